"""The wire's messages to the server's own types, and back. Knows no sockets and no engine."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sized
from dataclasses import fields
from typing import Any, Final

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

from ...proto import generation_pb2 as pb
from ..types import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_REQUEST_ID_CHARACTERS,
    ChatMessage,
    ChatRole,
    FinishReason,
    InvalidRequest,
    Priority,
    SamplingParams,
    SchedulingParams,
    TokenLogprob,
)
from .errors import UnsupportedField

FINISH_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
_ROLES: Final[dict[int, ChatRole]] = {
    pb.CHAT_ROLE_SYSTEM: "system",
    pb.CHAT_ROLE_USER: "user",
    pb.CHAT_ROLE_ASSISTANT: "assistant",
}
_SUPPORTED: Final = frozenset(field.name for field in fields(SamplingParams))
PRIORITIES: Final = {
    pb.PRIORITY_UNSPECIFIED: Priority.NORMAL,
    pb.PRIORITY_HIGH: Priority.HIGH,
    pb.PRIORITY_NORMAL: Priority.NORMAL,
    pb.PRIORITY_LOW: Priority.LOW,
}


def new_request_id() -> str:
    return uuid.uuid4().hex


def request_id_of(request: pb.GenerateRequest) -> str | None:
    """The caller's id, if there is one. Raises InvalidRequest."""
    request_id = request.request_id
    if not request_id:
        return None
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; "
            f"it may have at most {MAX_REQUEST_ID_CHARACTERS}"
        )
    if not (request_id.isascii() and request_id.isprintable()):
        raise InvalidRequest(f"request_id is {request_id!a}; it must be printable ASCII")
    return request_id


def chat_of(chat: pb.Chat) -> list[ChatMessage]:
    """Raises InvalidRequest."""
    if not chat.messages:
        raise InvalidRequest("chat.messages is empty; it must hold at least 1 message")
    for i, message in enumerate(chat.messages):
        if message.role not in _ROLES:
            known = ", ".join(f"{number} ({role})" for number, role in _ROLES.items())
            raise InvalidRequest(
                f"chat.messages[{i}].role is {int(message.role)}; it must be one of {known}"
            )
    return [ChatMessage(role=_ROLES[each.role], content=each.content) for each in chat.messages]


def sampling_params_of(sampling: pb.SamplingParams) -> SamplingParams:
    """What is set, the rest at its default. Raises InvalidRequest or UnsupportedField."""
    given: dict[str, Any] = {}
    for field, value in sampling.ListFields():
        if field.name not in _SUPPORTED:
            raise UnsupportedField(f"sampling.{field.name} is set; this server does not support it")
        if field.is_repeated:
            check_length(field.name, value)
        if field.message_type is not None:
            given[field.name] = dict(value)  # the only messages in it are maps
        else:
            given[field.name] = tuple(value) if field.is_repeated else value
    return SamplingParams(**given)


def check_length(field: str, values: Sized) -> None:
    """Refuse what no list of SamplingParams may hold before it is copied: 4 MiB are two million.

    Raises InvalidRequest.
    """
    if len(values) > MAX_ALLOWED_TOKEN_IDS:
        raise InvalidRequest(
            f"{field} holds {len(values)} values; no list may hold more than "
            f"{MAX_ALLOWED_TOKEN_IDS}"
        )


def scheduling_params_of(request: pb.GenerateRequest, tenant: str = "") -> SchedulingParams:
    """What is set, the rest at its default. Raises InvalidRequest."""
    if request.priority not in PRIORITIES:
        known = ", ".join(f"{number} ({each.name})" for number, each in PRIORITIES.items())
        raise InvalidRequest(f"priority is {int(request.priority)}; it must be one of {known}")
    return SchedulingParams(
        priority=PRIORITIES[request.priority],
        tenant=tenant,
        deadline_seconds=request.deadline_seconds if request.HasField("deadline_seconds") else None,
    )


def stream_interval_of(request: pb.GenerateRequest) -> int:
    """Raises InvalidRequest."""
    if not request.HasField("stream_interval"):
        return 1
    if request.stream_interval < 1:
        raise InvalidRequest(f"stream_interval is {request.stream_interval}; it must be at least 1")
    return request.stream_interval


def add_token(
    tokens: RepeatedCompositeFieldContainer[pb.TokenInfo],
    token: TokenLogprob,
    token_text: Callable[[int], str],
) -> None:
    """Append a token to those of a message."""
    text = token_text(token.token_id)
    info = tokens.add(id=token.token_id, logprob=token.logprob, text=text, rank=token.rank)
    for candidate_id, candidate_logprob in token.top:
        info.top_logprobs.add(
            id=candidate_id, logprob=candidate_logprob, text=token_text(candidate_id)
        )
