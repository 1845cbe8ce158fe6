"""One request inside the engine: its tokens, its blocks, its state. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..types import SamplingParams


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: float  # under the model's own distribution, before temperature and cuts


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known so far and how many of them have keys and values in the cache.

    A step computes `num_scheduled_tokens` tokens from `num_cached_tokens` on. It yields a new
    token only when it reaches the last known one.
    """

    request_id: str
    token_ids: list[int]  # prompt, then completion
    num_prompt_tokens: int
    max_tokens: int  # bound of the completion
    params: SamplingParams
    stop_token_ids: frozenset[int]  # end-of-sequence tokens included, unless ignored
    seed: int
    status: SequenceStatus = SequenceStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncached_tokens(self) -> int:
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def yields_token(self) -> bool:
        """Whether the scheduled step reaches the last known token."""
        return self.num_cached_tokens + self.num_scheduled_tokens == self.num_tokens
