"""KServe v2 and Triton's stream, through Triton's own client where it is installed."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc import StatusCode
from lowbit.proto import kserve_pb2 as ks
from lowbit.server.config import ServerConfig
from serving import RecitingRunner, Rig, make_rig, running

# In a process of its own: its messages have the names of ours, and protobuf knows each name once.
CONFIG = ServerConfig(port=0, metrics_port=0, kserve=True)
TRITON_CLIENT = """
import json, queue, sys
import numpy
import tritonclient.grpc as triton

client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("recital")
assert not client.is_model_ready("another")
metadata = client.get_model_metadata("recital")
assert [each.name for each in metadata.outputs] == ["text_output"]

def inputs(text, stream, **sampling):
    values = {"text_input": numpy.array([text.encode()], object),
              "sampling_parameters": numpy.array([json.dumps(sampling).encode()], object)}
    if stream is not None:
        values["stream"] = numpy.array([stream])
    tensors = []
    for name, value in values.items():
        kind = "BOOL" if name == "stream" else "BYTES"
        tensors.append(triton.InferInput(name, [1], kind))
        tensors[-1].set_data_from_numpy(value)
    return tensors

whole = client.infer("recital", inputs("Hi", None, max_tokens=5), request_id="mine")
results = queue.Queue()
client.start_stream(lambda result, error: results.put((result, error)))
client.async_stream_infer("recital", inputs("Hi", True, temperature=0))
parts = []
while True:
    result, error = results.get(timeout=10)
    assert error is None, error
    parts.append(result.as_numpy("text_output")[0].decode())
    if result.get_response().parameters["triton_final_response"].bool_param:
        break
client.async_stream_infer("recital", inputs("Hi", True, temperature=-1))
_, error = results.get(timeout=10)
client.async_stream_infer("recital", inputs("Hi", False, max_tokens=3))
after, none = results.get(timeout=10)
client.stop_stream()
print(json.dumps({"whole": whole.as_numpy("text_output")[0].decode(), "id": whole.get_response().id,
                  "text": "".join(parts), "error": str(error),
                  "after": after.as_numpy("text_output")[0].decode()}))
