"""Scheduler and block manager case by case, with a runner that checks slots."""

from __future__ import annotations

import pytest
from checking_runner import EOS, VOCAB, CheckingRunner, expected_next
from hypothesis import given
from hypothesis import strategies as st
from lowbit.server.config import EngineConfig
from lowbit.server.engine.block_manager import BlockManager, NoFreeBlocks
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import Sequence
from lowbit.server.types import InvalidRequest, SamplingParams


def make_engine(
    *, num_blocks: int = 12, block_size: int = 4, max_num_seqs: int = 5, budget: int = 9
) -> LLMEngine:
    config = EngineConfig(
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_queued_requests=6,
        max_itl_stretch=0.0,
    )
    return LLMEngine(
        CheckingRunner(block_size),
        config,
        num_blocks=num_blocks,
        max_model_len=40,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
    )


def test_a_crowd_that_outgrows_the_cache_is_preempted_and_still_right() -> None:
    engine = make_engine(num_blocks=8)
    prompts = {f"r{i}": [i, i + 1, i + 2] for i in range(5)}
    for request_id, prompt in prompts.items():
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, seed=0)
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
            tokens.append(expected_next(tokens, 0))
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


class Clock:
    """A step takes 10 ms, and each token of a prompt in it so much more."""

    def __init__(self, token_seconds: float) -> None:
        self.now = 0.0
        self.token_seconds = token_seconds

    def __call__(self) -> float:
        return self.now

    def elapse(self, output: SchedulerOutput) -> None:
        self.now += 0.01 + self.token_seconds * output.num_prefill_tokens


GREEDY = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


def paced_engine(clock: Clock, *, num_layers: int, budget: int = 512) -> LLMEngine:
    """One stream has decoded for a while, so that it is known how long that takes."""
    engine = LLMEngine(
        CheckingRunner(16, clock.elapse),
        EngineConfig(
            block_size=16, max_itl_stretch=1.5, max_num_seqs=4, max_num_batched_tokens=budget
        ),
        num_blocks=100,
        max_model_len=500,
        vocab_size=VOCAB,
        eos_token_ids=frozenset(),
        num_layers=num_layers,
        clock=clock,
    )
    engine.add(engine.new_sequence("stream", [1, 2], GREEDY))
    for _ in range(20):
        engine.step()
    return engine


def add_prompt(engine: LLMEngine, request_id: str, num_tokens: int) -> None:
    prompt = [(len(request_id) + i) % VOCAB for i in range(num_tokens)]
    engine.add(engine.new_sequence(request_id, prompt, GREEDY))


@pytest.mark.parametrize("token_seconds", [0.0001, 0.003, 0.02])
def test_a_long_prompt_never_makes_a_step_longer_than_the_stretch(token_seconds: float) -> None:
    """However dear its tokens are: a chunk's layers are spread over several steps."""
    clock = Clock(token_seconds)
    engine = paced_engine(clock, num_layers=400)
    add_prompt(engine, "long", 50)
    seconds, finished = [], False
    while not finished:
        began = clock.now
        finished = any(output.request_id == "long" for output in engine.step())
        seconds.append(clock.now - began)
    assert max(seconds) < 0.0151
    assert len(seconds) < 1.3 * 50 * token_seconds / 0.005 + 4  # and it uses what it may


def test_a_step_without_streams_finishes_a_chunk_that_was_begun() -> None:
    engine = paced_engine(Clock(0.01), num_layers=10)
    add_prompt(engine, "long", 100)
    for _ in range(3):
        engine.step()
    assert engine.runner.num_partial_steps > 0
    engine.abort("stream")
    engine.step()  # the rest of the chunk
    outputs = engine.step()  # the rest of the prompt
    assert [output.request_id for output in outputs] == ["long"]


def test_a_fraction_of_a_token_begins_no_chunk() -> None:
    """What the end of a partial chunk leaves of the budget goes to whole tokens alone."""
    engine = paced_engine(Clock(0.01), num_layers=10, budget=64)
    add_prompt(engine, "long", 100)
    for _ in range(3):
        engine.step()
    engine.abort("stream")
    add_prompt(engine, "second", 60)
    add_prompt(engine, "another", 60)
    output = engine.scheduler.schedule()
    assert output.num_prefill_tokens % 1 > 0  # a part of the chunk had been computed before
    assert [each.request_id for each in output.sequences if each.partial] == ["long"]
    assert "another" not in [each.request_id for each in output.sequences]


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
            with pytest.raises(NoFreeBlocks):
                blocks.grow(sequence, size)
        else:
            blocks.grow(sequence, size)
            assert len(sequence.block_table) == needed
            sequences.append(sequence)
        blocks.check_integrity(sequences)
    for sequence in sequences:
        blocks.release(sequence, num_verified_tokens=0)
    blocks.check_integrity([])
    assert blocks.num_free_blocks == 10
