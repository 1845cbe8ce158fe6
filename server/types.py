"""What a request asks for, what it gets back, and every way it can be refused."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, Self

DEFAULT_MAX_TOKENS = 256
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 16_384
MAX_LOGPROBS = 20  # candidates at one position
MAX_CHOICES = 1024
MAX_GRAMMAR_CHARACTERS = 65_536  # of a schema, a regex, a grammar, or all choices together
MAX_CHAT_MESSAGES = 1024
MAX_REQUEST_ID_CHARACTERS = 128
MAX_TENANT_CHARACTERS = 128
MAX_SAMPLES = 16


class LowbitError(Exception):
    """Base of every error that the server reports to a caller by name."""


class InvalidRequest(LowbitError):
    """The request can never be served. The text begins with the field, then value and limit."""

    @property
    def field(self) -> str:
        return str(self).split(maxsplit=1)[0]


class TryLater(LowbitError):
    """The same request may succeed later, or on another server."""

    def __init__(self, text: str, *, retry_after_seconds: float = 1.0) -> None:
        super().__init__(text)
        self.retry_after_seconds = retry_after_seconds


class QueueFull(TryLater):
    """The waiting queue is at its bound."""


class QueueTimeout(TryLater):
    """The request waited for max_queue_seconds without being started."""


class Starting(TryLater):
    """The server is loading its model."""


class DeadlineExceeded(LowbitError):
    """The request's own deadline passed before it was finished."""


class Draining(TryLater):
    """The server is shutting down and takes no new requests."""


class EngineFailed(LowbitError):
    """The engine failed while it worked on this request."""


class ConstraintFailed(LowbitError):
    """The prescribed form of a completion became too costly to follow. The text says why."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationInfo:
    """How most of a model's layers are quantized."""

    format: str  # gptq, gptq_v2, awq, compressed-tensors
    bits: int
    group_size: int  # -1 is a whole row


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What a caller may know of the served model."""

    name: str
    folder: str = ""  # where it was loaded from; told to gateways alone
    architecture: str = ""
    eos_token_ids: tuple[int, ...] = ()
    quantization: QuantizationInfo | None = None


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
    weight: float = 1.0  # of the tenant's share against others of its class; the server's, too
    deadline_seconds: float | None = None  # from the request's arrival at the engine

    def __post_init__(self) -> None:
        _require(
            len(self.tenant) <= MAX_TENANT_CHARACTERS,
            "tenant",
            f"a string of {len(self.tenant)} characters",
            f"may have at most {MAX_TENANT_CHARACTERS}",
        )
        _require(
            math.isfinite(self.weight) and self.weight > 0,
            "weight",
            self.weight,
            "must be positive",
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
    """How tokens are chosen and when a sequence ends. Raises InvalidRequest when out of range.

    Logits go through the repetition, presence and frequency penalties, the biases, the bans
    (allowed tokens, structured output, min_tokens), the temperature, top-k, top-p and min-p, in
    this order; top-p counts the mass that top-k left.
    """

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # in (0, 1]
    min_p: float = 0.0  # in [0, 1], relative to the most likely token
    presence_penalty: float = 0.0  # off the logits of tokens that the completion holds
    frequency_penalty: float = 0.0  # the same, for every time that it holds them
    # Divides positive logits of tokens in prompt and completion, multiplies negative ones
    # (Keskar et al. 2019, "CTRL", section 4.1).
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    allowed_token_ids: tuple[int, ...] = ()  # only these may be chosen; empty: all
    seed: int | None = None  # None draws one; the same seed gives the same tokens
    max_tokens: int | None = None  # None: DEFAULT_MAX_TOKENS, or less where less fits
    n: int = 1  # completions of the same prompt, each with a seed of its own
    min_tokens: int = 0  # of the completion, before it may stop
    stop: tuple[str, ...] = ()  # the text layer ends the sequence on these
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # keep the stop string in the text
    ignore_eos: bool = False
    top_logprobs: int = 0  # most likely candidates to report at each token
    prompt_logprobs: int | None = None  # candidates to report at each prompt token; None: nothing
    # At most one of the following; the text layer makes a TokenConstraint of it.
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None  # in the Lark or GBNF notation
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (holds, limit) in _LIMITS.items():
            value = getattr(self, name)
            _require(value is None or holds(value), name, value, limit)
        for name, (most, things) in _MOST.items():
            number = len(getattr(self, name))
            _require(number <= most, name, f"{number} {things}", f"may hold at most {most}")
        self._check_texts()
        for token_id, bias in self.logit_bias.items():
            _require(
                -100 <= bias <= 100, f"logit_bias[{token_id}]", bias, "must lie in [-100, 100]"
            )
        self._check_contradictions()

    @property
    def structured_output(self) -> tuple[str, str | tuple[str, ...]] | None:
        """The name and the value of the one field that prescribes the completion's form."""
        for name in _STRUCTURED:
            value = getattr(self, name)
            if value is not None and value != ():
                return name, value
        return None

    def _check_texts(self) -> None:
        for text in self.stop:
            _require(
                1 <= len(text) <= MAX_STOP_STRING_CHARACTERS,
                "stop",
                f"a string of {len(text)} characters",
                f"must hold 1 to {MAX_STOP_STRING_CHARACTERS}",
            )
        for name in _STRUCTURED:
            length = sum(map(len, getattr(self, name) or ()))
            _require(
                length <= MAX_GRAMMAR_CHARACTERS,
                name,
                f"{length} characters long",
                f"may have at most {MAX_GRAMMAR_CHARACTERS}",
            )

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens "
                f"({self.max_tokens})"
            )
        given = [name for name in _STRUCTURED if getattr(self, name) not in (None, ())]
        if len(given) > 1:
            raise InvalidRequest(
                f"{' and '.join(given)} are set; at most one of {', '.join(_STRUCTURED)} may be"
            )
        for name in ("allowed_token_ids", "ignore_eos"):
            if given and getattr(self, name):
                raise InvalidRequest(f"{name} is set beside {given[0]}; only one of them may be")


