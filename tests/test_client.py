from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from lowbit.server.client import AbortOutcome, AsyncClient, Client
from lowbit.server.config import ServerConfig
from lowbit.server.types import ChatMessage, FinishReason
from serving import RecitingRunner, Rig, make_rig, running

HELLO = ChatMessage(role="user", content="Hello")


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(make_rig()) as rig:
        yield rig


async def test_blocking_generate_and_stream(rig: Rig) -> None:
    def use() -> None:
        with Client(rig.address) as client:
            client.wait_until_serving(5)
            generation = client.generate("Hi", stop=["wor"], temperature=0, seed=1)
            assert generation.text == "Hello, "
            assert generation.finish_reason is FinishReason.STOP
            deltas = list(client.stream([HELLO], max_tokens=3, request_id="mine"))
            assert "".join(delta.text for delta in deltas) == "Hel"
            assert {delta.request_id for delta in deltas} == {"mine"}
            assert deltas[-1].finish_reason is FinishReason.LENGTH
            assert client.generate(range(5)).usage.prompt_tokens == 5

    await asyncio.to_thread(use)


async def test_asyncio_generate_and_stream(rig: Rig) -> None:
    async with AsyncClient(rig.address) as client:
        await client.wait_until_serving(5)
        generation, deltas = await asyncio.gather(
            client.generate([HELLO]), collect(client, max_tokens=3)
        )
        assert generation.text == "Hello, world!"
        assert "".join(deltas) == "Hel"


async def collect(client: AsyncClient, *, max_tokens: int) -> list[str]:
    return [delta.text async for delta in client.stream("Hi", max_tokens=max_tokens)]


async def test_leaving_a_loop_cancels_the_call() -> None:
    def use(address: str) -> None:
        with Client(address) as client:
            for _ in client.stream("Hi", max_tokens=400):
                break
            with closing(client.stream("Hi", max_tokens=400)) as stream:
                next(stream)

    runner = RecitingRunner(endless=True, step_seconds=0.001)
    async with running(make_rig(runner)) as rig:
        await asyncio.to_thread(use, rig.address)
        await rig.wait_ended("cancelled", 2)
        async with AsyncClient(rig.address) as client:
            async for _ in client.stream("Hi", max_tokens=400):
                break
            await rig.wait_ended("cancelled", 3)
        await rig.wait_blocks_free()


