"""Which tokens run in the next step, and what becomes of the sequences after it. No torch.

One token budget per step: sequences that decode come first, the rest goes to prompts in order of
arrival, in chunks where a prompt does not fit. When blocks run out the newest running sequence
gives its blocks up and waits at the head of the queue; what it had computed is computed again.
The oldest running sequence can take the blocks of all others, and the engine admits only what fits
the cache alone, so every step makes progress.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

from ..types import FinishReason, QueueFull, TokenOutput
from .block_manager import BlockManager
from .sequence import SampledToken, Sequence, SequenceResult, SequenceStatus


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The sequences of one step; each has `num_scheduled_tokens` set.

    Before the forward pass, in this order: `blocks_to_clear` are zeroed, then each pair of
    `block_copies` is copied, source to target.
    """

    sequences: list[Sequence]
    num_preemptions: int
    blocks_to_clear: list[int] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    ended: list[TokenOutput] = field(default_factory=list)  # ended while they waited or ran

    @property
    def num_tokens(self) -> int:
        return sum(sequence.num_scheduled_tokens for sequence in self.sequences)


class Drafter(Protocol):
    """Guesses what a sequence will say next, to be verified in one step."""

    def propose(self, sequence: Sequence, num_running: int, max_draft_tokens: int) -> list[int]:
        """At most `max_draft_tokens` tokens to follow the last known one; none is always right."""

    def observe(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """How a proposal fared."""


class Scheduler:
    def __init__(
        self,
        block_manager: BlockManager,
        drafter: Drafter | None = None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queued_requests: int,
    ) -> None:
        self.block_manager = block_manager
        self.drafter = drafter
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_queued_requests = max_queued_requests
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission, oldest first
        self._sequences: dict[str, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. Raises QueueFull; a preempted one goes back without this check."""
        assert sequence.request_id not in self._sequences
        if len(self._waiting) >= self.max_queued_requests:
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting; "
                f"max_queued_requests is {self.max_queued_requests}"
            )
        self._sequences[sequence.request_id] = sequence
        self._waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        scheduled: list[Sequence] = []
        num_preemptions = self._schedule_decodes(scheduled)
        budget = self.max_num_batched_tokens - len(scheduled)
        budget -= self._add_drafts(budget, scheduled)
        for sequence in self._running:
            # All blocks of an admitted prompt are its own already, so this needs no room.
            if budget > 0 and sequence.num_scheduled_tokens == 0:
                budget -= _schedule_chunk(sequence, budget, scheduled)
        if num_preemptions == 0:
            self._admit(budget, scheduled)
        return SchedulerOutput(scheduled, num_preemptions)

    def update(
        self, output: SchedulerOutput, results: SequenceOf[SequenceResult]
    ) -> list[TokenOutput]:
        """Record what the step computed. `results` has one entry per sequence that yields."""
        remaining = iter(results)
        news: list[TokenOutput] = []
        for sequence in output.sequences:
            result = next(remaining) if sequence.yields_token else None
            drafts = sequence.draft_token_ids
            sequence.num_cached_tokens += sequence.num_scheduled_tokens - len(drafts)
            sequence.num_scheduled_tokens = 0
            sequence.draft_token_ids = []
            if result is not None:
                self._take(sequence, drafts, result, news)
        return news

    def finish(self, request_id: str) -> None:
        """The one transition out of the engine: blocks are freed, the sequence is forgotten.

        Raises KeyError for a request that is unknown or already finished.
        """
        sequence = self._sequences.pop(request_id)
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.block_manager.release(sequence)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def check_integrity(self) -> None:
        """Raises AssertionError when a block or a sequence is lost or counted twice."""
        self.block_manager.check_integrity(self._sequences.values())
        assert len(self._waiting) + len(self._running) == len(self._sequences)
        assert all(not sequence.block_table for sequence in self._waiting)

    def _schedule_decodes(self, scheduled: list[Sequence]) -> int:
        """One token for each sequence that lacks just one; returns the number of preemptions."""
        num_preemptions = 0
        for sequence in [s for s in self._running if s.num_uncached_tokens == 1]:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # gave way to an older one just now
            num_preemptions += self._make_room(sequence)
            if sequence.status is SequenceStatus.RUNNING:
                self.block_manager.grow(sequence, sequence.num_tokens)
                _schedule_chunk(sequence, 1, scheduled)
        return num_preemptions

    def _make_room(self, sequence: Sequence) -> int:
        """Preempt newer sequences until all tokens fit; at last the sequence itself."""
        num_preemptions = 0
        while not self.block_manager.can_grow(sequence, sequence.num_tokens):
            newest = self._running[-1]
            self._preempt(newest)
            num_preemptions += 1
            if newest is sequence:
                break
        return num_preemptions

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.block_manager.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_cached_tokens = 0
        sequence.num_preemptions += 1
        self._waiting.appendleft(sequence)

    def _admit(self, budget: int, scheduled: list[Sequence]) -> None:
        while self._waiting and budget > 0 and len(self._running) < self.max_num_seqs:
            sequence = self._waiting[0]
            # Room for all known tokens, not just this chunk: an admitted prompt is never stuck
            # half way because of the prompts admitted after it.
            if not self.block_manager.can_grow(sequence, sequence.num_tokens):
                break
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
            self.block_manager.grow(sequence, sequence.num_tokens)
            budget -= _schedule_chunk(sequence, budget, scheduled)

    def _add_drafts(self, budget: int, scheduled: list[Sequence]) -> int:
        """Draft tokens for the sequences that decode, where budget and blocks are left over."""
        if self.drafter is None:
            return 0
        used = 0
        for sequence in scheduled:
            room = min(
                budget - used,
                sequence.max_tokens - sequence.num_completion_tokens - 1,
                self.block_manager.growable_tokens(sequence) - sequence.num_tokens,
            )
            drafts = self.drafter.propose(sequence, len(self._running), room) if room > 0 else []
            assert len(drafts) <= max(0, room)
            sequence.draft_token_ids = drafts
            sequence.num_scheduled_tokens += len(drafts)
            self.block_manager.grow(sequence, sequence.num_tokens + len(drafts))
            used += len(drafts)
        return used

    def _take(
        self,
        sequence: Sequence,
        drafts: list[int],
        result: SequenceResult,
        news: list[TokenOutput],
    ) -> None:
        """Append the tokens until one ends the sequence; slots of rejected drafts are given up."""
        if result.error:
            news.append(self._fail(sequence, result.error))
            return
        num_accepted = len(result.tokens) - 1
        assert [token.token_id for token in result.tokens[:-1]] == drafts[:num_accepted]
        if drafts:
            assert self.drafter is not None
            self.drafter.observe(sequence, len(drafts), num_accepted)
        sequence.num_cached_tokens += num_accepted
        for token in result.tokens:
            news.append(self._append(sequence, token))
            if sequence.status is SequenceStatus.FINISHED:
                return
        if drafts:
            self.block_manager.trim(sequence)

    def _fail(self, sequence: Sequence, error: str) -> TokenOutput:
        self.finish(sequence.request_id)
        return TokenOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            token_id=None,
            finish_reason=FinishReason.ERROR,
            error=error,
        )

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenOutput:
        sequence.token_ids.append(token.token_id)
        reason = None
        if token.token_id in sequence.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.num_completion_tokens >= sequence.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.finish(sequence.request_id)
        return TokenOutput(
            request_id=sequence.request_id,
            token_id=token.token_id,
            logprob=token.logprob,
            top_logprobs=token.top_logprobs,
            prompt_logprobs=(
                tuple(sequence.prompt_logprobs) if sequence.num_completion_tokens == 1 else ()
            ),
            finish_reason=reason,
        )


def _schedule_chunk(sequence: Sequence, budget: int, scheduled: list[Sequence]) -> int:
    sequence.num_scheduled_tokens = min(sequence.num_uncached_tokens, budget)
    scheduled.append(sequence)
    return sequence.num_scheduled_tokens
