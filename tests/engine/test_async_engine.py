"""The thread boundary: every end of a request frees its blocks, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator

import pytest
from lowbit.server.config import EngineConfig
from lowbit.server.engine.async_engine import AsyncEngine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, SequenceResult
from lowbit.server.types import (
    DeadlineExceeded,
    Draining,
    EngineFailed,
    FinishReason,
    InvalidRequest,
    QueueFull,
    QueueTimeout,
    SamplingParams,
    SchedulingParams,
    StepStats,
    TokenOutput,
)
from runners import BlockingRunner

NUM_BLOCKS = 40


class CountingRunner(BlockingRunner):
    """Yields 1, 2, 3, …; can be held at a gate, and told to fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next = False
        self.fails = False
        self.poisoned: set[str] = set()
        self.step_seconds = 0.0

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        assert self.gate.wait(10)
        time.sleep(self.step_seconds)
        if self.fail_next or self.fails:
            self.fail_next = False
            raise RuntimeError("injected")
        yielding = [sequence for sequence in output.sequences if sequence.yields_token]
        return [
            SequenceResult(error="not a number")
            if s.request_id in self.poisoned
            else SequenceResult((SampledToken(s.num_completion_tokens + 1, -0.5),))
            for s in yielding
        ]


class Harness:
    def __init__(self, step_timeout_seconds: float = 300.0, **settings: float) -> None:
        self.now = 0.0
        self.runner = CountingRunner()
        config = EngineConfig(
            block_size=4,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            max_queued_requests=3,
            **settings,
        )
        self.llm = LLMEngine(
            self.runner,
            config,
            num_blocks=NUM_BLOCKS,
            max_model_len=1000,
            vocab_size=2000,
            eos_token_ids=frozenset(),
            clock=lambda: self.now,
        )
        self.stats: list[StepStats] = []
        self.engine = AsyncEngine(
            self.llm, on_step=self.stats.append, step_timeout_seconds=step_timeout_seconds
        )

    def generate(
        self,
        request_id: str,
        max_tokens: int = 5,
        prompt_length: int = 3,
        n: int = 1,
        deadline_seconds: float | None = None,
    ):
        return self.engine.generate(
            request_id,
            [7] * prompt_length,
            SamplingParams(max_tokens=max_tokens, n=n),
            SchedulingParams(deadline_seconds=deadline_seconds),
        )

    async def tokens(self, request_id: str, max_tokens: int = 5) -> list[int]:
        return [output.token_id async for output in self.generate(request_id, max_tokens)]

    async def close(self) -> None:
        self.runner.fails = False
        self.runner.gate.set()
        await self.engine.stop()

    async def all_blocks_free(self) -> None:
        """Within a few steps, not at once: an abort takes effect between steps."""
        blocks = self.llm.scheduler.block_manager
        async with asyncio.timeout(5):
            while blocks.num_free_blocks != NUM_BLOCKS or self.llm.has_work:
                await asyncio.sleep(0.001)
        self.llm.scheduler.check_integrity()


@pytest.fixture
async def harness() -> AsyncIterator[Harness]:
    harness = Harness()
    await harness.engine.start()
    yield harness
    await harness.close()


async def test_concurrent_requests_each_get_their_own_tokens(harness: Harness) -> None:
    results = await asyncio.gather(*(harness.tokens(f"r{i}", 3 + i) for i in range(3)))
    assert results == [list(range(1, 4 + i)) for i in range(3)]
    await harness.engine.wait_idle()
    await harness.all_blocks_free()
    assert sum(stats.num_generation_tokens for stats in harness.stats) == 3 + 4 + 5


async def test_the_last_output_alone_has_a_finish_reason(harness: Harness) -> None:
    outputs = [output async for output in harness.generate("r")]
    assert [o.finish_reason for o in outputs] == [None] * 4 + [FinishReason.LENGTH]


async def test_closing_the_generator_frees_the_blocks(harness: Harness) -> None:
    stream = harness.generate("r", max_tokens=100)
    assert (await anext(stream)).token_id == 1
    await stream.aclose()
    await harness.all_blocks_free()
    async with asyncio.timeout(5):
        while harness.stats[-1].num_running:  # reported right after the blocks are free
            await asyncio.sleep(0.001)


