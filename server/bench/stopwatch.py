"""Where a step's time goes: by the host's clock, and by a GPU's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..engine.graph_runner import CudaRecorder, Recorder


class Broken(RuntimeError):
    """The engine did not do what is being timed; its time would say nothing."""


class Stopwatch:
    """Seconds spent in methods, by name, each time from the outermost call to its return."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._followed: list[tuple[object, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, method in self._followed:
            delattr(owner, method)  # the class's own is seen again

    def follow(
        self, owner: object, method: str, name: str = "", then: Callable[[], None] | None = None
    ) -> None:
        """Time a method of one object until the watch is left, under its own name or another;
        `then` is called after it, untimed."""
        inner = getattr(owner, method)
        seconds = self._seconds.setdefault(name or method, [])

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments)
            seconds.append(time.perf_counter() - start)
            if then is not None:
                then()
            return result

        setattr(owner, method, timed)
        self._followed.append((owner, method))

    def clear(self) -> None:
        """Forget what was measured so far."""
        for seconds in self._seconds.values():
            seconds.clear()

    def seconds(self) -> dict[str, list[float]]:
        """Of each call, of what was called at all."""
        return {name: list(each) for name, each in self._seconds.items() if each}


class Event(Protocol):
    """A place in the device's work, as `torch.cuda.Event`."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds."""


class Marks:
    """When, by the device's own clock, forward passes begin and end and their draws are done.

    A Recorder: what is recorded through it is marked whenever it is replayed.
    """

    def __init__(self, recorder: Recorder, event: Callable[[], Event]) -> None:
        self._recorder = recorder
        self._event = event
        self._starts: list[Event] = []
        self._ends: list[Event] = []
        self._draws: list[Event] = []

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        replay, output = self._recorder.record(work)

        def marked() -> None:
            self._mark(self._starts)
            replay()
            self._mark(self._ends)

        return marked, output

    def held_bytes(self) -> int:
        return self._recorder.held_bytes()

    def forget(self) -> None:
        self._recorder.forget()

    def drawn(self) -> None:
        """The device has been given all that follows a forward pass."""
        self._mark(self._draws)

    def clear(self) -> None:
        for events in (self._starts, self._ends, self._draws):
            events.clear()

    def gaps_and_passes(self) -> tuple[list[float], list[float]]:
        """Seconds from each pass's draws to the next pass, and of each pass.

        Raises Broken where passes were not replayed.
        """
        if len(self._starts) < 2 or len(self._starts) != len(self._draws):
            raise Broken(f"{len(self._starts)} recorded passes and {len(self._draws)} draws")
        self._draws[-1].synchronize()
        gaps = zip(self._draws, self._starts[1:], strict=False)
        passes = zip(self._starts, self._ends, strict=True)
        return [_elapsed(*each) for each in gaps], [_elapsed(*each) for each in passes]

    def _mark(self, events: list[Event]) -> None:
        event = self._event()
        event.record()
        events.append(event)


def _elapsed(start: Event, end: Event) -> float:
    return start.elapsed_time(end) / 1e3


def marks_of(device: torch.device) -> Callable[[], Marks] | None:
    """What marks a decode's steps on that device; None where nothing is recorded."""
    if device.type != "cuda":
        return None
    return lambda: Marks(CudaRecorder(device), partial(torch.cuda.Event, enable_timing=True))
