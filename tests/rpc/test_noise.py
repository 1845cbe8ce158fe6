"""Random and mutated messages of every method: each gets a status that is its caller's business."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from byte_tokenizer import byte_tokenizer
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.proto import generation_pb2 as pb
from lowbit.proto import kserve_pb2 as ks
from lowbit.server.client import AsyncClient
from lowbit.server.config import ServerConfig
from lowbit.server.rpc.reflection import V1_NAME, V1ALPHA_NAME
from serving import Rig, make_rig, running
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common

CONFIG = ServerConfig(port=0, metrics_port=0, kserve=True, vllm_engine=True)
GENERATE = pb.GenerateRequest(text="Hi", request_id="a")
INFER = ks.ModelInferRequest(
    model_name="recital",
    inputs=[
        ks.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=[1])
        for name in ("text_input", "sampling_parameters")
    ],
    raw_input_contents=[b"\2\0\0\0Hi", b'\x11\0\0\0{"max_tokens": 4}'],
)
VLLM_GENERATE = vllm.GenerateRequest(
    tokenized=vllm.TokenizedInput(input_ids=b"Hi"), sampling_params=vllm.SamplingParams(n=1)
)
FILES = reflection_pb2.ServerReflectionRequest(list_services="")
SOUND: dict[str, Message] = {
    "lowbit.v1.GenerationService/Generate": GENERATE,
    "lowbit.v1.GenerationService/GenerateStream": GENERATE,
    "lowbit.v1.GenerationService/Tokenize": pb.TokenizeRequest(text="Hi"),
    "lowbit.v1.GenerationService/Detokenize": pb.DetokenizeRequest(ids=[1, 2]),
    "lowbit.v1.ModelService/GetModel": pb.GetModelRequest(),
    "lowbit.v1.ModelService/GetServerInfo": pb.GetServerInfoRequest(),
    "lowbit.v1.ModelService/GetLoad": pb.GetLoadRequest(),
    "lowbit.v1.ControlService/Abort": pb.AbortRequest(request_ids=["a"]),
    "lowbit.v1.ControlService/SetLogLevel": pb.SetLogLevelRequest(level=pb.LOG_LEVEL_WARNING),
    "inference.GRPCInferenceService/ServerLive": ks.ServerLiveRequest(),
    "inference.GRPCInferenceService/ServerReady": ks.ServerReadyRequest(),
    "inference.GRPCInferenceService/ModelReady": ks.ModelReadyRequest(name="recital"),
    "inference.GRPCInferenceService/ServerMetadata": ks.ServerMetadataRequest(),
    "inference.GRPCInferenceService/ModelMetadata": ks.ModelMetadataRequest(name="recital"),
    "inference.GRPCInferenceService/ModelInfer": INFER,
    "inference.GRPCInferenceService/ModelStreamInfer": INFER,
    "vllm.grpc.engine.VllmEngine/Generate": VLLM_GENERATE,
    "vllm.grpc.engine.VllmEngine/HealthCheck": vllm.HealthCheckRequest(),
    "vllm.grpc.engine.VllmEngine/Abort": vllm.AbortRequest(request_ids=["a"]),
    "vllm.grpc.engine.VllmEngine/GetModelInfo": vllm.GetModelInfoRequest(),
    "vllm.grpc.engine.VllmEngine/GetServerInfo": vllm.GetServerInfoRequest(),
    "vllm.grpc.engine.VllmEngine/GetLoads": vllm.GetLoadsRequest(),
    "vllm.grpc.engine.VllmEngine/GetTokenizer": common.GetTokenizerRequest(),
    "grpc.health.v1.Health/Check": health_pb2.HealthCheckRequest(),
    "grpc.health.v1.Health/Watch": health_pb2.HealthCheckRequest(),
    f"{V1_NAME}/ServerReflectionInfo": FILES,
    f"{V1ALPHA_NAME}/ServerReflectionInfo": FILES,
}
DRAIN: dict[str, Message] = {"lowbit.v1.ControlService/Drain": pb.DrainRequest(grace_seconds=1.0)}
# Of VllmEngine; refused whatever they say.
NOT_SERVED: dict[str, Message] = {
    "vllm.grpc.engine.VllmEngine/Embed": vllm.EmbedRequest(),
    "vllm.grpc.engine.VllmEngine/FlushCache": common.FlushCacheRequest(),
    "vllm.grpc.engine.VllmEngine/StartProfile": common.StartProfileRequest(),
    "vllm.grpc.engine.VllmEngine/StopProfile": common.StopProfileRequest(),
    "vllm.grpc.engine.VllmEngine/SubscribeKvEvents": common.SubscribeKvEventsRequest(),
}
METHODS: dict[str, MethodDescriptor] = {
    f"{service.full_name}/{method.name}": method
    for file in (pb, ks, vllm, health_pb2, reflection_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
METHODS[f"{V1_NAME}/ServerReflectionInfo"] = METHODS[f"{V1ALPHA_NAME}/ServerReflectionInfo"]
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.UNIMPLEMENTED,
    StatusCode.DEADLINE_EXCEEDED,
}


def test_every_method_is_looked_at() -> None:
    assert {*SOUND, *DRAIN, *NOT_SERVED} == set(METHODS)


VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(0, 20) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(0, 20) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: st.integers(0, 400) | st.integers(0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: st.integers(0, 20) | st.integers(0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-2, 9),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(0, 2, width=32) | st.floats(width=32),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats(0, 2) | st.floats(),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}
TEXTS = st.text(max_size=8) | st.sampled_from(["Hi", "recital", "text_input", "BYTES", "{}", "["])
JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def values(draw: st.DrawFn, field: FieldDescriptor) -> Any:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.binary(max_size=20))
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw(TEXTS)
    return draw(VALUES[field.cpp_type])


def change_some_fields(draw: st.DrawFn, message: Message, depth: int = 4) -> None:
    fields = message.DESCRIPTOR.fields
    if depth == 0 or not fields:
        return
    for field in draw(st.lists(st.sampled_from(list(fields)), max_size=3)):
        old = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            key, value = field.message_type.fields
            if value.message_type is None:
                old[draw(values(key))] = draw(values(value))
            else:
                change_some_fields(draw, old[draw(values(key))], depth - 1)
        elif field.message_type is not None:
            inner = old.add() if field.is_repeated else old
            inner.SetInParent()
            change_some_fields(draw, inner, depth - 1)
        elif field.is_repeated:
            old.append(draw(values(field)))
        else:
            setattr(message, field.name, draw(values(field)))


@st.composite
def noise(draw: st.DrawFn, sound: dict[str, Message]) -> tuple[str, bytes]:
    """A method, and noise or a message with some of its fields and bytes changed."""
    method = draw(st.sampled_from(sorted(sound)))
    if draw(st.integers(0, 4)) == 0:
        return method, draw(st.binary(max_size=200))
    message = type(sound[method])()
    if draw(st.booleans()):
        message.CopyFrom(sound[method])
    change_some_fields(draw, message)
    if isinstance(message, ks.ModelInferRequest) and len(message.raw_input_contents) > 1:
        text = json.dumps(draw(JSON)).encode()
        message.raw_input_contents[1] = len(text).to_bytes(4, "little") + text
    data = bytearray(message.SerializeToString())
    for _ in range(draw(st.sampled_from([0, 0, 1, 4]))):
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
    ("sound", "num_examples", "afterwards"),
    [
        (SOUND, 800, StatusCode.OK),
        (DRAIN, 60, StatusCode.UNAVAILABLE),
        (NOT_SERVED, 20, StatusCode.OK),
    ],
    ids=["all but Drain", "Drain", "not served"],
)
def test_noise_gets_a_status_and_the_server_goes_on(
    sound: dict[str, Message],
    num_examples: int,
    afterwards: StatusCode,
    own_level: None,
    tmp_path: Path,
) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    with asyncio.Runner() as runner:
        rig: Rig = make_rig(config=CONFIG, folder=str(tmp_path))
        context = running(rig)
        runner.run(context.__aenter__())
        channel = runner.run(_connect(rig.address))

        @settings(max_examples=num_examples)
        @given(noise(sound))
        def check(message: tuple[str, bytes]) -> None:
            method, data = message
            assert runner.run(_status(channel, method, data)) in EXPECTED

        try:
            check()
            for method, request in sound.items():
                status = runner.run(_status(channel, method, request.SerializeToString()))
                assert (status is StatusCode.OK) == (method not in NOT_SERVED)
            runner.run(rig.wait_blocks_free())
            for method in ("Generate", "GenerateStream"):
                name = f"lowbit.v1.GenerationService/{method}"
                status = runner.run(_status(channel, name, GENERATE.SerializeToString()))
                assert status is afterwards
            assert rig.ended("error") == 0
        finally:
            runner.run(channel.close())
            runner.run(context.__aexit__(None, None, None))


async def _connect(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address)


async def _status(channel: grpc.aio.Channel, name: str, data: bytes) -> StatusCode:
    """How a call ends that says nothing but `data`; one that never ends is left after its reply."""
    method = METHODS[name]
    try:
        if method.client_streaming:
            call = channel.stream_stream(f"/{name}")(timeout=10)
            await call.write(data)
            if name.endswith("ModelStreamInfer"):
                await _assert_goes_on(call)
            await call.done_writing()
            while await call.read() is not grpc.aio.EOF:
                pass
            return await call.code()
        if not method.server_streaming:
            await channel.unary_unary(f"/{name}")(data, timeout=10)
            return StatusCode.OK
        stream = channel.unary_stream(f"/{name}")(data, timeout=10)
        async for _ in stream:
            if method.name == "Watch":
                stream.cancel()
                return StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    return StatusCode.OK


async def _assert_goes_on(call: Any) -> None:
    """A failure is a message of the stream; the next request of it is answered."""
    await call.write(INFER.SerializeToString())
    while (data := await call.read()) is not grpc.aio.EOF:
        part = ks.ModelStreamInferResponse.FromString(data)
        assert not part.error_message.startswith(("INTERNAL", "UNKNOWN")), part
        if part.infer_response.raw_output_contents[:1] == [b"\4\0\0\0Hell"]:
            return
    raise AssertionError("the stream has ended")


def test_bytes_that_are_no_http2() -> None:
    async def check() -> None:
        async with running(make_rig()) as rig, AsyncClient(rig.address) as client:
            chance = random.Random(0)
            for _ in range(50):
                with socket.create_connection(("127.0.0.1", rig.server.port)) as connection:
                    connection.sendall(chance.randbytes(200))
            assert (await client.generate("Hi")).text == "Hello, world!"

    asyncio.run(check())
