"""What a request asks for, what it gets back, and every way it can be refused."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Literal

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_CHAT_MESSAGES = 1024
MAX_REQUEST_ID_CHARACTERS = 128


class LowbitError(Exception):
    """Base of every error that the server reports to a caller by name."""


class InvalidRequest(LowbitError):
    """The request can never be served. The text names the field, the value and the limit."""


class QueueFull(LowbitError):
    """The waiting queue is at its bound; the same request may succeed later."""


class Draining(LowbitError):
    """The server is shutting down and takes no new requests."""


class EngineFailed(LowbitError):
    """The engine failed while it worked on this request."""


class CannotListen(LowbitError):
    """The server's address is in use, or not this machine's. The text names it and says why."""


ChatRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatMessage:
    """One turn of a conversation."""

    role: ChatRole
    content: str


class FinishReason(enum.Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens reached
    CANCELLED = "cancelled"  # the caller went away or its deadline passed
    ERROR = "error"  # the engine failed


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Raises InvalidRequest when out of range."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1], relative to the most likely token
    seed: int | None = None  # None draws one; the same seed gives the same tokens
    max_tokens: int | None = None  # None: DEFAULT_MAX_TOKENS, or less where less fits
    stop: tuple[str, ...] = ()  # the text layer ends the sequence on these
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require(
            math.isfinite(self.temperature) and 0 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "must lie in [0, 100]",
        )
        _require(0 <= self.top_k < 1 << 31, "top_k", self.top_k, "must be 0 (off) or positive")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "must lie in [0, 1]")
        if self.seed is not None:
            _require(0 <= self.seed < 1 << 63, "seed", self.seed, "must lie in [0, 2**63)")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1")
        _require(
            len(self.stop) <= MAX_STOP_STRINGS,
            "stop",
            f"{len(self.stop)} strings",
            f"may hold at most {MAX_STOP_STRINGS}",
        )
        for text in self.stop:
            _require(
                1 <= len(text) <= MAX_STOP_STRING_CHARACTERS,
                "stop",
                f"a string of {len(text)} characters",
                f"must hold 1 to {MAX_STOP_STRING_CHARACTERS}",
            )
        _require(
            len(self.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"{len(self.stop_token_ids)} ids",
            f"may hold at most {MAX_STOP_TOKEN_IDS}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One step's news of one request; the last one carries a finish reason."""

    request_id: str
    token_id: int | None  # None when the request ended without a new token
    logprob: float = 0.0  # of token_id under the model's own distribution (temperature 1)
    finish_reason: FinishReason | None = None
    error: str = ""  # set when finish_reason is ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """A snapshot after one engine step. Counts are of this step, not running totals."""

    num_running: int
    num_waiting: int
    kv_cache_usage_ratio: float  # used blocks over all blocks, 0 to 1
    num_prompt_tokens: int  # prompt tokens computed for the first time
    num_generation_tokens: int
    num_preemptions: int


def _require(holds: bool, field: str, value: object, limit: str) -> None:
    if not holds:
        raise InvalidRequest(f"{field} is {value}; it {limit}")
