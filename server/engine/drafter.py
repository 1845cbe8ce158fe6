"""Guesses what a sequence says next from what it said before. No torch.

Prompt lookup (Saxena 2023, "Prompt Lookup Decoding"): where the last tokens stood before, what
followed them then is proposed to follow now. That costs no model, only the verification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .sequence import Sequence

# How many last tokens must have stood before, the strictest first, and the rate of success that
# the proposals of each begin with: each has a record of its own.
_ORDERS = {8: 0.9, 4: 0.8, 2: 0.5}
_PRIOR_TRIALS = 2.0  # that this rate counts for
# What verifying one draft token takes, in decode steps of one sequence: 0.15 to 0.2 measured with
# SmolLM2-135M at 4 bits on one thread.
_TOKEN_COST = 0.15
_MAX_NUM_RUNNING = 16  # beyond, a step is bound by computing and drafts only displace tokens
_DECAY = 0.9  # of a record's weight with every proposal
_MIN_PAUSE, _MAX_PAUSE = 16, 256  # matches that are passed over after a failure


@dataclass(slots=True)
class _Record:
    """How the proposals of one order have fared with one sequence."""

    successes: float
    trials: float = _PRIOR_TRIALS
    pause: int = _MIN_PAUSE  # matches to pass over before the next attempt
    next_pause: int = _MIN_PAUSE

    def draft_length(self, cost: float) -> int:
        """As long as the last of the tokens is likelier to stand than it is dear."""
        if not self.pays(cost):
            return self._attempt()
        return int(math.log(cost) / math.log(min(self._rate, 0.99)))

    def pays(self, cost: float) -> bool:
        """Whether a guess is likelier to stand than it is dear."""
        return self._rate > cost

    @property
    def _rate(self) -> float:
        return self.successes / self.trials

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Tokens behind the first wrong one say nothing."""
        rejected = num_accepted_tokens < num_draft_tokens
        self.successes = _DECAY * self.successes + num_accepted_tokens
        self.trials = _DECAY * self.trials + num_accepted_tokens + rejected
        if num_accepted_tokens:
            self.next_pause = _MIN_PAUSE

    def _attempt(self) -> int:
        """One token, once the pause is over; the next pause is longer."""
        if self.pause > 0:
            self.pause -= 1
            return 0
        self.pause = self.next_pause
        self.next_pause = min(2 * self.next_pause, _MAX_PAUSE)
        return 1


@dataclass(slots=True)
class _History:
    """Where each run of tokens of a sequence ended last."""

    num_indexed: int = 0
    ends: tuple[dict[tuple[int, ...], int], ...] = field(
        default_factory=lambda: tuple({} for _ in _ORDERS)
    )
    records: tuple[_Record, ...] = field(
        default_factory=lambda: tuple(_Record(rate * _PRIOR_TRIALS) for rate in _ORDERS.values())
    )
    last_used: int = 0  # index of the record whose proposal is being verified

    def index(self, token_ids: list[int]) -> None:
        """Take in all runs that end before the last token."""
        for end in range(self.num_indexed + 1, len(token_ids)):
            for order, ends in zip(_ORDERS, self.ends, strict=True):
                if end >= order:
                    ends[tuple(token_ids[end - order : end])] = end
        self.num_indexed = max(self.num_indexed, len(token_ids) - 1)

    def find(self, token_ids: list[int]) -> tuple[int, int] | None:
        """(index of the strictest order that matches, where what followed begins)."""
        for i, (order, ends) in enumerate(zip(_ORDERS, self.ends, strict=True)):
            start = ends.get(tuple(token_ids[-order:]))
            if start is not None:
                return i, start
        return None


class PromptLookupDrafter:
    """Proposes at most `max_draft_tokens`, fewer where fewer have stood, none where few sequences
    would gain."""

    def __init__(self, max_draft_tokens: int) -> None:
        self.max_draft_tokens = max_draft_tokens

    def propose(self, sequence: Sequence, num_running: int, max_draft_tokens: int) -> list[int]:
        if num_running > _MAX_NUM_RUNNING:
            return []
        history = _history(sequence)
        found = history.find(sequence.token_ids)
        if found is None:
            return []
        history.last_used, start = found
        length = history.records[history.last_used].draft_length(_relative_cost(num_running))
        length = min(length, max_draft_tokens, self.max_draft_tokens)
        period = sequence.num_tokens - start  # what followed may reach into what is proposed
        return [sequence.token_ids[start + i % period] for i in range(length)]

    def has_hope(self, sequence: Sequence, num_running: int) -> bool:
        """Whether what was said last stood before, and what follows such a match pays."""
        if num_running > _MAX_NUM_RUNNING:
            return False
        history = _history(sequence)
        found = history.find(sequence.token_ids)
        return found is not None and history.records[found[0]].pays(_relative_cost(num_running))

    def observe(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        history = sequence.history
        assert isinstance(history, _History)
        history.records[history.last_used].observe(num_draft_tokens, num_accepted_tokens)


def _history(sequence: Sequence) -> _History:
    """What is known of the sequence, up to its last known token."""
    if sequence.history is None:
        sequence.history = _History()
    assert isinstance(sequence.history, _History)
    sequence.history.index(sequence.token_ids)
    return sequence.history


def _relative_cost(num_running: int) -> float:
    """What verifying a token takes, over what a token takes without drafts.

    A step of B sequences takes 1 + c (B - 1) steps of one, and gives B tokens.
    """
    return _TOKEN_COST * num_running / (1 + _TOKEN_COST * (num_running - 1))
