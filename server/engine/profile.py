"""Steps that are run before there are requests: to see what memory they take, and to compile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Protocol

import torch
from tqdm import tqdm

from ..config import EngineConfig
from ..model.decoder import Decoder
from ..types import SamplingParams
from .model_runner import ModelRunner
from .scheduler import SchedulerOutput
from .sequence import Sequence

# Of what a request may ask, what takes the most memory.
_ROWS = (*range(1, 18), *range(32, 512, 16), *range(33, 512, 16))
_PARAMS = SamplingParams(
    top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1, top_logprobs=20
)


class PeakMeter(Protocol):
    """Memory that is allocated at most between two calls."""

    def start(self) -> None: ...

    def peak_bytes(self) -> int:
        """Beyond what was allocated at the start."""


class CudaPeakMeter:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._before


def largest_step_bytes(
    decoder: Decoder, config: EngineConfig, max_model_len: int, meter: PeakMeter
) -> int:
    """Run a step of max_num_batched_tokens prompt tokens of max_num_seqs sequences, all of which
    end in it, over a cache of one block; the memory that it takes for a moment."""
    runner = ModelRunner(decoder, 1, config.block_size)
    output = SchedulerOutput(_largest_step(config, max_model_len), 0)
    runner.launch(output).wait()  # compiles; what libraries keep from now on is no longer free
    meter.start()
    runner.launch(output).wait()
    peak = meter.peak_bytes()
    del runner
    gc.collect()
    if decoder.backend.device.type == "cuda":
        torch.cuda.empty_cache()
    return peak


def warm_up(runner: ModelRunner, config: EngineConfig, max_model_len: int) -> None:
    """Run steps of every kind that serving knows, so that nothing is compiled for a request.

    Kernels are compiled for ranges of numbers of tokens, and once more each for a number of tokens,
    sequences or blocks that is 1, a multiple of 16, or neither.
    """
    steps = list(_kinds_of_steps(config, max_model_len))
    for lengths, num_blocks in tqdm(steps, desc="warming up", unit="step", disable=None):
        table = [runner.spare_block] * num_blocks
        sequences = [_sequence(i, n, table) for i, n in enumerate(lengths)]
        runner.launch(SchedulerOutput(sequences, 0)).wait()


def _kinds_of_steps(config: EngineConfig, max_model_len: int) -> Iterator[tuple[list[int], int]]:
    """(prompt tokens of each sequence, blocks of each)."""
    most = min(config.max_num_batched_tokens, max_model_len)
    max_blocks = -(-max_model_len // config.block_size)
    for n in sorted({n for n in _ROWS if n < most} | {most}):
        yield [n], -(-n // config.block_size)
    for num_seqs in (1, 2, 16):
        for num_blocks in {1, 2, 16, 32, 33, 64, 1024, max_blocks}:
            if num_seqs > config.max_num_seqs or num_blocks > max_blocks:
                continue
            yield [1] * num_seqs, num_blocks  # they only decode
            if 2 * num_seqs <= most:
                yield [2] * num_seqs, num_blocks


def _largest_step(config: EngineConfig, max_model_len: int) -> list[Sequence]:
    each, left = divmod(config.max_num_batched_tokens, config.max_num_seqs)
    lengths = [each + (i < left) for i in range(config.max_num_seqs)]
    # Tables of full width: what attention takes for a moment may depend on it.
    table = [0] * -(-max_model_len // config.block_size)
    return [_sequence(i, min(length, max_model_len - 1), table) for i, length in enumerate(lengths)]


def _sequence(index: int, num_tokens: int, block_table: list[int]) -> Sequence:
    return Sequence(
        request_id=f"profile-{index}",
        token_ids=[0] * num_tokens,
        num_prompt_tokens=0,  # penalties count the completion
        max_tokens=num_tokens + 1,
        params=_PARAMS,
        stop_token_ids=frozenset(),
        seed=index,
        block_table=list(block_table),
        num_scheduled_tokens=num_tokens,
    )
