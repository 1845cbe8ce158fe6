"""Refuses calls by their metadata alone, before anything of their message is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
import grpc.aio

from .control import SERVICE_NAME as CONTROL_NAME
from .convert import new_request_id
from .errors import PermissionDenied, Unauthenticated, abort, describe
from .health import SERVICE_NAME as HEALTH_NAME
from .tenants import KeyRing
from .vllm_engine import ABORT_METHOD

_HEALTH_PREFIX: Final = f"/{HEALTH_NAME}/"
_CONTROL_PREFIXES: Final = (f"/{CONTROL_NAME}/", ABORT_METHOD)


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """Every method needs a key, but for health checks where those are open."""

    def __init__(self, keys: KeyRing, *, health_needs_key: bool) -> None:
        self._keys = keys
        self._health_needs_key = health_needs_key

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        if method.startswith(_HEALTH_PREFIX) and not self._health_needs_key:
            return await continuation(handler_call_details)
        try:
            tenant = self._keys.tenant_of(handler_call_details.invocation_metadata)
        except Unauthenticated as error:
            return _refusal(error)
        if method.startswith(_CONTROL_PREFIXES) and not tenant.control:
            return _refusal(PermissionDenied(f"tenant {tenant.name} has no control role"))
        return await continuation(handler_call_details)


def _refusal(error: Exception) -> grpc.RpcMethodHandler[Any, Any]:
    """Of a streaming kind, whatever the method: those begin before a message has come."""

    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await abort(context, describe(error, new_request_id()))

    return grpc.stream_stream_rpc_method_handler(refuse)
