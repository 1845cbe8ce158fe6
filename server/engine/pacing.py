"""How many prompt tokens may join a step that decodes. No torch; learns from measured steps."""

from __future__ import annotations

from collections import deque
from statistics import median

_NUM_REMEMBERED = 9  # steps; the median of them forgives a few slow ones
_PROBE_EVERY = 64  # mixed steps in a row, after which one decodes only and is measured again


class PrefillPacer:
    """Keeps a step with prompt tokens below `max_stretch` times one that only decodes.

    How long decoding takes is known from steps without prompt tokens, for numbers of sequences
    of the same power of two. What a prompt token adds is what mixed steps took beyond that. Less
    than one token means that it goes through some of the model's layers.
    """

    def __init__(self, max_stretch: float, min_tokens: float) -> None:
        assert max_stretch > 1 and min_tokens > 0
        self._max_stretch = max_stretch
        self._min_tokens = min_tokens
        self._decode_seconds: dict[int, deque[float]] = {}
        self._token_seconds: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        self._num_mixed_steps = 0

    def max_prefill_tokens(self, num_decodes: int) -> float:
        """0 is a probe. Never less than `min_tokens` twice in a row: prompts always get on."""
        known = self._decode_seconds.get(num_decodes.bit_length())
        if known is None or self._num_mixed_steps >= _PROBE_EVERY:
            self._num_mixed_steps = 0
            return 0
        if not self._token_seconds:
            return self._min_tokens
        allowed = (self._max_stretch - 1) * median(known)
        return max(self._min_tokens, allowed / max(median(self._token_seconds), 1e-9))

    def observe(self, num_decodes: int, num_prefill_tokens: float, seconds: float) -> None:
        """A step that decoded `num_decodes` sequences took so long."""
        bucket = num_decodes.bit_length()
        if num_prefill_tokens == 0:
            self._num_mixed_steps = 0
            self._decode_seconds.setdefault(bucket, deque(maxlen=_NUM_REMEMBERED)).append(seconds)
        elif bucket in self._decode_seconds:
            self._num_mixed_steps += 1
            more = seconds - median(self._decode_seconds[bucket])
            self._token_seconds.append(max(0.0, more) / num_prefill_tokens)
