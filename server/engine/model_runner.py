"""Turns a SchedulerOutput into tensors, runs the decoder, samples. Owns the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ...kernels.interface import ForwardBatch
from ..model.decoder import Decoder, StepContext
from . import constraints
from .sampler import Sampler, prompt_logprobs
from .scheduler import SchedulerOutput
from .sequence import PartialChunk, Sequence, SequenceResult


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
        self.kv_caches = model.backend.allocate_kv_cache(
            config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim
        )
        self.sampler = Sampler()
        self._constraint_threads = constraints.ConstraintThreads()

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        """Compute the scheduled tokens; one result per sequence that yields."""
        self._prepare_blocks(output)
        yielding = [sequence for sequence in output.sequences if sequence.yields_token]
        begun = self._constraint_threads.begin(yielding)
        logits = self._forward(output.sequences)
        allowed = constraints.wait(begun)
        masks = [each.masks for each in allowed]
        results = self.sampler.sample(_joined(logits), yielding, masks) if yielding else []
        return constraints.advance(yielding, results, allowed)

    def _forward(self, sequences: list[Sequence]) -> list[Tensor]:
        """Logits of the sequences' logit rows in parts [r, V]; the prompts' logprobs are kept."""
        whole = [sequence for sequence in sequences if sequence.partial is None]
        parts = []
        if whole:
            inputs = self._inputs(whole)
            logits = self.model.forward(
                *inputs, self._batch(whole), self.kv_caches, self._rows(whole)
            )
            parts.append(_without_prompt_rows(logits, whole))
        for sequence in sequences[len(whole) :]:
            assert sequence.partial is not None
            x = self._advance(sequence, sequence.partial)
            if sequence.completes_chunk:
                logits = self.model.logits(x, self._rows([sequence]))
                parts.append(_without_prompt_rows(logits, [sequence]))
        return parts

    def _advance(self, sequence: Sequence, partial: PartialChunk) -> Tensor:
        """A partial chunk through the layers of this step: hidden states [T, C]."""
        state = partial.hidden
        if state is None:
            ids, positions = self._inputs([sequence])
            context = self.model.context(positions, self._batch([sequence]), self.kv_caches)
            state = HiddenStates(self.model.embed(ids, positions), context)
        assert isinstance(state, HiddenStates)
        layers = partial.layers
        x = self.model.run_layers(state.x, state.context, layers.start, layers.stop)
        partial.hidden = HiddenStates(x, state.context)
        return x

    def _inputs(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
        """Token ids and positions, both [T]."""
        device = self.model.backend.device
        ids = [token for sequence in sequences for token in sequence.scheduled_token_ids]
        positions = [p for sequence in sequences for p in _scheduled_positions(sequence)]
        return torch.tensor(ids, device=device), torch.tensor(positions, device=device)

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
        return torch.tensor(rows, dtype=torch.int64, device=self.model.backend.device)

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
            query_start=torch.tensor(starts, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            block_size=self.block_size,
        )

    def _slots(self, sequence: Sequence) -> list[int]:
        size = self.block_size
        table = sequence.block_table
        return [table[p // size] * size + p % size for p in _scheduled_positions(sequence)]


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
