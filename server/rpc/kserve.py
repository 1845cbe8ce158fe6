"""inference.GRPCInferenceService (KServe v2, and Triton's streaming call) over the same requests.

The tensors are those that Triton's LLM backends have: `text_input`, `stream`,
`sampling_parameters` (a JSON object) in, `text_output` out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from importlib.metadata import version
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from google.protobuf import json_format

from ...proto import generation_pb2 as pb
from ...proto import kserve_pb2 as ks
from ..types import MAX_GRAMMAR_CHARACTERS, InvalidRequest
from .deployment import Deployment, State
from .errors import NotFound, UnsupportedField
from .requests import RequestServer
from .unary import unary_handler
from .wire import read

SERVICE_NAME: Final = ks.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_VERSION: Final = "1"
_INPUTS: Final = {"text_input": "BYTES", "stream": "BOOL", "sampling_parameters": "BYTES"}
_OUTPUT: Final = "text_output"
# A schema of the most characters that it may have, quoted, and the other options.
_MAX_SAMPLING_CHARACTERS: Final = 2 * MAX_GRAMMAR_CHARACTERS
_LENGTH_BYTES: Final = 4
# Asks for a last response of its own, which may be empty: ours says that it is the last.
_KNOWN_PARAMETERS: Final = frozenset({"triton_enable_empty_final_response"})

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer:
    def __init__(self, deployment: Deployment, requests: RequestServer) -> None:
        self._deployment = deployment
        self._requests = requests

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "ServerLive": unary_handler(ks.ServerLiveRequest, self.server_live),
                "ServerReady": unary_handler(ks.ServerReadyRequest, self.server_ready),
                "ModelReady": unary_handler(ks.ModelReadyRequest, self.model_ready),
                "ServerMetadata": unary_handler(ks.ServerMetadataRequest, self.server_metadata),
                "ModelMetadata": unary_handler(ks.ModelMetadataRequest, self.model_metadata),
                "ModelInfer": grpc.unary_unary_rpc_method_handler(
                    self.model_infer,
                    response_serializer=ks.ModelInferResponse.SerializeToString,
                ),
                "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                    self.model_stream_infer,
                    response_serializer=ks.ModelStreamInferResponse.SerializeToString,
                ),
            },
        )

    async def server_live(self, _: ks.ServerLiveRequest) -> ks.ServerLiveResponse:
        return ks.ServerLiveResponse(live=self._deployment.state is not State.FAILED)

    async def server_ready(self, _: ks.ServerReadyRequest) -> ks.ServerReadyResponse:
        return ks.ServerReadyResponse(ready=self._deployment.state is State.SERVING)

    async def model_ready(self, request: ks.ModelReadyRequest) -> ks.ModelReadyResponse:
        ready = self._deployment.state is State.SERVING
        return ks.ModelReadyResponse(ready=ready and self._has(request.name, request.version))

    async def server_metadata(self, _: ks.ServerMetadataRequest) -> ks.ServerMetadataResponse:
        return ks.ServerMetadataResponse(name="lowbit", version=version("lowbit"))

    async def model_metadata(self, request: ks.ModelMetadataRequest) -> ks.ModelMetadataResponse:
        self._require(request.name, request.version)
        tensor = ks.ModelMetadataResponse.TensorMetadata
        return ks.ModelMetadataResponse(
            name=request.name,
            versions=[_VERSION],
            platform="lowbit",
            inputs=[tensor(name=n, datatype=kind, shape=[1]) for n, kind in _INPUTS.items()],
            outputs=[tensor(name=_OUTPUT, datatype="BYTES", shape=[1])],
        )

    async def model_infer(self, data: bytes, context: Context) -> ks.ModelInferResponse:
        answers: list[ks.ModelInferResponse] = []

        async def collect(part: pb.GenerateResponse) -> None:
            answers.append(_response(part, self._deployment.loaded.model.name))

        async def request() -> pb.GenerateRequest:
            generate, streams = self._read(await read(data, ks.ModelInferRequest))
            if streams:
                raise InvalidRequest("stream is true; ModelInfer gives one response")
            return generate

        await self._requests.serve(request, context, collect, streams=False)
        (answer,) = answers
        return answer

    async def model_stream_infer(self, messages: AsyncIterator[bytes], context: Context) -> None:
        async for data in messages:
            await self._answer(data, context)

    async def _answer(self, data: bytes, context: Context) -> None:
        """One request of a stream, whose failure is a message and does not end the stream."""

        async def send(part: pb.GenerateResponse) -> None:
            if part.HasField("error"):
                return  # the same is told in `error_message`
            response = _response(part, self._deployment.loaded.model.name)
            await context.write(ks.ModelStreamInferResponse(infer_response=response))

        request_id, streams = "", False
        generate: pb.GenerateRequest | Exception
        try:
            message = await read(data, ks.ModelInferRequest)
            request_id = message.id
            generate, streams = self._read(message)
        except Exception as error:  # told like every failure, and counted, by `serve`
            generate = error

        async def request() -> pb.GenerateRequest:
            if isinstance(generate, Exception):
                raise generate
            return generate

        call = _OneOfMany(context)
        try:
            await self._requests.serve(request, call, send, streams=streams)  # type: ignore[arg-type]
        except _Aborted as failure:
            response = ks.ModelInferResponse(id=request_id)
            await context.write(
                ks.ModelStreamInferResponse(error_message=str(failure), infer_response=response)
            )
        finally:
            call.done()

    def _read(self, request: ks.ModelInferRequest) -> tuple[pb.GenerateRequest, bool]:
        """The same request in our words, and whether it wants parts. Raises what refuses it."""
        self._require(request.model_name, request.model_version)
        _check_parameters("parameters", request.parameters)
        _check_number("outputs", len(request.outputs), 1)
        for output in request.outputs:
            _check_parameters("outputs[0].parameters", output.parameters)
            if output.name != _OUTPUT:
                raise InvalidRequest(f"outputs holds {output.name!r}; the only one is {_OUTPUT}")
        values = _inputs(request)
        if "text_input" not in values:
            raise InvalidRequest("text_input is missing; it must hold the prompt")
        generate = pb.GenerateRequest(request_id=request.id, text=_text(values, "text_input"))
        if "sampling_parameters" in values:
            generate.sampling.CopyFrom(_sampling(_text(values, "sampling_parameters")))
        if generate.sampling.n > 1:
            raise UnsupportedField(
                f"sampling_parameters.n is {generate.sampling.n}; {_OUTPUT} holds one completion"
            )
        return generate, values.get("stream", b"\0") != b"\0"

    def _has(self, name: str, model_version: str) -> bool:
        return name == self._deployment.loaded.model.name and model_version in ("", _VERSION)

    def _require(self, name: str, model_version: str) -> None:
        if not self._has(name, model_version):
            raise NotFound(
                f"model {name!r}, version {model_version!r} is not served; "
                f"{self._deployment.loaded.model.name!r}, version {_VERSION!r} is"
            )


class _Aborted(Exception):
    """What would be the status of a call of its own."""


class _OneOfMany:
    """A request's view of a call that carries many: it can end without the call."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._callbacks: list[Callable[[Any], None]] = []

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        self._callbacks.append(callback)

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata()

    def time_remaining(self) -> float | None:
        return self._context.time_remaining()

    async def abort(self, code: grpc.StatusCode, details: str, metadata: object) -> NoReturn:
        raise _Aborted(f"{code.name}: {details}")

    def done(self) -> None:
        for callback in self._callbacks:
            callback(self)


