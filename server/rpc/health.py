"""grpc.health.v1 for a server whose services are up or down together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """NOT_SERVING until told otherwise.

    grpcio-health-checking's own asyncio servicer (1.81) forgets all watchers of a service as soon
    as one of them leaves: the others never hear of a change.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(services)
        self._serving = False
        self._changed = asyncio.Event()  # replaced with every change

    def set_serving(self, serving: bool) -> None:
        """Report all services as serving or not; watchers are told of a change."""
        if serving != self._serving:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ],
    ) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for a service that this server does not have."""
        if request.service not in self._services:
            await context.abort(
                grpc.StatusCode.NOT_FOUND, f"service is {request.service!r}; it is unknown"
            )
        return self._response(request.service)

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ],
    ) -> None:
        """The state now and after every change, until the caller leaves."""
        while True:
            changed = self._changed
            await context.write(self._response(request.service))
            await changed.wait()

    def _response(self, service: str) -> health_pb2.HealthCheckResponse:
        states = health_pb2.HealthCheckResponse
        if service not in self._services:
            return states(status=states.SERVICE_UNKNOWN)
        return states(status=states.SERVING if self._serving else states.NOT_SERVING)