async def test_a_timeout(rig: Rig) -> None:
    rig.runner.endless, rig.runner.step_seconds = True, 0.001

    def use() -> StatusCode:
        with Client(rig.address) as client, pytest.raises(grpc.RpcError) as caught:
            client.generate("Hi", max_tokens=500, timeout_seconds=0.05)
        code = caught.value.code()
        assert isinstance(code, StatusCode)
        return code

    assert await asyncio.to_thread(use) is StatusCode.DEADLINE_EXCEEDED
    async with AsyncClient(rig.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in client.stream("Hi", max_tokens=500, timeout_seconds=0.05):
                pass
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED


async def test_waiting_for_a_server_that_comes_late() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    rig = make_rig(config=ServerConfig(port=port, metrics_port=0))
    async with AsyncClient(f"127.0.0.1:{port}") as client:
        waiting = asyncio.create_task(client.wait_until_serving(10))
        blocking = asyncio.create_task(asyncio.to_thread(wait_blocking, f"127.0.0.1:{port}", 10))
        await asyncio.sleep(0.05)
        assert not waiting.done() and not blocking.done()
        async with running(rig):
            await asyncio.gather(waiting, blocking)


def wait_blocking(address: str, timeout_seconds: float) -> None:
    with Client(address) as client:
        client.wait_until_serving(timeout_seconds)


async def test_waiting_for_a_server_that_does_not_serve(rig: Rig) -> None:
    await rig.server.drain()
    with pytest.raises(TimeoutError, match=r"did not serve within 0\.05 seconds"):
        await asyncio.to_thread(wait_blocking, rig.address, 0.05)
    async with AsyncClient(rig.address) as client:
        with pytest.raises(TimeoutError, match=r"did not serve within 0\.05 seconds"):
            await client.wait_until_serving(0.05)


async def test_arguments_that_no_server_should_see() -> None:
    async with AsyncClient() as client:
        with pytest.raises(TypeError, match="either token ids or chat messages"):
            await client.generate([1, HELLO])  # type: ignore[list-item]
        with pytest.raises(ValueError, match="temprature"):
            await client.generate("Hi", temprature=1.0)  # type: ignore[call-arg]


@pytest.fixture
def own_level() -> Iterator[None]:
    logger = logging.getLogger("lowbit")
    level = logger.level
    yield
    logger.setLevel(level)


async def test_tokens_and_texts_both_ways(rig: Rig) -> None:
    def use() -> None:
        with Client(rig.address) as client:
            tokens = client.tokenize("né")
            assert tokens.ids == tuple("né".encode()) and tokens.texts[0] == "n"
            assert client.count_tokens("né") == 3
            assert client.count_tokens([HELLO]) == len(client.tokenize([HELLO]).ids) > 5
            assert client.detokenize(tokens.ids) == "né"

    await asyncio.to_thread(use)
    async with AsyncClient(rig.address) as client:
        tokens = await client.tokenize("né")
        assert tokens.ids == tuple("né".encode()) and tokens.texts[0] == "n"
        assert await client.count_tokens("né") == 3
        assert await client.count_tokens([HELLO]) == len((await client.tokenize([HELLO])).ids) > 5
        assert await client.detokenize(tokens.ids) == "né"
        with pytest.raises(grpc.RpcError, match="320"):
            await client.detokenize([320])


async def test_what_is_served_and_how_busy_it_is(rig: Rig) -> None:
    def use() -> tuple[object, object, object]:
        with Client(rig.address) as client:
            return client.model(), client.server_info(), client.load()

    async with AsyncClient(rig.address) as client:
        model, info, load = await client.model(), await client.server_info(), await client.load()
        blocking_model, blocking_info, blocking_load = await asyncio.to_thread(use)
    assert (model.name, model.max_model_len, model.vocab_size) == ("recital", 512, 320)
    assert model.quantization is None and model.has_chat_template
    assert info.state == "serving" and info.uptime_seconds > 0
    assert info.max_receive_message_bytes == rig.config.max_message_bytes
    assert (load.num_running, load.num_waiting, load.num_requests) == (0, 0, 0)
    assert (blocking_model, blocking_load) == (model, load)
    assert blocking_info == replace(info, uptime_seconds=blocking_info.uptime_seconds)


async def test_the_operators_calls(own_level: None) -> None:
    runner = RecitingRunner(endless=True, step_seconds=0.02)
    async with running(make_rig(runner)) as rig, AsyncClient(rig.address, max_attempts=1) as client:
        calls = [
            asyncio.create_task(client.generate("Hi", request_id=f"r{i}", max_tokens=500))
            for i in range(4)
        ]
        while rig.llm.scheduler.num_running < 4:
            await asyncio.sleep(0.001)

        def use() -> None:
            with Client(rig.address, max_attempts=1) as blocking:
                outcomes = blocking.abort(["r0", "nobody's"])
                assert outcomes == {
                    "r0": AbortOutcome.ABORTED,
                    "nobody's": AbortOutcome.NOT_FOUND,
                }
                blocking.set_log_level("error")
                assert blocking.set_log_level("warning") == "error"
                assert blocking.drain(grace_seconds=0.01) == 3

        await asyncio.to_thread(use)
        assert (await calls[0]).finish_reason is FinishReason.CANCELLED
        assert (await client.abort(["r0", "r1"])) == {
            "r0": AbortOutcome.ALREADY_FINISHED,
            "r1": AbortOutcome.ABORTED,
        }
        assert await client.set_log_level("info") == "warning"
        assert set(await client.abort_all()) == {"r2", "r3"}
        await asyncio.gather(*calls)
        assert await client.drain() == 0
        assert (await client.server_info()).state == "draining"
