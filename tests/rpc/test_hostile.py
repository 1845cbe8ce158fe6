"""Callers that mean harm, or do it by accident: each gets its status, and health stays quick."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.proto import generation_pb2 as pb
from lowbit.server.client import AsyncClient
from lowbit.server.config import ServerConfig
from lowbit.server.rpc.tenants import hash_key, new_key
from serving import RecitingRunner, Rig, make_rig, running

CONFIG = ServerConfig(port=0, metrics_port=0)
MAX_HEALTH_SECONDS = 0.1


@asynccontextmanager
async def quick_health(address: str, credentials: Any = None) -> AsyncIterator[None]:
    """Health is answered all the while, every time within the bound."""
    times: list[float] = []

    async def probe() -> None:
        async with (
            grpc.aio.secure_channel(address, credentials)
            if credentials
            else grpc.aio.insecure_channel(address)
        ) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
            while True:
                began = time.perf_counter()
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                times.append(time.perf_counter() - began)
                await asyncio.sleep(0.01)

    probing = asyncio.create_task(probe())
    try:
        yield
        await asyncio.sleep(0.1)
    finally:
        probing.cancel()
        await asyncio.wait({probing})
    assert times, probing
    assert max(times) < MAX_HEALTH_SECONDS


async def test_a_caller_that_does_not_read_loses_its_request_and_nobody_else_does() -> None:
    runner = RecitingRunner(endless=True)
    config = replace(CONFIG, stall_timeout_seconds=0.3, max_buffered_tokens=64)
    rig = make_rig(runner, config=config, max_model_len=100_000, num_blocks=8192)
    # The window that HTTP/2 gives a stream: what fits it is sent though nobody reads.
    window = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    async with (
        running(rig),
        grpc.aio.insecure_channel(rig.address, options=window) as channel,
        AsyncClient(rig.address) as client,
    ):
        stream = channel.unary_stream(
            "/lowbit.v1.GenerationService/GenerateStream",
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        params = pb.SamplingParams(max_tokens=90_000, ignore_eos=True)
        call = stream(pb.GenerateRequest(text="Hi", sampling=params))
        await call.read()
        async with quick_health(rig.address):
            await rig.wait_ended("stalled", 1)
            assert (await client.generate("Hi", max_tokens=5)).text == "Hello"
        await rig.wait_blocks_free()
        call.cancel()


async def test_five_hundred_idle_connections() -> None:
    async with running(make_rig()) as rig, AsyncClient(rig.address) as client:
        idle = [await asyncio.open_connection("127.0.0.1", rig.server.port) for _ in range(500)]
        async with quick_health(rig.address):
            assert (await client.generate("Hi")).text == "Hello, world!"
        for _, writer in idle:
            writer.close()


async def test_a_message_of_64_megabytes() -> None:
    async with (
        running(make_rig()) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
        quick_health(rig.address),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/lowbit.v1.GenerationService/Generate")(bytes(64 << 20))
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED


async def test_a_flood_without_keys(tmp_path: Path) -> None:
    path, key = tmp_path / "keys.toml", new_key()
    path.write_text(f'[tenants.a]\nkeys = ["{hash_key(key)}"]')
    async with (
        running(make_rig(config=replace(CONFIG, api_keys=str(path)))) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
        AsyncClient(rig.address, api_key=key) as client,
    ):
        generate = channel.unary_unary("/lowbit.v1.GenerationService/Generate")

        async def knock() -> StatusCode:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(b"x" * 1000)
            return caught.value.code()

        async with quick_health(rig.address):
            for _ in range(5):
                knocks = asyncio.gather(*(knock() for _ in range(200)))
                assert (await client.generate("Hi")).text == "Hello, world!"
                assert set(await knocks) == {StatusCode.UNAUTHENTICATED}


async def test_a_handshake_that_never_ends(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    config = replace(
        CONFIG,
        tls_certificate=str(tmp_path / "server.pem"),
        tls_key=str(tmp_path / "server.pem"),
        handshake_timeout_seconds=0.3,
    )
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    async with running(make_rig(config=config)) as rig:
        silent = [await asyncio.open_connection("127.0.0.1", rig.server.port) for _ in range(20)]
        for _, writer in silent:
            writer.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
        async with quick_health(rig.address, credentials):
            for reader, writer in silent:
                assert await asyncio.wait_for(reader.read(), 5) == b""  # closed by the server
                writer.close()


# Races of ends


@pytest.mark.parametrize("num_requests", [400, pytest.param(8000, marks=pytest.mark.slow)])
async def test_cancelled_in_every_state_nothing_is_left(num_requests: int) -> None:
    """Queued, encoded, prefilled, decoded, finishing: by cancel, deadline and Abort."""
    chance = random.Random(1)
    rig = make_rig(RecitingRunner(b"0123456789" * 2, step_seconds=0.0005))
    before = set(asyncio.all_tasks())

    async def one(client: AsyncClient, number: int) -> None:
        kind = chance.choice(("cancel", "deadline", "abort", "read", "unary"))
        patience = chance.choice((0.0, 0.001, 0.005, 0.02, 0.05))
        name = f"{number}"
        timeout = max(patience, 0.001) if kind == "deadline" else None
        try:
            if kind == "unary":
                call = asyncio.create_task(client.generate("Hi", request_id=name))
                await asyncio.sleep(patience)
                call.cancel()
                await asyncio.wait({call})
                return
            async with aclosing(
                client.stream("Hi", request_id=name, timeout_seconds=timeout)
            ) as stream:
                if kind == "abort":
                    asyncio.get_running_loop().call_later(patience, rig.server.abort, name)
                for _ in range(chance.randint(0, 30) if kind == "cancel" else 100):
                    await anext(stream)
        except StopAsyncIteration:
            pass
        except grpc.aio.AioRpcError as error:
            assert error.code() is StatusCode.DEADLINE_EXCEEDED

    async with running(rig), AsyncClient(rig.address, max_attempts=1) as client:
        await client.wait_until_serving()
        for start in range(0, num_requests, 100):
            await asyncio.gather(*(one(client, i) for i in range(start, start + 100)))
        await rig.wait_blocks_free()
        assert rig.ended("error") == 0
        async with asyncio.timeout(5):
            while rig.server.num_requests > 0:
                await asyncio.sleep(0.01)
        assert (await client.generate("Hi")).text == "0123456789" * 2
    await asyncio.sleep(0.05)
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    assert not [task for task in left if "lowbit" in repr(task) or "/server/rpc/" in repr(task)]


# Noise on the wire

GENERATE = pb.GenerateRequest(text="Hi", request_id="a")
METHODS: dict[str, Message] = {
    "GenerationService/Generate": GENERATE,
    "GenerationService/GenerateStream": GENERATE,
    "GenerationService/Tokenize": pb.TokenizeRequest(text="Hi"),
    "GenerationService/Detokenize": pb.DetokenizeRequest(ids=[1, 2]),
    "ModelService/GetModel": pb.GetModelRequest(),
    "ModelService/GetServerInfo": pb.GetServerInfoRequest(),
    "ModelService/GetLoad": pb.GetLoadRequest(),
    "ControlService/Abort": pb.AbortRequest(request_ids=["a"]),
    "ControlService/SetLogLevel": pb.SetLogLevelRequest(level=pb.LOG_LEVEL_WARNING),
}
DRAIN: dict[str, Message] = {"ControlService/Drain": pb.DrainRequest(grace_seconds=1.0)}
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.UNIMPLEMENTED,
    StatusCode.DEADLINE_EXCEEDED,
}


@st.composite
def messages(draw: st.DrawFn, methods: dict[str, Message]) -> tuple[str, bytes]:
    """A method, and noise or a message with some of its bytes changed, added or taken away."""
    method = draw(st.sampled_from(sorted(methods)))
    if draw(st.booleans()):
        return method, draw(st.binary(max_size=200))
    request = methods[method]
    if isinstance(request, pb.GenerateRequest):
        request = pb.GenerateRequest()
        request.CopyFrom(GENERATE)
        request.sampling.temperature = draw(st.floats())
        request.sampling.max_tokens = draw(st.integers(-(2**31), 2**31 - 1))
        request.sampling.stop.extend(draw(st.lists(st.text(max_size=5), max_size=3)))
        request.sampling.logit_bias[draw(st.integers(0, 2**32 - 1))] = draw(st.floats())
        request.deadline_seconds = draw(st.floats())
        request.stream_interval = draw(st.integers(-(2**31), 2**31 - 1))
    data = bytearray(request.SerializeToString())
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return method, bytes(data)


@pytest.fixture
def own_level() -> Iterator[None]:
    logger = logging.getLogger("lowbit")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("methods", "num_examples", "afterwards"),
    [(METHODS, 300, StatusCode.OK), (DRAIN, 60, StatusCode.UNAVAILABLE)],
    ids=["all but Drain", "Drain"],
)
def test_noise_gets_a_status_and_the_server_goes_on(
    methods: dict[str, Message], num_examples: int, afterwards: StatusCode, own_level: None
) -> None:
    with asyncio.Runner() as runner:
        rig: Rig = make_rig()
        context = running(rig)
        runner.run(context.__aenter__())
        channel = runner.run(_connect(rig.address))

        @settings(max_examples=num_examples)
        @given(messages(methods))
        def check(message: tuple[str, bytes]) -> None:
            method, data = message
            assert runner.run(_status(channel, method, data)) in EXPECTED

        try:
            check()
            for method, request in methods.items():
                status = runner.run(_status(channel, method, request.SerializeToString()))
                assert status is StatusCode.OK
            runner.run(rig.wait_blocks_free())
            data = pb.GenerateRequest(text="Hi").SerializeToString()
            for method in ("Generate", "GenerateStream"):
                status = runner.run(_status(channel, f"GenerationService/{method}", data))
                assert status is afterwards
            assert rig.ended("error") == 0
        finally:
            runner.run(channel.close())
            runner.run(context.__aexit__(None, None, None))


async def _connect(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address)


async def _status(channel: grpc.aio.Channel, method: str, data: bytes) -> StatusCode:
    try:
        if method.endswith("Stream"):
            async for _ in channel.unary_stream(f"/lowbit.v1.{method}")(data, timeout=10):
                pass
        else:
            await channel.unary_unary(f"/lowbit.v1.{method}")(data, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return StatusCode.OK


def test_bytes_that_are_no_http2() -> None:
    async def check() -> None:
        async with running(make_rig()) as rig, AsyncClient(rig.address) as client:
            chance = random.Random(0)
            for _ in range(50):
                with socket.create_connection(("127.0.0.1", rig.server.port)) as connection:
                    connection.sendall(chance.randbytes(200))
            assert (await client.generate("Hi")).text == "Hello, world!"

    asyncio.run(check())