class TokenConstraint(Protocol):
    """Which tokens may come next in one sequence. Knows what was chosen so far.

    One thread at a time may use it.
    """

    def allowed_tokens(self) -> bytes:
        """One bit per token id, lowest bit first, in whole 32-bit words: 1 may be chosen.

        Where the sequence may end, or must, the end-of-sequence tokens are allowed. Raises
        ConstraintFailed.
        """

    def advance(self, token_id: int) -> bool:
        """Take a token in. False, and nothing changes, for one that is not allowed."""

    def rollback(self, num_tokens: int) -> None:
        """Forget the last tokens that were taken in."""

    def fork(self) -> Self:
        """An independent copy in the same state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token and how likely the model itself (temperature 1, no penalties) held it to be."""

    token_id: int
    logprob: float  # natural logarithm
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob) of the candidates, best first
    rank: int | None = None  # 1 + how many tokens it held to be likelier; None: not computed


DEFAULT_SCHEDULING = SchedulingParams()


@dataclass(slots=True, kw_only=True)
class TokenOutput:
    """One token of one sample; the sample's last one carries a finish reason.

    A step may give several of them for a sample, in order.
    """

    request_id: str
    index: int = 0  # which of the request's n samples
    token_id: int | None  # None when the request ended without a new token
    logprob: float = 0.0  # of token_id under the model's own distribution (temperature 1)
    top_logprobs: tuple[tuple[int, float], ...] = ()  # as many as the request asked for
    rank: int | None = None  # of token_id under the model's own distribution; see TokenLogprob
    # Of the prompt's tokens from the second on, with the first output of a request that asked.
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    error: str = ""  # why, when the sample ended without a token
    num_cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    # With a sample's first token: from the request's arrival at the engine to the sample's start,
    # and from there to the token.
    queue_seconds: float | None = None
    prefill_seconds: float | None = None

    @property
    def token(self) -> TokenLogprob:
        """The new token, of an output that has one."""
        assert self.token_id is not None
        return TokenLogprob(
            token_id=self.token_id, logprob=self.logprob, top=self.top_logprobs, rank=self.rank
        )


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
    num_draft_tokens: int = 0  # guessed, and verified by the step
    num_accepted_draft_tokens: int = 0  # of them, those that stood


_STRUCTURED: Final = ("json_schema", "regex", "grammar", "choice")
# Field -> what must hold of its value, and that in words. A comparison with NaN does not hold.
_LIMITS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "temperature": (lambda value: 0 <= value <= 100, "must lie in [0, 100]"),
    "top_k": (lambda value: 0 <= value < 1 << 31, "must be 0 (off) or positive"),
    "top_p": (lambda value: 0 < value <= 1, "must lie in (0, 1]"),
    "min_p": (lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
    "presence_penalty": (lambda value: -2 <= value <= 2, "must lie in [-2, 2]"),
    "frequency_penalty": (lambda value: -2 <= value <= 2, "must lie in [-2, 2]"),
    "repetition_penalty": (lambda value: 0.1 <= value <= 10, "must lie in [0.1, 10]"),
    "seed": (lambda value: 0 <= value < 1 << 63, "must lie in [0, 2**63)"),
    "max_tokens": (lambda value: value >= 1, "must be at least 1"),
    "n": (lambda value: 1 <= value <= MAX_SAMPLES, f"must lie in [1, {MAX_SAMPLES}]"),
    "min_tokens": (lambda value: value >= 0, "must be at least 0"),
    "top_logprobs": (
        lambda value: 0 <= value <= MAX_LOGPROBS,
        f"must lie in [0, {MAX_LOGPROBS}]",
    ),
    "prompt_logprobs": (
        lambda value: 0 <= value <= MAX_LOGPROBS,
        f"must lie in [0, {MAX_LOGPROBS}]",
    ),
}
_MOST: Final = {
    "stop": (MAX_STOP_STRINGS, "strings"),
    "stop_token_ids": (MAX_STOP_TOKEN_IDS, "ids"),
    "logit_bias": (MAX_LOGIT_BIASES, "tokens"),
    "allowed_token_ids": (MAX_ALLOWED_TOKEN_IDS, "ids"),
    "choice": (MAX_CHOICES, "strings"),
}
