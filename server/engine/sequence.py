"""One request inside the engine: its tokens, its blocks, its state. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ..types import Priority, SamplingParams, TokenConstraint, TokenLogprob


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: float  # under the model's own distribution, before temperature and cuts
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first
    rank: int | None = None  # 1 + the number of likelier tokens, under the same distribution


@dataclass(frozen=True, slots=True)
class SequenceResult:
    """What a step gave a sequence that yields: 1 to 1 + number of its draft tokens, or an error.

    All tokens but the last equal the draft tokens at their places: those are verified, and the
    last one follows them.
    """

    tokens: tuple[SampledToken, ...] = ()
    error: str = ""  # the sequence ends with ERROR, for example on logits that are not numbers
    is_revised: bool = False  # not the token that a step launched meanwhile has gone on with


@dataclass(slots=True, eq=False)
class Account:
    """What one tenant has been served in one priority class, in tokens over its weight."""

    weight: float = 1.0
    service: float = 0.0
    num_sequences: int = 0  # alive: waiting or running
    num_running: int = 0


@dataclass(slots=True, eq=False)
class PartialChunk:
    """A chunk of a prompt that takes several steps, each of them some of the model's layers."""

    num_tokens: int
    num_layers: int  # of the model
    layers: range = range(0)  # of the step that is scheduled, or was the last one
    hidden: object = None  # what the runner has computed up to there

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known so far and how many of them have keys and values in the cache.

    A step computes `num_scheduled_tokens` tokens from `num_cached_tokens` on: known ones, then
    draft tokens; of a `partial` chunk only some layers. It yields new tokens only when it reaches
    the last layer of the last known one.

    While a step is on its way to the device, the next one may be scheduled: it computes the
    `num_pending_tokens` that the first one draws, and those count as known.
    """

    request_id: str
    token_ids: list[int]  # prompt, then completion
    num_prompt_tokens: int
    max_tokens: int  # bound of the completion
    params: SamplingParams
    stop_token_ids: frozenset[int]  # end-of-sequence tokens included, unless ignored
    seed: int
    index: int = 0  # which of the request's n samples
    siblings: tuple[Sequence, ...] = ()  # of sample 0: the samples that wait for its prompt
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    weight: float = 1.0  # of its tenant
    deadline_seconds: float | None = None  # from its arrival
    reads_prefix_cache: bool = True  # False computes every prompt token, for example for logprobs
    status: SequenceStatus = SequenceStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_scheduled_tokens: int = 0  # draft tokens included
    num_pending_tokens: int = 0  # 1 or 0: drawn after `token_ids`, but the host has not got them
    draws_settle: bool = True  # False: a token was revised once, so its draws are waited for
    writes_ahead: bool = False  # behind its cached tokens may be what no logits have vouched for
    draft_token_ids: list[int] = field(default_factory=list)  # guessed, verified by the step
    partial: PartialChunk | None = None  # None: a chunk goes through all layers in its step
    error: str = ""  # set by the runner: the step could not be computed for it, and it ends
    num_preemptions: int = 0
    constraint: TokenConstraint | None = None  # has taken in the tokens of the completion
    history: object = None  # whatever the drafter keeps; it outlives a preemption
    # Of the prompt's tokens from the second on, as far as they were computed, where asked for.
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    arrival: int = 0  # its number among all sequences, set by the scheduler
    arrival_seconds: float = 0.0  # on the scheduler's clock, set by it
    start_seconds: float | None = None  # of its first start, on the same clock
    account: Account = field(default_factory=Account)  # its tenant's, set by the queue
    block_hashes: list[bytes] = field(default_factory=list)  # of its first blocks, once computed
    num_hit_tokens: int = 0  # of the prompt, found in the prefix cache at its first start
    num_committed_blocks: int = 0  # offered to the prefix cache

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def was_admitted(self) -> bool:
        return self.start_seconds is not None

    @property
    def num_uncached_tokens(self) -> int:
        return len(self.token_ids) - self.num_cached_tokens

    @property
    def scheduled_token_ids(self) -> list[int]:
        """What the step computes, `num_scheduled_tokens` of them: known tokens, then drafts."""
        first = self.num_cached_tokens
        num_known = self.num_scheduled_tokens - len(self.draft_token_ids)
        return self.token_ids[first : first + num_known] + self.draft_token_ids

    @property
    def completes_chunk(self) -> bool:
        """Whether the scheduled step is the scheduled tokens' last one."""
        return self.partial is None or self.partial.is_last

    @property
    def num_scheduled_shares(self) -> float:
        """The scheduled tokens, each counted for the share of the layers that it goes through."""
        if self.partial is None:
            return self.num_scheduled_tokens
        return self.num_scheduled_tokens * len(self.partial.layers) / self.partial.num_layers

    @property
    def yields_token(self) -> bool:
        """Whether the scheduled step reaches the last known token, and its last layer."""
        if not self.completes_chunk:
            return False
        num_known = self.num_scheduled_tokens - len(self.draft_token_ids)
        return self.num_cached_tokens + num_known == len(self.token_ids) + self.num_pending_tokens

    @property
    def num_logit_rows(self) -> int:
        """The last rows of the step's tokens whose logits it needs: the last known token's, and
        one for each draft token."""
        return 1 + len(self.draft_token_ids) if self.yields_token else 0

    @property
    def prompt_logprob_positions(self) -> range:
        """The scheduled tokens whose logits say how likely the prompt's next token was, if asked.

        A prompt that is computed again, after a preemption or for another sample, is not reported
        again.
        """
        if self.params.prompt_logprobs is None or self.index > 0 or not self.completes_chunk:
            return range(0)
        first = max(self.num_cached_tokens, len(self.prompt_logprobs))
        end = self.num_cached_tokens + self.num_scheduled_tokens
        return range(first, min(end, self.num_prompt_tokens - 1))

    def describe(self) -> str:
        """For a log; says nothing of what the tokens are."""
        return (
            f"{self.request_id}[{self.index}] prompt {self.num_prompt_tokens} completion "
            f"{self.num_completion_tokens} cached {self.num_cached_tokens} scheduled "
            f"{self.num_scheduled_tokens} blocks {len(self.block_table)}"
        )
