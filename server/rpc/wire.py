"""Bytes to a request message, or an error that says where they are wrong.

protobuf's own parser says of bad bytes only that they are bad, and says nothing of fields that it
does not know.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import Iterator
from typing import Any, Final, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ...proto import generation_pb2 as pb
from ..types import MAX_CHAT_MESSAGES, InvalidRequest
from .errors import UnsupportedField

# 4 MiB can hold two million fields, and looking at each takes seconds of everybody's time.
_MAX_LOOKED_AT: Final = 4096
# Of a message, before a thread must look at it.
_MAX_BYTES_AT_ONCE: Final = 1 << 16

Request = TypeVar("Request", bound=Message)


async def read(data: bytes, kind: type[Request]) -> Request:
    """`parse`, which lets others go on where there is much to look at."""
    if len(data) <= _MAX_BYTES_AT_ONCE:
        return parse(data, kind)
    return await asyncio.to_thread(parse, data, kind)


def parse(data: bytes, kind: type[Request]) -> Request:
    """Raises InvalidRequest or UnsupportedField."""
    request = decode(data, kind)
    if isinstance(request, pb.GenerateRequest | pb.TokenizeRequest):
        _check_num_messages(request.chat)
    num_bytes = request.ByteSize()
    request.DiscardUnknownFields()
    num_unknown_bytes = num_bytes - request.ByteSize()
    if num_unknown_bytes > 0:
        raise UnsupportedField(_why_unsupported(kind.FromString(data), num_unknown_bytes))
    return request


def decode(data: bytes, kind: type[Request]) -> Request:
    """Without a look at fields that are not known. Raises InvalidRequest."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidRequest(_why_undecodable(data, kind)) from None


def _check_num_messages(chat: pb.Chat) -> None:
    num_messages = len(chat.messages)
    if num_messages > MAX_CHAT_MESSAGES:
        raise InvalidRequest(
            f"chat.messages holds {num_messages} messages; it may hold at most {MAX_CHAT_MESSAGES}"
        )


def _why_unsupported(request: Message, num_unknown_bytes: int) -> str:
    found = None
    if num_unknown_bytes <= _MAX_LOOKED_AT:
        found = next(_unknown_fields(request), None)
    if found is None:
        return (
            f"{request.DESCRIPTOR.full_name} holds {num_unknown_bytes} bytes of fields "
            "that this server does not know"
        )
    path, number = found
    return (
        f"{path or request.DESCRIPTOR.full_name} holds field number {number}, "
        "which this server does not know, or knows with another type"
    )


def _unknown_fields(request: Message) -> Iterator[tuple[str, int]]:
    for path, message in itertools.islice(_messages(request), _MAX_LOOKED_AT):
        unknown = UnknownFieldSet(message)
        if len(unknown) > 0:
            yield path.rstrip("."), unknown[0].field_number


def _why_undecodable(data: bytes, kind: type[Message]) -> str:
    try:
        message = _bytes_twin(kind.DESCRIPTOR).FromString(data)
    except DecodeError:
        return f"the {len(data)} bytes of the request are not a {kind.DESCRIPTOR.full_name}"
    for field, value in itertools.islice(_texts(message), _MAX_LOOKED_AT):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            return (
                f"{field} is not valid UTF-8: "
                f"byte 0x{value[error.start]:02x} at offset {error.start}"
            )
    return "the request holds text that is not valid UTF-8"


def _texts(message: Message) -> Iterator[tuple[str, bytes]]:
    for path, part in itertools.islice(_messages(message), _MAX_LOOKED_AT):
        for name, value in _items(part, FieldDescriptor.TYPE_BYTES):
            yield f"{path}{name}", value


@functools.cache
def _bytes_twin(descriptor: Any) -> type[Message]:
    """The same message with bytes for every string, which takes what is not UTF-8."""
    pool = descriptor_pool.DescriptorPool()
    _add_twins(descriptor.file, pool)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(descriptor.full_name))


def _add_twins(file: Any, pool: descriptor_pool.DescriptorPool) -> None:
    for dependency in file.dependencies:
        _add_twins(dependency, pool)
    twin = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(twin)
    del twin.service[:]
    for message in twin.message_type:
        _take_bytes(message)
    pool.AddSerializedFile(twin.SerializeToString())


def _take_bytes(message: descriptor_pb2.DescriptorProto) -> None:
    # A map is a repeated message on the wire; as a map it could have no key of bytes.
    message.options.ClearField("map_entry")
    for field in message.field:
        if field.type == FieldDescriptor.TYPE_STRING:
            field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    for nested in message.nested_type:
        _take_bytes(nested)


def _messages(message: Message, path: str = "") -> Iterator[tuple[str, Message]]:
    """The message and all messages in it, each with its path: "", "chat.", "chat.messages[0]."."""
    yield path, message
    for name, part in _items(message, FieldDescriptor.TYPE_MESSAGE):
        yield from _messages(part, f"{path}{name}.")


def _items(message: Message, kind: int) -> Iterator[tuple[str, Any]]:
    """The values that the message's fields of one type hold, each with its name."""
    for field, value in message.ListFields():
        if _is_map(field):
            assert field.message_type is not None
            if field.message_type.fields_by_name["value"].type == kind:
                yield from ((f"{field.name}[{key!r}]", item) for key, item in value.items())
        elif field.type == kind:
            if field.is_repeated:
                yield from ((f"{field.name}[{i}]", item) for i, item in enumerate(value))
            else:
                yield field.name, value


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
