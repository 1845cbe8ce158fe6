"""Generation and conversation in a terminal, over gRPC. Prints tokens as they come."""

from __future__ import annotations

# Line editing and history for input().
import readline  # noqa: F401
from contextlib import closing
from typing import Unpack

from .client import Client, Prompt, RpcError, SamplingOptions
from .types import ChatMessage, LowbitError


class CallFailed(LowbitError):
    """A call to a server failed. The text holds the address, the gRPC status and its details."""


def generate(
    client: Client, text: str, *, as_chat: bool = False, **sampling: Unpack[SamplingOptions]
) -> None:
    """Print the completion of a text, or the answer to it. Raises CallFailed."""
    prompt = [ChatMessage(role="user", content=text)] if as_chat else text
    _print_stream(client, prompt, sampling)


def chat(client: Client, system: str | None, **sampling: Unpack[SamplingOptions]) -> None:
    """Ask, answer, until Ctrl-D. Ctrl-C ends an answer, or the conversation. Raises CallFailed."""
    messages = [ChatMessage(role="system", content=system)] if system else []
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        asked = [*messages, ChatMessage(role="user", content=line)]
        try:
            answer = _print_stream(client, asked, sampling)
        except KeyboardInterrupt:
            print(" [stopped]")
            continue
        messages = [*asked, ChatMessage(role="assistant", content=answer)]


def _ask() -> str | None:
    try:
        return input("> ")
    except EOFError:
        print()
        return None


def _print_stream(client: Client, prompt: Prompt, sampling: SamplingOptions) -> str:
    parts: list[str] = []
    try:
        with closing(client.stream(prompt, **sampling)) as deltas:
            for delta in deltas:
                parts.append(delta.text)
                print(delta.text, end="", flush=True)
    except RpcError as error:
        raise CallFailed(f"{client.address}: {error.code().name}: {error.details()}") from error
    print()
    return "".join(parts)