async def test_cancelling_while_queued_frees_the_place(harness: Harness) -> None:
    harness.runner.gate.clear()
    tasks = [asyncio.create_task(harness.tokens(f"r{i}")) for i in range(4)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    harness.runner.gate.set()
    await harness.all_blocks_free()


async def test_a_thousand_random_ends_leak_nothing(harness: Harness) -> None:
    rng = random.Random(1)

    async def caller(index: int) -> None:
        try:
            async with asyncio.timeout(rng.random() * 0.02):
                await harness.tokens(f"r{index}", rng.randint(1, 60))
        except (TimeoutError, QueueFull, EngineFailed):
            pass

    for start in range(0, 1000, 10):
        harness.runner.fail_next = rng.random() < 0.1
        await asyncio.gather(*(caller(start + i) for i in range(10)))
    await harness.all_blocks_free()
    assert await harness.tokens("still-serving") == [1, 2, 3, 4, 5]


async def test_a_full_queue_refuses_at_once(harness: Harness) -> None:
    harness.runner.gate.clear()
    first = asyncio.create_task(harness.tokens("r0"))
    await asyncio.sleep(0.02)  # r0 is in its step now; the next ones wait in the inbox
    tasks = [asyncio.create_task(harness.tokens(f"r{i}")) for i in range(1, 6)]
    await asyncio.sleep(0.02)
    harness.runner.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [result for result in results if isinstance(result, QueueFull)]
    assert len(refused) == 2
    assert "max_queued_requests is 3" in str(refused[0])
    assert await first == [1, 2, 3, 4, 5]


async def test_a_failing_step_fails_its_requests_alone(harness: Harness) -> None:
    harness.runner.fail_next = True
    outputs = [output async for output in harness.generate("r")]
    assert [(o.token_id, o.finish_reason) for o in outputs] == [(None, FinishReason.ERROR)]
    assert "RuntimeError" in outputs[0].error
    assert harness.engine.is_healthy
    assert await harness.tokens("next") == [1, 2, 3, 4, 5]
    await harness.all_blocks_free()


async def test_draining_refuses_new_requests_and_finishes_the_running(harness: Harness) -> None:
    stream = harness.generate("r", max_tokens=20)
    await anext(stream)
    harness.engine.begin_drain()
    with pytest.raises(Draining):
        await anext(harness.generate("late"))
    assert len([output async for output in stream]) == 19
    async with asyncio.timeout(1):
        await harness.engine.wait_idle()


async def test_stopping_fails_what_is_left(harness: Harness) -> None:
    harness.runner.gate.clear()
    request = asyncio.create_task(harness.tokens("r", max_tokens=100))
    await asyncio.sleep(0.02)  # the request is in its first step
    stopping = asyncio.create_task(harness.engine.stop())
    await asyncio.sleep(0.02)
    harness.runner.gate.set()
    await stopping
    with pytest.raises(Draining):
        await request
    assert not harness.engine.is_healthy


async def test_a_bug_in_the_engine_thread_fails_every_request(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(harness.llm.scheduler, "schedule", broken)
    with pytest.raises(EngineFailed, match="engine thread died"):
        await anext(harness.generate("r"))
    assert not harness.engine.is_healthy
    with pytest.raises(EngineFailed, match="not running"):
        await anext(harness.generate("next"))


async def test_refusals_come_before_the_queue(harness: Harness) -> None:
    with pytest.raises(InvalidRequest, match="prompt has 0 tokens"):
        await anext(harness.generate("r", prompt_length=0))
    stream = harness.generate("twice", max_tokens=100)
    await anext(stream)
    with pytest.raises(InvalidRequest, match="request_id is 'twice'"):
        await anext(harness.generate("twice"))
    await stream.aclose()
    await harness.all_blocks_free()


async def test_a_second_failing_step_in_a_row_is_the_engines_end(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    harness.runner.fails = True
    outputs = [output async for output in harness.generate("first")]
    assert outputs[-1].finish_reason is FinishReason.ERROR
    assert harness.engine.is_healthy
    with pytest.raises(EngineFailed, match="2 steps in a row failed"):
        await anext(harness.generate("second"))
    assert not harness.engine.is_healthy
    async with asyncio.timeout(1):
        failure = await harness.engine.wait_failed()
    assert "2 steps in a row" in str(failure)
    assert "second[0] prompt 3 completion 0" in caplog.text  # what was scheduled


async def test_failures_with_a_step_between_are_survived(harness: Harness) -> None:
    for number in range(5):
        harness.runner.fail_next = True
        outputs = [output async for output in harness.generate(f"bad{number}")]
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert await harness.tokens(f"good{number}") == [1, 2, 3, 4, 5]
    assert harness.engine.is_healthy


async def test_a_step_that_hangs_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(step_timeout_seconds=0.2)
    await harness.engine.start()
    assert await harness.tokens("before") == [1, 2, 3, 4, 5]
    harness.runner.gate.clear()
    with pytest.raises(EngineFailed, match=r"a step has taken more than 0\.2 s"):
        await anext(harness.generate("r"))
    assert not harness.engine.is_healthy
    async with asyncio.timeout(1):
        await harness.engine.wait_failed()
        await harness.engine.stop()  # does not wait for the thread that hangs
    assert "r[0] prompt 3 completion 0" in caplog.text
    harness.runner.gate.set()


async def test_an_idle_engine_is_not_taken_for_a_hung_one() -> None:
    harness = Harness(step_timeout_seconds=0.1)
    await harness.engine.start()
    await asyncio.sleep(0.5)
    assert await harness.tokens("r") == [1, 2, 3, 4, 5]
    assert harness.engine.is_healthy
    await harness.close()


async def test_a_lost_block_is_noticed_when_idle(harness: Harness) -> None:
    await harness.tokens("r")
    harness.llm.scheduler.block_manager._free.pop()
    async with asyncio.timeout(5):
        await harness.engine.wait_failed()


async def test_numbers_that_are_none_fail_one_request(harness: Harness) -> None:
    harness.runner.poisoned.add("bad")
    good = asyncio.create_task(harness.tokens("good", 20))
    outputs = [output async for output in harness.generate("bad")]
    assert [(o.finish_reason, o.error) for o in outputs] == [(FinishReason.ERROR, "not a number")]
    assert await good == list(range(1, 21))
    await harness.all_blocks_free()


async def test_a_deadline_ends_a_running_request(harness: Harness) -> None:
    harness.runner.step_seconds = 0.01
    stream = harness.generate("r", max_tokens=150, deadline_seconds=10)
    assert (await anext(stream)).token_id == 1
    harness.now = 9.9
    assert (await anext(stream)).token_id == 2
    harness.now = 10.0
    with pytest.raises(DeadlineExceeded, match="deadline_seconds is 10; that time is over"):
        async for _ in stream:
            pass
    await harness.all_blocks_free()


async def test_waiting_requests_end_by_their_deadline_or_the_queues_timeout() -> None:
    harness = Harness(max_queue_seconds=20.0)
    harness.runner.step_seconds = 0.01
    await harness.engine.start()
    streams = [harness.generate(f"r{i}", max_tokens=150) for i in range(8)]
    for stream in streams:  # all places are taken
        await anext(stream)
    urgent = asyncio.create_task(anext(harness.generate("urgent", deadline_seconds=5)))
    patient = asyncio.create_task(anext(harness.generate("patient")))
    async with asyncio.timeout(5):
        while harness.llm.scheduler.num_waiting < 2:
            await asyncio.sleep(0.001)
        harness.now = 5.0
        with pytest.raises(DeadlineExceeded, match="deadline_seconds is 5"):
            await urgent
        harness.now = 20.0
        with pytest.raises(QueueTimeout, match=r"waited for 20 seconds \(max_queue_seconds\)"):
            await patient
    for stream in streams:
        await anext(stream)  # those that run know no such timeout
        await stream.aclose()
    await harness.all_blocks_free()
    await harness.close()


async def test_the_first_token_says_how_long_its_request_waited_and_was_computed() -> None:
    harness = Harness()
    await harness.engine.start()
    streams = [harness.generate(f"r{i}", max_tokens=150) for i in range(8)]
    for stream in streams:  # all places are taken
        await anext(stream)
    outputs: list[TokenOutput] = []

    async def late() -> None:
        outputs.extend([output async for output in harness.generate("late", n=2)])

    waiting = asyncio.create_task(late())
    async with asyncio.timeout(5):
        while harness.llm.scheduler.num_waiting < 2:
            await asyncio.sleep(0.001)
        harness.runner.gate.clear()
        harness.now = 7.0
        await streams.pop().aclose()
        await streams.pop().aclose()
        harness.runner.gate.set()
        await waiting
    first = [output for output in outputs if output.queue_seconds is not None]
    assert [(each.index, each.token_id) for each in first] == [(0, 1), (1, 1)]
    assert [(each.queue_seconds, each.prefill_seconds) for each in first] == [(7.0, 0.0)] * 2
    for stream in streams:
        await stream.aclose()
    await harness.all_blocks_free()
    await harness.close()


async def test_samples_end_one_by_one(harness: Harness) -> None:
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    reasons = {}
    async for output in harness.generate("r", max_tokens=6, n=3):
        tokens[output.index].append(output.token_id)
        if output.finish_reason is not None:
            reasons[output.index] = output.finish_reason
        if output.index == 1 and output.token_id == 2:
            harness.engine.end_sample("r", 1)
    assert tokens == {0: [1, 2, 3, 4, 5, 6], 1: [1, 2], 2: [1, 2, 3, 4, 5, 6]}
    assert reasons == {0: FinishReason.LENGTH, 2: FinishReason.LENGTH}
    await harness.all_blocks_free()


async def test_a_request_id_can_be_used_again_at_once(harness: Harness) -> None:
    """Tokens of the first request that are on their way must not reach the second."""
    for _ in range(50):
        stream = harness.generate("same", max_tokens=100)
        await anext(stream)
        await stream.aclose()
        assert await harness.tokens("same", 3) == [1, 2, 3]
