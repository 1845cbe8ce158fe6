"""What a caller sends as a prompt to token ids, bounded before it costs anything."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Final

from ...proto import generation_pb2 as pb
from ..types import InvalidRequest
from .convert import chat_of
from .deployment import Loaded

# Of a text, before it takes so long to encode that a thread must do it. The way to a thread and
# back takes as long as 500 characters do.
_MAX_CHARACTERS_AT_ONCE: Final = 512


async def encode_prompt(
    request: pb.GenerateRequest | pb.TokenizeRequest,
    loaded: Loaded,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Raises InvalidRequest."""
    tokenizer = loaded.tokenizer
    kind = request.WhichOneof("prompt" if isinstance(request, pb.GenerateRequest) else "input")
    if request.parse_special_tokens and kind != "text":
        raise InvalidRequest(
            f"parse_special_tokens is set beside {kind}; it is for a prompt of text"
        )
    match kind:
        case "text":
            _check_characters("text", len(request.text), loaded)
            encode = partial(
                tokenizer.encode,
                request.text,
                add_special_tokens=add_special_tokens,
                parse_special_tokens=request.parse_special_tokens,
            )
            is_short = len(request.text) <= _MAX_CHARACTERS_AT_ONCE
            token_ids = encode() if is_short else await asyncio.to_thread(encode)
        case "token_ids":
            assert isinstance(request, pb.GenerateRequest)
            token_ids = check_token_ids("token_ids", request.token_ids.ids, loaded)
        case "chat":
            messages = chat_of(request.chat)
            num_characters = 1 + sum(len(each.content) for each in messages)
            _check_characters("chat", num_characters, loaded)
            token_ids = await asyncio.to_thread(tokenizer.encode_chat, messages)
        case _:
            raise InvalidRequest("prompt is not set; one of text, token_ids and chat must be")
    if isinstance(request, pb.GenerateRequest) and request.HasField("truncate_prompt_tokens"):
        return _truncate(token_ids, request.truncate_prompt_tokens)
    return token_ids


def check_token_ids(field: str, ids: Sequence[int], loaded: Loaded) -> list[int]:
    """Raises InvalidRequest."""
    max_model_len, vocab_size = loaded.engine.max_model_len, loaded.engine.vocab_size
    # The engine checks the length too, but 4 MiB are four million ids to copy before.
    if not 1 <= len(ids) <= max_model_len:
        raise InvalidRequest(
            f"{field} holds {len(ids)} ids; it must hold 1 to {max_model_len} (max_model_len)"
        )
    for token_id in ids:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"{field} holds token id {token_id}; ids must lie in [0, {vocab_size})"
            )
    return list(ids)


def _truncate(token_ids: list[int], limit: int) -> list[int]:
    if limit < 1:
        raise InvalidRequest(f"truncate_prompt_tokens is {limit}; it must be at least 1")
    return token_ids[-limit:]


def _check_characters(field: str, num_characters: int, loaded: Loaded) -> None:
    """Refuse what cannot fit the model without encoding it: 4 MiB take seconds and 1 GB."""
    if num_characters == 0:
        raise InvalidRequest(f"{field} is empty; a prompt must have at least 1 token")
    max_model_len = loaded.engine.max_model_len
    limit = max_model_len * loaded.tokenizer.max_characters_per_token
    if num_characters > limit:
        raise InvalidRequest(
            f"{field} has {num_characters} characters; "
            f"max_model_len ({max_model_len} tokens) allows at most {limit}"
        )
