"""Threads that share one process's work, each with a part of its cores.

Two threads that each pass a batch through a layer are faster than one whose every operation is
spread over two cores: most operations are too small for that, and what is not one waits. Knows
nothing of what is worked on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from .devices import CPU

MAX_WORKERS = 4  # each has a batch in memory; beyond these, operations are spread over cores
WIDE = 2048  # hidden states from where on every operation has work for all cores

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A context: leaving it ends the threads. With a count of 1 there are none."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._num_threads = torch.get_num_threads()
        each = max(1, self._num_threads // self.count)
        self._threads = [
            ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(each,))
            for _ in range(self.count if self.count > 1 else 0)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.submit(torch.get_num_threads).result()
        torch.set_num_threads(self._num_threads)  # of this thread; the last one's was everybody's
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.shutdown()

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """work(item) of every item; the same place in `items` is always the same thread's.

        In inference mode. The first error, in the order of the items, is raised when no thread is
        at work any more; items that were not begun are left out then.
        """
        if not self._threads:
            return [_infer(work, item) for item in items]
        futures: list[Future[Result]] = [
            self._threads[i % self.count].submit(_infer, work, item) for i, item in enumerate(items)
        ]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            wait(futures)


def num_workers(hidden_size: int, device: torch.device = CPU) -> int:
    """As many as suit this machine and a model of that width. A GPU does one thing at a time."""
    if device.type != "cpu" or hidden_size >= WIDE:
        return 1
    return min(torch.get_num_threads(), MAX_WORKERS)


@torch.inference_mode()
def _infer(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)
