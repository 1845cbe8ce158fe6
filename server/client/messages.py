"""What the client takes and returns, and how that is said on the wire."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict

from ...proto import generation_pb2 as pb
from ..types import ChatMessage, ChatRole, FinishReason, Priority, QuantizationInfo

Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids or a conversation."""

_ROLES: Final[dict[ChatRole, pb.ChatRole]] = {
    "system": pb.CHAT_ROLE_SYSTEM,
    "user": pb.CHAT_ROLE_USER,
    "assistant": pb.CHAT_ROLE_ASSISTANT,
}
_PRIORITIES: Final = {
    Priority.HIGH: pb.PRIORITY_HIGH,
    Priority.NORMAL: pb.PRIORITY_NORMAL,
    Priority.LOW: pb.PRIORITY_LOW,
}
_FINISH_REASONS: Final = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}

LogLevel = Literal["debug", "info", "warning", "error"]
ServerState = Literal["starting", "serving", "draining", "failed"]


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and when a completion ends; what is left out is at its default.

    Meanings, limits and defaults stand in `lowbit.server.types.SamplingParams`.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int]
    seed: int
    max_tokens: int
    min_tokens: int
    n: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    ignore_eos: bool
    top_logprobs: int
    prompt_logprobs: int
    json_schema: str
    regex: str
    grammar: str
    choice: Sequence[str]


class GenerateOptions(SamplingOptions, total=False):
    """All options of a request. Meanings and defaults stand in `proto/generation.proto`."""

    request_id: str
    priority: Priority
    deadline_seconds: float
    tenant: str
    stream_interval: int
    echo: bool
    truncate_prompt_tokens: int
    parse_special_tokens: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a completion, or of a prompt that was asked for."""

    id: int
    logprob: float  # natural logarithm, under the model itself (temperature 1)
    text: str  # what it says by itself; parts of characters are U+FFFD
    top_logprobs: tuple[tuple[int, float], ...]  # (id, logprob) of the candidates asked for
    rank: int | None  # by likelihood, from 1; None where it was not computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request took, all its completions together."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long a request took, as the server measured it from its arrival."""

    time_to_first_token_seconds: float
    duration_seconds: float  # to its last token
    decode_seconds: float  # from its first token to its last
    queue_seconds: float | None  # in the engine's queue; None where the engine did not say
    prefill_seconds: float | None  # from there to its first token


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A part of a completion; a completion is the concatenation of all parts of its index."""

    request_id: str
    index: int  # which of the n completions
    text: str  # may lag behind the tokens, until it is decided
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None  # on a completion's last part only
    stop_match: str | int | None  # the stop string or token id that ended it
    prompt_tokens: tuple[Token, ...]  # on the request's first part only, if asked for
    usage: Usage | None  # on the request's last part only
    timings: Timings | None  # on the request's last part only


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One whole completion."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason
    stop_match: str | int | None  # the stop string or token id that ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A whole answer: as many completions as were asked for."""

    request_id: str
    completions: tuple[Completion, ...]
    prompt_tokens: tuple[Token, ...]  # if asked for
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """Of the first completion."""
        return self.completions[0].text

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Of the first completion."""
        return self.completions[0].tokens

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first completion."""
        return self.completions[0].finish_reason


