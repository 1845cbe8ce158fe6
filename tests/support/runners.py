"""Runners that have done a step when they have launched it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SequenceResult


@dataclass(frozen=True)
class Done:
    results: list[SequenceResult]

    def wait(self) -> list[SequenceResult]:
        return self.results


class BlockingRunner(ABC):
    @abstractmethod
    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        """One result per sequence that yields and has no `error`."""

    def launch(self, output: SchedulerOutput, previous: object = None) -> Done:
        return Done(self.execute(output))
