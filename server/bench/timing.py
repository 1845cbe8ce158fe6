"""Times GPU work the way a decoder runs it: in a CUDA graph, over weights that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

import torch

_CACHE_FACTOR = 5  # bytes that a round of calls reads, in L2 caches
_MIN_ROUND_SECONDS = 2e-3
_NUM_ROUNDS = 15


class NoDevice(ValueError):
    """There is nothing to measure on."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call over several rounds."""

    median_seconds: float
    lowest_seconds: float
    highest_seconds: float


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


def time_in_graph(calls: Sequence[Callable[[], object]]) -> Timing:
    """Capture all the calls in one CUDA graph and replay it; the first round warms up."""
    for call in calls:
        call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    replays = max(1, int(_MIN_ROUND_SECONDS / _round_seconds(graph, 1)))
    rounds = [_round_seconds(graph, replays) / replays / len(calls) for _ in range(_NUM_ROUNDS)]
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
