"""lowbit.v1.ControlService: what an operator does to a running server."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

import grpc

from ...proto import generation_pb2 as pb
from ..types import InvalidRequest
from .calls import AbortOutcome, Calls
from .unary import unary_handler

SERVICE_NAME: Final = pb.DESCRIPTOR.services_by_name["ControlService"].full_name
_MAX_ABORTED_IDS: Final = 1024
_OUTCOMES: Final = {
    AbortOutcome.ABORTED: pb.ABORT_OUTCOME_ABORTED,
    AbortOutcome.ALREADY_FINISHED: pb.ABORT_OUTCOME_ALREADY_FINISHED,
    AbortOutcome.NOT_FOUND: pb.ABORT_OUTCOME_NOT_FOUND,
}
_LEVELS: Final = {
    pb.LOG_LEVEL_DEBUG: logging.DEBUG,
    pb.LOG_LEVEL_INFO: logging.INFO,
    pb.LOG_LEVEL_WARNING: logging.WARNING,
    pb.LOG_LEVEL_ERROR: logging.ERROR,
}
_LOGGER: Final = logging.getLogger("lowbit")

Drain = Callable[[float | None], Awaitable[int]]
"""Drains for at most so many seconds, None for the server's own grace; the requests left."""


class ControlServicer:
    def __init__(self, calls: Calls, drain: Drain) -> None:
        self._calls = calls
        self._drain = drain

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Abort": unary_handler(pb.AbortRequest, self.abort),
                "Drain": unary_handler(pb.DrainRequest, self.drain),
                "SetLogLevel": unary_handler(pb.SetLogLevelRequest, self.set_log_level),
            },
        )

    async def abort(self, request: pb.AbortRequest) -> pb.AbortResponse:
        if request.all and request.request_ids:
            raise InvalidRequest(
                f"request_ids holds {len(request.request_ids)} ids beside all; it must be empty"
            )
        if len(request.request_ids) > _MAX_ABORTED_IDS:
            raise InvalidRequest(
                f"request_ids holds {len(request.request_ids)} ids; "
                f"it may hold at most {_MAX_ABORTED_IDS}"
            )
        ids = self._calls.request_ids() if request.all else request.request_ids
        return pb.AbortResponse(
            results=[
                pb.AbortResult(request_id=each, outcome=_OUTCOMES[self._calls.abort(each)])
                for each in ids
            ]
        )

    async def drain(self, request: pb.DrainRequest) -> pb.DrainResponse:
        grace = request.grace_seconds if request.HasField("grace_seconds") else None
        if grace is not None and not (math.isfinite(grace) and grace >= 0):
            raise InvalidRequest(f"grace_seconds is {grace}; it must be finite and not negative")
        return pb.DrainResponse(num_unfinished=await self._drain(grace))

    async def set_log_level(self, request: pb.SetLogLevelRequest) -> pb.SetLogLevelResponse:
        if request.level not in _LEVELS:
            known = ", ".join(str(int(number)) for number in _LEVELS)
            raise InvalidRequest(f"level is {int(request.level)}; it must be one of {known}")
        before = _LOGGER.getEffectiveLevel()
        _LOGGER.setLevel(_LEVELS[request.level])
        previous = min(_LEVELS, key=lambda level: abs(_LEVELS[level] - before))
        return pb.SetLogLevelResponse(previous=previous)
