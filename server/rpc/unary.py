"""Handlers of calls with one small request and one reply, refused by the same table of errors."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from .convert import new_request_id
from .errors import abort, describe
from .wire import Request, read

Context = grpc.aio.ServicerContext[Any, Any]


def unary_handler(
    kind: type[Request],
    method: Callable[[Request], Awaitable[Message]],
    admit: Callable[[Context], None] | None = None,
    read: Callable[[bytes, type[Request]], Awaitable[Request]] = read,
) -> grpc.RpcMethodHandler[Any, Any]:
    """Parse the bytes of a call, answer it, or end it with the status of what is raised.

    `admit` may raise before anything is looked at.
    """

    async def handle(data: bytes, context: Context) -> Message:
        try:
            if admit is not None:
                admit(context)
            return await method(await read(data, kind))
        except Exception as error:
            await abort(context, describe(error, new_request_id()))

    return grpc.unary_unary_rpc_method_handler(
        handle, response_serializer=lambda message: message.SerializeToString()
    )
