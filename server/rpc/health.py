"""grpc.health.v1 for a server whose services are up or down together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any, Final

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]

from .convert import new_request_id
from .errors import NotFound, abort, describe
from .unary import unary_handler
from .wire import Request, decode

SERVICE_NAME: Final[str] = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class HealthServicer:
    """NOT_SERVING until told otherwise.

    grpcio-health-checking's own asyncio servicer (1.81) forgets all watchers of a service as soon
    as one of them leaves: the others never hear of a change.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._changed = asyncio.Event()  # replaced with every change

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods, for a server to register."""
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Check": unary_handler(health_pb2.HealthCheckRequest, self.check, read=_decode),
                "Watch": grpc.unary_stream_rpc_method_handler(
                    self.watch,
                    response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
                ),
            },
        )

    def set_serving(self, serving: bool) -> None:
        """Report all services as serving or not; watchers are told of a change."""
        if serving != self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """The state now. Raises NotFound for a service that this server does not have."""
        if request.service not in self._services:
            raise NotFound(f"service is {request.service!r}; it is unknown")
        return self._response(request.service)

    async def watch(self, data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """The state now and after every change, until the caller leaves."""
        try:
            service = decode(data, health_pb2.HealthCheckRequest).service
        except Exception as error:
            await abort(context, describe(error, new_request_id()))
        while True:
            changed = self._changed
            await context.write(self._response(service))
            await changed.wait()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse
        if service not in self._services:
            return states(status=states.SERVICE_UNKNOWN)
        return states(status=states.SERVING if self._serving else states.NOT_SERVING)


async def _decode(data: bytes, kind: type[Request]) -> Request:
    return decode(data, kind)
