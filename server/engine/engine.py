"""The synchronous engine: one thread calls `step` until no work is left."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from ..config import EngineConfig
from ..types import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_SCHEDULING,
    FinishReason,
    InvalidRequest,
    SamplingParams,
    SchedulingParams,
    StepStats,
    TokenConstraint,
    TokenOutput,
)
from .block_manager import BlockManager
from .scheduler import Scheduler, SchedulerOutput
from .sequence import Sequence, SequenceResult

logger = logging.getLogger(__name__)


class Runner(Protocol):
    """What the engine needs of a ModelRunner."""

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]: ...


class LLMEngine:
    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.runner = runner
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.scheduler = Scheduler(
            BlockManager(num_blocks, config.block_size),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_queued_requests=config.max_queued_requests,
        )
        self.last_step = self._stats()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def new_sequence(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        scheduling: SchedulingParams = DEFAULT_SCHEDULING,
        constraint: TokenConstraint | None = None,
    ) -> Sequence:
        """Check a request against the limits. Touches no engine state, so any thread may call it.

        Raises InvalidRequest.
        """
        if params.n > 1:
            raise InvalidRequest(f"n is {params.n}; this engine makes 1 completion")
        if scheduling.deadline_seconds is not None:
            raise InvalidRequest("deadline_seconds is set; this engine has no deadlines")
        max_tokens = self._max_tokens(len(prompt_token_ids), params)
        self._check_token_ids("prompt", prompt_token_ids)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("logit_bias", list(params.logit_bias))
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        stop_token_ids = eos | frozenset(params.stop_token_ids)
        _check_contradictions(params, max_tokens, stop_token_ids, constraint)
        return Sequence(
            request_id=request_id,
            token_ids=list(prompt_token_ids),
            num_prompt_tokens=len(prompt_token_ids),
            max_tokens=max_tokens,
            params=params,
            stop_token_ids=stop_token_ids,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            priority=scheduling.priority,
            tenant=scheduling.tenant,
            deadline_seconds=scheduling.deadline_seconds,
            # A token that was found in the cache has no logits.
            reads_prefix_cache=params.prompt_logprobs is None,
            constraint=constraint,
        )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises QueueFull, or InvalidRequest for a request id in use."""
        if sequence.request_id in self.scheduler:
            raise InvalidRequest(f"request_id is {sequence.request_id!r}; it is already in use")
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> None:
        """End a request and free its blocks; one that is unknown or finished is left alone."""
        if request_id in self.scheduler:
            self.scheduler.finish(request_id)
            self.last_step = self._stats()

    def step(self) -> list[TokenOutput]:
        """One forward pass over the scheduled tokens. A failing step fails its sequences alone."""
        output = self.scheduler.schedule()
        finished_prompts = [
            s.num_prompt_tokens
            for s in output.sequences
            if s.yields_token and s.num_completion_tokens == 0
        ]
        try:
            results = self.runner.execute(output) if output.sequences else []
        except Exception as error:
            logger.exception("a step of %d sequences failed", len(output.sequences))
            return self._fail(output, error)
        news = self.scheduler.update(output, results)
        self.last_step = self._stats(sum(finished_prompts), len(news), output.num_preemptions)
        return news

    def _fail(self, output: SchedulerOutput, error: Exception) -> list[TokenOutput]:
        for sequence in output.sequences:
            self.scheduler.finish(sequence.request_id)
        self.last_step = self._stats(num_preemptions=output.num_preemptions)
        return [
            TokenOutput(
                request_id=sequence.request_id,
                token_id=None,
                finish_reason=FinishReason.ERROR,
                error=f"the step failed: {type(error).__name__}",
            )
            for sequence in output.sequences
        ]

    def _stats(
        self, num_prompt_tokens: int = 0, num_generation_tokens: int = 0, num_preemptions: int = 0
    ) -> StepStats:
        return StepStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_cache_usage_ratio=self.scheduler.block_manager.usage_ratio,
            num_prompt_tokens=num_prompt_tokens,
            num_generation_tokens=num_generation_tokens,
            num_preemptions=num_preemptions,
        )

    def _check_token_ids(self, field: str, token_ids: SequenceOf[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self.vocab_size:
                raise InvalidRequest(
                    f"{field} holds token id {token_id}; ids must lie in [0, {self.vocab_size})"
                )

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """The completion's bound, such that the sequence alone always fits model and cache."""
        if num_prompt_tokens == 0:
            raise InvalidRequest("prompt has 0 tokens; it must have at least 1")
        blocks = self.scheduler.block_manager
        cache_tokens = blocks.num_blocks * blocks.block_size
        # The last token is returned but never fed back, so it needs no slot in the cache.
        limits = {"max_model_len": self.max_model_len, "the KV cache": cache_tokens + 1}
        name, limit = min(limits.items(), key=lambda item: item[1])
        if num_prompt_tokens >= limit:
            raise InvalidRequest(
                f"prompt has {num_prompt_tokens} tokens; {name} allows at most {limit - 1}"
            )
        room = limit - num_prompt_tokens
        if params.max_tokens is None:
            return min(DEFAULT_MAX_TOKENS, room)
        if params.max_tokens > room:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens} after a prompt of {num_prompt_tokens} tokens; "
                f"{name} allows at most {room}"
            )
        return params.max_tokens


def _check_contradictions(
    params: SamplingParams,
    max_tokens: int,
    stop_token_ids: frozenset[int],
    constraint: TokenConstraint | None,
) -> None:
    """Raises InvalidRequest for what no completion could satisfy."""
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}; here it must be at most {max_tokens} (max_tokens)"
        )
    allowed = params.allowed_token_ids
    if params.min_tokens > 0 and allowed and stop_token_ids.issuperset(allowed):
        raise InvalidRequest(
            f"allowed_token_ids holds only tokens that stop; min_tokens is {params.min_tokens}, "
            "so at least 1 other must be allowed"
        )
    if params.structured_output is not None and constraint is None:
        name, _ = params.structured_output
        raise InvalidRequest(f"{name} is set; this engine was given no constraint that follows it")
