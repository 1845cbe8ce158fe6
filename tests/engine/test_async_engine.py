"""The thread boundary: every end of a request frees its blocks, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator

import pytest
from lowbit.server.config import EngineConfig
from lowbit.server.engine.async_engine import AsyncEngine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, SequenceResult
from lowbit.server.types import (
    Draining,
    EngineFailed,
    FinishReason,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    StepStats,
)

NUM_BLOCKS = 40


class CountingRunner:
    """Yields 1, 2, 3, …; can be held at a gate, and told to fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next = False

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        assert self.gate.wait(10)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("injected")
        yielding = [sequence for sequence in output.sequences if sequence.yields_token]
        return [
            SequenceResult((SampledToken(s.num_completion_tokens + 1, -0.5),)) for s in yielding
        ]


class Harness:
    def __init__(self) -> None:
        self.runner = CountingRunner()
        config = EngineConfig(
            block_size=4, max_num_seqs=8, max_num_batched_tokens=32, max_queued_requests=3
        )
        self.llm = LLMEngine(
            self.runner,
            config,
            num_blocks=NUM_BLOCKS,
            max_model_len=1000,
            vocab_size=2000,
            eos_token_ids=frozenset(),
        )
        self.stats: list[StepStats] = []
        self.engine = AsyncEngine(self.llm, on_step=self.stats.append)

    def generate(self, request_id: str, max_tokens: int = 5, prompt_length: int = 3):
        params = SamplingParams(max_tokens=max_tokens)
        return self.engine.generate(request_id, [7] * prompt_length, params)

    async def tokens(self, request_id: str, max_tokens: int = 5) -> list[int]:
        return [output.token_id async for output in self.generate(request_id, max_tokens)]

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
    harness.runner.gate.set()
    await harness.engine.stop()


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
