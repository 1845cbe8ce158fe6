"""The engine's tokens of one request, gathered until a part of its response is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ...proto import generation_pb2 as pb
from ..metrics import RequestEnd, RequestObserver
from ..text.detokenizer import Detokenizer
from ..types import (
    DeadlineExceeded,
    EngineFailed,
    FinishReason,
    LowbitError,
    QueueTimeout,
    TokenLogprob,
    TokenOutput,
)
from .convert import FINISH_REASONS, add_token
from .deployment import TextCodec

_ENDS: Final[dict[FinishReason, RequestEnd]] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "cancelled",
}
_FAILURES: Final[dict[FinishReason, tuple[type[LowbitError], str]]] = {
    FinishReason.DEADLINE: (DeadlineExceeded, "the deadline passed before the request was done"),
    FinishReason.QUEUE_TIMEOUT: (QueueTimeout, "the request waited too long to be started"),
}


# Decoded at once, they take milliseconds of everybody's time.
_MAX_UNDECODED_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class _News:
    """What is new of one of the n completions."""

    index: int
    text: str
    outputs: Sequence[TokenOutput]
    finish_reason: FinishReason | None  # where it is the last
    stop_string: str | None

    def write(self, output: pb.Output, token_text: Callable[[int], str]) -> None:
        output.index = self.index
        output.text = self.text
        for each in self.outputs:
            add_token(output.tokens, each.token, token_text)
        if self.finish_reason is None:
            return
        output.finish_reason = FINISH_REASONS[self.finish_reason]
        if self.finish_reason is FinishReason.STOP:
            if self.stop_string is not None:
                output.stop_string = self.stop_string
            else:
                output.stop_token_id = output.tokens[-1].id


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What is due of a response. Nothing changes it any more: any thread may build its message."""

    request_id: str
    news: Sequence[_News]
    prompt_token_ids: Sequence[int]  # empty where the prompt is not due
    prompt_logprobs: Sequence[TokenLogprob]  # of them from the second on, where asked for
    usage: pb.Usage | None
    timings: pb.Timings | None
    tokenizer: TextCodec

    @property
    def num_entries(self) -> int:
        """Tokens and candidates that `build` has to write."""
        outputs = (output for news in self.news for output in news.outputs)
        candidates = sum(1 + len(each.top_logprobs) for each in outputs)
        candidates += sum(len(each.top) for each in self.prompt_logprobs)
        return candidates + len(self.prompt_token_ids)

    def build(self) -> pb.GenerateResponse:
        message = pb.GenerateResponse(
            request_id=self.request_id, usage=self.usage, timings=self.timings
        )
        token_text = self.tokenizer.token_text
        for news in self.news:
            news.write(message.outputs.add(), token_text)
        if self.prompt_token_ids:
            self._write_prompt(message.prompt)
        return message

    def _write_prompt(self, prompt: pb.Prompt) -> None:
        ids = self.prompt_token_ids
        prompt.text = self.tokenizer.decode(ids, skip_special_tokens=False)
        unknown = [TokenLogprob(token_id=each, logprob=0.0) for each in ids]
        for token in (unknown[0], *(self.prompt_logprobs or unknown[1:])):
            add_token(prompt.tokens, token, self.tokenizer.token_text)


class _Choice:
    """One of the n completions: what of it was not sent yet."""

    def __init__(self, index: int, detokenizer: Detokenizer) -> None:
        self.index = index
        self.detokenizer = detokenizer
        self.finish_reason: FinishReason | None = None
        self._is_reported = False  # whether its finish reason was taken
        self._texts: list[str] = []
        self._undecoded: list[int] = []
        self._outputs: list[TokenOutput] = []

    @property
    def has_news(self) -> bool:
        return bool(self._outputs) or (self.finish_reason is not None and not self._is_reported)

    def add(self, output: TokenOutput) -> None:
        assert output.token_id is not None
        self._outputs.append(output)
        reason = output.finish_reason
        if reason is not FinishReason.STOP:  # the token that stops is not part of the text
            self._undecoded.append(output.token_id)
        # What is sent together is decoded together, but for stop strings, and not all at the end.
        if self.detokenizer.may_stop or len(self._undecoded) >= _MAX_UNDECODED_TOKENS:
            self._decode()
            if self.detokenizer.stopped:
                reason = FinishReason.STOP
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        self._decode()
        self._texts.append(self.detokenizer.finish())
        self.finish_reason = reason

    def take(self) -> _News:
        self._decode()
        news = _News(
            index=self.index,
            text="".join(self._texts),
            outputs=self._outputs,
            finish_reason=self.finish_reason,
            stop_string=self.detokenizer.stop_string,
        )
        self._texts, self._outputs = [], []
        self._is_reported = self.finish_reason is not None
        return news

    def _decode(self) -> None:
        self._texts.append(self.detokenizer.push_all(self._undecoded))
        self._undecoded.clear()


