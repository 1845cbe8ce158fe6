"""Runners that have done a step when they have launched it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lowbit.server.engine.engine import Done
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SequenceResult


class BlockingRunner(ABC):
    @abstractmethod
    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        """One result per sequence that yields and has no `error`."""

    def launch(self, output: SchedulerOutput, previous: object = None) -> Done:
        return Done(self.execute(output))
