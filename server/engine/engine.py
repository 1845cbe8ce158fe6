"""The synchronous engine: one thread calls `step` until no work is left.

Where the device works by itself, the next step is launched before this one's tokens are known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

from ..config import EngineConfig
from ..types import (
    DEFAULT_MAX_TOKENS,
    DEFAULT_SCHEDULING,
    EngineFailed,
    InvalidRequest,
    SamplingParams,
    SchedulingParams,
    StepStats,
    TokenConstraint,
    TokenOutput,
)
from .block_manager import BlockManager
from .pacing import PrefillPacer
from .scheduler import PARTIAL_CHUNK_TOKENS, Drafter, Scheduler, SchedulerOutput
from .sequence import Sequence, SequenceResult

logger = logging.getLogger(__name__)

MAX_FAILED_STEPS = 2  # in a row; then it is not the requests' fault


class Launched(Protocol):
    """A step that the device is working on, or has done."""

    def wait(self) -> list[SequenceResult]:
        """One result per sequence that yields and has no `error`."""


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was done when it was launched."""

    results: list[SequenceResult]

    def wait(self) -> list[SequenceResult]:
        return self.results


class Runner(Protocol):
    """What the engine needs of a ModelRunner."""

    def launch(self, output: SchedulerOutput, previous: Any = None) -> Launched:
        """Have the scheduled tokens computed. Where some are pending, `previous` draws them: what
        the launch of the step before has returned."""


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step between its launch and its update."""

    output: SchedulerOutput
    launched: Launched
    num_prompt_tokens: int  # of the prompts that it ends


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
        num_layers: int = 1,
        drafter: Drafter | None = None,
        runs_ahead: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`runs_ahead`: steps are launched before the last one's end, where that can be."""
        self.runner = runner
        self.runs_ahead = runs_ahead
        self._flight: _Flight | None = None  # launched in the step before
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.scheduler = _scheduler(config, num_blocks, num_layers, drafter, clock)
        self.current_step: SchedulerOutput | None = None  # while the runner works on it
        self._num_failed_steps = 0  # in a row
        self.last_step = self._stats()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._flight is not None

    def new_sequence(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        scheduling: SchedulingParams = DEFAULT_SCHEDULING,
        constraint: TokenConstraint | None = None,
    ) -> Sequence:
        """Check a request against the limits. Touches no engine state, so any thread may call it.

        Sample 0 is returned, the others are its siblings. Raises InvalidRequest.
        """
        max_tokens = self._max_tokens(len(prompt_token_ids), params)
        self._check_token_ids("prompt", prompt_token_ids)
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        self._check_token_ids("logit_bias", list(params.logit_bias))
        self._check_token_ids("allowed_token_ids", params.allowed_token_ids)
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        stop_token_ids = eos | frozenset(params.stop_token_ids)
        _check_contradictions(params, max_tokens, stop_token_ids, constraint)
        sibling_params = dataclasses.replace(params, prompt_logprobs=None)  # sample 0 has them
        seed = secrets.randbits(63) if params.seed is None else params.seed

        def sample(index: int, siblings: tuple[Sequence, ...] = ()) -> Sequence:
            return Sequence(
                request_id=request_id,
                token_ids=list(prompt_token_ids),
                num_prompt_tokens=len(prompt_token_ids),
                max_tokens=max_tokens,
                params=params if index == 0 else sibling_params,
                stop_token_ids=stop_token_ids,
                seed=seed if index == 0 else _sibling_seed(seed, index),
                index=index,
                siblings=siblings,
                priority=scheduling.priority,
                tenant=scheduling.tenant,
                weight=scheduling.weight,
                deadline_seconds=scheduling.deadline_seconds,
                # A token that was found in the cache has no logits.
                reads_prefix_cache=index > 0 or params.prompt_logprobs is None,
                constraint=constraint if constraint is None or index == 0 else constraint.fork(),
            )

        return sample(0, tuple(sample(index) for index in range(1, params.n)))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises QueueFull, DeadlineExceeded for a deadline that cannot be met, or InvalidRequest for
        a request id in use.
        """
        if sequence.request_id in self.scheduler:
            raise InvalidRequest(f"request_id is {sequence.request_id!r}; it is already in use")
        self.scheduler.add(sequence)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its samples; what is unknown or finished is left alone."""
        self.scheduler.abort(request_id, index)
        self.last_step = self._stats()

    def step(self) -> list[TokenOutput]:
        """One forward pass over the scheduled tokens. A failing step fails its sequences alone.

        Raises EngineFailed when the second step in a row fails.
        """
        news = self.scheduler.expire()
        flight = self._flight or self._begin(news)
        self._flight = None
        if flight is None:
            return news
        self._flight = self._launch_following(flight, news)
        output = flight.output
        self.current_step = output
        try:
            results = flight.launched.wait()
        except Exception as error:
            return news + self._fail(output, error)
        self.current_step = None
        self._num_failed_steps = 0
        made = self.scheduler.update(output, results)
        num_accepted = sum(len(result.tokens) - 1 for result in results if result.tokens)
        self.last_step = self._stats(output, flight.num_prompt_tokens, len(made), num_accepted)
        return news + made

    def _begin(self, news: list[TokenOutput]) -> _Flight | None:
        """Launch a step when none is on its way; None where nothing is to be computed."""
        output = self.scheduler.schedule()
        if not output.sequences:
            self.last_step = self._stats(output)
            return None
        return self._launch(output, None, news)

    def _launch_following(self, flight: _Flight, news: list[TokenOutput]) -> _Flight | None:
        if not self.runs_ahead:
            return None
        output = self.scheduler.schedule_after(flight.output)
        return None if output is None else self._launch(output, flight, news)

    def _launch(
        self, output: SchedulerOutput, previous: _Flight | None, news: list[TokenOutput]
    ) -> _Flight | None:
        ended_prompts = [
            s.num_prompt_tokens
            for s in output.sequences
            if s.num_completion_tokens == 0 and s.num_pending_tokens == 0 and s.yields_token
        ]
        self.current_step = output
        try:
            launched = self.runner.launch(output, previous.launched if previous else None)
        except Exception as error:
            news += self._fail(output, error)
            return None
        return _Flight(output, launched, sum(ended_prompts))

    def _fail(self, output: SchedulerOutput, error: Exception) -> list[TokenOutput]:
        if self.scheduler.is_void(output):  # it followed one that failed, or all have left
            logger.error("a step for nobody failed: %s", error)
            self.current_step = None
            return []
        self._num_failed_steps += 1
        if self._num_failed_steps >= MAX_FAILED_STEPS:
            raise EngineFailed(f"{self._num_failed_steps} steps in a row failed") from error
        logger.exception("a step failed: %s", output.describe())
        self.current_step = None
        news = self.scheduler.fail(output, f"the step failed: {type(error).__name__}")
        self.last_step = self._stats(output)
        return news

    def _stats(
        self,
        output: SchedulerOutput | None = None,
        num_prompt_tokens: int = 0,
        num_generation_tokens: int = 0,
        num_accepted_draft_tokens: int = 0,
    ) -> StepStats:
        """Before the first step, and after an abort, there is no `output`."""
        return StepStats(
            num_running=self.scheduler.num_running,
            num_waiting=self.scheduler.num_waiting,
            kv_cache_usage_ratio=self.scheduler.block_manager.usage_ratio,
            num_prompt_tokens=num_prompt_tokens,
            num_generation_tokens=num_generation_tokens,
            num_preemptions=output.num_preemptions if output else 0,
            num_prefix_queried_tokens=output.num_prefix_queried_tokens if output else 0,
            num_prefix_hit_tokens=output.num_prefix_hit_tokens if output else 0,
            num_draft_tokens=output.num_draft_tokens if output else 0,
            num_accepted_draft_tokens=num_accepted_draft_tokens,
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


def _scheduler(
    config: EngineConfig,
    num_blocks: int,
    num_layers: int,
    drafter: Drafter | None,
    clock: Callable[[], float],
) -> Scheduler:
    stretch = config.max_itl_stretch
    return Scheduler(
        BlockManager(num_blocks, config.block_size, prefix_cache=config.prefix_cache),
        drafter,
        PrefillPacer(stretch, min_tokens=PARTIAL_CHUNK_TOKENS / num_layers) if stretch else None,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_queued_requests=config.max_queued_requests,
        max_queued_tokens=config.max_queued_tokens,
        max_queue_seconds=config.max_queue_seconds or None,
        num_layers=num_layers,
        clock=clock,
    )


def _sibling_seed(seed: int, index: int) -> int:
    """63 bits that share nothing with the seed's own or another sibling's."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}".encode()).digest()[:8]) >> 1
