"""lowbit.v1.GenerationService: one call is one request of the engine.

The handlers take bytes, so that a message which does not parse gets an answer that says why.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import grpc
import grpc.aio

from ...proto import generation_pb2 as pb
from ..types import InvalidRequest
from .deployment import Deployment
from .prompt import check_token_ids, encode_prompt
from .requests import RequestServer
from .unary import unary_handler
from .wire import read

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name

Context = grpc.aio.ServicerContext[bytes, pb.GenerateResponse]


class GenerationServicer:
    def __init__(self, deployment: Deployment, requests: RequestServer) -> None:
        self._deployment = deployment
        self._requests = requests

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register."""
        serialize = pb.GenerateResponse.SerializeToString
        admit = self._requests.admit
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Generate": grpc.unary_unary_rpc_method_handler(
                    self.generate, response_serializer=serialize
                ),
                "GenerateStream": grpc.unary_stream_rpc_method_handler(
                    self.generate_stream, response_serializer=serialize
                ),
                "Tokenize": unary_handler(pb.TokenizeRequest, self.tokenize, admit),
                "Detokenize": unary_handler(pb.DetokenizeRequest, self.detokenize, admit),
            },
        )

    async def generate(self, data: bytes, context: Context) -> pb.GenerateResponse:
        parts: list[pb.GenerateResponse] = []

        async def collect(part: pb.GenerateResponse) -> None:
            parts.append(part)

        request = partial(read, data, pb.GenerateRequest)
        await self._requests.serve(request, context, collect, streams=False)
        (whole,) = parts
        return whole

    async def generate_stream(self, data: bytes, context: Context) -> None:
        request = partial(read, data, pb.GenerateRequest)
        await self._requests.serve(request, context, context.write, streams=True)

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        loaded = self._deployment.loaded
        if request.HasField("add_special_tokens") and not request.HasField("text"):
            raise InvalidRequest("add_special_tokens is set; it is for an input of text")
        adds = not request.HasField("add_special_tokens") or request.add_special_tokens
        token_ids = await encode_prompt(request, loaded, add_special_tokens=adds)
        response = pb.TokenizeResponse(num_tokens=len(token_ids))
        if not request.count_only:
            response.ids.extend(token_ids)
            text_of = loaded.tokenizer.token_text
            response.texts.extend(await asyncio.to_thread(lambda: list(map(text_of, token_ids))))
        return response

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        loaded = self._deployment.loaded
        token_ids = check_token_ids("ids", request.ids, loaded)
        skips = not request.HasField("skip_special_tokens") or request.skip_special_tokens
        decode = loaded.tokenizer.decode
        text = await asyncio.to_thread(decode, token_ids, skip_special_tokens=skips)
        return pb.DetokenizeResponse(text=text)