"""


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running(make_rig(config=CONFIG)) as rig:
        yield rig
        await rig.wait_blocks_free()
        assert rig.ended("error") == 0


async def test_tritons_own_client(rig: Rig) -> None:
    if importlib.util.find_spec("tritonclient") is None:
        pytest.skip("tritonclient[grpc] is not installed")
    run = [sys.executable, "-c", TRITON_CLIENT, rig.address]
    done = await asyncio.to_thread(
        subprocess.run, run, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    error = answers.pop("error")
    assert answers == {"whole": "Hello", "id": "mine", "text": "Hello, world!", "after": "Hel"}
    assert "INVALID_ARGUMENT: temperature is -1.0" in error


def infer_request(
    model: str = "recital", parameter: str = "", **contents: Any
) -> ks.ModelInferRequest:
    request = ks.ModelInferRequest(model_name=model)
    if parameter:
        request.parameters[parameter].int64_param = 1
    for name, value in contents.items():
        kind = "BOOL" if isinstance(value, bool) else "BYTES"
        tensor = request.inputs.add(name=name, datatype=kind, shape=[1])
        if isinstance(value, bool):
            tensor.contents.bool_contents.append(value)
        else:
            tensor.contents.bytes_contents.append(value)
    return request


def infer(channel: grpc.aio.Channel) -> Any:
    return channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=ks.ModelInferRequest.SerializeToString,
        response_deserializer=ks.ModelInferResponse.FromString,
    )


async def test_contents_that_are_not_raw(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        request = infer_request(text_input=b"Hi", sampling_parameters=b'{"max_tokens": 4}')
        response = await infer(channel)(request)
        assert response.raw_output_contents[0] == b"\4\0\0\0Hell"


async def test_bytes_that_are_no_text_are_named(rig: Rig) -> None:
    """Also inside of a map, and inside of what protobuf nests."""
    for data, text in (
        (b"\x0a\x01\xff", "model_name is not valid UTF-8: byte 0xff at offset 0"),
        (b"\x22\x05\x0a\x01\xff\x12\x00", "parameters[0].key is not valid UTF-8"),
        (b"\x2a\x03\x0a\x01\xff", "inputs[0].name is not valid UTF-8"),
        (b"\x0a\x50", "the 2 bytes of the request are not a inference.ModelInferRequest"),
    ):
        async with grpc.aio.insecure_channel(rig.address) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data)
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
        assert text in (caught.value.details() or "")


async def test_a_field_of_a_newer_client_inside_of_a_map_is_refused(rig: Rig) -> None:
    data = b"\x22\x07\x0a\x01a\x12\x02\x78\x01"  # field 15 of the value of parameters["a"]
    async with grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=r"parameters\['a'\] holds field number 15"):
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(data)


@pytest.mark.parametrize(
    ("request_", "code", "text"),
    [
        (infer_request(text_input=b"Hi", model="b"), StatusCode.NOT_FOUND, "model 'b'"),
        (infer_request(), StatusCode.INVALID_ARGUMENT, "text_input is missing"),
        (infer_request(text_input=True), StatusCode.INVALID_ARGUMENT, "text_input is of type BOOL"),
        (infer_request(text_input=b"\xff"), StatusCode.INVALID_ARGUMENT, "not valid UTF-8"),
        (infer_request(image=b"x"), StatusCode.INVALID_ARGUMENT, "inputs holds 'image'"),
        (
            infer_request(text_input=b"Hi", stream=True),
            StatusCode.INVALID_ARGUMENT,
            "ModelInfer gives one response",
        ),
        (
            infer_request(text_input=b"Hi", sampling_parameters=b'{"temprature": 1}'),
            StatusCode.INVALID_ARGUMENT,
            "temprature",
        ),
        (
            infer_request(text_input=b"Hi", sampling_parameters=b'{"n": 2}'),
            StatusCode.UNIMPLEMENTED,
            "sampling_parameters.n is 2",
        ),
        (
            infer_request(text_input=b"Hi", sampling_parameters=b"[" * 100_000),
            StatusCode.INVALID_ARGUMENT,
            "sampling_parameters is not understood: .*maximum recursion",
        ),
        (
            infer_request(text_input=b"Hi", sampling_parameters=b" " * 200_000),
            StatusCode.INVALID_ARGUMENT,
            "200000 characters; it may have at most 131072",
        ),
        (
            infer_request(text_input=b"Hi", parameter="timeout"),
            StatusCode.UNIMPLEMENTED,
            r"parameters\['timeout'\] is set",
        ),
        (
            ks.ModelInferRequest(
                model_name="recital", inputs=[ks.ModelInferRequest.InferInputTensor()] * 4
            ),
            StatusCode.INVALID_ARGUMENT,
            "inputs holds 4 tensors; it may hold at most 3",
        ),
        (
            ks.ModelInferRequest(
                model_name="recital",
                inputs=[*infer_request(text_input=b"a").inputs] * 2,
            ),
            StatusCode.INVALID_ARGUMENT,
            "inputs holds text_input twice",
        ),
    ],
    ids=lambda value: str(value)[:30].replace("\n", " "),
)
async def test_bad_input(
    rig: Rig, request_: ks.ModelInferRequest, code: StatusCode, text: str
) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
            await infer(channel)(request_)
        assert caught.value.code() is code


def infer_stream(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        request_serializer=ks.ModelInferRequest.SerializeToString,
        response_deserializer=ks.ModelStreamInferResponse.FromString,
    )()


async def test_a_stream_to_a_server_that_loads_is_told_so_and_goes_on() -> None:
    rig = make_rig(config=CONFIG)
    await rig.server.start()
    try:
        async with grpc.aio.insecure_channel(rig.address) as channel:
            stream = infer_stream(channel)
            await stream.write(infer_request(text_input=b"Hi"))
            assert (await stream.read()).error_message.startswith("UNAVAILABLE: the server is load")
            await rig.server.open(rig.loaded)
            await stream.write(infer_request(text_input=b"Hi"))
            text = (await stream.read()).infer_response.raw_output_contents[0][4:]
            assert text == b"Hello, world!"
            await stream.done_writing()
            assert await stream.code() is StatusCode.OK
    finally:
        await rig.server.stop()


async def test_what_fails_on_the_way_ends_with_an_error_and_no_final_response() -> None:
    runner = RecitingRunner(gated=True)
    async with (
        running(make_rig(runner, config=CONFIG)) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
    ):
        stream = infer_stream(channel)
        await stream.write(infer_request(text_input=b"Hi", stream=True))
        runner.allow(1)
        first = await stream.read()
        assert not first.infer_response.parameters["triton_final_response"].bool_param
        runner.fails = True
        runner.open()
        assert (await stream.read()).error_message.startswith("INTERNAL: request")
        await stream.done_writing()
        assert await stream.code() is StatusCode.OK


async def test_it_is_off_unless_asked_for() -> None:
    async with (
        running(make_rig()) as rig,
        grpc.aio.insecure_channel(rig.address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await infer(channel)(infer_request(text_input=b"Hi"))
        assert caught.value.code() is StatusCode.UNIMPLEMENTED
