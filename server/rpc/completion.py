"""The engine's tokens of one request to the parts of its response."""

from __future__ import annotations

from collections.abc import Sequence

from ...proto import generation_pb2 as pb
from ..metrics import RequestEnd, RequestObserver
from ..text.detokenizer import Detokenizer
from ..types import EngineFailed, FinishReason, TokenOutput
from .convert import FINISH_REASONS, token_info_of

_ENDS: dict[FinishReason, RequestEnd] = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
}


class Completion:
    """`end` is set by the last token."""

    def __init__(
        self,
        request_id: str,
        num_prompt_tokens: int,
        detokenizer: Detokenizer,
        observer: RequestObserver,
    ) -> None:
        self.end: RequestEnd | None = None
        self._request_id = request_id
        self._num_prompt_tokens = num_prompt_tokens
        self._num_completion_tokens = 0
        self._detokenizer = detokenizer
        self._observer = observer

    def add(self, output: TokenOutput) -> pb.GenerateResponse:
        """The part that this token makes. Raises EngineFailed."""
        if output.token_id is None:
            raise EngineFailed(output.error or "the engine ended it without a token")
        self._observer.token()
        self._num_completion_tokens += 1
        text, finish_reason = self._decide(output.token_id, output.finish_reason)
        part = pb.GenerateResponse(
            request_id=self._request_id,
            text=text,
            tokens=[token_info_of(output.token)],
            prompt_tokens=[token_info_of(token) for token in output.prompt_logprobs],
        )
        if finish_reason is not None:
            self.end = _ENDS[finish_reason]
            part.finish_reason = FINISH_REASONS[finish_reason]
            part.usage.CopyFrom(self._usage())
        return part

    def _decide(
        self, token_id: int, finish_reason: FinishReason | None
    ) -> tuple[str, FinishReason | None]:
        """The new text, and why the completion ends here, if it does."""
        text = ""
        if finish_reason is not FinishReason.STOP:  # the token that stops is not part of the text
            text = self._detokenizer.push(token_id)
        if finish_reason is not None:
            text += self._detokenizer.finish()
        return text, FinishReason.STOP if self._detokenizer.stopped else finish_reason

    def _usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=self._num_completion_tokens,
            time_to_first_token_seconds=self._observer.time_to_first_token_seconds,
            duration_seconds=self._observer.duration_seconds,
        )


def whole(parts: Sequence[pb.GenerateResponse]) -> pb.GenerateResponse:
    """All parts of a completion as one."""
    response = pb.GenerateResponse()
    response.CopyFrom(parts[-1])
    response.text = "".join(part.text for part in parts)
    del response.tokens[:]
    response.tokens.extend(token for part in parts for token in part.tokens)
    response.prompt_tokens.extend(parts[0].prompt_tokens if len(parts) > 1 else ())
    return response
