"""What one connection may do and what it costs, between real clients and the server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from lowbit.proto import generation_pb2 as pb
from lowbit.proto import generation_pb2_grpc as pb_grpc
from lowbit.server.client import AsyncClient
from lowbit.server.config import ServerConfig
from proxy import GOAWAY, PING, Proxy, proxy
from serving import RecitingRunner, Rig, make_rig, running

CONFIG = ServerConfig(port=0, metrics_port=0)
REQUEST = pb.GenerateRequest(text="Hi")
PINGING = (
    ("grpc.keepalive_time_ms", 200),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(make_rig(RecitingRunner(gated=True))) as rig:
        yield rig
        await rig.wait_blocks_free()


async def wait_pings(wire: Proxy, number: int) -> None:
    async with asyncio.timeout(10):
        while wire.up[PING] < number:
            await asyncio.sleep(0.02)


async def test_pings_through_a_long_silent_call_and_between_calls(rig: Rig) -> None:
    """By default gRPC answers a client's third ping without data with ENHANCE_YOUR_CALM."""
    async with (
        proxy(rig.server.port) as wire,
        grpc.aio.insecure_channel(f"127.0.0.1:{wire.port}", options=PINGING) as channel,
    ):
        generate = pb_grpc.GenerationServiceStub(channel).Generate
        call = asyncio.create_task(_response(generate(REQUEST, timeout=20)))
        await wait_pings(wire, 4)
        rig.runner.open()
        assert (await call).outputs[0].text == "Hello, world!"
        await wait_pings(wire, 7)
        assert (await generate(REQUEST)).outputs[0].text == "Hello, world!"
        assert wire.num_connections == 1 and wire.down[GOAWAY] == 0


async def _response(call: grpc.aio.UnaryUnaryCall) -> pb.GenerateResponse:
    response: pb.GenerateResponse = await call
    return response


async def test_a_peer_that_vanished_without_a_word_loses_its_request() -> None:
    config = replace(CONFIG, keepalive_seconds=0.3, keepalive_timeout_seconds=0.3)
    async with (
        running(make_rig(RecitingRunner(gated=True), config=config)) as rig,
        proxy(rig.server.port) as wire,
        grpc.aio.insecure_channel(f"127.0.0.1:{wire.port}") as channel,
    ):
        rig.runner.allow(1)
        call = pb_grpc.GenerationServiceStub(channel).GenerateStream(REQUEST)
        await call.read()
        wire.is_cut = True
        began = time.monotonic()
        await rig.wait_ended("cancelled", 1)
        assert time.monotonic() - began < 3
        rig.runner.open()
        await rig.wait_blocks_free()
        call.cancel()


async def test_a_silent_peer_that_answers_pings_keeps_its_request() -> None:
    config = replace(CONFIG, keepalive_seconds=0.1, keepalive_timeout_seconds=0.3)
    async with (
        running(make_rig(RecitingRunner(gated=True), config=config)) as rig,
        proxy(rig.server.port) as wire,
        grpc.aio.insecure_channel(f"127.0.0.1:{wire.port}") as channel,
    ):
        generate = pb_grpc.GenerationServiceStub(channel).Generate
        call = asyncio.create_task(_response(generate(REQUEST, timeout=20)))
        async with asyncio.timeout(10):
            while wire.down[PING] < 5:
                await asyncio.sleep(0.02)
        rig.runner.open()
        assert (await call).outputs[0].text == "Hello, world!"


async def test_calls_beyond_the_limit_of_a_connection_wait_at_the_client() -> None:
    rig = make_rig(RecitingRunner(gated=True), config=replace(CONFIG, max_concurrent_streams=2))
    async with running(rig), AsyncClient(rig.address) as client:
        calls = [asyncio.create_task(client.generate("Hi")) for _ in range(5)]
        async with asyncio.timeout(5):
            while rig.server.num_requests < 2:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert rig.server.num_requests == 2
        rig.runner.open()
        assert {each.text for each in await asyncio.gather(*calls)} == {"Hello, world!"}


async def test_a_reply_over_the_limit_is_a_status_and_harms_nobody() -> None:
    config = replace(CONFIG, max_send_message_bytes=150)
    async with running(make_rig(config=config)) as rig, AsyncClient(rig.address) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.generate("Hi")
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert (await client.generate("Hi", max_tokens=1)).text == "H"
        await rig.wait_blocks_free()


@pytest.mark.parametrize("reuse_port", [False, True])
async def test_a_port_is_shared_by_wish_alone(reuse_port: bool) -> None:
    async with running(make_rig(config=replace(CONFIG, reuse_port=reuse_port))) as rig:
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if reuse_port:
                other.bind(("127.0.0.1", rig.server.port))
                return
            with pytest.raises(OSError, match="Address already in use"):
                other.bind(("127.0.0.1", rig.server.port))


async def test_gzip_makes_replies_smaller() -> None:
    sizes = {}
    for compression in ("none", "gzip"):
        rig = make_rig(config=replace(CONFIG, compression=compression))
        async with (
            running(rig),
            proxy(rig.server.port) as wire,
            AsyncClient(f"127.0.0.1:{wire.port}") as client,
        ):
            generation = await client.generate("Hi", ignore_eos=True, max_tokens=500)
            assert generation.text == "Hello, world!"
            sizes[compression] = wire.num_bytes_down
    assert sizes["gzip"] < sizes["none"] / 3
