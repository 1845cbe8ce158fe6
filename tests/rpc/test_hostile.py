"""Callers that mean harm, or do it by accident: each gets its status, and health stays quick."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lowbit.proto import generation_pb2 as pb
from lowbit.server.client import AsyncClient
from lowbit.server.config import ServerConfig
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SequenceResult
from lowbit.server.rpc.tenants import hash_key, new_key
from serving import PromptScoringRunner, RecitingRunner, make_rig, running

CONFIG = ServerConfig(port=0, metrics_port=0)
MAX_HEALTH_SECONDS = 0.1
UNBOUNDED = (("grpc.max_receive_message_length", -1),)


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

    gc.collect()
    gc.freeze()  # what pytest and torch have loaded is looked at for 0.2 seconds, time and again
    probing = asyncio.create_task(probe())
    try:
        yield
        await asyncio.sleep(0.1)
    finally:
        probing.cancel()
        await asyncio.wait({probing})
        gc.unfreeze()
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


CROWD_BYTES = 1 << 20  # a quarter of what may come: so that a busy machine makes no test fail
GENERATE = "lowbit.v1.GenerationService/Generate"


def nested(number: int, content: bytes) -> bytes:
    """A field of messages or texts with this content."""
    length, varint = len(content), bytearray()
    while length > 127:
        varint.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *varint, length]) + content


def fill(pattern: bytes) -> bytes:
    return pattern * (CROWD_BYTES // len(pattern))


BIASED = pb.GenerateRequest(
    text="Hi", sampling=pb.SamplingParams(logit_bias=dict.fromkeys(range(65_000), 1.0))
)
CROWDED = {
    "messages of a chat": (GENERATE, nested(4, fill(b"\x0a\x00"))),
    "chats": (GENERATE, fill(b"\x22\x02\x0a\x00")),
    "stop strings": (GENERATE, nested(2, b"Hi") + nested(5, fill(b"\x3a\x00"))),
    "biases": (GENERATE, BIASED.SerializeToString()),
    "allowed ids": (GENERATE, nested(2, b"Hi") + nested(5, nested(15, fill(b"\x01")))),
    "token ids": (GENERATE, nested(3, nested(1, fill(b"\x01")))),
    "text": (GENERATE, nested(2, fill(b"x"))),
    "text that is none": (GENERATE, nested(2, fill(b"x") + b"\xff")),
    "unknown fields": (GENERATE, nested(2, b"Hi") + fill(b"\x78\x01")),
    "unknown fields further in": (GENERATE, nested(2, b"Hi") + nested(5, fill(b"\xf8\x7f\x01"))),
    "request ids": ("lowbit.v1.ControlService/Abort", fill(b"\x0a\x00")),
    "ids to decode": ("lowbit.v1.GenerationService/Detokenize", nested(1, fill(b"\x01"))),
    "tensors": ("inference.GRPCInferenceService/ModelInfer", fill(b"\x2a\x00")),
    "tensors with an unknown field": (
        "inference.GRPCInferenceService/ModelInfer",
        fill(b"\x2a\x00") + b"\x2a\x02\x78\x01",
    ),
    "elements": (
        "inference.GRPCInferenceService/ModelInfer",
        nested(5, nested(1, b"text_input") + nested(2, b"BYTES") + nested(5, fill(b"\x42\x00"))),
    ),
    "choices": (
        "vllm.grpc.engine.VllmEngine/Generate",
        nested(3, b"Hi") + nested(4, b"\xaa\x01" + nested(0, fill(b"\x0a\x00"))[1:]),
    ),
}


REFUSED = {StatusCode.INVALID_ARGUMENT, StatusCode.UNIMPLEMENTED, StatusCode.NOT_FOUND}


@pytest.mark.parametrize("name", CROWDED)
async def test_a_message_that_holds_as_many_things_as_it_can(name: str) -> None:
    method, data = CROWDED[name]
    config = replace(CONFIG, kserve=True, vllm_engine=True)
    async with (
        running(make_rig(config=config)) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
        # The others' messages, off by default, hold more messages: protobuf takes its time.
        quick_health(rig.address) if method.startswith("lowbit") else nullcontext(),
    ):
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                if method.startswith("vllm"):
                    await channel.unary_stream(f"/{method}")(data).read()
                else:
                    await channel.unary_unary(f"/{method}")(data)
            assert caught.value.code() in REFUSED
            await asyncio.sleep(0.01)


async def test_a_long_prompt_that_is_echoed_with_all_candidates() -> None:
    prompt, number = "x" * 6500, 20
    request = pb.GenerateRequest(text=prompt, echo=True)
    request.sampling.prompt_logprobs, request.sampling.max_tokens = number, 1
    rig = make_rig(PromptScoringRunner(), num_blocks=512, max_model_len=8000)
    async with (
        running(rig),
        grpc.aio.insecure_channel(rig.address, options=UNBOUNDED) as channel,
    ):
        for method in ("Generate", "GenerateStream"):
            name = f"/lowbit.v1.GenerationService/{method}"
            data = request.SerializeToString()
            async with quick_health(rig.address):
                if method == "Generate":
                    reply = await channel.unary_unary(name)(data)
                else:
                    reply = await channel.unary_stream(name)(data).read()
            echoed = pb.GenerateResponse.FromString(reply).prompt
            assert echoed.text == prompt and len(echoed.tokens) == len(prompt)
            assert {len(each.top_logprobs) for each in echoed.tokens[1:]} == {number}


async def test_a_long_completion_with_all_candidates_in_one_reply() -> None:
    class Runner(RecitingRunner):
        def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
            top = tuple((token_id, -1.0) for token_id in range(20))
            return [
                SequenceResult(tuple(replace(token, top_logprobs=top) for token in result.tokens))
                for result in super().execute(output)
            ]

    request = pb.GenerateRequest(text="Hi")
    request.sampling.max_tokens, request.sampling.top_logprobs = 6000, 20
    rig = make_rig(Runner(endless=True), num_blocks=512, max_model_len=8000)
    async with (
        running(rig),
        grpc.aio.insecure_channel(rig.address, options=UNBOUNDED) as channel,
        quick_health(rig.address),
    ):
        name = "/lowbit.v1.GenerationService/Generate"
        reply = await channel.unary_unary(name)(request.SerializeToString())
        assert len(pb.GenerateResponse.FromString(reply).outputs[0].tokens) == 6000


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
            for _ in range(20):
                knocks = asyncio.gather(*(knock() for _ in range(50)))
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
