"""The real engine in virtual time: a runner that computes nothing and moves the clock instead."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from lowbit.server.config import EngineConfig
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, SequenceResult
from lowbit.server.types import (
    DeadlineExceeded,
    FinishReason,
    Priority,
    QueueFull,
    SamplingParams,
    SchedulingParams,
)
from runners import BlockingRunner


@dataclass(frozen=True, slots=True, order=True)
class Arrival:
    seconds: float
    number: int  # unique
    num_prompt_tokens: int
    max_tokens: int
    tenant: str = ""
    weight: float = 1.0
    priority: Priority = Priority.NORMAL
    deadline_seconds: float | None = None
    num_shared_tokens: int = 0  # the prompt begins with so many that all prompts have


@dataclass(slots=True)
class Simulation(BlockingRunner):
    """Step time is a constant plus so much per token, about that of a 7B model on one GPU."""

    config: EngineConfig
    num_blocks: int = 8192
    step_seconds: float = 0.008
    token_seconds: float = 0.00005
    now: float = 0.0
    ttft: dict[int, float] = field(default_factory=dict)  # by the arrival's number
    finished: dict[int, float] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)  # past their deadline, waiting or running
    tokens: dict[str, int] = field(default_factory=dict)  # generated, by tenant
    num_preemptions: int = 0

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        self.now += self.step_seconds + self.token_seconds * output.num_tokens
        result = SequenceResult((SampledToken(1, 0.0),))
        return [result for each in output.sequences if each.yields_token]

    def run(self, arrivals: list[Arrival], until: float = float("inf")) -> None:
        """Until all have ended, or that time. Requests arrive between steps, as they really do."""
        engine = LLMEngine(
            self,
            self.config,
            num_blocks=self.num_blocks,
            max_model_len=1 << 16,
            vocab_size=1 << 20,
            eos_token_ids=frozenset(),
            num_layers=32,
            clock=lambda: self.now,
        )
        pending = list(arrivals)
        heapq.heapify(pending)
        by_number = {arrival.number: arrival for arrival in arrivals}
        while (pending or engine.has_work) and self.now < until:
            if not engine.has_work:
                self.now = max(self.now, pending[0].seconds)
            while pending and pending[0].seconds <= self.now:
                self._add(engine, heapq.heappop(pending))
            for output in engine.step():
                arrival = by_number[int(output.request_id)]
                if output.finish_reason is FinishReason.DEADLINE:
                    self.late.add(arrival.number)
                    continue
                self.ttft.setdefault(arrival.number, self.now - arrival.seconds)
                self.tokens[arrival.tenant] = self.tokens.get(arrival.tenant, 0) + 1
                if output.finish_reason is not None:
                    self.finished[arrival.number] = self.now
            self.num_preemptions += engine.last_step.num_preemptions

    def _add(self, engine: LLMEngine, arrival: Arrival) -> None:
        # The number in front: no two prompts share a block.
        num_own = arrival.num_prompt_tokens - arrival.num_shared_tokens
        prompt = [0] * arrival.num_shared_tokens + [arrival.number] * num_own
        params = SamplingParams(temperature=0, max_tokens=arrival.max_tokens)
        scheduling = SchedulingParams(
            tenant=arrival.tenant,
            weight=arrival.weight,
            priority=arrival.priority,
            deadline_seconds=arrival.deadline_seconds,
        )
        try:
            engine.add(engine.new_sequence(str(arrival.number), prompt, params, scheduling))
        except (QueueFull, DeadlineExceeded):
            self.refused.add(arrival.number)
