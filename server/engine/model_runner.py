"""Turns a SchedulerOutput into tensors, runs the decoder, samples. Owns the KV cache."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...kernels.interface import ForwardBatch
from ..model.decoder import Decoder, StepContext
from . import constraints
from .graph_runner import DecodeGraphs, DecodeRow, Recorder, batch_buckets
from .sampler import Sampler, prompt_logprobs
from .scheduler import SchedulerOutput
from .sequence import PartialChunk, Sequence, SequenceResult
from .upload import upload

logger = logging.getLogger(__name__)

Begun = dict[Sequence, Future[constraints.Allowed] | None]


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Some tokens on their way through the layers."""

    x: Tensor  # [T, C]
    context: StepContext


class ModelRunner:
    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        self.spare_block = num_blocks  # of no sequence
        self.kv_caches = model.backend.allocate_kv_cache(
            config.num_layers, num_blocks + 1, block_size, config.num_kv_heads, config.head_dim
        )
        self.sampler = Sampler()
        self.graphs: DecodeGraphs | None = None
        self._constraint_threads = constraints.ConstraintThreads()

    def record_graphs(
        self, recorder: Recorder, *, max_num_seqs: int, max_model_len: int, max_bytes: int
    ) -> None:
        """From now on, replay decode steps instead of launching their kernels one by one."""
        self.graphs = DecodeGraphs(
            self.model,
            self.kv_caches,
            recorder,
            block_size=self.block_size,
            max_num_seqs=max_num_seqs,
            max_blocks=-(-max_model_len // self.block_size),
            spare_block=self.spare_block,
        )
        self.graphs.record(batch_buckets(max_num_seqs), max_bytes)

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        """Compute the scheduled tokens; one result per sequence that yields and has no `error`.

        What the device's memory does not hold in one pass is computed in smaller ones. A sequence
        that even alone does not fit has its `error` set.
        """
        self._prepare_blocks(output)
        yielding = [sequence for sequence in output.sequences if sequence.yields_token]
        begun = dict(zip(yielding, self._constraint_threads.begin(yielding), strict=True))
        results: dict[Sequence, SequenceResult] = {}
        self._run(output.sequences, begun, results)
        return [results[sequence] for sequence in yielding if not sequence.error]

    def _run(
        self, sequences: list[Sequence], begun: Begun, results: dict[Sequence, SequenceResult]
    ) -> None:
        try:
            results.update(self._pass(sequences, begun))
            return
        except torch.OutOfMemoryError as error:
            num_tokens = sum(sequence.num_scheduled_tokens for sequence in sequences)
            logger.warning("out of memory in a pass of %d tokens: %s", num_tokens, error)
        # Only here: in the handler, the error's traceback would keep the tensors of the pass.
        if self.model.backend.device.type == "cuda":
            torch.cuda.empty_cache()
        first, *others = sequences
        if others:
            middle = len(sequences) // 2
            self._run(sequences[:middle], begun, results)
            self._run(sequences[middle:], begun, results)
        elif num_tokens > 1 and first.partial is None and not first.draft_token_ids:
            self._run_window(first, 0, num_tokens // 2, begun, results)
            if not first.error:
                self._run_window(first, num_tokens // 2, num_tokens, begun, results)
        else:
            first.error = (
                f"out of memory: the device has no room for {num_tokens} tokens of this sequence "
                f"after {first.num_cached_tokens}"
            )

    def _run_window(
        self,
        sequence: Sequence,
        start: int,
        end: int,
        begun: Begun,
        results: dict[Sequence, SequenceResult],
    ) -> None:
        """Some of its scheduled tokens, as if no more were scheduled."""
        before = sequence.num_cached_tokens, sequence.num_scheduled_tokens
        sequence.num_cached_tokens += start
        sequence.num_scheduled_tokens = end - start
        try:
            self._run([sequence], begun, results)
        finally:
            sequence.num_cached_tokens, sequence.num_scheduled_tokens = before

    def _pass(self, sequences: list[Sequence], begun: Begun) -> dict[Sequence, SequenceResult]:
        yielding = [sequence for sequence in sequences if sequence.yields_token]
        advanced: dict[PartialChunk, HiddenStates] = {}
        logits = self._forward(sequences, advanced)
        allowed = constraints.wait([begun[sequence] for sequence in yielding])
        masks = [each.masks for each in allowed]
        results = self.sampler.sample(_joined(logits), yielding, masks) if yielding else []
        # Only now: a pass that fails may be repeated.
        for partial, state in advanced.items():
            partial.hidden = state
        return dict(zip(yielding, constraints.advance(yielding, results, allowed), strict=True))

    def _forward(
        self, sequences: list[Sequence], advanced: dict[PartialChunk, HiddenStates]
    ) -> list[Tensor]:
        """Logits of the sequences' logit rows in parts [r, V]; the prompts' logprobs are kept.

        Notes how far it came with partial chunks in `advanced`.
        """
        whole = [sequence for sequence in sequences if sequence.partial is None]
        parts = []
        if whole:
            logits = self._replay(whole)
            if logits is None:
                inputs = self._inputs(whole)
                logits = self.model.forward(
                    *inputs, self._batch(whole), self.kv_caches, self._rows(whole)
                )
            parts.append(_without_prompt_rows(logits, whole))
        for sequence in sequences[len(whole) :]:
            assert sequence.partial is not None
            state = self._advance(sequence, sequence.partial)
            advanced[sequence.partial] = state
            if sequence.completes_chunk:
                logits = self.model.logits(state.x, self._rows([sequence]))
                parts.append(_without_prompt_rows(logits, [sequence]))
        return parts

    def _replay(self, sequences: list[Sequence]) -> Tensor | None:
        """Logits [B, V] of a step that only decodes; None where it has no graph."""
        if self.graphs is None or not all(map(_only_decodes, sequences)):
            return None
        rows = [
            DecodeRow(
                token_id=sequence.token_ids[-1],
                position=sequence.num_cached_tokens,
                block_table=sequence.block_table,
            )
            for sequence in sequences
        ]
        return self.graphs.run(rows)

    def _advance(self, sequence: Sequence, partial: PartialChunk) -> HiddenStates:
        """A partial chunk through the layers of this step."""
        state = partial.hidden
        if state is None:
            ids, positions = self._inputs([sequence])
            context = self.model.context(positions, self._batch([sequence]), self.kv_caches)
            state = HiddenStates(self.model.embed(ids, positions), context)
        assert isinstance(state, HiddenStates)
        layers = partial.layers
        x = self.model.run_layers(state.x, state.context, layers.start, layers.stop)
        return HiddenStates(x, state.context)

    def _inputs(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Token ids and positions, both [T]."""
        device = self.model.backend.device
        ids = [token for sequence in sequences for token in sequence.scheduled_token_ids]
        positions = [p for sequence in sequences for p in _scheduled_positions(sequence)]
        return upload(ids, torch.int64, device), upload(positions, torch.int64, device)

    def _rows(self, sequences: list[Sequence]) -> Tensor:
        """Whose logits are wanted, of the tokens laid end to end: first all that yield, then those
        of the prompts' logprobs."""
        starts = _starts(sequences)
        ends = zip(sequences, starts[1:], strict=True)
        rows = [row for s, end in ends for row in range(end - s.num_logit_rows, end)]
        rows += [
            start + position - sequence.num_cached_tokens
            for sequence, start in zip(sequences, starts[:-1], strict=True)
            for position in sequence.prompt_logprob_positions
        ]
        return upload(rows, torch.int64, self.model.backend.device)

    def _prepare_blocks(self, output: SchedulerOutput) -> None:
        if output.blocks_to_clear:
            self.model.backend.clear_blocks(self.kv_caches, output.blocks_to_clear)
        if output.block_copies:
            self.model.backend.copy_blocks(self.kv_caches, output.block_copies)

    def _batch(self, sequences: list[Sequence]) -> ForwardBatch:
        device = self.model.backend.device
        starts = _starts(sequences)
        contexts = [s.num_cached_tokens + s.num_scheduled_tokens for s in sequences]
        widest = max(len(sequence.block_table) for sequence in sequences)
        # Padded with a block of the sequence's own: numbers that are not finite stay with it.
        tables = [
            s.block_table + s.block_table[-1:] * (widest - len(s.block_table)) for s in sequences
        ]
        slots = [slot for sequence in sequences for slot in self._slots(sequence)]
        return ForwardBatch(
            query_start=upload(starts, torch.int32, device),
            context_lens=upload(contexts, torch.int32, device),
            block_tables=upload(tables, torch.int32, device),
            slot_mapping=upload(slots, torch.int64, device),
            block_size=self.block_size,
        )

    def _slots(self, sequence: Sequence) -> list[int]:
        size = self.block_size
        table = sequence.block_table
        return [table[p // size] * size + p % size for p in _scheduled_positions(sequence)]


def _only_decodes(sequence: Sequence) -> bool:
    return (
        sequence.num_scheduled_tokens == 1
        and sequence.num_logit_rows == 1
        and not sequence.prompt_logprob_positions
    )


def _starts(sequences: list[Sequence]) -> list[int]:
    return [0, *accumulate(sequence.num_scheduled_tokens for sequence in sequences)]


def _without_prompt_rows(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """The rows that yield; the others' logprobs are kept with their sequences."""
    num_rows = sum(sequence.num_logit_rows for sequence in sequences)
    _record_prompt_logprobs(logits[num_rows:], sequences)
    return logits[:num_rows]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


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
