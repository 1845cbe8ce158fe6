"""lowbit.v1.ModelService: what is served and how busy the server is. Changes nothing."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Final

import grpc

from ...proto import generation_pb2 as pb
from ..config import ServerConfig
from .calls import Calls
from .deployment import Deployment, State
from .unary import unary_handler

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["ModelService"].full_name
SCHEMA_REVISION: Final = 1
_STATES: Final = {
    State.STARTING: pb.SERVER_STATE_STARTING,
    State.SERVING: pb.SERVER_STATE_SERVING,
    State.DRAINING: pb.SERVER_STATE_DRAINING,
    State.FAILED: pb.SERVER_STATE_FAILED,
}


class ModelServicer:
    def __init__(self, config: ServerConfig, deployment: Deployment, calls: Calls) -> None:
        self._config = config
        self._deployment = deployment
        self._calls = calls
        self._started = time.monotonic()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "GetModel": unary_handler(pb.GetModelRequest, self.get_model),
                "GetServerInfo": unary_handler(pb.GetServerInfoRequest, self.get_server_info),
                "GetLoad": unary_handler(pb.GetLoadRequest, self.get_load),
            },
        )

    async def get_model(self, _: pb.GetModelRequest) -> pb.GetModelResponse:
        loaded = self._deployment.loaded
        model = loaded.model
        response = pb.GetModelResponse(
            name=model.name,
            architecture=model.architecture,
            max_model_len=loaded.engine.max_model_len,
            vocab_size=loaded.engine.vocab_size,
            eos_token_ids=model.eos_token_ids,
            has_chat_template=loaded.tokenizer.has_chat_template,
        )
        if model.quantization is not None:
            quantization = model.quantization
            response.quantization.format = quantization.format
            response.quantization.bits = quantization.bits
            response.quantization.group_size = quantization.group_size
        return response

    async def get_server_info(self, _: pb.GetServerInfoRequest) -> pb.GetServerInfoResponse:
        config = self._config
        return pb.GetServerInfoResponse(
            version=version("lowbit"),
            schema_revision=SCHEMA_REVISION,
            state=_STATES[self._deployment.state],
            uptime_seconds=time.monotonic() - self._started,
            limits=pb.Limits(
                max_receive_message_bytes=config.max_message_bytes,
                max_send_message_bytes=config.max_send_message_bytes,
                max_requests=self._calls.max_requests,
                max_num_seqs=config.engine.max_num_seqs,
            ),
        )

    async def get_load(self, _: pb.GetLoadRequest) -> pb.GetLoadResponse:
        stats = self._deployment.loaded.engine.last_step
        return pb.GetLoadResponse(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            kv_cache_usage_ratio=stats.kv_cache_usage_ratio,
            num_requests=self._calls.num_requests,
        )
