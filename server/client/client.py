"""The connections of the client: one class that blocks, one for asyncio, with the same methods."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from ...proto import generation_pb2 as pb
from ...proto import generation_pb2_grpc as pb_grpc
from ..types import ChatMessage
from .messages import (
    AbortOutcome,
    Delta,
    GenerateOptions,
    Generation,
    Load,
    LogLevel,
    Model,
    Prompt,
    ServerInfo,
    Tokenization,
    deltas_of,
    generate_request,
    generation_of,
    load_of,
    log_level_request,
    model_of,
    outcomes_of,
    previous_level_of,
    server_info_of,
    tokenization_of,
    tokenize_request,
)

DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
_SERVICES: Final = [each.full_name for each in pb.DESCRIPTOR.services_by_name.values()]

# gRPC's own retries: a call is tried again as long as nothing of its answer has come. The pause is
# the server's (grpc-retry-pushback-ms, the same as its RetryInfo) where it says one.
_RETRIED_STATUSES: Final = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")
_MAX_ATTEMPTS: Final = 5  # gRPC allows no more


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
        self._model = pb_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._control = pb_grpc.ControlServiceStub(self._channel)  # type: ignore[no-untyped-call]
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
        request = generate_request(prompt, options)
        call = self._generation.Generate(request, timeout=timeout_seconds, metadata=self._metadata)
        return generation_of(call)

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
        request = generate_request(prompt, options)
        call = self._generation.GenerateStream(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        try:
            for response in call:
                yield from deltas_of(response)
        finally:
            call.cancel()

    def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool = True,
        parse_special_tokens: bool = False,
        timeout_seconds: float | None = None,
    ) -> Tokenization:
        """The tokens of a text, or of a conversation up to where the assistant speaks next."""
        request = tokenize_request(
            prompt,
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
        )
        response = self._generation.Tokenize(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return tokenization_of(response)

    def count_tokens(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool = True,
        parse_special_tokens: bool = False,
        timeout_seconds: float | None = None,
    ) -> int:
        """How many tokens `tokenize` would give."""
        request = tokenize_request(
            prompt,
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
            count_only=True,
        )
        response = self._generation.Tokenize(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return int(response.num_tokens)

    def detokenize(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout_seconds: float | None = None,
    ) -> str:
        """The text of token ids; parts of characters at its ends are U+FFFD."""
        request = pb.DetokenizeRequest(ids=ids, skip_special_tokens=skip_special_tokens)
        response = self._generation.Detokenize(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return str(response.text)

    def model(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> Model:
        """What is served."""
        response = self._model.GetModel(
            pb.GetModelRequest(), timeout=timeout_seconds, metadata=self._metadata
        )
        return model_of(response)

    def server_info(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> ServerInfo:
        """What serves it: version, state and limits."""
        response = self._model.GetServerInfo(
            pb.GetServerInfoRequest(), timeout=timeout_seconds, metadata=self._metadata
        )
        return server_info_of(response)

    def load(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> Load:
        """How busy the server is."""
        response = self._model.GetLoad(
            pb.GetLoadRequest(), timeout=timeout_seconds, metadata=self._metadata
        )
        return load_of(response)

    def abort(
        self,
        request_ids: Sequence[str],
        *,
        timeout_seconds: float | None = None,
    ) -> dict[str, AbortOutcome]:
        """End requests within one step; what became of each. Needs the control role."""
        response = self._control.Abort(
            pb.AbortRequest(request_ids=request_ids),
            timeout=timeout_seconds,
            metadata=self._metadata,
        )
        return outcomes_of(response)

    def abort_all(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> dict[str, AbortOutcome]:
        """End every request; what became of each. Needs the control role."""
        response = self._control.Abort(
            pb.AbortRequest(all=True), timeout=timeout_seconds, metadata=self._metadata
        )
        return outcomes_of(response)

    def drain(
        self,
        *,
        grace_seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> int:
        """Refuse new requests, and wait for the running ones; how many are left.

        `grace_seconds` is how long to wait at most, by default as long as the server does at its
        end. Needs the control role.
        """
        request = pb.DrainRequest(grace_seconds=grace_seconds)
        response = self._control.Drain(request, timeout=timeout_seconds, metadata=self._metadata)
        return int(response.num_unfinished)

    def set_log_level(
        self,
        level: LogLevel,
        *,
        timeout_seconds: float | None = None,
    ) -> LogLevel:
        """Say how much the server logs; returns the level before. Needs the control role."""
        response = self._control.SetLogLevel(
            log_level_request(level), timeout=timeout_seconds, metadata=self._metadata
        )
        return previous_level_of(response)

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
        self._model = pb_grpc.ModelServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._control = pb_grpc.ControlServiceStub(self._channel)  # type: ignore[no-untyped-call]
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
        request = generate_request(prompt, options)
        call = self._generation.Generate(request, timeout=timeout_seconds, metadata=self._metadata)
        return generation_of(await call)

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
        request = generate_request(prompt, options)
        call = self._generation.GenerateStream(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        try:
            async for response in call:
                for delta in deltas_of(response):
                    yield delta
        finally:
            call.cancel()

    async def tokenize(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool = True,
        parse_special_tokens: bool = False,
        timeout_seconds: float | None = None,
    ) -> Tokenization:
        """The tokens of a text, or of a conversation up to where the assistant speaks next."""
        request = tokenize_request(
            prompt,
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
        )
        response = await self._generation.Tokenize(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return tokenization_of(response)

    async def count_tokens(
        self,
        prompt: str | Sequence[ChatMessage],
        *,
        add_special_tokens: bool = True,
        parse_special_tokens: bool = False,
        timeout_seconds: float | None = None,
    ) -> int:
        """How many tokens `tokenize` would give."""
        request = tokenize_request(
            prompt,
            add_special_tokens=add_special_tokens,
            parse_special_tokens=parse_special_tokens,
            count_only=True,
        )
        response = await self._generation.Tokenize(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return int(response.num_tokens)

    async def detokenize(
        self,
        ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
        timeout_seconds: float | None = None,
    ) -> str:
        """The text of token ids; parts of characters at its ends are U+FFFD."""
        request = pb.DetokenizeRequest(ids=ids, skip_special_tokens=skip_special_tokens)
        response = await self._generation.Detokenize(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return str(response.text)

    async def model(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> Model:
        """What is served."""
        response = await self._model.GetModel(
            pb.GetModelRequest(), timeout=timeout_seconds, metadata=self._metadata
        )
        return model_of(response)

    async def server_info(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> ServerInfo:
        """What serves it: version, state and limits."""
        response = await self._model.GetServerInfo(
            pb.GetServerInfoRequest(), timeout=timeout_seconds, metadata=self._metadata
        )
        return server_info_of(response)

    async def load(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> Load:
        """How busy the server is."""
        response = await self._model.GetLoad(
            pb.GetLoadRequest(), timeout=timeout_seconds, metadata=self._metadata
        )
        return load_of(response)

    async def abort(
        self,
        request_ids: Sequence[str],
        *,
        timeout_seconds: float | None = None,
    ) -> dict[str, AbortOutcome]:
        """End requests within one step; what became of each. Needs the control role."""
        response = await self._control.Abort(
            pb.AbortRequest(request_ids=request_ids),
            timeout=timeout_seconds,
            metadata=self._metadata,
        )
        return outcomes_of(response)

    async def abort_all(
        self,
        *,
        timeout_seconds: float | None = None,
    ) -> dict[str, AbortOutcome]:
        """End every request; what became of each. Needs the control role."""
        response = await self._control.Abort(
            pb.AbortRequest(all=True), timeout=timeout_seconds, metadata=self._metadata
        )
        return outcomes_of(response)

    async def drain(
        self,
        *,
        grace_seconds: float | None = None,
        timeout_seconds: float | None = None,
    ) -> int:
        """Refuse new requests, and wait for the running ones; how many are left.

        `grace_seconds` is how long to wait at most, by default as long as the server does at its
        end. Needs the control role.
        """
        request = pb.DrainRequest(grace_seconds=grace_seconds)
        response = await self._control.Drain(
            request, timeout=timeout_seconds, metadata=self._metadata
        )
        return int(response.num_unfinished)

    async def set_log_level(
        self,
        level: LogLevel,
        *,
        timeout_seconds: float | None = None,
    ) -> LogLevel:
        """Say how much the server logs; returns the level before. Needs the control role."""
        response = await self._control.SetLogLevel(
            log_level_request(level), timeout=timeout_seconds, metadata=self._metadata
        )
        return previous_level_of(response)

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
        ("grpc.http2.ping_timeout_ms", 10_000),  # without it, a minute
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
    methods: dict[str, object] = {"name": [{"service": name} for name in _SERVICES]}
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


def _health_request() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=SERVICE_NAME)


def _is_serving(response: health_pb2.HealthCheckResponse) -> bool:
    return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def _raise_if_late(error: grpc.RpcError, timeout_seconds: float) -> None:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise TimeoutError(f"the server did not serve within {timeout_seconds} seconds") from error
