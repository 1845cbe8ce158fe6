"""vllm.grpc.engine.VllmEngine over the same requests: what the smg gateway speaks to its workers.

The messages come from the package smg-grpc-proto. The gateway does the text (templates, tokens,
tool calls, an OpenAI API); here are token ids. In these messages 0 means a parameter's default.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
import zipfile
from collections.abc import Sized
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from smg_grpc_proto import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]
from smg_grpc_proto.generated import common_pb2 as common  # type: ignore[import-untyped]

from ...proto import generation_pb2 as pb
from ..types import InvalidRequest
from .calls import Calls
from .convert import check_length, new_request_id
from .deployment import Deployment, State
from .errors import UnsupportedField, abort, describe
from .requests import RequestServer
from .unary import unary_handler
from .wire import read

SERVICE_NAME: Final[str] = vllm.DESCRIPTOR.services_by_name["VllmEngine"].full_name
ABORT_METHOD: Final = f"/{SERVICE_NAME}/Abort"
_CHUNK_BYTES: Final = 1 << 20
_MAX_TOKENS_AT_ONCE: Final = 1024
_TOKENIZER_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_UNSUPPORTED: Final = (
    "kv_transfer_params",
    "mm_inputs",
    "extra_mm_inputs",
    "kv_transfer_params_json",
    "media_refs",
)
_RENAMED: Final = {
    "logprobs": "top_logprobs",
    "include_stop_str_in_output": "include_stop",
}
_TEXT_OPTIONS: Final = (  # for who makes the text, which is not us
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "grammar_from_first_token",
)
_FINISH_REASONS: Final = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "abort",
}

Context = grpc.aio.ServicerContext[Any, Any]


class VllmEngineServicer:
    def __init__(self, deployment: Deployment, requests: RequestServer, calls: Calls) -> None:
        self._deployment = deployment
        self._requests = requests
        self._calls = calls
        self._started = time.monotonic()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register; the others are UNIMPLEMENTED."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate,
                    response_serializer=vllm.GenerateResponse.SerializeToString,
                ),
                "GetTokenizer": grpc.unary_stream_rpc_method_handler(
                    self.get_tokenizer,
                    response_serializer=common.GetTokenizerChunk.SerializeToString,
                ),
                "HealthCheck": unary_handler(vllm.HealthCheckRequest, self.health_check),
                "Abort": unary_handler(vllm.AbortRequest, self.abort),
                "GetModelInfo": unary_handler(vllm.GetModelInfoRequest, self.get_model_info),
                "GetServerInfo": unary_handler(vllm.GetServerInfoRequest, self.get_server_info),
                "GetLoads": unary_handler(vllm.GetLoadsRequest, self.get_loads),
            },
        )

    async def generate(self, data: bytes, context: Context) -> None:
        message: Any = None
        answer = _Answer(self._eos_token_ids)

        async def request() -> pb.GenerateRequest:
            nonlocal message
            message = await read(data, vllm.GenerateRequest)
            return _request(message)

        async def send(part: pb.GenerateResponse) -> None:
            take = partial(answer.take, part, streams=message.stream)
            responses = await asyncio.to_thread(take) if answer.is_long(part) else take()
            for response in responses:
                await context.write(response)

        await self._requests.serve(request, context, send, streams=True)

    async def health_check(self, _: Any) -> Any:
        state = self._deployment.state
        return vllm.HealthCheckResponse(healthy=state is State.SERVING, message=state.value)

    async def abort(self, request: Any) -> Any:
        for request_id in request.request_ids:
            self._calls.abort(request_id)
        return vllm.AbortResponse()

    async def get_model_info(self, _: Any) -> Any:
        loaded = self._deployment.loaded
        return vllm.GetModelInfoResponse(
            model_path=loaded.model.folder or loaded.model.name,
            tokenizer_path=loaded.model.folder,
            served_model_name=loaded.model.name,
            is_generation=True,
            max_context_length=loaded.engine.max_model_len,
            max_req_input_len=loaded.engine.max_model_len - 1,
            vocab_size=loaded.engine.vocab_size,
            architectures=[loaded.model.architecture],
            eos_token_ids=sorted(loaded.engine.eos_token_ids),
        )

    async def get_tokenizer(self, _: bytes, context: Context) -> None:
        """The tokenizer's files, zipped, with the hash of the whole in the last chunk."""
        try:
            data = await asyncio.to_thread(_zip, Path(self._deployment.loaded.model.folder))
        except Exception as error:
            await abort(context, describe(error, new_request_id()))
        for start in range(0, len(data), _CHUNK_BYTES):
            chunk = common.GetTokenizerChunk(data=data[start : start + _CHUNK_BYTES])
            if start + _CHUNK_BYTES >= len(data):
                chunk.sha256 = hashlib.sha256(data).hexdigest()
            await context.write(chunk)

    async def get_server_info(self, _: Any) -> Any:
        return vllm.GetServerInfoResponse(
            active_requests=self._calls.num_requests,
            uptime_seconds=time.monotonic() - self._started,
            server_type="lowbit",
        )

    async def get_loads(self, _: Any) -> Any:
        stats = self._deployment.loaded.engine.last_step
        response = vllm.GetLoadsResponse(version=version("lowbit"), dp_rank_count=1)
        response.loads.add(
            num_running_reqs=stats.num_running,
            num_waiting_reqs=stats.num_waiting,
            num_total_reqs=stats.num_running + stats.num_waiting,
            token_usage=stats.kv_cache_usage_ratio,
            max_running_requests=self._calls.max_requests,
        )
        return response

    @property
    def _eos_token_ids(self) -> frozenset[int]:
        if self._deployment.state is State.STARTING:
            return frozenset()
        return self._deployment.loaded.engine.eos_token_ids


