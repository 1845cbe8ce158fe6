"""Which tokens run in the next step, and what becomes of the sequences after it. No torch.

One token budget per step: sequences that decode come first, the rest goes to prompts, in chunks
where a prompt does not fit. Beside sequences that decode the pacer may allow less than a small
chunk: such a chunk takes several steps, some of the model's layers in each. Who is admitted next is
up to the WaitingQueue.

All sequences have one order: by priority class, then by arrival. When blocks run out, the last
running sequence in that order gives its blocks up and waits; what it had computed is computed
again. So the first one is never preempted, and the engine accepts only what fits the cache alone:
every step brings the first running sequence nearer to its end. A sequence is admitted only with
some room to spare, so that it is not preempted again at once.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

from ..types import DeadlineExceeded, FinishReason, QueueFull, TokenOutput
from .block_manager import BlockManager, NoFreeBlocks
from .pacing import PrefillPacer
from .sequence import (
    Account,
    PartialChunk,
    SampledToken,
    Sequence,
    SequenceResult,
    SequenceStatus,
)
from .waiting_queue import WaitingQueue

PARTIAL_CHUNK_TOKENS = 32  # smaller chunks would read weights and cache for too few tokens
_RESERVED = 8  # one in so many places is for tenants below their fair share


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """The sequences of one step; each has `num_scheduled_tokens` set. Partial chunks come last.

    Before the forward pass, in this order: each pair of `block_copies` is copied, source to target,
    as if all at once, then `blocks_to_clear` are zeroed, among them what was a source.
    """

    sequences: list[Sequence]
    num_preemptions: int
    blocks_to_clear: list[int] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    num_decodes: int = 0  # the first so many of the sequences
    num_draft_tokens: int = 0
    num_prefill_tokens: float = 0.0  # a token counts for the share of the layers it goes through
    num_prefix_queried_tokens: int = 0  # of the sequences admitted
    num_prefix_hit_tokens: int = 0  # of them, found in the prefix cache
    start_seconds: float = 0.0

    @property
    def num_tokens(self) -> float:
        return self.num_decodes + self.num_draft_tokens + self.num_prefill_tokens

    def describe(self) -> str:
        """For a log: what a step that failed or hung was working on."""
        sequences = ", ".join(each.describe() for each in self.sequences)
        return f"{self.num_tokens:g} tokens of {len(self.sequences)} sequences: {sequences}"


class Drafter(Protocol):
    """Guesses what a sequence will say next, to be verified in one step."""

    def propose(self, sequence: Sequence, num_running: int, max_draft_tokens: int) -> list[int]:
        """At most `max_draft_tokens` tokens to follow the last known one; none is always right."""

    def has_hope(self, sequence: Sequence, num_running: int) -> bool:
        """Whether it may soon propose something, as far as the known tokens tell."""

    def observe(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """How a proposal fared."""


class Scheduler:
    def __init__(
        self,
        block_manager: BlockManager,
        drafter: Drafter | None = None,
        pacer: PrefillPacer | None = None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_queued_requests: int,
        max_queued_tokens: int,
        max_queue_seconds: float | None = None,
        num_layers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_layers` says into how many parts a chunk can be divided."""
        self.block_manager = block_manager
        self.drafter = drafter
        self.pacer = pacer
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_queued_requests = max_queued_requests
        self.max_queued_tokens = max_queued_tokens
        self.max_queue_seconds = max_queue_seconds
        self.num_layers = num_layers
        self._clock = clock
        self.waiting = WaitingQueue()
        # In order of admission; a sequence moves from the one to the other with its prompt's end.
        self._prefilling: dict[Sequence, None] = {}
        self._decoding: dict[Sequence, None] = {}
        self._held: dict[Sequence, None] = {}  # siblings whose prompt sample 0 is computing
        self._requests: dict[str, list[Sequence]] = {}  # those alive
        self._expiries: list[tuple[float, int, Sequence, FinishReason]] = []
        self._num_arrivals = 0
        self._last_update_seconds = 0.0
        self._tokens_per_second = 0.0
        self._most_tokens_per_second = 0.0  # of the steps that were full

    # The queue

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self._held)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence, its siblings with it. Raises QueueFull, or DeadlineExceeded for one
        that cannot have a token by its deadline.

        A preempted one goes back to the queue without this check.
        """
        assert sequence.request_id not in self._requests
        samples = [sequence, *sequence.siblings]
        now = self._clock()
        self._check_queue(sequence, len(samples))
        self._check_deadline(sequence)
        self._requests[sequence.request_id] = samples
        for sample in samples:
            self._num_arrivals += 1
            sample.arrival = self._num_arrivals
            sample.arrival_seconds = now
            self.waiting.open_account(sample)
        self.waiting.push(sequence)
        self._held.update(dict.fromkeys(sequence.siblings))
        if sequence.deadline_seconds is not None:
            self._expire_at(now + sequence.deadline_seconds, sequence, FinishReason.DEADLINE)
        if self.max_queue_seconds is not None:
            self._expire_at(now + self.max_queue_seconds, sequence, FinishReason.QUEUE_TIMEOUT)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or its sample `index`; what is unknown or finished is left alone."""
        for sequence in list(self._requests.get(request_id, ())):
            if index is None or sequence.index == index:
                self._leave(sequence)

    def expire(self) -> list[TokenOutput]:
        """End the requests whose time is over."""
        now = self._clock()
        ended: list[TokenOutput] = []
        while self._expiries and self._expiries[0][0] <= now:
            _, _, leader, reason = heapq.heappop(self._expiries)
            samples = (leader, *leader.siblings)
            if reason is FinishReason.QUEUE_TIMEOUT and any(s.was_admitted for s in samples):
                continue
            for sequence in _alive(leader):
                self._leave(sequence)
                ended.append(_ended(sequence, reason, self._why(leader, reason)))
        return ended

    # The step

    def schedule(self) -> SchedulerOutput:
        now = self._clock()
        scheduled: list[Sequence] = []
        num_preemptions = self._schedule_decodes(scheduled)
        num_decodes = len(scheduled)
        budget: float = self.max_num_batched_tokens - num_decodes
        num_draft_tokens = 0
        if self.drafter is not None:
            num_draft_tokens = self._add_drafts(self.drafter, scheduled, int(budget))
            budget -= num_draft_tokens
        smallest_chunk = 1
        if self.pacer is not None and num_decodes > 0 and (self._prefilling or self.waiting):
            budget = min(budget, self.pacer.max_prefill_tokens(num_decodes))
            smallest_chunk = min(PARTIAL_CHUNK_TOKENS, self.max_num_batched_tokens)
        admitted: list[Sequence] = []
        num_preemptions += self._schedule_prompts(
            budget, smallest_chunk, scheduled, admitted, may_admit=num_preemptions == 0
        )
        if num_preemptions > 0:
            scheduled = [each for each in scheduled if each.status is SequenceStatus.RUNNING]
            num_decodes = sum(each in self._decoding for each in scheduled)
            num_draft_tokens = sum(len(each.draft_token_ids) for each in scheduled)
        prompts = sorted(scheduled[num_decodes:], key=_is_partial)
        return SchedulerOutput(
            scheduled[:num_decodes] + prompts,
            num_preemptions,
            blocks_to_clear=self.block_manager.take_clears(),
            block_copies=self.block_manager.take_copies(),
            num_decodes=num_decodes,
            num_draft_tokens=num_draft_tokens,
            num_prefill_tokens=sum(each.num_scheduled_shares for each in prompts),
            num_prefix_queried_tokens=sum(each.num_tokens for each in admitted),
            num_prefix_hit_tokens=sum(each.num_cached_tokens for each in admitted),
            start_seconds=now,
        )

    def schedule_after(self, output: SchedulerOutput) -> SchedulerOutput | None:
        """The step after one that is on its way, whose tokens are not known yet: they are decoded.

        None where those tokens decide what comes next, or something else than decoding may. A
        sequence that the tokens turn out to have ended, or that leaves meanwhile, is withdrawn from
        the step: what it computes for that sequence is void.
        """
        if not self._only_decoding_follows(output):
            return None
        sequences = [each for each in output.sequences if _goes_on(each)]
        if not sequences or any(map(self._depends_on_tokens, sequences)):
            return None
        try:
            for sequence in sequences:
                self.block_manager.grow(sequence, sequence.num_tokens + 1)
        except NoFreeBlocks:
            return None
        for sequence in sequences:
            sequence.num_cached_tokens += 1
            sequence.num_pending_tokens = 1
            sequence.writes_ahead = True
        return SchedulerOutput(
            sequences,
            num_preemptions=0,
            blocks_to_clear=self.block_manager.take_clears(),
            block_copies=self.block_manager.take_copies(),
            num_decodes=len(sequences),
            start_seconds=self._clock(),
        )

    def update(
        self, output: SchedulerOutput, results: SequenceOf[SequenceResult]
    ) -> list[TokenOutput]:
        """Record what the step computed. `results` has one entry per sequence that yields and has
        no `error`."""
        now = self._clock()
        self._observe(output, now - max(output.start_seconds, self._last_update_seconds))
        self._last_update_seconds = now
        remaining = iter(results)
        news: list[TokenOutput] = []
        for sequence in output.sequences:
            if sequence.error:
                if sequence.status is SequenceStatus.RUNNING:
                    self._fail(sequence, sequence.error, news)
                continue
            if sequence.num_scheduled_tokens == 0:  # withdrawn
                next(remaining)
                continue
            if sequence.num_pending_tokens:
                self._take_pending(sequence, next(remaining), news)
                continue
            if not sequence.completes_chunk:
                sequence.num_scheduled_tokens = 0
                continue
            sequence.partial = None
            drafts = sequence.draft_token_ids
            if sequence.num_preemptions == 0 and sequence.num_completion_tokens == 0:
                # Nobody pays for what was computed again because of a preemption.
                sequence.account.service += sequence.num_scheduled_tokens / sequence.weight
            num_cached = sequence.num_cached_tokens + sequence.num_scheduled_tokens - len(drafts)
            sequence.num_cached_tokens = num_cached
            sequence.num_scheduled_tokens = 0
            if num_cached == len(sequence.token_ids):
                self._take(sequence, next(remaining), news)
        return news

    def is_void(self, output: SchedulerOutput) -> bool:
        """Whether no sequence waits for what the step computes."""
        return all(map(_was_withdrawn, output.sequences))

    def fail(self, output: SchedulerOutput, error: str) -> list[TokenOutput]:
        """The step raised: its sequences end, and their blocks hold nobody knows what."""
        news: list[TokenOutput] = []
        for sequence in output.sequences:
            if not _was_withdrawn(sequence):
                self._fail(sequence, error, news)
        self.block_manager.soil(output.blocks_to_clear)
        return news

    def check_integrity(self) -> None:
        """Raises AssertionError when a block or a sequence is lost or counted twice."""
        alive = [each for samples in self._requests.values() for each in samples]
        self.block_manager.check_integrity(alive)
        places = [*self.waiting, *self._held, *self._running()]
        assert sorted(map(id, places)) == sorted(map(id, alive)), "a sequence is lost"
        assert len(self.waiting) == len(list(self.waiting))
        assert self.waiting.num_tokens == sum(each.num_tokens for each in self.waiting)
        assert all(not each.block_table for each in (*self.waiting, *self._held))
        assert all(each.num_uncached_tokens == 1 for each in self._decoding)

    # Decodes

    def _schedule_decodes(self, scheduled: list[Sequence]) -> int:
        """One token for each sequence past its prompt; returns the number of preemptions."""
        num_preemptions = 0
        grow = self.block_manager.grow
        for sequence in list(self._decoding):
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # gave way to another one just now
            try:
                grow(sequence, len(sequence.token_ids))
            except NoFreeBlocks:
                num_preemptions += self._make_room(sequence)
                if sequence.status is not SequenceStatus.RUNNING:
                    continue
            sequence.num_scheduled_tokens = 1
            scheduled.append(sequence)
        if num_preemptions > 0:
            scheduled[:] = [each for each in scheduled if each.status is SequenceStatus.RUNNING]
        return num_preemptions

    def _make_room(self, sequence: Sequence) -> int:
        """Preempt the last running ones until all tokens fit; if need be the sequence itself."""
        num_preemptions = 0
        while True:
            last = max(self._running(), key=_order)
            self._preempt(last)
            num_preemptions += 1
            if last is sequence:
                return num_preemptions
            try:
                self.block_manager.grow(sequence, sequence.num_tokens)
                return num_preemptions
            except NoFreeBlocks:
                continue

    def _only_decoding_follows(self, output: SchedulerOutput) -> bool:
        """Whether neither prompts nor drafts come between it and its next step."""
        if output.num_decodes < len(output.sequences) or output.num_draft_tokens > 0:
            return False
        if self._prefilling or self._held or len(self._decoding) > len(output.sequences):
            return False
        first = self.waiting.first()
        return first is None or not (self._has_room(first) or self._victims(first))

    def _depends_on_tokens(self, sequence: Sequence) -> bool:
        """Whether its next step can only be told, or drawn from, once its last token is known."""
        if sequence.constraint is not None or not sequence.draws_settle:
            return True
        return self.drafter is not None and self.drafter.has_hope(sequence, self.num_running)

    def _add_drafts(self, drafter: Drafter, scheduled: list[Sequence], budget: int) -> int:
        """Draft tokens for the sequences that decode, where budget and blocks are left over."""
        used = 0
        for sequence in scheduled:
            room = min(
                budget - used,
                sequence.max_tokens - sequence.num_completion_tokens - 1,
                self.block_manager.growable_tokens(sequence) - sequence.num_tokens,
            )
            if room <= 0:
                continue
            drafts = drafter.propose(sequence, self.num_running, room)
            assert len(drafts) <= room
            if drafts:
                sequence.draft_token_ids = drafts
                sequence.writes_ahead = True
                sequence.num_scheduled_tokens += len(drafts)
                self.block_manager.grow(sequence, sequence.num_tokens + len(drafts))
                used += len(drafts)
        return used

    # Prompts

    def _schedule_prompts(
        self,
        budget: float,
        smallest_chunk: int,
        scheduled: list[Sequence],
        admitted: list[Sequence],
        *,
        may_admit: bool,
    ) -> int:
        """Chunks of running and waiting prompts, by share; returns the number of preemptions."""
        preempted: list[Sequence] = []
        prefilling = sorted(self._prefilling, key=_share, reverse=True)
        while budget > 0:
            first = self.waiting.first() if may_admit else None
            if first is None or (prefilling and _share(prefilling[-1]) < _share(first)):
                if not prefilling:
                    break
                sequence = prefilling.pop()
                if sequence.status is not SequenceStatus.RUNNING:
                    continue  # gave way to one admitted just now
            elif first in preempted or not self._make_place(first, preempted):
                may_admit = False
                continue
            else:
                sequence = first
                self._start(sequence)
                admitted.append(sequence)
            # What is left of less than a token would cost the next prompt a layer of a whole chunk.
            budget = int(budget - self._schedule_chunk(sequence, budget, smallest_chunk))
            scheduled.append(sequence)
        return len(preempted)

    def _schedule_chunk(self, sequence: Sequence, budget: float, smallest_chunk: int) -> float:
        """As many tokens as the budget allows, or some layers of the smallest chunk; returns what
        that takes of the budget."""
        num_tokens = min(sequence.num_uncached_tokens, int(budget))
        smallest_chunk = min(sequence.num_uncached_tokens, smallest_chunk)
        if sequence.partial is None and num_tokens < smallest_chunk:
            sequence.partial = PartialChunk(smallest_chunk, self.num_layers)
        partial = sequence.partial
        if partial is None:
            sequence.num_scheduled_tokens = num_tokens
            return num_tokens
        sequence.num_scheduled_tokens = partial.num_tokens
        num_layers = max(1, int(budget * self.num_layers / partial.num_tokens))
        first = partial.layers.stop
        partial.layers = range(first, min(first + num_layers, self.num_layers))
        return sequence.num_scheduled_shares if partial.is_last else budget

    def _make_place(self, sequence: Sequence, preempted: list[Sequence]) -> bool:
        """Whether the sequence can start; may preempt others for it."""
        if self._has_room(sequence):
            return True
        victims = self._victims(sequence)
        obtainable = sum(len(each.block_table) for each in victims)
        wanted = self.block_manager.blocks_for(sequence.num_tokens)
        if wanted > self.block_manager.num_free_blocks + obtainable:
            return False
        while victims and not self._has_room(sequence):
            preempted.append(victims.pop())
            self._preempt(preempted[-1])
        return self._has_room(sequence)

    def _victims(self, sequence: Sequence) -> list[Sequence]:
        """Who may have to give way to it, the last one first of all: lower classes, and if its
        tenant lacks its fair share of the places, what others have beyond theirs."""
        victims = []
        if self.waiting.has_running_below(sequence.priority):
            victims = [each for each in self._running() if each.priority > sequence.priority]
        if sequence.account.num_running + 1 <= self._fair_places(sequence):
            peers = [each for each in self._running() if each.priority == sequence.priority]
            victims += self._beyond_their_share(peers)
        return sorted(victims, key=_order)

    def _beyond_their_share(self, peers: list[Sequence]) -> list[Sequence]:
        excess: dict[Account, int] = {}
        beyond = []
        for each in sorted(peers, key=_order, reverse=True):
            left = excess.get(each.account)
            if left is None:
                left = int(each.account.num_running - self._fair_places(each))
            if left > 0:
                beyond.append(each)
            excess[each.account] = left - 1
        return beyond

    def _fair_places(self, sequence: Sequence) -> float:
        return self.waiting.fair_share(sequence, self.max_num_seqs)

    def _has_room(self, sequence: Sequence) -> bool:
        if self.num_running >= self._max_running(sequence):
            return False
        return self.block_manager.can_admit(sequence, self._num_spare_blocks(sequence))

    def _max_running(self, sequence: Sequence) -> int:
        """Who has its fair share of the places leaves some for those who have not."""
        if sequence.account.num_running < self._fair_places(sequence):
            return self.max_num_seqs
        return self.max_num_seqs - self.max_num_seqs // _RESERVED

    def _num_spare_blocks(self, sequence: Sequence) -> int:
        """What the running ones may need before its prompt is done and it has decoded a while."""
        if not self._prefilling and not self._decoding:
            return 0
        prefill_budget = max(1, self.max_num_batched_tokens - self.num_running)
        num_steps = -(-sequence.num_tokens // prefill_budget)
        return (self.num_running + 1) * self.block_manager.blocks_for(num_steps)

    def _start(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        sequence.status = SequenceStatus.RUNNING
        # Room for all known tokens, not just this chunk: an admitted prompt is never stuck half
        # way because of the prompts admitted after it.
        self.block_manager.admit(sequence)
        if not sequence.was_admitted:
            sequence.start_seconds = self._clock()
            sequence.num_hit_tokens = sequence.num_cached_tokens
        sequence.account.num_running += 1
        self._prefilling[sequence] = None

    # Ends and returns

    def _preempt(self, sequence: Sequence) -> None:
        self.block_manager.release(
            sequence, num_verified_tokens=self._num_verified_tokens(sequence)
        )
        self._withdraw(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.waiting.push(sequence)

    def _num_verified_tokens(self, sequence: Sequence) -> int:
        """How much of what is in its blocks logits have vouched for."""
        if sequence in self._prefilling:
            return 0
        if sequence.writes_ahead:
            return sequence.num_cached_tokens
        return len(sequence.block_table) * self.block_manager.block_size

    def _take_pending(
        self, sequence: Sequence, result: SequenceResult, news: list[TokenOutput]
    ) -> None:
        """The token with which the step after this one was launched."""
        sequence.num_pending_tokens = 0
        if result.is_revised:
            sequence.draws_settle = False
            sequence.num_scheduled_tokens = 0  # withdrawn from the step that has the wrong one
        self._take(sequence, result, news)

    def _take(self, sequence: Sequence, result: SequenceResult, news: list[TokenOutput]) -> None:
        """Append the tokens until one ends the sequence; slots of rejected drafts are given up."""
        if result.error:
            self._fail(sequence, result.error, news)
            return
        if sequence in self._prefilling:
            del self._prefilling[sequence]
            self._decoding[sequence] = None
            self._release_siblings(sequence)
        drafts = sequence.draft_token_ids
        if drafts:
            self._judge_drafts(sequence, drafts, result)
        for token in result.tokens:
            news.append(self._append(sequence, token))
            if sequence.status is SequenceStatus.FINISHED:
                return
        if drafts:
            self.block_manager.trim(sequence)
        # Only now: that it has logits proves that what it has cached are numbers.
        self.block_manager.commit(sequence)

    def _judge_drafts(self, sequence: Sequence, drafts: list[int], result: SequenceResult) -> None:
        num_accepted = len(result.tokens) - 1
        assert [token.token_id for token in result.tokens[:-1]] == drafts[:num_accepted]
        sequence.draft_token_ids = []
        sequence.num_cached_tokens += num_accepted
        assert self.drafter is not None
        self.drafter.observe(sequence, len(drafts), num_accepted)

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenOutput:
        sequence.token_ids.append(token.token_id)
        sequence.account.service += 1 / sequence.weight
        reason = None
        if token.token_id in sequence.stop_token_ids:
            reason = FinishReason.STOP
        elif len(sequence.token_ids) - sequence.num_prompt_tokens >= sequence.max_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            # Accepted draft tokens behind the one that ends it are dropped.
            sequence.num_cached_tokens = min(sequence.num_cached_tokens, sequence.num_tokens)
            self.block_manager.commit(sequence)
            self._leave(sequence)
        is_first = sequence.num_completion_tokens == 1
        queue_seconds, prefill_seconds = self._start_timings(sequence) if is_first else (None, None)
        return TokenOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            token_id=token.token_id,
            logprob=token.logprob,
            top_logprobs=token.top_logprobs,
            rank=token.rank,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if is_first else (),
            finish_reason=reason,
            num_cached_tokens=sequence.num_hit_tokens,
            queue_seconds=queue_seconds,
            prefill_seconds=prefill_seconds,
        )

    def _start_timings(self, sequence: Sequence) -> tuple[float, float]:
        """How long it waited for its first start, and then, until now, for its first token."""
        assert sequence.start_seconds is not None
        queued = sequence.start_seconds - sequence.arrival_seconds
        return queued, self._clock() - sequence.start_seconds

    def _release_siblings(self, leader: Sequence) -> None:
        """Sample 0 has computed the prompt: the others share it, or wait for a place."""
        for sibling in leader.siblings:
            if sibling not in self._held:
                continue  # it had its start before a preemption, or has ended
            del self._held[sibling]
            if self.num_running >= self.max_num_seqs:
                self.waiting.push(sibling)
                continue
            sibling.status = SequenceStatus.RUNNING
            sibling.start_seconds = self._clock()
            self.block_manager.fork(leader, sibling)
            sibling.account.num_running += 1
            self._decoding[sibling] = None

    def _fail(self, sequence: Sequence, error: str, news: list[TokenOutput]) -> None:
        """End it, and the siblings that still wait for its prompt."""
        held = [sibling for sibling in sequence.siblings if sibling in self._held]
        for each in (sequence, *held):
            self.block_manager.forget(each)
            self._leave(each, verified=False)
            news.append(_ended(each, FinishReason.ERROR, error))

    def _expire_at(self, seconds: float, leader: Sequence, reason: FinishReason) -> None:
        if len(self._expiries) > 64 + 4 * len(self._requests):
            self._expiries = [each for each in self._expiries if _alive(each[2])]
            heapq.heapify(self._expiries)
        heapq.heappush(self._expiries, (seconds, leader.arrival, leader, reason))

    def _why(self, leader: Sequence, reason: FinishReason) -> str:
        if reason is FinishReason.DEADLINE:
            return f"deadline_seconds is {leader.deadline_seconds:g}; that time is over"
        return (
            f"the request waited for {self.max_queue_seconds:g} seconds (max_queue_seconds) "
            "without being started"
        )

    def _leave(self, sequence: Sequence, *, verified: bool = True) -> None:
        """The one transition out of the engine: blocks are freed, the sequence is forgotten."""
        num_verified_tokens = self._num_verified_tokens(sequence) if verified else 0
        if sequence.status is SequenceStatus.RUNNING:
            self._withdraw(sequence)
        elif sequence in self._held:
            del self._held[sequence]
        else:
            self.waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.block_manager.release(sequence, num_verified_tokens=num_verified_tokens)
        self.waiting.close_account(sequence)
        samples = self._requests[sequence.request_id]
        samples.remove(sequence)
        if not samples:
            del self._requests[sequence.request_id]
        for sibling in sequence.siblings:  # now each must compute the prompt by itself
            if sibling in self._held:
                del self._held[sibling]
                self.waiting.push(sibling)

    def _withdraw(self, sequence: Sequence) -> None:
        """Out of the running ones, and of what was scheduled."""
        if sequence in self._decoding:
            del self._decoding[sequence]
        else:
            del self._prefilling[sequence]
        sequence.account.num_running -= 1
        sequence.num_scheduled_tokens = 0
        sequence.num_pending_tokens = 0
        sequence.draft_token_ids = []
        sequence.partial = None

    def _running(self) -> Iterable[Sequence]:
        return chain(self._prefilling, self._decoding)

    # What was measured

    def _check_queue(self, sequence: Sequence, num_samples: int) -> None:
        """Raises QueueFull. An empty queue takes any request that can run at all."""
        num_waiting, num_tokens = self.num_waiting, self.waiting.num_tokens
        over_requests = num_waiting + num_samples > self.max_queued_requests
        over_tokens = num_tokens + sequence.num_tokens > self.max_queued_tokens
        if num_waiting == 0 or not (over_requests or over_tokens):
            return
        name = "max_queued_requests" if over_requests else "max_queued_tokens"
        retry_after = self._seconds_for(num_tokens)
        raise QueueFull(
            f"{num_waiting} requests with {num_tokens} tokens are waiting; {name} is "
            f"{getattr(self, name)}; try again in {retry_after:.0f} s",
            retry_after_seconds=retry_after,
        )

    def _check_deadline(self, sequence: Sequence) -> None:
        """Raises DeadlineExceeded where even the fastest full steps so far would be too slow."""
        if sequence.deadline_seconds is None or self._most_tokens_per_second == 0:
            return
        speed = self._most_tokens_per_second
        most = self.waiting.num_tokens + sequence.num_tokens
        if most <= sequence.deadline_seconds * speed:
            return
        num_tokens = self._min_tokens_until(sequence)
        seconds = num_tokens / speed
        if seconds > sequence.deadline_seconds:
            raise DeadlineExceeded(
                f"deadline_seconds is {sequence.deadline_seconds:g}; the {num_tokens} tokens of "
                f"this prompt and those before it take at least {seconds:.3g} s"
            )

    def _min_tokens_until(self, sequence: Sequence) -> int:
        """What must be computed before its first token, however much of it prompts share.

        Of prompts that go on alike where the prefix cache ends, only the longest counts; none does
        where that is being computed.
        """
        in_progress = {h for each in self._prefilling for h in each.block_hashes}
        longest: dict[bytes | int, int] = {}
        for each in (*self.waiting.before(sequence), sequence):
            hash_there, num_tokens = self.block_manager.uncached(each)
            key = each.arrival if hash_there is None else hash_there
            if key not in in_progress:
                longest[key] = max(num_tokens, longest.get(key, 0))
        return sum(longest.values())

    def _seconds_for(self, num_tokens: int) -> float:
        """How long as many tokens take at the present speed, in [1, 600]."""
        return min(600.0, max(1.0, num_tokens / max(self._tokens_per_second, 1.0)))

    def _observe(self, output: SchedulerOutput, seconds: float) -> None:
        if self.pacer is not None and output.num_decodes > 0:
            self.pacer.observe(output.num_decodes, output.num_prefill_tokens, seconds)
        if seconds > 0:
            speed = output.num_tokens / seconds
            self._tokens_per_second += 0.1 * (speed - self._tokens_per_second)
            if output.num_tokens >= self.max_num_batched_tokens:
                self._most_tokens_per_second = max(speed, self._most_tokens_per_second)


def _goes_on(sequence: Sequence) -> bool:
    """Whether it runs, and the token that its step draws does not reach its bound."""
    if sequence.error or sequence.status is not SequenceStatus.RUNNING:
        return False
    return sequence.num_completion_tokens + 1 < sequence.max_tokens


def _was_withdrawn(sequence: Sequence) -> bool:
    """Whether a step that was launched with it is no concern of it any more."""
    return sequence.num_scheduled_tokens == 0


def _is_partial(sequence: Sequence) -> bool:
    return sequence.partial is not None


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


def _share(sequence: Sequence) -> tuple[int, float, int]:
    return sequence.priority, sequence.account.service, sequence.arrival


def _alive(leader: Sequence) -> list[Sequence]:
    samples = (leader, *leader.siblings)
    return [each for each in samples if each.status is not SequenceStatus.FINISHED]


def _ended(sequence: Sequence, reason: FinishReason, error: str) -> TokenOutput:
    return TokenOutput(
        request_id=sequence.request_id,
        index=sequence.index,
        token_id=None,
        finish_reason=reason,
        error=error,
    )
