"""Token ids in, text out, as soon as it is decided. Knows no requests and no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"
# A character has at most 4 bytes and a token at least 1, so after 3 undecodable tokens the oldest
# are no incomplete character: they are undecodable for good.
_MAX_INCOMPLETE_TOKENS = 3
# Where a window is cut. Larger decodes more per token, smaller cuts more often.
_WINDOW_TOKENS = 16
_MAX_CONTEXT_TOKENS = 8


class Detokenizer:
    """Turns one completion's tokens into text that only ever grows, cut before a stop string.

    A character that is spread over tokens comes out with its last token, and text that may be the
    beginning of a stop string when that is decided. Tokens are decoded in a window that starts at
    a boundary between characters, so a token costs the same at any length of the completion.

    `decode` gives the text of some tokens; `context` are the tokens just before the completion. A
    word there keeps the space before the completion's first word, which tokenizers of the
    SentencePiece family drop from the first word that they decode. Stop strings are looked for in
    the text from the `min_tokens`-th token on.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        special_token_ids: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._special_token_ids = special_token_ids
        self._stop = _StopStrings(stop, included=include_stop)
        self._tokens_before_stop = min_tokens - 1
        self._window = self._shortest_context(context)
        self._emitted = len(decode(self._window))  # characters of the window's text
        self._boundary = len(self._window)  # tokens of the window up to its last whole character
        self._num_incomplete = 0  # tokens since then

    @property
    def may_stop(self) -> bool:
        """Whether there are stop strings to look for."""
        return self._stop.may_find

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; all text before it is out then."""
        return self._stop.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        """The text that this token decides."""
        may_stop = self._tokens_before_stop <= 0
        self._tokens_before_stop -= 1
        if token_id in self._special_token_ids:
            return ""
        self._window.append(token_id)
        text = self._advance()
        return self._stop.push(text) if may_stop else text

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens decide: what `push` gives for one after the other.

        Without stop strings most of them are decoded together, which costs about as much as one.
        """
        shown = [each for each in token_ids if each not in self._special_token_ids]
        if self._stop.may_find or not shown:
            return "".join(map(self.push, token_ids))
        text = self._decode([*self._window, *shown])
        if text.endswith(_UNDECODABLE):
            return "".join(map(self.push, token_ids))
        self._tokens_before_stop -= len(token_ids)
        self._window += shown
        delta = self._emit(text)
        self._cut_at_boundary()
        return delta

    def finish(self) -> str:
        """The text that was held back; there are no more tokens."""
        rest = self._decode(self._window)[self._emitted :]
        return self._stop.push(rest) + self._stop.finish()

    def _advance(self) -> str:
        text = self._decode(self._window)
        if not text.endswith(_UNDECODABLE):
            delta = self._emit(text)
            self._cut_at_boundary()
            return delta
        self._num_incomplete += 1
        if self._num_incomplete <= _MAX_INCOMPLETE_TOKENS:
            return ""
        delta = self._emit(text[:-1])  # the last character may still become a whole one
        if self._num_incomplete > _WINDOW_TOKENS:
            self._cut_undecodable()
        return delta

    def _emit(self, text: str) -> str:
        delta = text[self._emitted :]
        self._emitted = max(self._emitted, len(text))
        return delta

    def _cut_at_boundary(self) -> None:
        """Move the window's start to the last boundary, so that what follows has a context."""
        if len(self._window) >= _WINDOW_TOKENS:
            self._window = self._window[self._boundary :]
            self._emitted = len(self._decode(self._window))
        self._boundary = len(self._window)
        self._num_incomplete = 0

    def _cut_undecodable(self) -> None:
        """Bound the window where no boundary comes: a model that emits bytes, not text."""
        self._window = self._window[-_WINDOW_TOKENS // 2 :]
        self._emitted = len(self._decode(self._window)) - 1
        self._boundary = 0
        self._num_incomplete = _MAX_INCOMPLETE_TOKENS

    def _shortest_context(self, token_ids: Sequence[int]) -> list[int]:
        """The fewest last tokens that have a text of whole characters; none if there are none."""
        recent = [
            token_id
            for token_id in token_ids[-_MAX_CONTEXT_TOKENS:]
            if token_id not in self._special_token_ids
        ]
        for start in range(len(recent) - 1, -1, -1):
            text = self._decode(recent[start:])
            if text and not text.endswith(_UNDECODABLE):
                return recent[start:]
        return []


class _StopStrings:
    """Passes text on, but for what is, or may become, a stop string.

    Of several stop strings the one that ends first in the text wins, and of those the longest: the
    result does not depend on how the text was cut into pieces.
    """

    def __init__(self, stop: Sequence[str], *, included: bool) -> None:
        self.found: str | None = None
        self.may_find = bool(stop)
        self._stop = stop
        self._included = included
        self._held = ""  # could be the beginning of a stop string

    def push(self, text: str) -> str:
        if self.found is not None or not text:
            return ""
        text = self._held + text
        matches = [
            (start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0
        ]
        if matches:
            end, start = min(matches)
            self.found = text[start:end]
            self._held = ""
            return text[: end if self._included else start]
        num_held = max((_num_held_back(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _num_held_back(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with, all of `stop` apart."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
