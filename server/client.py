"""The Python client of lowbit.v1, blocking and asyncio. Knows the wire, nothing of the server.

Failures are `grpc.RpcError`s: `code()` is the status, `details()` says what went wrong.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypedDict, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from ..proto import generation_pb2 as pb
from ..proto import generation_pb2_grpc as pb_grpc
from .types import ChatMessage, ChatRole, FinishReason, Priority

RpcError = grpc.RpcError
"""What every call raises when it fails."""

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids or a conversation."""

_ROLES: Final[dict[ChatRole, pb.ChatRole]] = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
}
_PRIORITIES: Final = {
    Priority.HIGH: pb.PRIORITY_HIGH,
    Priority.NORMAL: pb.PRIORITY_NORMAL,
    Priority.LOW: pb.PRIORITY_LOW,
}
_FINISH_REASONS: Final = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
# gRPC's own retries: a call is tried again as long as nothing of its answer has come. The pause is
# the server's (grpc-retry-pushback-ms, the same as its RetryInfo) where it says one.
_RETRIED_STATUSES: Final = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_MAX_ATTEMPTS: Final = 5  # gRPC allows no more


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and when a completion ends; what is left out is at its default.

    Meanings, limits and defaults stand in `lowbit.server.types.SamplingParams`.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    seed: int
    max_tokens: int
    min_tokens: int
    n: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    top_logprobs: int
    prompt_logprobs: int
    json_schema: str
    regex: str
    grammar: str
    choice: Sequence[str]


