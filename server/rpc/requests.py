"""One request from its message to its end: admitted, encoded, generated, delivered, counted.

Every protocol that is served comes through here, as the same message.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import grpc.aio

from ...proto import generation_pb2 as pb
from ..config import ServerConfig
from ..metrics import Metrics, RequestObserver
from ..types import (
    DeadlineExceeded,
    InvalidRequest,
    SamplingParams,
    SchedulingParams,
    TokenConstraint,
)
from .admission import Admission
from .calls import Calls
from .completion import Completion
from .convert import new_request_id, request_id_of, sampling_params_of, stream_interval_of
from .deployment import Deployment, Loaded
from .errors import ClientStalled, abort, describe
from .prompt import encode_prompt
from .stream import PartStream, Send
from .tenants import Tenant

# How long the status of a call may take to a caller that does not read.
_GOODBYE_SECONDS: Final = 1.0
_MAX_COMPILE_SECONDS: Final = 10.0

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Generation:
    """A request that can be given to the engine, and its way back."""

    loaded: Loaded
    token_ids: list[int]
    params: SamplingParams
    scheduling: SchedulingParams
    constraint: TokenConstraint | None
    completion: Completion
    stream: PartStream


class RequestServer:
    def __init__(
        self,
        config: ServerConfig,
        deployment: Deployment,
        calls: Calls,
        metrics: Metrics,
        admission: Admission,
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._calls = calls
        self._metrics = metrics
        self._admission = admission
        # Of its own: what takes long to compile keeps no prompt waiting to be encoded.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="lowbit-compiling")

    def admit(self, context: Context) -> None:
        """Count a call that the engine has no part in.

        Raises QueueFull, Unauthenticated or QuotaExceeded.
        """
        self._calls.enter(context)
        self._admission.count_request(context)

    async def serve(
        self,
        read: Callable[[], Awaitable[pb.GenerateRequest]],
        context: Context,
        send: Send,
        *,
        streams: bool,
    ) -> None:
        """Answer the request that `read` gives with parts to `send`, or with one if not `streams`.

        A failure, also one that `read` raises, becomes the call's status: this returns after
        success only.
        """
        observer = self._metrics.observe_request()
        request_id = new_request_id()
        generation: _Generation | None = None
        try:
            self._calls.enter(context)
            message = await read()
            request_id = request_id_of(message) or request_id
            caller = self._admission.caller_of(context)
            with self._admission.request(caller):
                generation = await self._prepare(
                    message, request_id, caller, context, observer, send, streams
                )
                with (
                    self._calls.running(request_id, generation.stream.abort),
                    self._admission.tokens(caller, generation.completion),
                ):
                    scheduling = _scheduling_now(generation.scheduling, observer)
                    await self._generate(request_id, generation, scheduling)
        except asyncio.CancelledError:
            # The caller left, or its deadline passed. grpc.aio leaks the call unless this goes on.
            observer.end("cancelled")
            raise
        except Exception as error:
            failed = describe(error, request_id)
            observer.end(failed.end)
            has_begun = streams and generation is not None and generation.stream.has_sent
            async with _patience():
                if has_begun and not isinstance(error, ClientStalled):
                    assert generation is not None
                    await send(generation.completion.fail(failed.as_message()))
                await abort(context, failed)
        else:
            assert generation.completion.end is not None
            observer.end(generation.completion.end)

    async def _generate(
        self, request_id: str, generation: _Generation, scheduling: SchedulingParams
    ) -> None:
        outputs = generation.loaded.engine.generate(
            request_id,
            generation.token_ids,
            generation.params,
            scheduling,
            generation.constraint,
        )
        await generation.stream.run(outputs)

    async def _prepare(
        self,
        message: pb.GenerateRequest,
        request_id: str,
        caller: Tenant | None,
        context: Context,
        observer: RequestObserver,
        send: Send,
        streams: bool,
    ) -> _Generation:
        """Everything that can be refused before the engine sees it."""
        loaded = self._deployment.accept()
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request was looked at")
        params = sampling_params_of(message.sampling)
        scheduling = self._admission.scheduling(caller, message, remaining)
        interval = stream_interval_of(message)
        constraint = await self._constrain(params, loaded)
        token_ids = await encode_prompt(message, loaded)
        limit = loaded.engine.max_model_len
        params = self._admission.sampling(caller, params, len(token_ids), limit)
        completion = _completion(message, request_id, token_ids, params, loaded, observer)
        stream = PartStream(
            completion,
            send,
            interval=interval if streams else None,
            max_buffered_tokens=self._config.max_buffered_tokens,
            stall_seconds=self._config.stall_timeout_seconds,
        )
        return _Generation(
            loaded=loaded,
            token_ids=token_ids,
            params=params,
            scheduling=scheduling,
            constraint=constraint,
            completion=completion,
            stream=stream,
        )

    async def _constrain(self, params: SamplingParams, loaded: Loaded) -> TokenConstraint | None:
        form = params.structured_output
        if form is None:
            return None
        compiling = asyncio.get_running_loop().run_in_executor(
            self._compiling,
            loaded.tokenizer.constraint,
            params,
            loaded.engine.vocab_size,
            loaded.engine.eos_token_ids,
        )
        try:
            return await asyncio.wait_for(compiling, _MAX_COMPILE_SECONDS)
        except TimeoutError:
            raise InvalidRequest(
                f"{form[0]} was not compiled within {_MAX_COMPILE_SECONDS:.0f} seconds"
            ) from None


def _scheduling_now(params: SchedulingParams, observer: RequestObserver) -> SchedulingParams:
    """Encoding and compiling take their time off the deadline. Raises DeadlineExceeded."""
    if params.deadline_seconds is None:
        return params
    remaining = params.deadline_seconds - observer.elapsed_seconds
    if remaining <= 0:
        raise DeadlineExceeded("the deadline passed before the request came to the engine")
    return dataclasses.replace(params, deadline_seconds=remaining)


def _completion(
    message: pb.GenerateRequest,
    request_id: str,
    token_ids: list[int],
    params: SamplingParams,
    loaded: Loaded,
    observer: RequestObserver,
) -> Completion:
    # An answer in a chat is a text of its own; a completion goes on where its prompt ends.
    before = () if message.HasField("chat") else token_ids
    return Completion(
        request_id,
        prompt_token_ids=token_ids,
        detokenizers=[
            loaded.tokenizer.detokenizer(
                params.stop,
                before,
                min_tokens=params.min_tokens,
                include_stop=params.include_stop,
            )
            for _ in range(params.n)
        ],
        tokenizer=loaded.tokenizer,
        observer=observer,
        end_sample=partial(loaded.engine.end_sample, request_id),
        echo=message.echo or params.prompt_logprobs is not None,
    )


@asynccontextmanager
async def _patience() -> AsyncIterator[None]:
    """To say good-bye in. Leaving a call without a status resets it, for who does not read."""
    try:
        async with asyncio.timeout(_GOODBYE_SECONDS):
            yield
    except TimeoutError:
        raise asyncio.CancelledError from None
