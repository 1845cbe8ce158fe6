"""What is served, once it is loaded, and whether it takes requests. Knows no wire."""

from __future__ import annotations

import enum
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..text.detokenizer import Detokenizer
from ..types import (
    ChatMessage,
    Draining,
    EngineFailed,
    ModelInfo,
    SamplingParams,
    SchedulingParams,
    Starting,
    StepStats,
    TokenConstraint,
    TokenOutput,
)


class Engine(Protocol):
    """What the server needs of an AsyncEngine; the meanings stand there."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    @property
    def is_healthy(self) -> bool: ...

    @property
    def last_step(self) -> StepStats: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def begin_drain(self) -> None: ...

    async def wait_failed(self) -> EngineFailed: ...

    def end_sample(self, request_id: str, index: int) -> None: ...

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        scheduling: SchedulingParams = ...,
        constraint: TokenConstraint | None = None,
    ) -> AsyncGenerator[TokenOutput, None]: ...


class TextCodec(Protocol):
    """What the server needs of a Tokenizer; the meanings stand there."""

    max_characters_per_token: int

    @property
    def has_chat_template(self) -> bool: ...

    def encode(
        self, text: str, *, add_special_tokens: bool = ..., parse_special_tokens: bool = ...
    ) -> list[int]: ...

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = ...) -> str: ...

    def token_text(self, token_id: int) -> str: ...

    def detokenizer(
        self,
        stop: Sequence[str] = ...,
        context: Sequence[int] = ...,
        min_tokens: int = ...,
        include_stop: bool = ...,
    ) -> Detokenizer: ...

    def constraint(
        self, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> TokenConstraint: ...


class State(enum.Enum):
    """Where a server is in its life."""

    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """All that answering a request takes."""

    engine: Engine
    tokenizer: TextCodec
    model: ModelInfo


class Deployment:
    """Nothing is loaded at first."""

    def __init__(self) -> None:
        self._loaded: Loaded | None = None
        self._draining = False

    @property
    def state(self) -> State:
        if self._draining:
            return State.DRAINING
        if self._loaded is None:
            return State.STARTING
        return State.SERVING if self._loaded.engine.is_healthy else State.FAILED

    @property
    def loaded(self) -> Loaded:
        """Raises Starting."""
        if self._loaded is None:
            raise Starting("the server is loading its model")
        return self._loaded

    def accept(self) -> Loaded:
        """What a new request needs. Raises Starting or Draining."""
        if self._draining:
            raise Draining("the server is shutting down; it takes no new requests")
        return self.loaded

    def open(self, loaded: Loaded) -> None:
        """Take requests from now on. The engine has been started."""
        self._loaded = loaded

    def begin_drain(self) -> None:
        """Refuse new requests with Draining; the running ones go on."""
        self._draining = True
        if self._loaded is not None:
            self._loaded.engine.begin_drain()

    async def close(self) -> None:
        """Refuse everything, and end what runs with Draining."""
        self.begin_drain()
        if self._loaded is not None:
            await self._loaded.engine.stop()
