"""Times GPU work the way a decoder runs it: in a CUDA graph, over weights that no cache holds.

Where there is no GPU, calls are timed as they are.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

_CACHE_FACTOR = 5  # bytes that a round of calls reads, in L2 caches
_MIN_ROUND_SECONDS = 2e-3
_NUM_ROUNDS = 15
_MIN_ROUNDS = 3
_MAX_CASE_SECONDS = 1.0  # of measuring one case


class NoDevice(ValueError):
    """There is nothing to measure on."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call over several rounds."""

    median_seconds: float
    lowest_seconds: float
    highest_seconds: float


class Budget:
    """Seconds that a run may take; what does not fit is left out and said to be."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds; 0 once they are spent."""
        return max(0.0, self._end - self._clock())


class Timer(Protocol):
    """Runs one call for each copy of its weights, over and over."""

    def __call__(self, calls: Sequence[Callable[[], object]]) -> Timing: ...


def cuda_device() -> torch.device:
    """Raises NoDevice where PyTorch finds no GPU."""
    if not torch.cuda.is_available():
        raise NoDevice("device must be a CUDA GPU; PyTorch finds none")
    return torch.device("cuda", torch.cuda.current_device())


def device_facts(device: torch.device) -> dict[str, str | int]:
    """What a figure must carry."""
    if device.type == "cpu":
        return {
            "processor": _processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "lowbit": version("lowbit"),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "num_sms": properties.multi_processor_count,
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": version("triton"),
        "lowbit": version("lowbit"),
    }


def num_copies(num_bytes: int, device: torch.device) -> int:
    """Copies of that many bytes that together pass five times the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-_CACHE_FACTOR * cache // num_bytes))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def timer_of(device: torch.device) -> Timer:
    """The one that suits the device."""
    return time_in_graph if device.type == "cuda" else time_on_host


def time_on_host(calls: Sequence[Callable[[], object]]) -> Timing:
    """Wall time of the calls one after the other; the first round warms up."""
    replays = max(1, int(_MIN_ROUND_SECONDS / _host_seconds(calls, 1)))
    rounds = [_host_seconds(calls, replays) / replays / len(calls) for _ in range(_NUM_ROUNDS)]
    return Timing(statistics.median(rounds), min(rounds), max(rounds))


def _host_seconds(calls: Sequence[Callable[[], object]], replays: int) -> float:
    start = time.perf_counter()
    for _ in range(replays):
        for call in calls:
            call()
    return time.perf_counter() - start


def bytes_per_second(device: torch.device, num_bytes: int = 1 << 29) -> float:
    """The device's memory bandwidth: of a copy, read plus written, or on a CPU of a sum if that is
    faster, for what is written there is read first."""
    timer = timer_of(device)
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copied = 2 * num_bytes / timer([lambda: target.copy_(source)]).median_seconds
    if device.type == "cuda":
        return copied
    return max(copied, num_bytes / timer([source.sum]).median_seconds)


def time_in_graph(calls: Sequence[Callable[[], object]]) -> Timing:
    """Capture all the calls in one CUDA graph and replay it; the first round warms up."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    once = _round_seconds(graph, 1)
    replays = max(1, int(_MIN_ROUND_SECONDS / once))
    num_rounds = max(_MIN_ROUNDS, min(_NUM_ROUNDS, int(_MAX_CASE_SECONDS / (once * replays))))
    rounds = [_round_seconds(graph, replays) / replays / len(calls) for _ in range(num_rounds)]
    return Timing(statistics.median(rounds), min(rounds), max(rounds))


def _round_seconds(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
