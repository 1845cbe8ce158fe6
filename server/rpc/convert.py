"""The wire's messages to the server's own types, and back. Knows no sockets and no engine."""

from __future__ import annotations

import uuid
from typing import Final

from ...proto import generation_pb2 as pb
from ..types import (
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

FINISH_REASONS: Final = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_ROLES: Final[dict[int, ChatRole]] = {
    pb.CHAT_ROLE_SYSTEM: "system",
    pb.CHAT_ROLE_USER: "user",
    pb.CHAT_ROLE_ASSISTANT: "assistant",
}
_PRIORITIES: Final = {
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


def token_ids_of(token_ids: pb.TokenIds, max_model_len: int) -> list[int]:
    """Raises InvalidRequest."""
    # The engine checks the length too, but 4 MiB are four million ids to copy before.
    if not 1 <= len(token_ids.ids) <= max_model_len:
        raise InvalidRequest(
            f"token_ids holds {len(token_ids.ids)} ids; "
            f"it must hold 1 to {max_model_len} (max_model_len)"
        )
    return list(token_ids.ids)


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
    """What is set, the rest at its default. Raises InvalidRequest."""
    given = {field.name: value for field, value in sampling.ListFields() if not field.is_repeated}
    return SamplingParams(
        **given,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        choice=tuple(sampling.choice),
    )


def token_info_of(token: TokenLogprob) -> pb.TokenInfo:
    return pb.TokenInfo(
        id=token.token_id,
        logprob=token.logprob,
        top_logprobs=[pb.Candidate(id=id, logprob=logprob) for id, logprob in token.top],
    )


def scheduling_params_of(request: pb.GenerateRequest, tenant: str = "") -> SchedulingParams:
    """What is set, the rest at its default. Raises InvalidRequest."""
    if request.priority not in _PRIORITIES:
        known = ", ".join(f"{number} ({each.name})" for number, each in _PRIORITIES.items())
        raise InvalidRequest(f"priority is {int(request.priority)}; it must be one of {known}")
    return SchedulingParams(
        priority=_PRIORITIES[request.priority],
        tenant=tenant,
        deadline_seconds=request.deadline_seconds if request.HasField("deadline_seconds") else None,
    )
