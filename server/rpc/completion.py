"""The engine's tokens of one request, gathered until a part of its response is due."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class _Choice:
    """One of the n completions: what of it was not sent yet."""

    def __init__(self, index: int, detokenizer: Detokenizer) -> None:
        self.index = index
        self.detokenizer = detokenizer
        self.finish_reason: FinishReason | None = None
        self.is_reported = False  # whether its finish reason was sent
        self._texts: list[str] = []
        self._undecoded: list[int] = []
        self._outputs: list[TokenOutput] = []

    @property
    def has_news(self) -> bool:
        return bool(self._outputs) or (self.finish_reason is not None and not self.is_reported)

    def add(self, output: TokenOutput) -> None:
        assert output.token_id is not None
        self._outputs.append(output)
        reason = output.finish_reason
        if reason is not FinishReason.STOP:  # the token that stops is not part of the text
            self._undecoded.append(output.token_id)
        if self.detokenizer.may_stop:  # else what is sent together is decoded together
            self._decode()
            if self.detokenizer.stopped:
                reason = FinishReason.STOP
        if reason is not None:
            self.finish(reason)

    def finish(self, reason: FinishReason) -> None:
        self._decode()
        self._texts.append(self.detokenizer.finish())
        self.finish_reason = reason

    def _decode(self) -> None:
        self._texts.append(self.detokenizer.push_all(self._undecoded))
        self._undecoded.clear()

    def move_into(self, output: pb.Output, token_text: Callable[[int], str]) -> None:
        self._decode()
        output.index = self.index
        output.text = "".join(self._texts)
        for each in self._outputs:
            add_token(output.tokens, each.token, token_text)
        if self.finish_reason is not None:
            self._report_end(output)
        self._texts.clear()
        self._outputs.clear()

    def _report_end(self, output: pb.Output) -> None:
        assert self.finish_reason is not None
        self.is_reported = True
        output.finish_reason = FINISH_REASONS[self.finish_reason]
        if self.finish_reason is FinishReason.STOP:
            if self.detokenizer.stop_string is not None:
                output.stop_string = self.detokenizer.stop_string
            else:
                output.stop_token_id = output.tokens[-1].id


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
        self._prompt = self._echo() if echo else None
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
        if output.prompt_logprobs:
            self._prompt = self._echo(output.prompt_logprobs)
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

    def take(self) -> pb.GenerateResponse:
        """All that came since the last call."""
        part = pb.GenerateResponse(request_id=self._request_id, prompt=self._prompt)
        self._prompt = None
        for choice in self._choices:
            if choice.has_news:
                choice.move_into(part.outputs.add(), self._tokenizer.token_text)
        self.num_pending_tokens = 0
        if self.end is not None:
            self._add_costs(part)
        return part

    def fail(self, error: pb.Error) -> pb.GenerateResponse:
        """The last part of a response that fails after it began."""
        part = pb.GenerateResponse(request_id=self._request_id, error=error)
        for choice in self._choices:
            if choice.finish_reason is None:
                part.outputs.add(index=choice.index, finish_reason=pb.FINISH_REASON_ERROR)
        self._add_costs(part)
        return part

    def _echo(self, logprobs: Sequence[TokenLogprob] = ()) -> pb.Prompt:
        """The prompt as the first part returns it; nothing comes before its first token."""
        ids = self._prompt_token_ids
        prompt = pb.Prompt(text=self._tokenizer.decode(ids, skip_special_tokens=False))
        known = [TokenLogprob(token_id=each, logprob=0.0) for each in ids]
        for token in (known[0], *logprobs) if logprobs else known:
            add_token(prompt.tokens, token, self._tokenizer.token_text)
        return prompt

    def _end_if_all_have(self) -> None:
        reasons = [choice.finish_reason for choice in self._choices]
        if None not in reasons and self.end is None:
            last = reasons[-1]
            assert last is not None
            self.end = _ENDS[last]

    def _add_costs(self, part: pb.GenerateResponse) -> None:
        part.usage.prompt_tokens = self.num_prompt_tokens
        part.usage.completion_tokens = self.num_completion_tokens
        part.usage.cached_tokens = self._num_cached_tokens
        first, last = self._observer.time_to_first_token_seconds, self._observer.duration_seconds
        part.timings.MergeFrom(
            pb.Timings(
                time_to_first_token_seconds=first,
                duration_seconds=last,
                queue_seconds=self._queue_seconds,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=last - first,
            )
        )


def _failure(output: TokenOutput) -> LowbitError:
    assert output.finish_reason is not None
    kind, text = _FAILURES.get(output.finish_reason, (EngineFailed, "it ended without a token"))
    return kind(output.error or text)
