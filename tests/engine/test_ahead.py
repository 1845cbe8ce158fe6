"""Steps launched before the tokens of the last one are known: the same tokens, and no trace."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Any

import pytest
import torch
from checking_runner import (
    EOS,
    NOT_A_NUMBER,
    VOCAB,
    CheckedStep,
    CheckingRunner,
    GuessingDrafter,
    expected_completion,
)
from engines import make_engine, prompt
from lowbit.kernels.cpu import CpuBackend, CpuPlan
from lowbit.kernels.interface import ForwardBatch, load_backend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.async_engine import AsyncEngine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.model_runner import ModelRunner
from lowbit.server.engine.sampler import Sampler
from lowbit.server.engine.scheduler import Drafter, SchedulerOutput
from lowbit.server.engine.sequence import Sequence, SequenceResult
from lowbit.server.types import FinishReason, SamplingParams, SchedulingParams, TokenOutput
from recorders import EagerRecorder
from tiny import TinyModel

GREEDY = SamplingParams(temperature=0, max_tokens=12, seed=1)


class LoggingRunner(CheckingRunner):
    """Notes when steps are launched and when they are waited for."""

    def __init__(self, block_size: int = 4) -> None:
        super().__init__(block_size)
        self.log: list[str] = []
        self._num_launched = 0

    def launch(self, output: SchedulerOutput, previous: CheckedStep | None = None) -> CheckedStep:
        self._num_launched += 1
        number = self._num_launched
        self.log.append(f"launch {number}")
        step = super().launch(output, previous)
        wait = step.wait

        def logged() -> list[SequenceResult]:
            self.log.append(f"wait {number}")
            return wait()

        step.wait = logged  # type: ignore[method-assign]
        return step


def engine_of(
    runner: CheckingRunner,
    drafter: Drafter | None = None,
    num_blocks: int = 64,
    clock: Callable[[], float] = time.monotonic,
    **settings: Any,
) -> LLMEngine:
    limits = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64} | settings
    return LLMEngine(
        runner,
        EngineConfig(**limits),
        num_blocks=num_blocks,
        max_model_len=64,
        vocab_size=VOCAB,
        eos_token_ids=frozenset({EOS}),
        drafter=drafter,
        runs_ahead=True,
        clock=clock,
    )


def add(engine: LLMEngine, name: str, tokens: list[int], params: SamplingParams = GREEDY) -> None:
    engine.add(engine.new_sequence(name, tokens, params))


def finish(engine: LLMEngine) -> dict[str, list[int | None]]:
    received: dict[str, list[int | None]] = {}
    while engine.has_work:
        for output in engine.step():
            received.setdefault(output.request_id, []).append(output.token_id)
        engine.scheduler.check_integrity()
    blocks = engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_blocks
    return received


def seed_whose_completion(prompt: list[int], ends: bool, length: int) -> int:
    """A seed with which the completion ends by itself with its token number `length`, or not before
    its `length`-th."""
    for seed in range(10_000):
        completion = expected_completion(prompt, seed, length)
        if len(completion) == length and (completion[-1] == EOS) == ends:
            return seed
    raise AssertionError


def add_stream(engine: LLMEngine, name: str, first: int = 1) -> list[int]:
    """A request that makes 12 tokens: those."""
    tokens = [first, 2, 3]
    seed = seed_whose_completion(tokens, ends=False, length=12)
    add(engine, name, tokens, dataclasses.replace(GREEDY, seed=seed))
    return expected_completion(tokens, seed, 12)


def test_a_step_is_launched_before_the_last_one_is_waited_for() -> None:
    runner = LoggingRunner()
    engine = engine_of(runner)
    seed = seed_whose_completion([1, 2, 3], ends=False, length=6)
    add(engine, "a", [1, 2, 3], dataclasses.replace(GREEDY, max_tokens=6, seed=seed))
    assert finish(engine) == {"a": expected_completion([1, 2, 3], seed, 6)}
    # The prompt is waited for; and that the sixth token is the last one is known beforehand.
    assert runner.log == [
        *("launch 1", "wait 1", "launch 2", "launch 3", "wait 2", "launch 4", "wait 3"),
        *("launch 5", "wait 4", "launch 6", "wait 5", "wait 6"),
    ]


def test_what_is_computed_behind_the_end_is_dropped() -> None:
    runner = LoggingRunner()
    engine = engine_of(runner)
    seed = seed_whose_completion([1, 2, 3], ends=True, length=6)
    add(engine, "a", [1, 2, 3], dataclasses.replace(GREEDY, seed=seed))
    received = finish(engine)
    assert received == {"a": expected_completion([1, 2, 3], seed, 12)}
    assert len(received["a"]) == 6
    assert runner.log.count("launch 7") == runner.log.count("wait 7") == 1


def test_a_request_is_admitted_after_one_step_at_most() -> None:
    runner = LoggingRunner()
    engine = engine_of(runner)
    add_stream(engine, "a")
    for _ in range(4):
        engine.step()
    add(engine, "b", [4, 5, 6])
    engine.step()  # what was launched already
    assert [output.request_id for output in engine.step()] == ["a", "b"]
    finish(engine)


def test_with_all_places_taken_waiting_ones_hold_nobody_up() -> None:
    runner = LoggingRunner()
    engine = engine_of(runner, max_num_seqs=1)
    expected = {"a": add_stream(engine, "a"), "b": add_stream(engine, "b", first=4)}
    assert finish(engine) == expected
    assert runner.num_ahead >= 10


def test_one_that_leaves_is_withdrawn_from_the_step_on_its_way() -> None:
    engine = engine_of(LoggingRunner())
    add_stream(engine, "a")
    expected = add_stream(engine, "b", first=4)
    for _ in range(4):
        engine.step()
    engine.abort("a")
    assert finish(engine) == {"b": expected[4:]}


def test_the_deadline_holds_with_a_step_on_its_way() -> None:
    now = 0.0
    engine = engine_of(LoggingRunner(), clock=lambda: now)
    params = dataclasses.replace(
        GREEDY, seed=seed_whose_completion([1, 2, 3], ends=False, length=12)
    )
    scheduling = SchedulingParams(deadline_seconds=5.0)
    engine.add(engine.new_sequence("a", [1, 2, 3], params, scheduling))
    for _ in range(4):
        engine.step()
    now = 6.0
    (output,) = engine.step()
    assert output.finish_reason is FinishReason.DEADLINE
    assert finish(engine) == {}


class PoisonAfterEos(CheckingRunner):
    """What is computed for an end-of-sequence token is not a number."""

    def _write(self, sequences: SequenceOf[Sequence], contexts: dict[Sequence, list[int]]) -> None:
        super()._write(sequences, contexts)
        for sequence in sequences:
            if contexts[sequence][-1] == EOS:
                self.slots[self._slot(sequence, len(contexts[sequence]) - 1)] = NOT_A_NUMBER

    def _result(self, sequence: Sequence, context: list[int]) -> SequenceResult:
        if context[-1] == EOS:
            return SequenceResult(error="not a number")
        return super()._result(sequence, context)


def test_no_number_from_behind_an_end_reaches_another_sequence() -> None:
    """The block that the step on its way has written to is cleared before anybody else uses it."""
    runner = PoisonAfterEos(4)
    engine = engine_of(runner, num_blocks=14, max_num_seqs=2, prefix_cache=False)
    for i in range(100):
        add(engine, str(i), [i % VOCAB, 2, 3], dataclasses.replace(GREEDY, max_tokens=40, seed=i))
    received = finish(engine)
    for i in range(100):
        assert received[str(i)] == expected_completion([i % VOCAB, 2, 3], i, 40)
    assert any(EOS in tokens for tokens in received.values())
    assert runner.num_ahead > 10


def test_a_revised_token_is_computed_again_and_then_waited_for() -> None:
    runner = LoggingRunner()
    engine = engine_of(runner)
    seed = seed_whose_completion([1, 2, 3], ends=False, length=12)
    expected = expected_completion([1, 2, 3], seed, 12)
    runner.revised = {expected[3]}
    add(engine, "a", [1, 2, 3], dataclasses.replace(GREEDY, seed=seed))
    assert finish(engine) == {"a": expected}
    first = expected.index(expected[3])
    assert runner.num_ahead == first  # the prompt's step, then one launched too many
    assert runner.log.count(f"launch {12 + 1}") == 1


def test_hopeful_drafts_are_waited_for() -> None:
    class Hopeless(GuessingDrafter):
        def has_hope(self, sequence: Any, num_running: int) -> bool:
            return False

        def propose(self, *_: Any) -> list[int]:
            return []

    class Hopeful(Hopeless):
        def has_hope(self, sequence: Any, num_running: int) -> bool:
            return True

    found = []
    for drafter in (Hopeful(), Hopeless()):
        runner = LoggingRunner()
        engine = engine_of(runner, drafter)
        add(engine, "a", [1, 2, 3])
        assert finish(engine) == {"a": expected_completion([1, 2, 3], 1, 12)}
        found.append(runner.num_ahead)
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_fails_on_its_way_fails_its_sequences_once(late: bool) -> None:
    runner = LoggingRunner()
    engine = engine_of(runner)
    add_stream(engine, "a")
    for _ in range(3):
        engine.step()
    runner.fail_next, runner.fails_late = not late, late
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.finish_reason for output in outputs if output.finish_reason] == [
        FinishReason.ERROR
    ]
    expected = add_stream(engine, "b")
    assert finish(engine) == {"b": expected}


async def test_a_client_that_has_enough_gets_no_token_more() -> None:
    """A stop string ends a sample from outside, a closed stream its request, with steps on the
    way."""
    engine = engine_of(LoggingRunner())
    seeds = [seed_whose_completion([i, 2, 3], ends=False, length=12) for i in range(2)]
    params = [dataclasses.replace(GREEDY, seed=seed) for seed in seeds]
    async_engine = AsyncEngine(engine)
    await async_engine.start()

    async def first_tokens(name: str, i: int, number: int) -> list[int | None]:
        tokens: list[int | None] = []
        async for output in async_engine.generate(name, [i, 2, 3], params[i]):
            tokens.append(output.token_id)
            if len(tokens) == number:
                async_engine.end_sample(name, 0)
        return tokens

    for round_ in range(10):
        few, all_ = await asyncio.gather(
            first_tokens(f"few {round_}", 0, 1 + round_), first_tokens(f"all {round_}", 1, 99)
        )
        assert few == expected_completion([0, 2, 3], seeds[0], 12)[: 1 + round_]
        assert all_ == expected_completion([1, 2, 3], seeds[1], 12)
    await async_engine.wait_idle()
    await async_engine.stop()
    engine.scheduler.check_integrity()
    assert not engine.scheduler.has_work


# The real runner, on a device that has done its work when it is launched.

REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "top_logprobs": 3},
    "seeded": {"temperature": 1.0, "seed": 5},
    "flat": {"temperature": 3.0, "seed": 6, "top_p": 0.999},
    "cut": {"temperature": 0.7, "seed": 7, "top_k": 5, "min_p": 0.01},
    "penalized": {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
    "repetition": {"temperature": 0.5, "seed": 8, "repetition_penalty": 1.3, "min_tokens": 9},
    "biased": {"temperature": 0, "logit_bias": {7: 3.0}},
    "twice": {"temperature": 1.0, "seed": 9, "n": 2},
}


def outputs_of(engine: LLMEngine) -> list[tuple[Any, ...]]:
    for i, (name, settings) in enumerate(REQUESTS.items()):
        params = SamplingParams(max_tokens=8 + 3 * i, **settings)
        engine.add(engine.new_sequence(name, prompt(3 + 7 * i, i), params))
    outputs: list[TokenOutput] = []
    while engine.has_work:
        outputs += engine.step()
        engine.scheduler.check_integrity()
    blocks = engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_blocks
    return sorted(
        (o.request_id, o.index, o.token_id, o.logprob, o.top_logprobs, o.rank, str(o.finish_reason))
        for o in outputs
    )


def going_ahead(engine: LLMEngine) -> ModelRunner:
    """Have an engine of the CPU go ahead, and look at its draws as late as one of a GPU."""
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    runner.sampler = Sampler(looks=False)
    engine.runs_ahead = True
    return runner


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.server.engine.sampler._NUM_CANDIDATES", (4, 16))


@pytest.mark.usefixtures("few_candidates")
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("drafts", [0, 4])
def test_all_kinds_of_requests_get_the_same_tokens(
    tiny_model: TinyModel, graphs: bool, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_num_seqs": 6, "max_num_batched_tokens": 24, "max_draft_tokens": drafts}
    expected = outputs_of(make_engine(tiny_model, **settings))
    engine = make_engine(tiny_model, **settings)
    runner = going_ahead(engine)
    recorder = EagerRecorder()
    if graphs:
        runner.record_graphs(recorder, max_num_seqs=6, max_model_len=512, max_bytes=1 << 30)
    num_ahead = 0
    launch = runner.launch

    def counting(output: SchedulerOutput, previous: Any = None) -> Any:
        nonlocal num_ahead
        num_ahead += previous is not None
        return launch(output, previous)

    monkeypatch.setattr(runner, "launch", counting)
    assert outputs_of(engine) == expected
    assert num_ahead > 3
    assert (recorder.num_replays > 5) == graphs


def test_a_step_ahead_that_does_not_fit_is_computed_in_parts(tiny_model: TinyModel) -> None:
    class SmallDevice(CpuBackend):
        """Has room for three sequences that decode."""

        num_failures = 0

        def plan_attention(self, batch: ForwardBatch) -> CpuPlan:
            starts = batch.query_start
            if len(starts) > 4 and int(starts[-1]) == len(starts) - 1:
                self.num_failures += 1
                raise torch.OutOfMemoryError("injected")
            return super().plan_attention(batch)

    expected = outputs_of(make_engine(tiny_model))
    device = SmallDevice()
    engine = make_engine(tiny_model, backend=device)
    going_ahead(engine)
    assert outputs_of(engine) == expected
    assert device.num_failures > 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_tokens_ahead(tiny_model: TinyModel) -> None:
    """With CUDA graphs and copies that are really on their way."""
    found = []
    for runs_ahead in (False, True):
        engine = make_engine(tiny_model, backend=load_backend("triton"))
        assert engine.runs_ahead
        engine.runs_ahead = runs_ahead
        found.append([each[:3] for each in outputs_of(engine)])
    assert found[0] == found[1]
