"""Every way a request ends before its completion does, and how the server itself ends."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lowbit.server.client import AsyncClient, Delta
from lowbit.server.config import EngineConfig, ServerConfig
from lowbit.server.types import CannotListen
from serving import ByteCodec, RecitingRunner, Rig, make_rig, running

CONFIG = ServerConfig(port=0, metrics_port=0)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Completions do not end by themselves, and every step waits to be allowed."""
    async with running(make_rig(RecitingRunner(endless=True, gated=True))) as rig:
        yield rig


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(rig.address) as client:
        yield client


async def assert_one_more_step_at_most(rig: Rig, num_steps: int) -> None:
    """The engine has taken `num_steps`, and the server learns of the end during the next."""
    await rig.wait_ended("cancelled", 1)
    rig.runner.open()
    await rig.wait_blocks_free()
    assert rig.runner.num_steps <= num_steps + 1


async def test_closing_a_stream_stops_the_generation(rig: Rig, client: AsyncClient) -> None:
    rig.runner.allow(3)
    async with aclosing(client.stream("Hi")) as stream:
        text = ""
        while len(text) < 3:  # what is made while a part is on its way comes as one part
            text += (await anext(stream)).text
        assert text == "Hel"
    await assert_one_more_step_at_most(rig, 3)


async def test_cancelling_a_unary_call_stops_the_generation(rig: Rig, client: AsyncClient) -> None:
    rig.runner.allow(3)
    call = asyncio.create_task(client.generate("Hi"))
    while rig.runner.num_steps < 3:
        await asyncio.sleep(0.001)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await assert_one_more_step_at_most(rig, 3)


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_deadline_stops_the_generation(
    rig: Rig, client: AsyncClient, streaming: bool
) -> None:
    rig.runner.allow(3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if streaming:
            async for _ in client.stream("Hi", timeout_seconds=0.2):
                pass
        else:
            await client.generate("Hi", timeout_seconds=0.2)
    assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
    await assert_one_more_step_at_most(rig, 3)


async def test_a_deadline_that_cannot_be_met_is_refused_on_arrival() -> None:
    engine = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32)
    config = replace(CONFIG, engine=engine)
    runner = RecitingRunner(step_seconds=0.02)
    async with running(make_rig(runner, config=config)) as rig, AsyncClient(rig.address) as client:
        await client.generate("a" * 100, max_tokens=1)  # shows how fast it is
        num_steps = rig.runner.num_steps
        with pytest.raises(grpc.aio.AioRpcError, match="400 tokens of this prompt") as caught:
            await client.generate("b" * 400, timeout_seconds=5, deadline_seconds=0.1)
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        assert rig.runner.num_steps == num_steps
        assert rig.ended("deadline") == 1
        assert (await client.generate("b" * 400, deadline_seconds=5)).text == "Hello, world!"


async def test_encoding_takes_its_time_off_the_deadline() -> None:
    class SlowCodec(ByteCodec):
        def encode(self, text: str, **options: bool) -> list[int]:
            time.sleep(0.2)
            return super().encode(text, **options)

    async with (
        running(make_rig(tokenizer=SlowCodec())) as rig,
        AsyncClient(rig.address) as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="before the request came") as caught:
            await client.generate("Hi", deadline_seconds=0.1)
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        assert rig.runner.num_steps == 0 and rig.ended("deadline") == 1
        assert (await client.generate("Hi", deadline_seconds=10)).text == "Hello, world!"


async def test_a_client_that_drops_its_connection_stops_the_generation(rig: Rig) -> None:
    rig.runner.allow(1)
    client = AsyncClient(rig.address)
    stream = client.stream("Hi")
    await anext(stream)
    await client.close()
    await assert_one_more_step_at_most(rig, 1)


async def test_a_client_may_ping_as_often_as_it_likes(rig: Rig) -> None:
    """By default gRPC answers the third ping of a silent client with a GOAWAY: calls are lost."""

    def frame(kind: int, payload: bytes = b"") -> bytes:
        return len(payload).to_bytes(3) + bytes([kind, 0, 0, 0, 0, 0]) + payload

    reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port)
    settings, ping, goaway, acknowledged = 4, 6, 7, 1
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings))
    for number in range(20):
        writer.write(frame(ping, number.to_bytes(8)))
        while True:
            header = await asyncio.wait_for(reader.readexactly(9), 5)
            payload = await reader.readexactly(int.from_bytes(header[:3]))
            assert header[3] != goaway
            if header[3:5] == bytes([ping, acknowledged]):
                break
        assert payload == number.to_bytes(8)
    writer.close()
    await writer.wait_closed()