def _zip(folder: Path) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for name in _TOKENIZER_FILES:
            if (folder / name).is_file():
                files.write(folder / name, name)
    return archive.getvalue()


def _request(message: Any) -> pb.GenerateRequest:
    """The same in our words. Raises InvalidRequest or UnsupportedField."""
    for field, _ in message.ListFields():
        if field.name in _UNSUPPORTED:
            raise UnsupportedField(f"{field.name} is set; this server does not support it")
    if message.data_parallel_rank:
        raise UnsupportedField(f"data_parallel_rank is {message.data_parallel_rank}; it must be 0")
    request = pb.GenerateRequest(request_id=message.request_id)
    if message.WhichOneof("input") == "tokenized":
        request.token_ids.ids.extend(message.tokenized.input_ids)
    else:
        request.text = message.text
    _copy_sampling(message.sampling_params, request)
    return request


def _copy_sampling(params: Any, request: pb.GenerateRequest) -> None:
    for field, value in params.ListFields():
        try:
            _copy_option(_RENAMED.get(field.name, field.name), value, request)
        except ValueError as error:  # their type of number is another one
            raise InvalidRequest(f"{field.name} is out of range: {error}") from None


def _copy_option(name: str, value: Any, request: pb.GenerateRequest) -> None:
    sampling = request.sampling
    if name == "choice":
        value = value.choices
    if isinstance(value, Sized) and not isinstance(value, str):
        check_length(name, value)
    if name == "truncate_prompt_tokens":
        request.truncate_prompt_tokens = value
    elif name == "json_object":
        sampling.json_schema = '{"type": "object"}'
    elif name == "logit_bias":
        sampling.logit_bias.update(value)
    elif name in ("stop", "stop_token_ids", "choice"):
        getattr(sampling, name).extend(value)
    elif name in pb.SamplingParams.DESCRIPTOR.fields_by_name:
        setattr(sampling, name, value)
    elif name not in _TEXT_OPTIONS:
        raise UnsupportedField(f"{name} is set; this server does not support it")


class _Answer:
    """Our parts in the gateway's words: chunks hold new tokens, a completion's end all of them."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos_token_ids = eos_token_ids
        self._prompt: Any = None  # as vllm.InputLogProbs
        self._tokens: dict[int, list[pb.TokenInfo]] = {}
        self._ended: list[Any] = []

    def is_long(self, part: pb.GenerateResponse) -> bool:
        """Whether to take it takes so long that a thread must do it."""
        num_tokens = sum(map(len, self._tokens.values())) + len(part.prompt.tokens)
        return num_tokens + sum(len(each.tokens) for each in part.outputs) > _MAX_TOKENS_AT_ONCE

    def take(self, part: pb.GenerateResponse, *, streams: bool) -> list[Any]:
        chunks = []
        if part.HasField("prompt"):
            self._prompt = _prompt_logprobs(part.prompt.tokens)
        for output in part.outputs:
            tokens = self._tokens.setdefault(output.index, [])
            tokens.extend(output.tokens)
            if streams and output.tokens:
                chunk = vllm.GenerateStreamChunk(
                    token_ids=[token.id for token in output.tokens],
                    completion_tokens=len(tokens),
                    index=output.index,
                    output_logprobs=_logprobs(output.tokens),
                    input_logprobs=self._prompt if part.HasField("prompt") else None,
                )
                chunks.append(vllm.GenerateResponse(chunk=chunk))
            if output.finish_reason in _FINISH_REASONS:
                self._ended.append(self._complete(output, tokens))
        if not part.HasField("usage"):
            return chunks
        # Their usage is known now, and only now.
        for complete in self._ended:
            complete.prompt_tokens = part.usage.prompt_tokens
            complete.cached_tokens = part.usage.cached_tokens
        return [*chunks, *(vllm.GenerateResponse(complete=each) for each in self._ended)]

    def _complete(self, output: pb.Output, tokens: list[pb.TokenInfo]) -> Any:
        complete = vllm.GenerateComplete(
            output_ids=[token.id for token in tokens],
            finish_reason=_FINISH_REASONS[output.finish_reason],
            completion_tokens=len(tokens),
            index=output.index,
            output_logprobs=_logprobs(tokens),
            input_logprobs=self._prompt,
        )
        match output.WhichOneof("stop_match"):
            case "stop_string":
                complete.matched_stop_str = output.stop_string
            case "stop_token_id" if output.stop_token_id not in self._eos_token_ids:
                complete.matched_token_id = output.stop_token_id
        return complete


def _logprobs(tokens: Any) -> Any:
    return vllm.OutputLogProbs(
        token_logprobs=[token.logprob for token in tokens],
        token_ids=[token.id for token in tokens],
        top_logprobs=list(map(_candidates, tokens)),
    )


def _prompt_logprobs(tokens: Any) -> Any:
    first, *others = tokens
    values = (vllm.InputTokenLogProb(value=token.logprob) for token in others)
    return vllm.InputLogProbs(
        token_logprobs=[vllm.InputTokenLogProb(), *values],
        token_ids=[first.id, *(token.id for token in others)],
        top_logprobs=list(map(_candidates, tokens)),
    )


def _candidates(token: pb.TokenInfo) -> Any:
    return vllm.TopLogProbs(
        values=[each.logprob for each in token.top_logprobs],
        token_ids=[each.id for each in token.top_logprobs],
    )
