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
MAX_TENANT_CHARACTERS = 128
MAX_SAMPLES = 16


class LowbitError(Exception):
    """Base of every error that the server reports to a caller by name."""


class InvalidRequest(LowbitError):
    """The request can never be served. The text names the field, the value and the limit."""


class QueueFull(LowbitError):
    """The waiting queue is at its bound; the same request may succeed later."""


class QueueTimeout(LowbitError):
    """The request waited for max_queue_seconds without being started."""


class DeadlineExceeded(LowbitError):
    """The request's own deadline passed before it was finished."""


class Draining(LowbitError):
    """The server is shutting down and takes no new requests."""


class EngineFailed(LowbitError):
    """The engine failed while it worked on this request."""


class CannotListen(LowbitError):
    """The server's address is in use, or not this machine's. The text names it and says why."""


def _require(holds: bool, field: str, value: object, limit: str) -> None:
    if not holds:
        raise InvalidRequest(f"{field} is {value}; it {limit}")


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
    CANCELLED = "cancelled"  # the caller went away
    DEADLINE = "deadline"  # its deadline passed, waiting or running
    QUEUE_TIMEOUT = "queue_timeout"  # it waited too long without being started
    ERROR = "error"  # the engine failed


class Priority(enum.IntEnum):
    """Strict classes: a waiting request of a smaller number goes first, always."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingParams:
    """When a request runs. Raises InvalidRequest when out of range."""

    priority: Priority = Priority.NORMAL
    # Who pays for the tokens and shares cached prompts. Set by the server, never by the caller.
    tenant: str = ""
    deadline_seconds: float | None = None  # from the request's arrival at the engine

    def __post_init__(self) -> None:
        _require(
            len(self.tenant) <= MAX_TENANT_CHARACTERS,
            "tenant",
            f"a string of {len(self.tenant)} characters",
            f"may have at most {MAX_TENANT_CHARACTERS}",
        )
        if self.deadline_seconds is not None:
            _require(
                math.isfinite(self.deadline_seconds) and self.deadline_seconds > 0,
                "deadline_seconds",
                self.deadline_seconds,
                "must be positive",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a sequence ends. Raises InvalidRequest when out of range."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1], relative to the most likely token
    seed: int | None = None  # None draws one; the same seed gives the same tokens
    max_tokens: int | None = None  # None: DEFAULT_MAX_TOKENS, or less where less fits
    n: int = 1  # completions of the same prompt, each with a seed of its own
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
        _require(1 <= self.n <= MAX_SAMPLES, "n", self.n, f"must lie in [1, {MAX_SAMPLES}]")
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


DEFAULT_SCHEDULING = SchedulingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """One token of one sample; the sample's last one carries a finish reason.

    A step may give several of them for a sample, in order.
    """

    request_id: str
    index: int = 0  # which of the request's n samples
    token_id: int | None  # None when the request ended without a new token
    logprob: float = 0.0  # of token_id under the model's own distribution (temperature 1)
    finish_reason: FinishReason | None = None
    error: str = ""  # why, when the sample ended without a token
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """A snapshot after one engine step. Counts are of this step, not running totals."""

    num_running: int
    num_waiting: int
    kv_cache_usage_ratio: float  # used blocks over all blocks, 0 to 1
    num_prompt_tokens: int  # prompt tokens computed for the first time
    num_generation_tokens: int
    num_preemptions: int
    num_prefix_queried_tokens: int = 0  # of the sequences admitted, to be computed or found
    num_prefix_hit_tokens: int = 0  # of them, found in the prefix cache