async def test_an_old_connection_is_told_to_go_and_its_streams_may_end() -> None:
    runner = RecitingRunner(step_seconds=0.1)  # 14 of them: a stream outlives its connection's age
    config = replace(CONFIG, max_connection_age_seconds=0.5)
    async with running(make_rig(runner, config=config)) as rig, AsyncClient(rig.address) as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        stream = asyncio.create_task(finish(client))
        kinds: list[int] = []
        async with asyncio.timeout(5):
            while 7 not in kinds:  # GOAWAY
                header = await reader.readexactly(9)
                await reader.readexactly(int.from_bytes(header[:3]))
                kinds.append(header[3])
        assert not stream.done()
        deltas = await stream
        assert isinstance(deltas, list)
        assert "".join(delta.text for delta in deltas) == "Hello, world!"
        assert (await client.generate("Hi")).text == "Hello, world!"
        writer.close()


async def test_no_block_is_lost_in_a_storm_of_random_ends() -> None:
    chance = random.Random(0)
    runner = RecitingRunner(endless=True, step_seconds=0.0002)

    async def one(client: AsyncClient) -> None:
        patience = chance.uniform(0, 0.03)
        stream = client.stream("Hi", max_tokens=chance.randint(1, 60), timeout_seconds=patience)
        try:
            async with aclosing(stream):
                for _ in range(chance.randint(0, 60)):
                    await anext(stream)
        except StopAsyncIteration:
            pass
        except grpc.aio.AioRpcError as error:
            assert error.code() is StatusCode.DEADLINE_EXCEEDED

    async with running(make_rig(runner)) as rig, AsyncClient(rig.address) as client:
        await client.wait_until_serving()
        for _ in range(10):
            await asyncio.gather(*(one(client) for _ in range(50)))
        await rig.wait_blocks_free()
        assert rig.ended("cancelled") > 0
        assert rig.ended("error") == 0


async def test_a_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    runner = RecitingRunner(gated=True)
    async with (
        running(make_rig(runner)) as rig,
        AsyncClient(rig.address, max_attempts=1) as client,
    ):
        runner.allow(1)
        stream = client.stream("Hi")
        text = (await anext(stream)).text
        drain = asyncio.create_task(rig.server.drain())
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await client.generate("Hi", timeout_seconds=5)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        assert rig.ended("draining") == 1
        assert not drain.done()
        runner.open()
        text += "".join([delta.text async for delta in stream])
        assert text == "Hello, world!"
        await asyncio.wait_for(drain, 5)


async def finish(client: AsyncClient) -> list[Delta] | grpc.aio.AioRpcError:
    try:
        return [delta async for delta in client.stream("Hi")]
    except grpc.aio.AioRpcError as error:
        return error


async def test_requests_that_outlast_the_grace_are_told_so() -> None:
    runner = RecitingRunner(endless=True, step_seconds=0.001)
    rig = make_rig(runner, config=replace(CONFIG, drain_grace_seconds=0.01))
    async with running(rig), AsyncClient(rig.address, max_attempts=1) as client:
        requests = [asyncio.create_task(finish(client)) for _ in range(3)]
        while rig.llm.scheduler.num_running < 3:
            await asyncio.sleep(0.001)
        await rig.server.drain()
        await rig.server.stop()
        for error in await asyncio.gather(*requests):
            assert isinstance(error, grpc.aio.AioRpcError)
            assert error.code() is StatusCode.UNAVAILABLE
            assert "the server stopped before the request was finished" in (error.details() or "")
            metadata = dict(error.trailing_metadata() or ())
            status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
            assert any(each.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for each in status.details)


async def test_a_drain_can_be_hurried() -> None:
    runner = RecitingRunner(endless=True, step_seconds=0.001)
    async with (
        running(make_rig(runner)) as rig,
        AsyncClient(rig.address, max_attempts=1) as client,
    ):
        request = asyncio.create_task(finish(client))
        while rig.runner.num_steps == 0:
            await asyncio.sleep(0.001)
        drain = asyncio.create_task(rig.server.drain())
        rig.server.hurry()
        await asyncio.wait_for(drain, 5)
        await rig.server.stop()
        assert isinstance(await request, grpc.aio.AioRpcError)


async def test_an_open_health_watch_does_not_hold_the_end_up() -> None:
    async with (
        running(make_rig()) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
    ):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        async with asyncio.timeout(1):
            await rig.server.drain()
            await rig.server.stop()
        watch.cancel()


@pytest.mark.parametrize("which", ["port", "metrics_port"])
async def test_a_port_in_use_is_one_clear_error(which: str, capfd: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        rig = make_rig(config=replace(CONFIG, **{which: port}))
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            async with running(rig, with_metrics=True):
                pass
    assert capfd.readouterr() == ("", "")


async def test_a_host_that_is_not_this_machine_is_one_clear_error() -> None:
    with pytest.raises(CannotListen, match=r"cannot listen on 192\.0\.2\.1:0: Cannot assign"):
        async with running(make_rig(config=replace(CONFIG, host="192.0.2.1", allow_insecure=True))):
            pass
