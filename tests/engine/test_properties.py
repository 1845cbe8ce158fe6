"""The real scheduler and block manager under random operations, with a runner that checks slots."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from checking_runner import EOS, VOCAB, CheckingRunner, GuessingDrafter, expected_completion
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lowbit.server.config import EngineConfig
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import Sequence
from lowbit.server.types import (
    DeadlineExceeded,
    FinishReason,
    InvalidRequest,
    Priority,
    QueueFull,
    SamplingParams,
    SchedulingParams,
    TokenOutput,
)

BLOCK_SIZE = 4
MAX_MODEL_LEN = 40
MAX_QUEUED_REQUESTS = 8
MAX_QUEUED_TOKENS = 100
Sample = tuple[str, int]  # request id, index

# Prompts begin alike, so that they share blocks; the tails make most of them differ somewhere.
STEMS = tuple([7 * i % VOCAB for i in range(length)] for length in (0, 4, 8, 9, 16, 17))

RARELY = st.sampled_from((False, False, True))


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Of thousands of injected faults."""
    logger = logging.getLogger("lowbit.server.engine")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


class EngineMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: right tokens, each sample ended once, no block lost."""

    @initialize(
        num_blocks=st.integers(3, 20),
        max_num_seqs=st.integers(1, 8),
        extra_budget=st.integers(0, 12),
        drafts=st.booleans(),
        prefix_cache=st.booleans(),
        paced=st.booleans(),
        num_layers=st.sampled_from((1, 3, 30)),
        token_seconds=st.sampled_from((0.0, 0.001, 0.1)),
        ahead=st.booleans(),
        revised=st.sets(st.integers(0, VOCAB - 1), max_size=10),
        plain=st.booleans(),
    )
    def start(
        self,
        num_blocks: int,
        max_num_seqs: int,
        extra_budget: int,
        drafts: bool,
        prefix_cache: bool,
        paced: bool,
        num_layers: int,
        token_seconds: float,
        ahead: bool,
        revised: set[int],
        plain: bool,
    ) -> None:
        """`plain`: one class, one tenant, whole prompts, no drafts."""
        self.plain = plain
        drafts, paced = drafts and not plain, paced and not plain
        self.preempted: dict[Sample, tuple[int, int]] = {}  # (how often, tokens at the last time)
        self.now = 0.0
        self.token_seconds = token_seconds  # that a prompt's token adds to a step
        self.num_layers = num_layers
        self.runner = CheckingRunner(BLOCK_SIZE, self.elapse)
        self.runner.revised = revised
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + extra_budget,
            max_queued_requests=MAX_QUEUED_REQUESTS,
            max_queued_tokens=MAX_QUEUED_TOKENS,
            max_queue_seconds=60.0,
            max_itl_stretch=1.5 if paced else 0.0,
            prefix_cache=prefix_cache,
        )
        self.engine = LLMEngine(
            self.runner,
            config,
            num_blocks=num_blocks,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCAB,
            eos_token_ids=frozenset({EOS}),
            num_layers=num_layers,
            drafter=GuessingDrafter() if drafts else None,
            runs_ahead=ahead,
            clock=lambda: self.now,
        )
        self.expected: dict[Sample, list[int]] = {}  # of the samples alive
        self.received: dict[Sample, list[int]] = {}
        self.sequences: dict[Sample, Sequence] = {}
        self.arrived: dict[str, float] = {}
        self.deadlines: dict[str, float] = {}
        self.num_requests = 0

    @rule(
        stem=st.sampled_from(STEMS),
        tail=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
        max_tokens=st.sampled_from((1, 2, 5, 12, 20)),
        n=st.sampled_from((1, 1, 1, 2, 3)),
        priority=st.sampled_from(Priority),
        tenant=st.sampled_from(("", "a", "b")),
        deadline=st.sampled_from((None, None, None, None, 0.05, 1.0, 20.0)),
        cached=st.sampled_from((True, True, False)),
        count=st.integers(1, 4),
    )
    def add(self, stem: list[int], tail: list[int], count: int, **settings: Any) -> None:
        for i in range(count):
            self.add_one(stem, [(token + i) % VOCAB for token in tail], **settings)

    def add_one(
        self,
        stem: list[int],
        tail: list[int],
        max_tokens: int,
        n: int,
        priority: Priority,
        tenant: str,
        deadline: float | None,
        cached: bool,
    ) -> None:
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        if self.plain:
            priority, tenant = Priority.NORMAL, ""
        prompt = stem + tail
        params = SamplingParams(temperature=0, max_tokens=max_tokens, n=n, seed=self.num_requests)
        scheduling = SchedulingParams(priority=priority, tenant=tenant, deadline_seconds=deadline)
        scheduler = self.engine.scheduler
        queued = [*scheduler.waiting]
        try:
            leader = self.engine.new_sequence(request_id, prompt, params, scheduling)
            leader.reads_prefix_cache = cached
            self.engine.add(leader)
        except InvalidRequest:
            cache_tokens = scheduler.block_manager.num_blocks * BLOCK_SIZE
            assert len(prompt) + max_tokens > min(MAX_MODEL_LEN, cache_tokens + 1)
            return
        except DeadlineExceeded:
            assert deadline is not None
            return
        except QueueFull as refusal:
            num_tokens = sum(each.num_tokens for each in queued) + len(prompt)
            full = scheduler.num_waiting + n > MAX_QUEUED_REQUESTS
            assert scheduler.num_waiting > 0 and (full or num_tokens > MAX_QUEUED_TOKENS)
            assert 1 <= refusal.retry_after_seconds <= 600
            return
        self.arrived[request_id] = self.now
        if deadline is not None:
            self.deadlines[request_id] = self.now + deadline
        for sample in (leader, *leader.siblings):
            key = (request_id, sample.index)
            self.expected[key] = expected_completion(prompt, sample.seed, max_tokens)
            self.received[key] = []
            self.sequences[key] = sample

    @rule(data=st.data(), whole=st.booleans(), happens=RARELY)
    def abort(self, data: st.DataObject, whole: bool, happens: bool) -> None:
        if self.expected and happens:
            request_id, index = data.draw(st.sampled_from(sorted(self.expected)))
            self.engine.abort(request_id, None if whole else index)
            for key in list(self.expected):
                if key == (request_id, index) or (whole and key[0] == request_id):
                    del self.expected[key]

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.deliver()

    @rule(happens=RARELY, late=st.booleans())
    def fail(self, happens: bool, late: bool) -> None:
        if happens and not self.runner.has_just_failed:  # no two in a row
            self.runner.fail_next, self.runner.fails_late = not late, late
        self.deliver()
        self.runner.fail_next = self.runner.fails_late = False

    @rule(data=st.data(), happens=RARELY)
    def poison(self, data: st.DataObject, happens: bool) -> None:
        if self.expected and happens:
            self.runner.poisoned.add(data.draw(st.sampled_from(sorted(self.expected)))[0])

    @rule(seconds=st.sampled_from((0.0, 0.01, 0.1, 1.0, 30.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    def elapse(self, output: SchedulerOutput) -> None:
        self.now += 0.01 + self.token_seconds * output.num_prefill_tokens

    def deliver(self) -> None:
        began = self.now
        for output in self.engine.step():
            key = (output.request_id, output.index)
            if output.token_id is None:
                self.check_end(output, began)
                del self.expected[key]  # a KeyError here is a second end
                continue
            tokens, expected = self.received[key], self.expected[key]
            tokens.append(output.token_id)
            assert tokens == expected[: len(tokens)]
            assert (output.finish_reason is not None) == (len(tokens) == len(expected))
            if output.finish_reason is not None:
                stopped = output.token_id == EOS
                reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                assert output.finish_reason is reason
                del self.expected[key]
        assert all(self.deadlines.get(each, began + 1) > began for each, _ in self.expected)

    def check_end(self, output: TokenOutput, now: float) -> None:
        assert output.error
        if output.finish_reason is FinishReason.DEADLINE:
            assert self.deadlines[output.request_id] <= now
        elif output.finish_reason is FinishReason.QUEUE_TIMEOUT:
            assert self.arrived[output.request_id] + 60 <= now
            assert not self.received[(output.request_id, output.index)]
        else:
            assert output.finish_reason is FinishReason.ERROR

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            scheduler = self.engine.scheduler
            scheduler.check_integrity()
            assert scheduler.num_running + scheduler.num_waiting == len(self.expected)

    @invariant()
    def nobody_is_resumed_to_be_preempted_at_once(self) -> None:
        """Between two preemptions a sequence makes a token, where nobody has a claim before it."""
        if not hasattr(self, "engine") or not self.plain:
            return
        for key in self.expected:
            sequence = self.sequences[key]
            times, tokens = self.preempted.get(key, (0, -1))
            if sequence.num_preemptions > times:
                assert sequence.num_completion_tokens > tokens
                self.preempted[key] = (sequence.num_preemptions, sequence.num_completion_tokens)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # Every step computes a token at least of the first running sequence, which none preempts,
        # or one layer of its chunk. A paced step may leave prompts out, but never two in a row.
        bound = 2 * self.num_layers * MAX_MODEL_LEN * (1 + len(self.expected))
        while self.engine.has_work:
            self.deliver()
            bound -= 1
            assert bound > 0, "no progress"
        assert not self.expected
        blocks = self.engine.scheduler.block_manager
        assert blocks.num_free_blocks == blocks.num_blocks
        blocks.check_integrity([])


class TestEngineMachine(EngineMachine.TestCase):
    settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestHundredThousandOperations(EngineMachine.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=50, deadline=None)
