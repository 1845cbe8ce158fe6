"""lowbit.v1.GenerationService: one call is one request of the engine.

The handlers take bytes, so that a message which does not parse gets an answer that says why.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Final, Protocol

import grpc
import grpc.aio

from ...proto import generation_pb2 as pb
from ..metrics import Metrics, RequestEnd, RequestObserver
from ..text.detokenizer import Detokenizer
from ..types import (
    ChatMessage,
    EngineFailed,
    InvalidRequest,
    QueueFull,
    SamplingParams,
    SchedulingParams,
    TokenConstraint,
    TokenOutput,
)
from .completion import Completion, whole
from .convert import (
    chat_of,
    new_request_id,
    request_id_of,
    sampling_params_of,
    scheduling_params_of,
    token_ids_of,
)
from .errors import describe
from .wire import parse_request

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

_MAX_COMPILE_SECONDS: Final = 10.0

_Context = grpc.aio.ServicerContext[bytes, pb.GenerateResponse]
_Send = Callable[[pb.GenerateResponse], Awaitable[None]]


class Engine(Protocol):
    """What the server needs of an AsyncEngine; the meanings stand there."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    @property
    def is_healthy(self) -> bool: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def begin_drain(self) -> None: ...

    async def wait_idle(self) -> None: ...

    async def wait_failed(self) -> EngineFailed: ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        scheduling: SchedulingParams = ...,
        constraint: TokenConstraint | None = None,
    ) -> AsyncGenerator[TokenOutput, None]: ...


class TextCodec(Protocol):
    """What the server needs of a Tokenizer; the meanings stand there."""

    max_characters_per_token: int

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]: ...

    def detokenizer(
        self, stop: Sequence[str] = (), context: Sequence[int] = (), min_tokens: int = 0
    ) -> Detokenizer: ...

    def constraint(
        self, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> TokenConstraint: ...


class GenerationServicer:
    """Serves at most `max_requests` calls at a time; more are refused before they cost anything."""

    def __init__(
        self, engine: Engine, tokenizer: TextCodec, metrics: Metrics, *, max_requests: int
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._max_requests = max_requests
        # Of its own: what takes long to compile keeps no prompt waiting to be encoded.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="lowbit-compiling")
        self.num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register."""
        serialize = pb.GenerateResponse.SerializeToString
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": grpc.unary_unary_rpc_method_handler(
                    self.generate, response_serializer=serialize
                ),
                "GenerateStream": grpc.unary_stream_rpc_method_handler(
                    self.generate_stream, response_serializer=serialize
                ),
            },
        )

    async def wait_idle(self) -> None:
        """Return when no call is left, their statuses sent."""
        await self._idle.wait()

    async def generate(self, data: bytes, context: _Context) -> pb.GenerateResponse:
        parts: list[pb.GenerateResponse] = []

        async def collect(part: pb.GenerateResponse) -> None:
            parts.append(part)

        await self._serve(data, context, collect)
        return whole(parts)

    async def generate_stream(self, data: bytes, context: _Context) -> None:
        # Writing, not yielding: a cancelled call then unwinds this coroutine at once, where a
        # generator would stay suspended until it is collected.
        async def write(part: pb.GenerateResponse) -> None:
            try:
                await context.write(part)
            except grpc.aio.BaseError as error:
                # The caller has left, and the cancellation that says so is on its way. Seen once
                # in some ten thousand cancelled calls.
                raise asyncio.CancelledError from error

        await self._serve(data, context, write)

    async def _serve(self, data: bytes, context: _Context, send: _Send) -> None:
        """One request from its bytes to its end, counted once."""
        observer = self._metrics.observe_request()
        self._enter(context)
        request_id = new_request_id()
        try:
            if self.num_requests > self._max_requests:
                raise QueueFull(f"the server holds {self._max_requests} requests, its limit")
            request = parse_request(data)
            request_id = request_id_of(request) or request_id
            end = await self._complete(request_id, request, observer, send)
        except asyncio.CancelledError:
            # The caller left, or its deadline passed. grpc.aio leaks the call unless this goes on.
            observer.end("cancelled")
            raise
        except Exception as error:
            failure = describe(error, request_id)
            observer.end(failure.end)
            await context.abort(failure.status, failure.details)
        else:
            observer.end(end)

    async def _complete(
        self, request_id: str, request: pb.GenerateRequest, observer: RequestObserver, send: _Send
    ) -> RequestEnd:
        params = sampling_params_of(request.sampling)
        scheduling = scheduling_params_of(request)
        if params.n > 1:
            raise InvalidRequest(f"n is {params.n}; a call makes 1 completion")
        constraint = await self._constrain(params)
        token_ids = await self._encode(request)
        # An answer in a chat is a text of its own; a completion goes on where its prompt ends.
        context = () if request.HasField("chat") else token_ids
        detokenizer = self._tokenizer.detokenizer(params.stop, context, params.min_tokens)
        completion = Completion(request_id, len(token_ids), detokenizer, observer)
        generation = self._engine.generate(request_id, token_ids, params, scheduling, constraint)
        async with aclosing(generation) as outputs:
            async for output in outputs:
                await send(completion.add(output))
                if completion.end is not None:
                    return completion.end
        raise EngineFailed("the engine gave no finish reason")

    async def _constrain(self, params: SamplingParams) -> TokenConstraint | None:
        form = params.structured_output
        if form is None:
            return None
        compiling = asyncio.get_running_loop().run_in_executor(
            self._compiling,
            self._tokenizer.constraint,
            params,
            self._engine.vocab_size,
            self._engine.eos_token_ids,
        )
        try:
            return await asyncio.wait_for(compiling, _MAX_COMPILE_SECONDS)
        except TimeoutError:
            raise InvalidRequest(
                f"{form[0]} was not compiled within {_MAX_COMPILE_SECONDS:.0f} seconds"
            ) from None

    async def _encode(self, request: pb.GenerateRequest) -> list[int]:
        match request.WhichOneof("prompt"):
            case "text":
                self._check_characters("text", len(request.text))
                return await asyncio.to_thread(self._tokenizer.encode, request.text)
            case "token_ids":
                return token_ids_of(request.token_ids, self._engine.max_model_len)
            case "chat":
                messages = chat_of(request.chat)
                self._check_characters("chat", 1 + sum(len(each.content) for each in messages))
                return await asyncio.to_thread(self._tokenizer.encode_chat, messages)
            case _:
                raise InvalidRequest("prompt is not set; one of text, token_ids and chat must be")

    def _check_characters(self, field: str, num_characters: int) -> None:
        """Refuse what cannot fit the model without encoding it: 4 MiB take seconds and 1 GB."""
        if num_characters == 0:
            raise InvalidRequest(f"{field} is empty; a prompt must have at least 1 token")
        max_model_len = self._engine.max_model_len
        limit = max_model_len * self._tokenizer.max_characters_per_token
        if num_characters > limit:
            raise InvalidRequest(
                f"{field} has {num_characters} characters; "
                f"max_model_len ({max_model_len} tokens) allows at most {limit}"
            )

    def _enter(self, context: _Context) -> None:
        self.num_requests += 1
        self._idle.clear()
        # The stubs ask for an instance of a class where any callable will do.
        context.add_done_callback(self._leave)  # type: ignore[arg-type]

    def _leave(self, _: _Context) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()
