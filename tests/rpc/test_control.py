"""ModelService and ControlService, the details of errors, and the beginning of a server's life."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from lowbit.proto import generation_pb2 as pb
from lowbit.proto import generation_pb2_grpc as pb_grpc
from lowbit.server.client import AsyncClient, Client
from lowbit.server.config import EngineConfig, ServerConfig
from lowbit.server.types import FinishReason
from serving import ByteCodec, RecitingRunner, Rig, make_rig, running

CONFIG = ServerConfig(port=0, metrics_port=0)
CHAT = pb.Chat(messages=[pb.ChatMessage(role=pb.CHAT_ROLE_USER, content="Hi")])


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(make_rig(RecitingRunner(endless=True, step_seconds=0.001))) as rig:
        yield rig
        await rig.wait_blocks_free()


@pytest.fixture
async def channel(rig: Rig) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        yield channel


async def test_what_is_served(channel: grpc.aio.Channel, rig: Rig) -> None:
    stub = pb_grpc.ModelServiceStub(channel)
    model = await stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.max_model_len, model.vocab_size) == ("recital", 512, 320)
    assert model.has_chat_template and not model.HasField("quantization")
    info = await stub.GetServerInfo(pb.GetServerInfoRequest())
    assert info.state == pb.SERVER_STATE_SERVING
    assert info.schema_revision >= 1 and info.uptime_seconds > 0
    assert info.limits.max_receive_message_bytes == rig.config.max_message_bytes


async def test_load_rises_and_falls(channel: grpc.aio.Channel, rig: Rig) -> None:
    stub = pb_grpc.ModelServiceStub(channel)
    async with AsyncClient(rig.address) as client:
        streams = [client.stream("Hi", max_tokens=500) for _ in range(3)]
        for stream in streams:
            await anext(stream)
        load = await stub.GetLoad(pb.GetLoadRequest())
        assert (load.num_running, load.num_waiting, load.num_requests) == (3, 0, 3)
        assert 0 < load.kv_cache_usage_ratio <= 1
        for stream in streams:
            await stream.aclose()
    await rig.wait_blocks_free()
    load = await stub.GetLoad(pb.GetLoadRequest())
    assert (load.num_running, load.num_requests) == (0, 0)


async def test_tokenize_counts_and_detokenize_undoes(channel: grpc.aio.Channel) -> None:
    stub = pb_grpc.GenerationServiceStub(channel)
    tokens = await stub.Tokenize(pb.TokenizeRequest(text="né"))
    assert (tokens.num_tokens, list(tokens.ids)) == (3, list("né".encode()))
    assert tokens.texts[0] == "n"
    count = await stub.Tokenize(pb.TokenizeRequest(text="né", count_only=True))
    assert (count.num_tokens, list(count.ids)) == (3, [])
    text = await stub.Detokenize(pb.DetokenizeRequest(ids=tokens.ids))
    assert text.text == "né"
    for call, request in (
        (stub.Tokenize, pb.TokenizeRequest()),
        (stub.Tokenize, pb.TokenizeRequest(text="")),
        (stub.Tokenize, pb.TokenizeRequest(chat=CHAT, add_special_tokens=False)),
        (stub.Detokenize, pb.DetokenizeRequest()),
        (stub.Detokenize, pb.DetokenizeRequest(ids=[320])),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(request)
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT


async def test_abort_ends_a_request_with_what_it_has(channel: grpc.aio.Channel, rig: Rig) -> None:
    control = pb_grpc.ControlServiceStub(channel)
    async with AsyncClient(rig.address) as client:
        stream = client.stream("Hi", request_id="streams", max_tokens=500)
        first = await anext(stream)
        unary = asyncio.create_task(client.generate("Hi", request_id="waits", max_tokens=500))
        while rig.llm.scheduler.num_running < 2:
            await asyncio.sleep(0.001)
        request = pb.AbortRequest(request_ids=["streams", "waits", "nobody's"])
        response = await control.Abort(request)
        assert [(each.request_id, each.outcome) for each in response.results] == [
            ("streams", pb.ABORT_OUTCOME_ABORTED),
            ("waits", pb.ABORT_OUTCOME_ABORTED),
            ("nobody's", pb.ABORT_OUTCOME_NOT_FOUND),
        ]
        rest = [delta async for delta in stream]
        assert rest[-1].finish_reason is FinishReason.CANCELLED
        assert rest[-1].usage is not None
        text = first.text + "".join(delta.text for delta in rest)
        assert ("Hello, world!" * 40).startswith(text) and len(text) < 500
        assert (await unary).finish_reason is FinishReason.CANCELLED
        await rig.wait_blocks_free()
        again = await control.Abort(request)
        assert [each.outcome for each in again.results] == [
            pb.ABORT_OUTCOME_ALREADY_FINISHED,
            pb.ABORT_OUTCOME_ALREADY_FINISHED,
            pb.ABORT_OUTCOME_NOT_FOUND,
        ]
        assert rig.ended("cancelled") == 2


async def test_abort_of_everything(channel: grpc.aio.Channel, rig: Rig) -> None:
    async with AsyncClient(rig.address) as client:
        calls = [asyncio.create_task(client.generate("Hi", max_tokens=500)) for _ in range(5)]
        while rig.llm.scheduler.num_running < 5:
            await asyncio.sleep(0.001)
        response = await pb_grpc.ControlServiceStub(channel).Abort(pb.AbortRequest(all=True))
        assert len(response.results) == 5
        ends = await asyncio.gather(*calls)
        assert {each.finish_reason for each in ends} == {FinishReason.CANCELLED}


async def test_drain_says_what_is_left(channel: grpc.aio.Channel, rig: Rig) -> None:
    control = pb_grpc.ControlServiceStub(channel)
    async with AsyncClient(rig.address, max_attempts=1) as client:
        stream = client.stream("Hi", max_tokens=500)
        await anext(stream)
        response = await control.Drain(pb.DrainRequest(grace_seconds=0.05))
        assert response.num_unfinished == 1
        info = await pb_grpc.ModelServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest())
        assert info.state == pb.SERVER_STATE_DRAINING
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down"):
            await client.generate("Hi")
        await stream.aclose()
        assert (await control.Drain(pb.DrainRequest())).num_unfinished == 0


@pytest.fixture
def own_level() -> Iterator[None]:
    logger = logging.getLogger("lowbit")
    level = logger.level
    yield
    logger.setLevel(level)


async def test_the_log_level(channel: grpc.aio.Channel, own_level: None) -> None:
    control = pb_grpc.ControlServiceStub(channel)
    await control.SetLogLevel(pb.SetLogLevelRequest(level=pb.LOG_LEVEL_ERROR))
    before = await control.SetLogLevel(pb.SetLogLevelRequest(level=pb.LOG_LEVEL_DEBUG))
    assert before.previous == pb.LOG_LEVEL_ERROR
    assert logging.getLogger("lowbit.server").isEnabledFor(logging.DEBUG)
    with pytest.raises(grpc.aio.AioRpcError, match="level is 0; it must be one of 1, 2, 3, 4"):
        await control.SetLogLevel(pb.SetLogLevelRequest())


# The details of errors, read with the blocking client and grpcio-status.


def details_of(error: grpc.RpcError) -> dict[str, Message]:
    status = rpc_status.from_call(error)
    assert status is not None
    found = {}
    for detail in status.details:
        message = getattr(error_details_pb2, detail.TypeName().rsplit(".", 1)[1])()
        assert detail.Unpack(message)
        found[type(message).__name__] = message
    return found


async def failure(address: str, **options: object) -> tuple[StatusCode, dict[str, Message]]:
    def call() -> grpc.RpcError:
        with Client(address, max_attempts=1) as client, pytest.raises(grpc.RpcError) as caught:
            client.generate("Hi", **options)  # type: ignore[arg-type]
        return caught.value

    error = await asyncio.to_thread(call)
    return error.code(), details_of(error)


async def test_bad_input_names_the_field(rig: Rig) -> None:
    code, details = await failure(rig.address, temperature=-1.0, request_id="mine")
    assert code is StatusCode.INVALID_ARGUMENT
    (violation,) = details["BadRequest"].field_violations  # type: ignore[attr-defined]
    assert violation.field == "sampling.temperature"
    assert violation.description.startswith("temperature is -1.0; it must lie in [0, 100]")
    assert details["RequestInfo"].request_id == "mine"  # type: ignore[attr-defined]
    assert details["ErrorInfo"].domain == "lowbit"  # type: ignore[attr-defined]
    assert "RetryInfo" not in details


async def test_a_full_queue_says_when_to_try_again() -> None:
    engine = EngineConfig(max_num_seqs=1, max_queued_requests=1)
    rig = make_rig(RecitingRunner(gated=True), config=replace(CONFIG, engine=engine))
    async with running(rig), AsyncClient(rig.address) as client:
        calls = [asyncio.create_task(client.generate("Hi"))]
        while rig.llm.scheduler.num_running < 1:  # or the second one may find the queue full
            await asyncio.sleep(0.001)
        calls.append(asyncio.create_task(client.generate("Hi")))
        async with grpc.aio.insecure_channel(rig.address) as channel:
            stub = pb_grpc.ModelServiceStub(channel)
            while (await stub.GetLoad(pb.GetLoadRequest())).num_requests < 2:
                await asyncio.sleep(0.001)
        code, details = await failure(rig.address)
        assert code is StatusCode.RESOURCE_EXHAUSTED
        assert details["ErrorInfo"].reason == "QUEUE_FULL"  # type: ignore[attr-defined]
        assert details["RetryInfo"].retry_delay.ToMilliseconds() > 0  # type: ignore[attr-defined]
        # The client waits for as long as it was told, and then succeeds.
        patient = asyncio.create_task(client.generate("Hi"))
        await asyncio.sleep(0.2)
        rig.runner.open()
        assert (await asyncio.wait_for(patient, 10)).text == "Hello, world!"
        await asyncio.gather(*calls)
        assert rig.ended("queue_full") >= 2  # it may have been told to wait once more


async def test_encoding_is_bounded_like_every_request() -> None:
    class SlowCodec(ByteCodec):
        def encode(self, text: str, **options: bool) -> list[int]:
            time.sleep(0.2)
            return super().encode(text, **options)

    engine = EngineConfig(max_num_seqs=1, max_queued_requests=1)
    rig = make_rig(config=replace(CONFIG, engine=engine), tokenizer=SlowCodec(), max_model_len=2000)
    async with running(rig), AsyncClient(rig.address, max_attempts=1) as client:
        calls = [asyncio.create_task(client.tokenize("x" * 1000)) for _ in range(3)]
        await asyncio.wait(calls)
        failures = [call.exception() for call in calls if call.exception() is not None]
        (refused,) = failures
        assert isinstance(refused, grpc.aio.AioRpcError)
        assert refused.code() is StatusCode.RESOURCE_EXHAUSTED
        assert (await client.tokenize("Hi")).ids == tuple(b"Hi")


async def test_what_fails_in_a_stream_is_its_last_part_and_its_status() -> None:
    runner = RecitingRunner(gated=True)
    async with running(make_rig(runner)) as rig, grpc.aio.insecure_channel(rig.address) as channel:
        stub = pb_grpc.GenerationServiceStub(channel)
        call = stub.GenerateStream(pb.GenerateRequest(text="Hi", request_id="mine"))
        runner.allow(1)
        first = await call.read()
        assert first.outputs[0].text == "H" and not first.HasField("error")
        runner.fails = True
        runner.open()
        last = await call.read()
        assert last.error.reason == "ENGINE_FAILED" and not last.error.retryable
        assert last.error.code == StatusCode.INTERNAL.value[0]
        assert last.outputs[0].finish_reason == pb.FINISH_REASON_ERROR
        assert last.usage.completion_tokens == 1
        with pytest.raises(grpc.aio.AioRpcError, match="request mine failed") as caught:
            await call.read()
        assert caught.value.code() is StatusCode.INTERNAL
        assert "Traceback" not in str(caught.value)


# The beginning


async def test_a_server_that_loads_says_so() -> None:
    rig = make_rig()
    await rig.server.start()
    try:
        async with grpc.aio.insecure_channel(rig.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            stub = pb_grpc.ModelServiceStub(channel)
            info = await stub.GetServerInfo(pb.GetServerInfoRequest())
            assert info.state == pb.SERVER_STATE_STARTING
            code, details = await failure(rig.address)
            assert code is StatusCode.UNAVAILABLE
            assert details["ErrorInfo"].reason == "STARTING"  # type: ignore[attr-defined]
            assert "RetryInfo" in details
            await rig.server.open(rig.loaded, warm_up=True)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            assert rig.runner.num_steps > 0  # it has generated before it serves
            watch.cancel()
    finally:
        await rig.server.stop()
