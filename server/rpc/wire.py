"""Bytes to a request message, or an error that says where they are wrong.

protobuf's own parser says of bad bytes only that they are bad, and says nothing of fields that it
does not know.
"""

from __future__ import annotations

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

Request = TypeVar("Request", bound=Message)


def parse(data: bytes, kind: type[Request]) -> Request:
    """Raises InvalidRequest or UnsupportedField."""
    try:
        request = kind.FromString(data)
    except DecodeError:
        raise InvalidRequest(_why_undecodable(data, kind.DESCRIPTOR.full_name)) from None
    if isinstance(request, pb.GenerateRequest | pb.TokenizeRequest):
        _check_num_messages(request.chat)
    _refuse_unknown_fields(request)
    return request


def _check_num_messages(chat: pb.Chat) -> None:
    num_messages = len(chat.messages)
    if num_messages > MAX_CHAT_MESSAGES:
        raise InvalidRequest(
            f"chat.messages holds {num_messages} messages; it may hold at most {MAX_CHAT_MESSAGES}"
        )


def _refuse_unknown_fields(request: Message) -> None:
    known = type(request)()
    known.CopyFrom(request)
    known.DiscardUnknownFields()
    num_unknown_bytes = request.ByteSize() - known.ByteSize()
    if num_unknown_bytes > _MAX_LOOKED_AT:
        raise UnsupportedField(
            f"{request.DESCRIPTOR.full_name} holds {num_unknown_bytes} bytes of fields "
            "that this server does not know"
        )
    if num_unknown_bytes > 0:
        path, number = next(_unknown_fields(request))
        raise UnsupportedField(
            f"{path or request.DESCRIPTOR.full_name} holds field number {number}, "
            "which this server does not know, or knows with another type"
        )


def _unknown_fields(request: Message) -> Iterator[tuple[str, int]]:
    for path, message in _messages(request):
        unknown = UnknownFieldSet(message)
        if len(unknown) > 0:
            yield path.rstrip("."), unknown[0].field_number


def _why_undecodable(data: bytes, name: str) -> str:
    try:
        message = _bytes_twin(name).FromString(data)
    except DecodeError:
        return f"the {len(data)} bytes of the request are not a {name}"
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
def _bytes_twin(name: str) -> type[Message]:
    """The message of this name with bytes for every string, which takes what is not UTF-8."""
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    del file.service[:]
    for message in file.message_type:
        for field in message.field:
            if field.type == FieldDescriptor.TYPE_STRING:
                field.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


def _messages(message: Message, path: str = "") -> Iterator[tuple[str, Message]]:
    """The message and all messages in it, each with its path: "", "chat.", "chat.messages[0]."."""
    yield path, message
    for name, part in _items(message, FieldDescriptor.TYPE_MESSAGE):
        yield from _messages(part, f"{path}{name}.")


def _items(message: Message, kind: int) -> Iterator[tuple[str, Any]]:
    """The values that the message's fields of one type hold, each with its name."""
    for field, value in message.ListFields():
        if field.type == kind and not _is_map(field):
            if field.is_repeated:
                yield from ((f"{field.name}[{i}]", item) for i, item in enumerate(value))
            else:
                yield field.name, value


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry
