"""Turns a SchedulerOutput into tensors, runs the decoder, samples. Owns the KV cache."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from ...kernels.interface import ForwardBatch
from ..model.decoder import Decoder
from . import constraints
from .sampler import Sampler, prompt_logprobs
from .scheduler import SchedulerOutput
from .sequence import Sequence, SequenceResult


class ModelRunner:
    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        self.kv_caches = model.backend.allocate_kv_cache(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim
        )
        self.sampler = Sampler()
        self._constraint_threads = constraints.ConstraintThreads()

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        """Compute the scheduled tokens; one result per sequence that yields."""
        self._prepare_blocks(output)
        sequences = output.sequences
        yielding = [sequence for sequence in sequences if sequence.yields_token]
        begun = self._constraint_threads.begin(yielding)
        device = self.model.backend.device
        ids = [token for sequence in sequences for token in sequence.scheduled_token_ids]
        positions = [p for sequence in sequences for p in _scheduled_positions(sequence)]
        logits = self.model.forward(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            self._forward_batch(sequences),
            self.kv_caches,
        )
        num_rows = sum(sequence.num_logit_rows for sequence in yielding)
        _record_prompt_logprobs(logits[num_rows:], sequences)
        allowed = constraints.wait(begun)
        masks = [each.masks for each in allowed]
        results = self.sampler.sample(logits[:num_rows], yielding, masks) if yielding else []
        return constraints.advance(yielding, results, allowed)

    def _prepare_blocks(self, output: SchedulerOutput) -> None:
        if output.blocks_to_clear:
            self.model.backend.clear_blocks(self.kv_caches, output.blocks_to_clear)
        if output.block_copies:
            self.model.backend.copy_blocks(self.kv_caches, output.block_copies)

    def _forward_batch(self, sequences: list[Sequence]) -> ForwardBatch:
        device = self.model.backend.device
        starts = [0, *accumulate(sequence.num_scheduled_tokens for sequence in sequences)]
        contexts = [s.num_cached_tokens + s.num_scheduled_tokens for s in sequences]
        widest = max(len(sequence.block_table) for sequence in sequences)
        # Padded with a block of the sequence's own: numbers that are not finite stay with it.
        tables = [
            s.block_table + s.block_table[-1:] * (widest - len(s.block_table)) for s in sequences
        ]
        slots = [slot for sequence in sequences for slot in self._slots(sequence)]
        ends = zip(sequences, starts[1:], strict=True)
        logit_rows = [row for s, end in ends for row in range(end - s.num_logit_rows, end)]
        logit_rows += [
            start + position - sequence.num_cached_tokens
            for sequence, start in zip(sequences, starts[:-1], strict=True)
            for position in sequence.prompt_logprob_positions
        ]
        return ForwardBatch(
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            logit_rows=torch.tensor(logit_rows, dtype=torch.int64, device=device),
            block_size=self.block_size,
        )

    def _slots(self, sequence: Sequence) -> list[int]:
        size = self.block_size
        table = sequence.block_table
        return [table[p // size] * size + p % size for p in _scheduled_positions(sequence)]


def _scheduled_positions(sequence: Sequence) -> range:
    first = sequence.num_cached_tokens
    return range(first, first + sequence.num_scheduled_tokens)


def _record_prompt_logprobs(logits: Tensor, sequences: list[Sequence]) -> None:
    """logits [R, V], one row for each of their `prompt_logprob_positions`."""
    start = 0
    for sequence in sequences:
        positions = sequence.prompt_logprob_positions
        if not positions:
            continue
        number = sequence.params.prompt_logprobs
        assert number is not None
        token_ids = sequence.token_ids[positions.start + 1 : positions.stop + 1]
        rows = logits[start : start + len(positions)]
        sequence.prompt_logprobs += prompt_logprobs(rows, token_ids, number)
        start += len(positions)
