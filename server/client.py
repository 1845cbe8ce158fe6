"""The Python client of lowbit.v1, blocking and asyncio. Knows the wire, nothing of the server.

Failures are `grpc.RpcError`s: `code()` is the status, `details()` says what went wrong.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, TypedDict, Unpack

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
}
_CHANNEL_OPTIONS: Final = (
    # Finds out that a server has vanished while a long call waits for its only reply.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A client often starts before its server; gRPC's own pause of up to two minutes is too long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


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
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    top_logprobs: int
    prompt_logprobs: int
    json_schema: str
    regex: str
    grammar: str
    choice: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a completion."""

    id: int
    logprob: float  # natural logarithm, under the model itself (temperature 1)
    top_logprobs: tuple[tuple[int, float], ...]  # (id, logprob) of the candidates asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took, as the server measured it."""

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_seconds: float  # from the request's arrival at the server
    duration_seconds: float  # from the request's arrival to its last token
    cached_tokens: int = 0  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A part of a completion; the completion is the concatenation of all parts."""

    request_id: str
    text: str  # may lag behind the tokens, until it is decided
    tokens: tuple[Token, ...]
    prompt_tokens: tuple[Token, ...]  # from the second on; on the first part, where asked for
    finish_reason: FinishReason | None  # on the last part only
    usage: Usage | None  # on the last part only


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole completion."""

    request_id: str
    text: str
    tokens: tuple[Token, ...]
    prompt_tokens: tuple[Token, ...]  # from the second on, where prompt_logprobs asked for them
    finish_reason: FinishReason
    usage: Usage


class Client:
    """A blocking client. Threads may share it; close it, or use it in a `with`.

    The connection is made by the first call.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
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
        request_id: str = "",
        timeout_seconds: float | None = None,
        priority: Priority = Priority.NORMAL,
        deadline_seconds: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Wait for the whole completion.

        The server makes a request id where none is given. Past the timeout the server stops the
        generation, and this raises with DEADLINE_EXCEEDED.
        """
        request = _request(prompt, request_id, priority, deadline_seconds, sampling)
        return _generation(self._generation.Generate(request, timeout=timeout_seconds))

    def stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        timeout_seconds: float | None = None,
        priority: Priority = Priority.NORMAL,
        deadline_seconds: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Delta, None, None]:
        """Yield the completion as it is made. The call starts with the first `next`.

        Closing the generator cancels the call. A `for` loop over a generator that nothing else
        refers to closes it when left; hold it with `contextlib.closing` where that matters.
        """
        request = _request(prompt, request_id, priority, deadline_seconds, sampling)
        call = self._generation.GenerateStream(request, timeout=timeout_seconds)
        try:
            for response in call:
                yield _delta(response)
        finally:
            call.cancel()

    def wait_until_serving(self, timeout_seconds: float = 60.0) -> None:
        """Return when the server reports that it serves. Raises TimeoutError."""
        call = self._health.Watch(_health_request(), timeout=timeout_seconds, wait_for_ready=True)
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

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
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
        request_id: str = "",
        timeout_seconds: float | None = None,
        priority: Priority = Priority.NORMAL,
        deadline_seconds: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """Wait for the whole completion; cancelling the task cancels the call.

        The server makes a request id where none is given. Past the timeout the server stops the
        generation, and this raises with DEADLINE_EXCEEDED.
        """
        request = _request(prompt, request_id, priority, deadline_seconds, sampling)
        return _generation(await self._generation.Generate(request, timeout=timeout_seconds))

    async def stream(
        self,
        prompt: Prompt,
        *,
        request_id: str = "",
        timeout_seconds: float | None = None,
        priority: Priority = Priority.NORMAL,
        deadline_seconds: float | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Delta, None]:
        """Yield the completion as it is made. The call starts with the first `anext`.

        Closing the generator, or cancelling the task that iterates, cancels the call. Leaving an
        `async for` early closes it soon; hold it with `contextlib.aclosing` to close it there.
        """
        request = _request(prompt, request_id, priority, deadline_seconds, sampling)
        call = self._generation.GenerateStream(request, timeout=timeout_seconds)
        try:
            async for response in call:
                yield _delta(response)
        finally:
            call.cancel()

    async def wait_until_serving(self, timeout_seconds: float = 60.0) -> None:
        """Return when the server reports that it serves. Raises TimeoutError."""
        call = self._health.Watch(_health_request(), timeout=timeout_seconds, wait_for_ready=True)
        try:
            async for response in call:
                if _is_serving(response):
                    return
        except grpc.RpcError as error:
            _raise_if_late(error, timeout_seconds)
            raise
        finally:
            call.cancel()


def _request(
    prompt: Prompt,
    request_id: str,
    priority: Priority,
    deadline_seconds: float | None,
    sampling: SamplingOptions,
) -> pb.GenerateRequest:
    request = pb.GenerateRequest(
        request_id=request_id,
        sampling=pb.SamplingParams(**sampling),
        priority=_PRIORITIES[priority],
        deadline_seconds=deadline_seconds,
    )
    if isinstance(prompt, str):
        request.text = prompt
        return request
    messages = [item for item in prompt if isinstance(item, ChatMessage)]
    ids = [item for item in prompt if not isinstance(item, ChatMessage)]
    if messages and ids:
        raise TypeError("a prompt is either token ids or chat messages")
    if messages:
        request.chat.CopyFrom(pb.Chat(messages=[_message(message) for message in messages]))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=ids))
    return request


def _message(message: ChatMessage) -> pb.ChatMessage:
    return pb.ChatMessage(role=_ROLES[message.role], content=message.content)


def _generation(response: pb.GenerateResponse) -> Generation:
    delta = _delta(response)
    assert delta.finish_reason is not None and delta.usage is not None
    return Generation(
        request_id=delta.request_id,
        text=delta.text,
        tokens=delta.tokens,
        prompt_tokens=delta.prompt_tokens,
        finish_reason=delta.finish_reason,
        usage=delta.usage,
    )


def _delta(response: pb.GenerateResponse) -> Delta:
    return Delta(
        request_id=response.request_id,
        text=response.text,
        tokens=tuple(map(_token, response.tokens)),
        prompt_tokens=tuple(map(_token, response.prompt_tokens)),
        finish_reason=_FINISH_REASONS[response.finish_reason],
        usage=_usage(response.usage) if response.HasField("usage") else None,
    )


def _token(token: pb.TokenInfo) -> Token:
    top = tuple((candidate.id, candidate.logprob) for candidate in token.top_logprobs)
    return Token(id=token.id, logprob=token.logprob, top_logprobs=top)


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        time_to_first_token_seconds=usage.time_to_first_token_seconds,
        duration_seconds=usage.duration_seconds,
        cached_tokens=usage.cached_tokens,
    )


def _health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=SERVICE_NAME)


def _is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _raise_if_late(error: grpc.RpcError, timeout_seconds: float) -> None:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise TimeoutError(f"the server did not serve within {timeout_seconds} seconds") from error