class Completion:
    """`end` is set when no more tokens are wanted.

    `end_sample` is told of each sample that a stop string ended while others go on.
    """

    def __init__(
        self,
        request_id: str,
        *,
        prompt_token_ids: list[int],
        detokenizers: list[Detokenizer],
        tokenizer: TextCodec,
        observer: RequestObserver,
        end_sample: Callable[[int], None],
        echo: bool = False,
    ) -> None:
        self.end: RequestEnd | None = None
        self.num_pending_tokens = 0
        self._request_id = request_id
        self._prompt_token_ids = prompt_token_ids
        self._choices = [_Choice(index, each) for index, each in enumerate(detokenizers)]
        self._tokenizer = tokenizer
        self._observer = observer
        self._end_sample = end_sample
        self._prompt_is_due = echo
        self._prompt_logprobs: Sequence[TokenLogprob] = ()
        self.num_completion_tokens = 0
        self._num_cached_tokens = 0
        self._queue_seconds: float | None = None  # of the sample that began first
        self._prefill_seconds: float | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_token_ids)

    def add(self, output: TokenOutput) -> None:
        """Take a token in. Raises EngineFailed, DeadlineExceeded or QueueTimeout."""
        if output.token_id is None:
            raise _failure(output)
        choice = self._choices[output.index]
        if choice.finish_reason is not None:
            return  # a stop string ended it; this was made before the engine knew
        self._observer.token()
        self.num_completion_tokens += 1
        self._num_cached_tokens = max(self._num_cached_tokens, output.num_cached_tokens)
        self.num_pending_tokens += 1
        if self._queue_seconds is None:
            self._queue_seconds = output.queue_seconds
            self._prefill_seconds = output.prefill_seconds
        if output.prompt_logprobs:  # with the first token: nothing was taken yet
            self._prompt_logprobs = output.prompt_logprobs
        choice.add(output)
        if choice.finish_reason is not None:
            self._end_if_all_have()
            if output.finish_reason is None and self.end is None:
                self._end_sample(output.index)

    def cancel(self) -> None:
        """End what has not ended."""
        for choice in self._choices:
            if choice.finish_reason is None:
                choice.finish(FinishReason.CANCELLED)
        self.end = "cancelled"

    def take(self) -> Part:
        """All that came since the last call."""
        is_last = self.end is not None
        part = Part(
            request_id=self._request_id,
            news=[choice.take() for choice in self._choices if choice.has_news],
            prompt_token_ids=self._prompt_token_ids if self._prompt_is_due else (),
            prompt_logprobs=self._prompt_logprobs,
            usage=self._usage() if is_last else None,
            timings=self._timings() if is_last else None,
            tokenizer=self._tokenizer,
        )
        self._prompt_is_due, self._prompt_logprobs = False, ()
        self.num_pending_tokens = 0
        return part

    def fail(self, error: pb.Error) -> pb.GenerateResponse:
        """The last part of a response that fails after it began."""
        part = pb.GenerateResponse(
            request_id=self._request_id, error=error, usage=self._usage(), timings=self._timings()
        )
        for choice in self._choices:
            if choice.finish_reason is None:
                part.outputs.add(index=choice.index, finish_reason=pb.FINISH_REASON_ERROR)
        return part

    def _end_if_all_have(self) -> None:
        reasons = [choice.finish_reason for choice in self._choices]
        if None not in reasons and self.end is None:
            last = reasons[-1]
            assert last is not None
            self.end = _ENDS[last]

    def _usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            cached_tokens=self._num_cached_tokens,
        )

    def _timings(self) -> pb.Timings:
        first, last = self._observer.time_to_first_token_seconds, self._observer.duration_seconds
        return pb.Timings(
            time_to_first_token_seconds=first,
            duration_seconds=last,
            queue_seconds=self._queue_seconds,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=last - first,
        )


def _failure(output: TokenOutput) -> LowbitError:
    assert output.finish_reason is not None
    kind, text = _FAILURES.get(output.finish_reason, (EngineFailed, "it ended without a token"))
    return kind(output.error or text)
