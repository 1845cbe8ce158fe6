"""Greedy decoding of a checkpoint by hand, for comparison with what another program decoded."""

from __future__ import annotations

from pathlib import Path

import torch
from lowbit.kernels.interface import KernelBackend
from lowbit.server.model.loader import load_decoder
from stepping import BLOCK_SIZE, Prompt, caches_for, run_step
from torch import Tensor


def decode(
    checkpoint: Path, backend: KernelBackend, prompt: Tensor, num_tokens: int
) -> tuple[Tensor, list[int]]:
    """(logits of the prompt [T, V], the tokens that follow it). prompt [T] int64."""
    decoder = load_decoder(checkpoint, backend)
    num_blocks = -(-(len(prompt) + num_tokens) // BLOCK_SIZE)
    caches = caches_for(decoder, num_blocks)
    sequence = Prompt(prompt.tolist(), list(range(num_blocks)))
    step = len(prompt)
    for _ in range(num_tokens):
        run_step(decoder, caches, [(sequence, step)])
        sequence.token_ids.append(int(sequence.logits[-1].argmax()))
        step = 1
    return torch.stack(sequence.logits[: len(prompt)]), sequence.token_ids[len(prompt) :]
