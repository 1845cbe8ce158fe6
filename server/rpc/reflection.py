"""gRPC server reflection, v1 and v1alpha: what a client that has no proto file asks.

grpcio-reflection knows v1alpha alone. The two differ in their package only, so the same servicer
answers both, and the description of v1 is made from that of v1alpha.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2  # type: ignore[import-untyped]

from ..types import InvalidRequest
from .convert import new_request_id
from .errors import abort, describe
from .wire import decode

Context = grpc.aio.ServicerContext[Any, Any]

V1ALPHA_NAME: Final[str] = reflection.SERVICE_NAME
V1_NAME: Final = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Describe these services, and reflection itself."""
    names = (*service_names, V1_NAME, V1ALPHA_NAME)
    servicer = reflection.aio.ReflectionServicer(names, pool=_describe_v1())

    async def info(messages: AsyncIterator[bytes], context: Context) -> None:
        try:
            async for response in servicer.ServerReflectionInfo(_decode_all(messages), context):
                await context.write(response)
        except InvalidRequest as error:
            await abort(context, describe(error, new_request_id()))

    method: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        info,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (V1_NAME, V1ALPHA_NAME):
        handlers = {"ServerReflectionInfo": method}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


async def _decode_all(
    messages: AsyncIterator[bytes],
) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
    async for data in messages:
        yield decode(data, reflection_pb2.ServerReflectionRequest)


def _describe_v1() -> descriptor_pool.DescriptorPool:
    """The pool of everything that is served, with v1 in it."""
    pool = descriptor_pool.Default()
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    renamed = text_format.MessageToString(file).replace("v1alpha", "v1")
    pool.AddSerializedFile(
        text_format.Parse(renamed, descriptor_pb2.FileDescriptorProto()).SerializeToString()
    )
    return pool
