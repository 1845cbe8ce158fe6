"""Scheduler and block manager under random arrivals, cancels and failures, with a fake runner."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from lowbit.server.config import EngineConfig
from lowbit.server.engine.block_manager import BlockManager, NoFreeBlocks
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, Sequence, SequenceResult
from lowbit.server.types import FinishReason, InvalidRequest, QueueFull, SamplingParams

VOCAB = 50
EOS = 49


class CacheCheckingRunner:
    """A model whose next token is a hash of all tokens it finds in the KV cache.

    It writes (position, token) to the slot of every scheduled token and reads the whole context
    back through the block table: a stale, shared or misplaced slot shows at once.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, tuple[int, int]] = {}
        self.fail_next = False

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("injected")
        for sequence in output.sequences:
            first = sequence.num_cached_tokens
            for position in range(first, first + sequence.num_scheduled_tokens):
                self.slots[self._slot(sequence, position)] = (
                    position,
                    sequence.token_ids[position],
                )
        return [
            SequenceResult((SampledToken(self._next_token(sequence), 0.0),))
            for sequence in output.sequences
            if sequence.yields_token
        ]

    def _slot(self, sequence: Sequence, position: int) -> int:
        block = sequence.block_table[position // self.block_size]
        return block * self.block_size + position % self.block_size

    def _next_token(self, sequence: Sequence) -> int:
        context = [self.slots[self._slot(sequence, p)] for p in range(sequence.num_tokens)]
        assert context == list(enumerate(sequence.token_ids))
        return expected_next(sequence.token_ids)


def expected_next(token_ids: list[int]) -> int:
    return hashlib.sha256(bytes(token_ids)).digest()[0] % VOCAB


def expected_completion(prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(expected_next(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def make_engine(
    *, num_blocks: int = 12, block_size: int = 4, max_num_seqs: int = 5, budget: int = 9
) -> LLMEngine:
    config = EngineConfig(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_queued_requests=6,
    )
    return LLMEngine(
        CacheCheckingRunner(block_size),
        config,
        num_blocks=num_blocks,
        max_model_len=40,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )


class EngineMachine(RuleBasedStateMachine):
    """Whatever happens in whatever order: right tokens, each request ended once, no block lost."""

    @initialize(
        num_blocks=st.integers(2, 14),
        max_num_seqs=st.integers(1, 6),
        extra_budget=st.integers(0, 12),
    )
    def start(self, num_blocks: int, max_num_seqs: int, extra_budget: int) -> None:
        self.engine = make_engine(
            num_blocks=num_blocks, max_num_seqs=max_num_seqs, budget=max_num_seqs + extra_budget
        )
        self.expected: dict[str, list[int]] = {}
        self.received: dict[str, list[int]] = {}
        self.num_requests = 0

    @rule(prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20), n=st.integers(1, 20))
    def add(self, prompt: list[int], n: int) -> None:
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        params = SamplingParams(temperature=0, max_tokens=n)
        try:
            self.engine.add(self.engine.new_sequence(request_id, prompt, params))
        except InvalidRequest:
            blocks = self.engine.scheduler.block_manager
            assert len(prompt) + n > min(40, blocks.num_blocks * blocks.block_size + 1)
            return
        except QueueFull:
            # More than the bound when preempted sequences, which are never refused, wait too.
            assert self.engine.scheduler.num_waiting >= 6
            return
        self.expected[request_id] = expected_completion(prompt, n)
        self.received[request_id] = []

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.expected:
            request_id = data.draw(st.sampled_from(sorted(self.expected)))
            self.engine.abort(request_id)
            del self.expected[request_id]

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.deliver()

    @rule()
    def fail(self) -> None:
        self.engine.runner.fail_next = self.engine.has_work
        self.deliver()

    def deliver(self) -> None:
        for output in self.engine.step():
            if output.finish_reason is FinishReason.ERROR:
                del self.expected[output.request_id]
                continue
            tokens = self.received[output.request_id]
            tokens.append(output.token_id)
            expected = self.expected[output.request_id]
            assert tokens == expected[: len(tokens)]
            assert (output.finish_reason is not None) == (len(tokens) == len(expected))
            if output.finish_reason is not None:
                stopped = output.token_id == EOS
                assert output.finish_reason is (
                    FinishReason.STOP if stopped else FinishReason.LENGTH
                )
                del self.expected[output.request_id]

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "engine"):
            self.engine.scheduler.check_integrity()
            scheduler = self.engine.scheduler
            assert scheduler.num_running + scheduler.num_waiting == len(self.expected)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        bound = 200 * (1 + len(self.expected))
        while self.engine.has_work:
            self.deliver()
            bound -= 1
            assert bound > 0, "no progress"
        assert not self.expected
        blocks = self.engine.scheduler.block_manager
        assert blocks.num_free_blocks == blocks.num_blocks


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase


def test_a_crowd_that_outgrows_the_cache_is_preempted_and_still_right() -> None:
    engine = make_engine(num_blocks=8)
    prompts = {f"r{i}": [i, i + 1, i + 2] for i in range(5)}
    for request_id, prompt in prompts.items():
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        engine.add(engine.new_sequence(request_id, prompt, params))
    received: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    num_preemptions = 0
    while engine.has_work:
        for output in engine.step():
            received[output.request_id].append(output.token_id)
        num_preemptions += engine.last_step.num_preemptions
    assert num_preemptions > 0
    for request_id, prompt in prompts.items():
        tokens = list(prompt)
        for _ in range(16):
            tokens.append(expected_next(tokens))
        assert received[request_id] == tokens[3:]


def test_decodes_come_before_a_long_prompt() -> None:
    engine = make_engine(budget=6, num_blocks=20)
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    engine.add(engine.new_sequence("short", [1, 2], greedy))
    engine.step()
    engine.add(engine.new_sequence("long", list(range(24)), greedy))
    short_tokens = 0
    for _ in range(5):  # 24 prompt tokens at 5 a step beside one decode
        news = engine.step()
        short_tokens += sum(output.request_id == "short" for output in news)
    assert short_tokens == 5
    assert [output.request_id for output in news] == ["short", "long"]


def test_stats_count_prompt_tokens_once_and_reset_after_an_abort() -> None:
    engine = make_engine()
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    engine.add(engine.new_sequence("a", [1, 2, 3], greedy))
    engine.step()
    assert (engine.last_step.num_prompt_tokens, engine.last_step.num_generation_tokens) == (3, 1)
    engine.step()
    assert (engine.last_step.num_prompt_tokens, engine.last_step.num_generation_tokens) == (0, 1)
    assert engine.last_step.kv_cache_usage_ratio == pytest.approx(1 / 12)
    engine.abort("a")
    assert (engine.last_step.num_running, engine.last_step.kv_cache_usage_ratio) == (0, 0)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt has 0 tokens"),
        ([1, 50], {}, "prompt holds token id 50; ids must lie in [0, 50)"),
        ([-1], {}, "prompt holds token id -1"),
        ([1] * 40, {}, "prompt has 40 tokens; max_model_len allows at most 39"),
        ([1] * 30, {"max_tokens": 11}, "max_tokens is 11 after a prompt of 30 tokens"),
        ([1], {"stop_token_ids": (99,)}, "stop_token_ids holds token id 99"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    prompt: list[int], params: dict, message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        make_engine().new_sequence("r", prompt, SamplingParams(**params))
    assert message in str(refusal.value)


def test_a_prompt_that_the_cache_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the KV cache allows at most 8"):
        make_engine(num_blocks=2).new_sequence("r", [1] * 9, SamplingParams())


def test_default_max_tokens_is_what_fits() -> None:
    assert make_engine().new_sequence("r", [1] * 30, SamplingParams()).max_tokens == 10


def test_a_request_id_in_use_is_refused() -> None:
    engine = make_engine()
    engine.add(engine.new_sequence("r", [1], SamplingParams()))
    with pytest.raises(InvalidRequest, match="request_id is 'r'"):
        engine.add(engine.new_sequence("r", [1], SamplingParams()))


@given(sizes=st.lists(st.integers(1, 30), max_size=12))
def test_block_manager_refuses_what_it_lacks(sizes: list[int]) -> None:
    blocks = BlockManager(10, 4)
    sequences = []
    for size in sizes:
        sequence = Sequence("r", [0], 1, 1, SamplingParams(), frozenset(), 0)
        needed = -(-size // 4)
        if needed > blocks.num_free_blocks:
            assert not blocks.can_grow(sequence, size)
            with pytest.raises(NoFreeBlocks):
                blocks.grow(sequence, size)
        else:
            blocks.grow(sequence, size)
            assert len(sequence.block_table) == needed
            sequences.append(sequence)
        blocks.check_integrity(sequences)
    for sequence in sequences:
        blocks.release(sequence)
    blocks.check_integrity([])
    assert blocks.num_free_blocks == 10
