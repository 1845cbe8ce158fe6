"""lowbit.v1.GenerationService: one call is one request of the engine.

The handlers take bytes, so that a message which does not parse gets an answer that says why.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import grpc
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
from .calls import Calls
from .completion import Completion
from .convert import (
    new_request_id,
    request_id_of,
    sampling_params_of,
    scheduling_params_of,
    stream_interval_of,
)
from .deployment import Deployment, Loaded
from .errors import Failure, abort, describe
from .prompt import check_token_ids, encode_prompt
from .stream import PartStream, Send
from .unary import unary_handler
from .wire import parse

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
# How long the status of a call may take to a caller that does not read.
_GOODBYE_SECONDS: Final = 1.0
_MAX_COMPILE_SECONDS: Final = 10.0

Context = grpc.aio.ServicerContext[bytes, pb.GenerateResponse]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A generation that has been checked."""

    request_id: str
    loaded: Loaded
    token_ids: list[int]
    params: SamplingParams
    scheduling: SchedulingParams
    constraint: TokenConstraint | None
    completion: Completion


class GenerationServicer:
    def __init__(
        self, config: ServerConfig, deployment: Deployment, calls: Calls, metrics: Metrics
    ) -> None:
        self._config = config
        self._deployment = deployment
        self._calls = calls
        self._metrics = metrics
        # Of its own: what takes long to compile keeps no prompt waiting to be encoded.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="lowbit-compiling")

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
                "Tokenize": unary_handler(pb.TokenizeRequest, self.tokenize),
                "Detokenize": unary_handler(pb.DetokenizeRequest, self.detokenize),
            },
        )

    async def generate(self, data: bytes, context: Context) -> pb.GenerateResponse:
        parts: list[pb.GenerateResponse] = []

        async def collect(part: pb.GenerateResponse) -> None:
            parts.append(part)

        await self._serve(data, context, collect, streams=False)
        return parts[-1]

    async def generate_stream(self, data: bytes, context: Context) -> None:
        await self._serve(data, context, context.write, streams=True)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        loaded = self._deployment.loaded
        token_ids = await encode_prompt(
            request,
            loaded,
            add_special_tokens=not request.HasField("add_special_tokens")
            or request.add_special_tokens,
        )
        response = pb.TokenizeResponse(num_tokens=len(token_ids))
        if not request.count_only:
            response.ids.extend(token_ids)
            response.texts.extend(map(loaded.tokenizer.token_text, token_ids))
        return response

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        loaded = self._deployment.loaded
        token_ids = check_token_ids("ids", request.ids, loaded)
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        return pb.DetokenizeResponse(
            text=loaded.tokenizer.decode(token_ids, skip_special_tokens=skip)
        )

    async def _serve(self, data: bytes, context: Context, send: Send, *, streams: bool) -> None:
        """One request from its bytes to its end, counted once."""
        observer = self._metrics.observe_request()
        request_id = new_request_id()
        stream: PartStream | None = None
        completion: Completion | None = None
        try:
            self._calls.enter(context)
            message = parse(data, pb.GenerateRequest)
            request_id = request_id_of(message) or request_id
            request = await self._check(message, request_id, context, observer)
            completion = request.completion
            stream = PartStream(
                completion,
                send,
                interval=stream_interval_of(message) if streams else None,
                max_buffered_tokens=self._config.max_buffered_tokens,
                stall_seconds=self._config.stall_timeout_seconds,
            )
            with self._calls.running(request_id, stream.abort):
                await stream.run(
                    request.loaded.engine.generate(
                        request_id,
                        request.token_ids,
                        request.params,
                        request.scheduling,
                        request.constraint,
                    )
                )
        except asyncio.CancelledError:
            # The caller left, or its deadline passed. grpc.aio leaks the call unless this goes on.
            observer.end("cancelled")
            raise
        except Exception as error:
            failure = describe(error, request_id)
            observer.end(failure.end)
            begun = completion if streams and stream is not None and stream.has_sent else None
            await self._say_goodbye(context, failure, begun, send)
        else:
            assert completion.end is not None
            observer.end(completion.end)

    async def _check(
        self,
        message: pb.GenerateRequest,
        request_id: str,
        context: Context,
        observer: RequestObserver,
    ) -> _Request:
        """Everything that can be refused before the engine sees it."""
        loaded = self._deployment.accept()
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the request arrived")
        params = sampling_params_of(message.sampling)
        scheduling = scheduling_params_of(message)
        constraint = await self._constrain(params, loaded)
        token_ids = await encode_prompt(message, loaded)
        # An answer in a chat is a text of its own; a completion goes on where its prompt ends.
        before = () if message.HasField("chat") else token_ids
        completion = Completion(
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
            echo=message.echo,
        )
        return _Request(
            request_id=request_id,
            loaded=loaded,
            token_ids=token_ids,
            params=params,
            scheduling=scheduling,
            constraint=constraint,
            completion=completion,
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

    async def _say_goodbye(
        self, context: Context, failure: Failure, begun: Completion | None, send: Send
    ) -> None:
        """The failure as the last part of a stream that has begun, and as the status."""
        try:
            async with asyncio.timeout(_GOODBYE_SECONDS):
                if begun is not None and failure.reason != "CLIENT_STALLED":
                    await send(begun.fail(failure.as_message()))
                await abort(context, failure)
        except TimeoutError:
            # It does not read. Leaving the call without a status resets it.
            raise asyncio.CancelledError from None