class GenerateOptions(SamplingOptions, total=False):
    """All options of a request. Meanings and defaults stand in `proto/generation.proto`."""

    request_id: str
    priority: Priority
    deadline_seconds: float
    tenant: str
    stream_interval: int
    echo: bool
    truncate_prompt_tokens: int
    parse_special_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a completion, or of a prompt that was asked for."""

    id: int
    logprob: float  # natural logarithm, under the model itself (temperature 1)
    text: str  # what it says by itself; parts of characters are U+FFFD
    top_logprobs: tuple[tuple[int, float], ...]  # (id, logprob) of the candidates asked for
    rank: int | None  # by likelihood, from 1; None where it was not computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took, all its completions together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long a request took, as the server measured it from its arrival."""

    time_to_first_token_seconds: float
    duration_seconds: float  # to its last token
    decode_seconds: float  # from its first token to its last
    queue_seconds: float | None  # in the engine's queue; None where the engine did not say
    prefill_seconds: float | None  # from there to its first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A part of a completion; a completion is the concatenation of all parts of its index."""

    request_id: str
    index: int  # which of the n completions
    text: str  # may lag behind the tokens, until it is decided
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None  # on a completion's last part only
    stop_match: str | int | None  # the stop string or token id that ended it
    prompt_tokens: tuple[Token, ...]  # on the request's first part only, if asked for
    usage: Usage | None  # on the request's last part only
    timings: Timings | None  # on the request's last part only


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole completion."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    stop_match: str | int | None  # the stop string or token id that ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer: as many completions as were asked for."""

    request_id: str
    completions: tuple[Completion, ...]
    prompt_tokens: tuple[Token, ...]  # if asked for
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Of the first completion."""
        return self.completions[0].tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first completion."""
        return self.completions[0].finish_reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How a connection is secured. PEM, as bytes."""

    root_certificates: bytes | None = None  # None: those that gRPC brings along
    certificate_chain: bytes | None = None  # of the client, for mutual TLS
    private_key: bytes | None = None
    server_name: str | None = None  # in the server's certificate, where it is not in the address


class Client:
    """A blocking client. Threads may share it; close it, or use it in a `with`.

    The connection is made by the first call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        max_attempts: int = 3,
    ) -> None:
        """`max_attempts` counts the first one: 1 never retries."""
        self.address = address
        options = _channel_options(tls, max_attempts)
        self._channel = (
            grpc.insecure_channel(address, options=options)
            if tls is None
            else grpc.secure_channel(address, _credentials(tls), options=options)
        )
        self._metadata = _metadata(api_key)
        self._generation = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is running and drop the connection."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_seconds: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Wait for the whole completion.

        The server makes a request id where none is given. Past the timeout the server stops the
        generation, and this raises with DEADLINE_EXCEEDED.
        """
        request = _request(prompt, options)
        call = self._generation.Generate(request, timeout=timeout_seconds, metadata=self._metadata)
        return _generation(call)

    def stream(
        self,
        prompt: Prompt,
        *,
        timeout_seconds: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Delta, None, None]:
        """Yield the completion as it is made. The call starts with the first `next`.

        Closing the generator cancels the call. A `for` loop over a generator that nothing else
        refers to closes it when left; hold it with `contextlib.closing` where that matters.
        """
        request = _request(prompt, options)
        call = self._generation.GenerateStream(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        try:
            for response in call:
                yield from _deltas(response)
        finally:
            call.cancel()

    def wait_until_serving(self, timeout_seconds: float = 60.0) -> None:
        """Return when the server reports that it serves. Raises TimeoutError."""
        call = self._health.Watch(
            _health_request(),
            timeout=timeout_seconds,
            wait_for_ready=True,
            metadata=self._metadata,
        )
        try:
            for response in call:
                if _is_serving(response):
                    return
        except grpc.RpcError as error:
            _raise_if_late(error, timeout_seconds)
            raise
        finally:
            call.cancel()


class AsyncClient:
    """An asyncio client. Create it on the loop that uses it; close it, or use `async with`.

    The connection is made by the first call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: Tls | None = None,
        max_attempts: int = 3,
    ) -> None:
        """`max_attempts` counts the first one: 1 never retries."""
        self.address = address
        options = _channel_options(tls, max_attempts)
        self._channel = (
            grpc.aio.insecure_channel(address, options=options)
            if tls is None
            else grpc.aio.secure_channel(address, _credentials(tls), options=options)
        )
        self._metadata = _metadata(api_key)
        self._generation = pb_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is running and drop the connection."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout_seconds: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generation:
        """Wait for the whole completion; cancelling the task cancels the call.

        The server makes a request id where none is given. Past the timeout the server stops the
        generation, and this raises with DEADLINE_EXCEEDED.
        """
        request = _request(prompt, options)
        call = self._generation.Generate(request, timeout=timeout_seconds, metadata=self._metadata)
        return _generation(await call)

    async def stream(
        self,
        prompt: Prompt,
        *,
        timeout_seconds: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[Delta, None]:
        """Yield the completion as it is made. The call starts with the first `anext`.

        Closing the generator, or cancelling the task that iterates, cancels the call. Leaving an
        `async for` early closes it soon; hold it with `contextlib.aclosing` to close it there.
        """
        request = _request(prompt, options)
        call = self._generation.GenerateStream(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        try:
            async for response in call:
                for delta in _deltas(response):
                    yield delta
        finally:
            call.cancel()

    async def wait_until_serving(self, timeout_seconds: float = 60.0) -> None:
        """Return when the server reports that it serves. Raises TimeoutError."""
        call = self._health.Watch(
            _health_request(),
            timeout=timeout_seconds,
            wait_for_ready=True,
            metadata=self._metadata,
        )
        try:
            async for response in call:
                if _is_serving(response):
                    return
        except grpc.RpcError as error:
            _raise_if_late(error, timeout_seconds)
            raise
        finally:
            call.cancel()


def _channel_options(tls: Tls | None, max_attempts: int) -> list[tuple[str, int | str]]:
    if not 1 <= max_attempts <= _MAX_ATTEMPTS:
        raise ValueError(f"max_attempts is {max_attempts}; it must lie in [1, {_MAX_ATTEMPTS}]")
    options: list[tuple[str, int | str]] = [
        # Finds out that a server has vanished while a long call waits for its only reply.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        # A client often starts before its server; gRPC's own pause of up to two minutes is long.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # The server bounds what it sends.
        ("grpc.max_receive_message_length", -1),
        ("grpc.service_config", _service_config(max_attempts)),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def _service_config(max_attempts: int) -> str:
    methods: dict[str, object] = {"name": [{"service": SERVICE_NAME}]}
    if max_attempts > 1:
        methods["retryPolicy"] = {
            "maxAttempts": max_attempts,
            "initialBackoff": "0.1s",
            "maxBackoff": "5s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": _RETRIED_STATUSES,
        }
    return json.dumps({"methodConfig": [methods]})


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return () if api_key is None else (("authorization", f"Bearer {api_key}"),)


def _request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    given: dict[str, Any] = dict(options)
    priority = given.pop("priority", None)
    own = [name for name in given if name in pb.GenerateRequest.DESCRIPTOR.fields_by_name]
    request = pb.GenerateRequest(**{name: given.pop(name) for name in own})
    request.sampling.CopyFrom(pb.SamplingParams(**given))
    if priority is not None:
        request.priority = _PRIORITIES[Priority(priority)]
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    messages = [item for item in prompt if isinstance(item, ChatMessage)]
    ids = [item for item in prompt if not isinstance(item, ChatMessage)]
    if messages and ids:
        raise TypeError("a prompt is either token ids or chat messages")
    if messages:
        request.chat.CopyFrom(pb.Chat(messages=[_message(message) for message in messages]))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=ids))


def _message(message: ChatMessage) -> pb.ChatMessage:
    return pb.ChatMessage(role=_ROLES[message.role], content=message.content)


def _generation(response: pb.GenerateResponse) -> Generation:
    return Generation(
        request_id=response.request_id,
        completions=tuple(map(_completion, response.outputs)),
        prompt_tokens=tuple(map(_token, response.prompt.tokens)),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
    )


def _completion(output: pb.Output) -> Completion:
    finish_reason = _FINISH_REASONS[output.finish_reason]
    assert finish_reason is not None
    return Completion(
        text=output.text,
        tokens=tuple(map(_token, output.tokens)),
        finish_reason=finish_reason,
        stop_match=_stop_match(output),
    )


def _deltas(response: pb.GenerateResponse) -> Iterator[Delta]:
    if response.HasField("error"):
        return  # the call raises the same as its status
    last = len(response.outputs) - 1
    for place, output in enumerate(response.outputs):
        ends = place == last and response.HasField("usage")
        yield Delta(
            request_id=response.request_id,
            index=output.index,
            text=output.text,
            tokens=tuple(map(_token, output.tokens)),
            finish_reason=_FINISH_REASONS[output.finish_reason],
            stop_match=_stop_match(output),
            prompt_tokens=tuple(map(_token, response.prompt.tokens)) if place == 0 else (),
            usage=_usage(response.usage) if ends else None,
            timings=_timings(response.timings) if ends else None,
        )


def _token(token: pb.TokenInfo) -> Token:
    top = tuple((candidate.id, candidate.logprob) for candidate in token.top_logprobs)
    rank = token.rank if token.HasField("rank") else None
    return Token(id=token.id, logprob=token.logprob, text=token.text, top_logprobs=top, rank=rank)


def _stop_match(output: pb.Output) -> str | int | None:
    match output.WhichOneof("stop_match"):
        case "stop_string":
            return output.stop_string
        case "stop_token_id":
            return output.stop_token_id
    return None


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        time_to_first_token_seconds=timings.time_to_first_token_seconds,
        duration_seconds=timings.duration_seconds,
        decode_seconds=timings.decode_seconds,
        queue_seconds=timings.queue_seconds if timings.HasField("queue_seconds") else None,
        prefill_seconds=timings.prefill_seconds if timings.HasField("prefill_seconds") else None,
    )


def _health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=SERVICE_NAME)


def _is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _raise_if_late(error: grpc.RpcError, timeout_seconds: float) -> None:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise TimeoutError(f"the server did not serve within {timeout_seconds} seconds") from error