def _inputs(request: ks.ModelInferRequest) -> dict[str, bytes]:
    """The one element of each input."""
    raw = request.raw_input_contents
    _check_number("inputs", len(request.inputs), len(_INPUTS))
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"raw_input_contents holds {len(raw)} values; there are {len(request.inputs)} inputs"
        )
    values: dict[str, bytes] = {}
    for i, tensor in enumerate(request.inputs):
        _check_parameters(f"inputs[{i}].parameters", tensor.parameters)
        kind = _INPUTS.get(tensor.name)
        if kind is None:
            raise InvalidRequest(f"inputs holds {tensor.name!r}; known are {', '.join(_INPUTS)}")
        if tensor.datatype != kind:
            raise InvalidRequest(f"{tensor.name} is of type {tensor.datatype}; it must be {kind}")
        if tensor.name in values:
            raise InvalidRequest(f"inputs holds {tensor.name} twice")
        values[tensor.name] = _raw(tensor.name, kind, raw[i]) if raw else _listed(tensor)
    return values


def _raw(name: str, kind: str, value: bytes) -> bytes:
    if kind == "BOOL":
        length, content = 1, value
    else:
        length, content = int.from_bytes(value[:_LENGTH_BYTES], "little"), value[_LENGTH_BYTES:]
    if len(content) != length:
        raise InvalidRequest(f"{name} holds {len(content)} bytes; it must hold one element")
    return content


def _listed(tensor: ks.ModelInferRequest.InferInputTensor) -> bytes:
    texts, flags = tensor.contents.bytes_contents, tensor.contents.bool_contents
    if len(texts) + len(flags) != 1:
        raise InvalidRequest(
            f"{tensor.name} holds {len(texts) + len(flags)} elements; it must hold one"
        )
    return texts[0] if texts else bytes([flags[0]])


def _check_parameters(field: str, parameters: Iterable[str]) -> None:
    for name in parameters:
        if name not in _KNOWN_PARAMETERS:
            raise UnsupportedField(f"{field}[{name!r}] is set; this server does not support it")


def _check_number(field: str, number: int, most: int) -> None:
    if number > most:
        raise InvalidRequest(f"{field} holds {number} tensors; it may hold at most {most}")


def _text(values: dict[str, bytes], name: str) -> str:
    try:
        return values[name].decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is not valid UTF-8: {error.reason}") from None


def _sampling(text: str) -> pb.SamplingParams:
    if len(text) > _MAX_SAMPLING_CHARACTERS:
        raise InvalidRequest(
            f"sampling_parameters has {len(text)} characters; "
            f"it may have at most {_MAX_SAMPLING_CHARACTERS}"
        )
    try:
        return json_format.Parse(text, pb.SamplingParams())
    except (json_format.ParseError, RecursionError) as error:
        raise InvalidRequest(f"sampling_parameters is not understood: {error}") from None


def _response(part: pb.GenerateResponse, model_name: str) -> ks.ModelInferResponse:
    text = "".join(output.text for output in part.outputs).encode()
    response = ks.ModelInferResponse(
        model_name=model_name,
        model_version=_VERSION,
        id=part.request_id,
        raw_output_contents=[len(text).to_bytes(_LENGTH_BYTES, "little") + text],
    )
    response.outputs.add(name=_OUTPUT, datatype="BYTES", shape=[1])
    response.parameters["triton_final_response"].bool_param = part.HasField("usage")
    return response
