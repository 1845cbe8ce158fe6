"""Drives a decoder by hand: prompts in chunks of any size, all logits kept."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lowbit.kernels.interface import ForwardBatch, KVCache
from lowbit.server.model.decoder import Decoder

BLOCK_SIZE = 16


class Prompt:
    """A sequence fed to the decoder in chunks, with blocks of its own."""

    def __init__(self, token_ids: list[int], blocks: list[int]) -> None:
        self.token_ids = token_ids
        self.blocks = blocks
        self.cached = 0
        self.logits: list[torch.Tensor] = []


def run_step(decoder: Decoder, caches: list[KVCache], work: Iterable[tuple[Prompt, int]]) -> None:
    """One forward pass over `num_tokens` further tokens of each prompt, all logits kept."""
    ids, positions, slots, starts, contexts, tables = [], [], [], [0], [], []
    work = list(work)
    for prompt, num_tokens in work:
        span = range(prompt.cached, prompt.cached + num_tokens)
        ids += [prompt.token_ids[p] for p in span]
        positions += span
        slots += [prompt.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in span]
        starts.append(starts[-1] + num_tokens)
        contexts.append(span.stop)
        tables.append(prompt.blocks)
        prompt.cached = span.stop
    widest = max(map(len, tables))
    with torch.inference_mode(), decoder.backend.device:
        batch = ForwardBatch(
            query_start=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=torch.tensor([t + [0] * (widest - len(t)) for t in tables]).int(),
            slot_mapping=torch.tensor(slots),
            block_size=BLOCK_SIZE,
        )
        rows = torch.arange(starts[-1])
        inputs = torch.tensor(ids), torch.tensor(positions)
        logits = decoder.forward(*inputs, batch, caches, rows).cpu()
    for i, (prompt, _) in enumerate(work):
        prompt.logits += logits[starts[i] : starts[i + 1]]


def caches_for(decoder: Decoder, num_blocks: int) -> list[KVCache]:
    c = decoder.config
    backend = decoder.backend
    return backend.allocate_kv_cache(
        c.num_layers, num_blocks, BLOCK_SIZE, c.num_kv_heads, c.head_dim
    )