class AbortOutcome(enum.Enum):
    """What became of a request that was to be ended."""

    ABORTED = "aborted"
    ALREADY_FINISHED = "already finished"
    NOT_FOUND = "not found"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenization:
    """The tokens of a text or a conversation."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]  # what each token says by itself; parts of characters are U+FFFD


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served."""

    name: str
    architecture: str
    max_model_len: int  # prompt plus completion, in tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    quantization: QuantizationInfo | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What serves it."""

    version: str
    schema_revision: int
    state: ServerState
    uptime_seconds: float
    max_receive_message_bytes: int
    max_send_message_bytes: int
    max_requests: int  # running and waiting
    max_num_seqs: int  # in one step


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a server is."""

    num_running: int
    num_waiting: int
    kv_cache_usage_ratio: float  # 0 to 1
    num_requests: int  # calls that are being served, in the engine or not


_OUTCOMES: Final = {
    pb.ABORT_OUTCOME_ABORTED: AbortOutcome.ABORTED,
    pb.ABORT_OUTCOME_ALREADY_FINISHED: AbortOutcome.ALREADY_FINISHED,
    pb.ABORT_OUTCOME_NOT_FOUND: AbortOutcome.NOT_FOUND,
}
_STATES: Final[dict[int, ServerState]] = {
    pb.SERVER_STATE_STARTING: "starting",
    pb.SERVER_STATE_SERVING: "serving",
    pb.SERVER_STATE_DRAINING: "draining",
    pb.SERVER_STATE_FAILED: "failed",
}
_LEVELS: Final[dict[LogLevel, pb.LogLevel]] = {
    "debug": pb.LOG_LEVEL_DEBUG,
    "info": pb.LOG_LEVEL_INFO,
    "warning": pb.LOG_LEVEL_WARNING,
    "error": pb.LOG_LEVEL_ERROR,
}


def generate_request(prompt: Prompt, options: GenerateOptions) -> pb.GenerateRequest:
    given: dict[str, Any] = dict(options)
    priority = given.pop("priority", None)
    own = [name for name in given if name in pb.GenerateRequest.DESCRIPTOR.fields_by_name]
    request = pb.GenerateRequest(**{name: given.pop(name) for name in own})
    request.sampling.CopyFrom(pb.SamplingParams(**given))
    if priority is not None:
        request.priority = _PRIORITIES[Priority(priority)]
    _set_prompt(request, prompt)
    return request


def _set_prompt(request: pb.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = prompt
        return
    messages = [item for item in prompt if isinstance(item, ChatMessage)]
    ids = [item for item in prompt if not isinstance(item, ChatMessage)]
    if messages and ids:
        raise TypeError("a prompt is either token ids or chat messages")
    if messages:
        request.chat.CopyFrom(pb.Chat(messages=[_message(message) for message in messages]))
    else:
        request.token_ids.CopyFrom(pb.TokenIds(ids=ids))


def _message(message: ChatMessage) -> pb.ChatMessage:
    return pb.ChatMessage(role=_ROLES[message.role], content=message.content)


def generation_of(response: pb.GenerateResponse) -> Generation:
    return Generation(
        request_id=response.request_id,
        completions=tuple(map(_completion, response.outputs)),
        prompt_tokens=tuple(map(_token, response.prompt.tokens)),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
    )


def _completion(output: pb.Output) -> Completion:
    finish_reason = _FINISH_REASONS[output.finish_reason]
    assert finish_reason is not None
    return Completion(
        text=output.text,
        tokens=tuple(map(_token, output.tokens)),
        finish_reason=finish_reason,
        stop_match=_stop_match(output),
    )


def deltas_of(response: pb.GenerateResponse) -> Iterator[Delta]:
    if response.HasField("error"):
        return  # the call raises the same as its status
    last = len(response.outputs) - 1
    for place, output in enumerate(response.outputs):
        ends = place == last and response.HasField("usage")
        yield Delta(
            request_id=response.request_id,
            index=output.index,
            text=output.text,
            tokens=tuple(map(_token, output.tokens)),
            finish_reason=_FINISH_REASONS[output.finish_reason],
            stop_match=_stop_match(output),
            prompt_tokens=tuple(map(_token, response.prompt.tokens)) if place == 0 else (),
            usage=_usage(response.usage) if ends else None,
            timings=_timings(response.timings) if ends else None,
        )


def _token(token: pb.TokenInfo) -> Token:
    top = tuple((candidate.id, candidate.logprob) for candidate in token.top_logprobs)
    rank = token.rank if token.HasField("rank") else None
    return Token(id=token.id, logprob=token.logprob, text=token.text, top_logprobs=top, rank=rank)


def _stop_match(output: pb.Output) -> str | int | None:
    match output.WhichOneof("stop_match"):
        case "stop_string":
            return output.stop_string
        case "stop_token_id":
            return output.stop_token_id
    return None


def _usage(usage: pb.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def _timings(timings: pb.Timings) -> Timings:
    return Timings(
        time_to_first_token_seconds=timings.time_to_first_token_seconds,
        duration_seconds=timings.duration_seconds,
        decode_seconds=timings.decode_seconds,
        queue_seconds=timings.queue_seconds if timings.HasField("queue_seconds") else None,
        prefill_seconds=timings.prefill_seconds if timings.HasField("prefill_seconds") else None,
    )


def tokenize_request(
    prompt: str | Sequence[ChatMessage],
    *,
    add_special_tokens: bool = True,
    parse_special_tokens: bool = False,
    count_only: bool = False,
) -> pb.TokenizeRequest:
    request = pb.TokenizeRequest(
        parse_special_tokens=parse_special_tokens,
        count_only=count_only,
    )
    if not add_special_tokens:
        request.add_special_tokens = False
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.chat.CopyFrom(pb.Chat(messages=map(_message, prompt)))
    return request


def tokenization_of(response: pb.TokenizeResponse) -> Tokenization:
    return Tokenization(ids=tuple(response.ids), texts=tuple(response.texts))


def model_of(response: pb.GetModelResponse) -> Model:
    quantization = None
    if response.HasField("quantization"):
        quantization = QuantizationInfo(
            format=response.quantization.format,
            bits=response.quantization.bits,
            group_size=response.quantization.group_size,
        )
    return Model(
        name=response.name,
        architecture=response.architecture,
        max_model_len=response.max_model_len,
        vocab_size=response.vocab_size,
        eos_token_ids=tuple(response.eos_token_ids),
        has_chat_template=response.has_chat_template,
        quantization=quantization,
    )


def server_info_of(response: pb.GetServerInfoResponse) -> ServerInfo:
    limits = response.limits
    return ServerInfo(
        version=response.version,
        schema_revision=response.schema_revision,
        state=_STATES[response.state],
        uptime_seconds=response.uptime_seconds,
        max_receive_message_bytes=limits.max_receive_message_bytes,
        max_send_message_bytes=limits.max_send_message_bytes,
        max_requests=limits.max_requests,
        max_num_seqs=limits.max_num_seqs,
    )


def load_of(response: pb.GetLoadResponse) -> Load:
    return Load(
        num_running=response.num_running,
        num_waiting=response.num_waiting,
        kv_cache_usage_ratio=response.kv_cache_usage_ratio,
        num_requests=response.num_requests,
    )


def outcomes_of(response: pb.AbortResponse) -> dict[str, AbortOutcome]:
    return {each.request_id: _OUTCOMES[each.outcome] for each in response.results}


def log_level_request(level: LogLevel) -> pb.SetLogLevelRequest:
    return pb.SetLogLevelRequest(level=_LEVELS[level])


def previous_level_of(response: pb.SetLogLevelResponse) -> LogLevel:
    return next(name for name, level in _LEVELS.items() if level == response.previous)
