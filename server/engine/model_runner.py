"""Turns a SchedulerOutput into tensors, runs the decoder, samples. Owns the KV cache.

A step is launched, and waited for when its tokens are wanted on the host; the next one may be
launched between the two and takes the tokens where they are.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ...kernels.interface import ForwardBatch
from ..model.decoder import Decoder, StepContext
from . import constraints
from .graph_runner import DecodeGraphs, DecodeRow, Recorder, batch_buckets
from .sampler import Draws, Sampler, prompt_logprobs
from .scheduler import SchedulerOutput
from .sequence import PartialChunk, Sequence, SequenceResult
from .transfer import upload

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward pass gives the sequences that yield."""

    yielding: list[Sequence]
    draws: Draws
    allowed: list[constraints.Allowed]

    def wait(self) -> dict[Sequence, SequenceResult]:
        results = constraints.advance(self.yielding, self.draws.wait(), self.allowed)
        return dict(zip(self.yielding, results, strict=True))


class LaunchedStep:
    """A step whose work the device has, or has done."""

    def __init__(self, yielding: list[Sequence], passes: list[Pass]) -> None:
        self._yielding = yielding
        self._passes = passes

    def wait(self) -> list[SequenceResult]:
        """One result per sequence that yields and has no `error`."""
        results: dict[Sequence, SequenceResult] = {}
        for each in self._passes:
            results |= each.wait()
        return [results[sequence] for sequence in self._yielding if not sequence.error]

    def tokens_of(self, sequences: list[Sequence]) -> Tensor:
        """[B] int64 on the device: what was drawn for each, in a step without draft tokens."""
        order = [sequence for each in self._passes for sequence in each.yielding]
        tokens = _joined([each.draws.tokens for each in self._passes])
        assert len(tokens) == len(order)
        if sequences == order:
            return tokens
        places = {sequence: place for place, sequence in enumerate(order)}
        rows = [places[sequence] for sequence in sequences]
        return tokens[upload(rows, torch.int64, tokens.device)]


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Some tokens on their way through the layers."""

    x: Tensor  # [T, C]
    context: StepContext


@dataclass(frozen=True, slots=True)
class _Work:
    """A step as far as it has been launched."""

    begun: dict[Sequence, Future[constraints.Allowed] | None]
    previous: LaunchedStep | None  # which draws the tokens that are pending
    passes: list[Pass] = field(default_factory=list)


class ModelRunner:
    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        config = model.config
        self.model = model
        self.block_size = block_size
        self.spare_block = num_blocks  # of no sequence
        self.kv_caches = model.backend.allocate_kv_cache(
            config.num_layers, num_blocks + 1, block_size, config.num_kv_heads, config.head_dim
        )
        self.sampler = Sampler(looks=model.backend.device.type == "cpu")
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
    def launch(self, output: SchedulerOutput, previous: LaunchedStep | None = None) -> LaunchedStep:
        """Have the scheduled tokens computed; those that are pending are what `previous` draws.

        What the device's memory does not hold in one pass is computed in smaller ones. A sequence
        that even alone does not fit has its `error` set.
        """
        self._prepare_blocks(output)
        yielding = [sequence for sequence in output.sequences if sequence.yields_token]
        begun = dict(zip(yielding, self._constraint_threads.begin(yielding), strict=True))
        work = _Work(begun, previous)
        self._run(output.sequences, work)
        return LaunchedStep(yielding, work.passes)

    def _run(self, sequences: list[Sequence], work: _Work) -> None:
        try:
            self._pass(sequences, work)
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
            self._run(sequences[:middle], work)
            self._run(sequences[middle:], work)
        elif num_tokens > 1 and first.partial is None and not first.draft_token_ids:
            self._run_window(first, 0, num_tokens // 2, work)
            if not first.error:
                self._run_window(first, num_tokens // 2, num_tokens, work)
        else:
            first.error = (
                f"out of memory: the device has no room for {num_tokens} tokens of this sequence "
                f"after {first.num_cached_tokens}"
            )

    def _run_window(self, sequence: Sequence, start: int, end: int, work: _Work) -> None:
        """Some of its scheduled tokens, as if no more were scheduled."""
        before = sequence.num_cached_tokens, sequence.num_scheduled_tokens
        sequence.num_cached_tokens += start
        sequence.num_scheduled_tokens = end - start
        try:
            self._run([sequence], work)
        finally:
            sequence.num_cached_tokens, sequence.num_scheduled_tokens = before

    def _pass(self, sequences: list[Sequence], work: _Work) -> None:
        yielding = [sequence for sequence in sequences if sequence.yields_token]
        advanced: dict[PartialChunk, HiddenStates] = {}
        pending = work.previous.tokens_of(sequences) if work.previous else None
        logits = self._forward(sequences, pending, advanced)
        if yielding:
            allowed = constraints.wait([work.begun[sequence] for sequence in yielding])
            masks = [each.masks for each in allowed]
            draws = self.sampler.draw(_joined(logits), yielding, masks, pending)
            work.passes.append(Pass(yielding, draws, allowed))
        # Only now: a pass that fails may be repeated.
        for partial, state in advanced.items():
            partial.hidden = state

    def _forward(
        self,
        sequences: list[Sequence],
        pending: Tensor | None,
        advanced: dict[PartialChunk, HiddenStates],
    ) -> list[Tensor]:
        """Logits of the sequences' logit rows in parts [r, V]; the prompts' logprobs are kept.

        `pending` holds the sequences' tokens where the host does not know them yet. Notes how far
        it came with partial chunks in `advanced`.
        """
        whole = [sequence for sequence in sequences if sequence.partial is None]
        parts = []
        if whole:
            logits = self._replay(whole, pending)
            if logits is None:
                inputs = self._inputs(whole, pending)
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

    def _replay(self, sequences: list[Sequence], pending: Tensor | None) -> Tensor | None:
        """Logits [B, V] of a step that only decodes; None where it has no graph."""
        if self.graphs is None or not all(map(_only_decodes, sequences)):
            return None
        rows = [
            DecodeRow(
                token_id=sequence.token_ids[-1],  # unless another is pending
                position=sequence.num_cached_tokens,
                block_table=sequence.block_table,
            )
            for sequence in sequences
        ]
        return self.graphs.run(rows, pending)

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

    def _inputs(
        self, sequences: list[Sequence], pending: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and positions, both [T]."""
        device = self.model.backend.device
        positions = [p for sequence in sequences for p in _scheduled_positions(sequence)]
        ids = pending
        if ids is None:
            known = [token for sequence in sequences for token in sequence.scheduled_token_ids]
            ids = upload(known, torch.int64, device)
        return ids, upload(positions, torch.int64, device)

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
        backend = self.model.backend
        if output.block_copies:
            pairs = upload(output.block_copies, torch.int64, backend.device)
            backend.copy_blocks(self.kv_caches, pairs)
        if output.blocks_to_clear:
            blocks = upload(output.blocks_to_clear, torch.int64, backend.device)
            backend.clear_blocks(self.kv_caches, blocks)

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
