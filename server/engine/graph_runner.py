"""Decode steps recorded once per batch bucket and replayed over buffers that stay where they are.

A replay launches a whole step at once, where Python would launch each of its kernels. Steps with
prompts, drafts or more sequences than the largest bucket do not go through here.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ...kernels.interface import ForwardBatch, KVCache
from ..model.decoder import Decoder
from .transfer import stage

logger = logging.getLogger(__name__)

_PADDING_CONTEXT = 1  # tokens that a padded row attends to


class Recorder(Protocol):
    """Where work is recorded. Tensors that it makes stay where they are between replays."""

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """(what runs it again, what it returned: the same memory after every run)."""

    def held_bytes(self) -> int:
        """Device memory that all recordings together hold."""

    def forget(self) -> None:
        """Give back what recordings that nobody refers to any more hold."""


class CudaRecorder:
    """CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._reserved_before = torch.cuda.memory_reserved(device)

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        work()  # compiles, and allocates what libraries keep
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = work()
        return graph.replay, output

    def held_bytes(self) -> int:
        return torch.cuda.memory_reserved(self._device) - self._reserved_before

    def forget(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRow:
    """One sequence of a decode step."""

    token_id: int
    position: int
    block_table: list[int]


def batch_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes to record: dense where a step is cheap, so that few rows are padding."""
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_num_seqs, 32))
    return sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    """Runs decode steps of up to `max_num_seqs` sequences and contexts of `max_blocks` blocks.

    Rows that only fill a bucket up write to `spare_block`, which belongs to no sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        caches: list[KVCache],
        recorder: Recorder,
        *,
        block_size: int,
        max_num_seqs: int,
        max_blocks: int,
        spare_block: int,
    ) -> None:
        self._decoder = decoder
        self.caches = caches
        self._recorder = recorder
        self._block_size = block_size
        self._spare_block = spare_block
        self._recorded: dict[int, tuple[Callable[[], None], Tensor]] = {}
        device = decoder.backend.device
        self._input_ids = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._input_ids)
        self._slots = torch.full_like(self._input_ids, spare_block * block_size)
        self._context_lens = torch.full(
            (max_num_seqs,), _PADDING_CONTEXT, dtype=torch.int32, device=device
        )
        self._block_tables = torch.full(
            (max_num_seqs, max_blocks), spare_block, dtype=torch.int32, device=device
        )
        self._starts = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_num_seqs, device=device)
        # One for all: each recording's own would take 1.2 GB at 256 sequences and 128,256 tokens.
        self._logits = torch.empty(max_num_seqs, decoder.config.vocab_size, device=device)

    @property
    def buckets(self) -> list[int]:
        """Those that were recorded, smallest first."""
        return sorted(self._recorded)

    @torch.inference_mode()
    def record(self, buckets: Iterable[int], max_bytes: int) -> None:
        """Record each bucket; those that would hold more than `max_bytes` together run as steps
        without a graph do."""
        # The largest first: the others then find room in the memory that it holds.
        largest_first = sorted(buckets, reverse=True)
        for bucket in tqdm(largest_first, desc="CUDA graphs", unit="graph", disable=None):
            reason = self._try_to_record(bucket, max_bytes)
            if reason:
                self._recorded.pop(bucket, None)
                self._recorder.forget()
                logger.warning("no CUDA graph for %d sequences: %s", bucket, reason)

    def _try_to_record(self, bucket: int, max_bytes: int) -> str:
        """Why it cannot be, else nothing."""
        try:
            self._recorded[bucket] = self._recorder.record(partial(self._forward, bucket))
        except RuntimeError as error:  # out of memory, or an operation that no graph can hold
            return str(error)
        if self._recorder.held_bytes() > max_bytes:
            return f"cuda_graph_memory_bytes is {max_bytes}"
        return ""

    def bucket_of(self, num_seqs: int) -> int | None:
        """The smallest recorded one that holds as many sequences."""
        return min((each for each in self._recorded if each >= num_seqs), default=None)

    @torch.inference_mode()
    def run(self, rows: SequenceOf[DecodeRow], token_ids: Tensor | None = None) -> Tensor | None:
        """Logits [B, V] float32 of a decode step, valid until the next run; None without a bucket
        that holds the rows.

        `token_ids` [B] int64 on the device stand for those of the rows.
        """
        bucket = self.bucket_of(len(rows))
        if bucket is None:
            return None
        self._fill(rows, bucket)
        if token_ids is not None:
            self._input_ids[: len(rows)].copy_(token_ids)
        replay, logits = self._recorded[bucket]
        replay()
        return logits[: len(rows)]

    def _forward(self, bucket: int) -> Tensor:
        batch = ForwardBatch(
            query_start=self._starts[: bucket + 1],
            context_lens=self._context_lens[:bucket],
            block_tables=self._block_tables[:bucket],
            slot_mapping=self._slots[:bucket],
            block_size=self._block_size,
        )
        logits = self._decoder.forward(
            self._input_ids[:bucket],
            self._positions[:bucket],
            batch,
            self.caches,
            self._rows[:bucket],
        )
        return self._logits[:bucket].copy_(logits)

    def _fill(self, rows: SequenceOf[DecodeRow], bucket: int) -> None:
        """Each buffer by one copy."""
        size, padding = self._block_size, bucket - len(rows)
        slots = [r.block_table[r.position // size] * size + r.position % size for r in rows]
        for buffer, values, filler in (
            (self._input_ids, [row.token_id for row in rows], 0),
            (self._positions, [row.position for row in rows], 0),
            (self._slots, slots, self._spare_block * size),
            (self._context_lens, [row.position + 1 for row in rows], _PADDING_CONTEXT),
        ):
            self._copy(values + [filler] * padding, buffer[:bucket])
        width = max(len(row.block_table) for row in rows)
        # Padded with a block of the sequence's own: numbers that are not finite stay with it.
        tables = array("i")
        for row in rows:
            tables.extend(row.block_table)
            tables.extend(row.block_table[-1:] * (width - len(row.block_table)))
        tables.extend([self._spare_block] * (width * padding))
        host = torch.frombuffer(tables, dtype=torch.int32).view(bucket, width)
        self._copy(host, self._block_tables[:bucket, :width])

    def _copy(self, values: Any, target: Tensor) -> None:
        target.copy_(stage(values, target.dtype, target.device), non_blocking=True)
