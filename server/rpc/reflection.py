"""gRPC server reflection, v1 and v1alpha: what a client that has no proto file asks.

grpcio-reflection knows v1alpha alone. The two differ in their package only, so the same servicer
answers both, and the description of v1 is made from that of v1alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2  # type: ignore[import-untyped]

V1ALPHA_NAME: Final[str] = reflection.SERVICE_NAME
V1_NAME: Final = "grpc.reflection.v1.ServerReflection"


def add_reflection(server: grpc.aio.Server, service_names: Iterable[str]) -> None:
    """Describe these services, and reflection itself."""
    names = (*service_names, V1_NAME, V1ALPHA_NAME)
    servicer = reflection.aio.ReflectionServicer(names, pool=_describe_v1())
    method = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    for name in (V1_NAME, V1ALPHA_NAME):
        handlers = {"ServerReflectionInfo": method}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


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
