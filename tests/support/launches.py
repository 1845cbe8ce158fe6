"""Kernels that are asked for but not run, and what Triton would compile for each.

Its rules: a number that is 1, or a multiple of 16, has a kernel of its own, unless the kernel says
otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime import interpreter

LAUNCH_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    name: str
    grid: tuple[int, ...]
    tensors: list[Tensor]
    kernel: Any  # (name, options, what each argument is compiled for); hashable


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """From now on launches go there instead of being run."""
    launches: list[Launch] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = kernel_of(self, arguments, options)
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        launches.append(Launch(self.fn.__name__, tuple(grid), tensors, kernel))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return launches


def kernel_of(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> object:
    signature = inspect.signature(function.fn)
    kwargs = {name: value for name, value in options.items() if name in signature.parameters}
    bound = signature.bind(*arguments, **kwargs).arguments
    unspecialized = set(function.kwargs.get("do_not_specialize") or ())
    parts = []
    for index, (name, value) in enumerate(bound.items()):
        if signature.parameters[name].annotation in (tl.constexpr, "tl.constexpr"):
            parts.append((name, str(value)))
        else:
            parts.append((name, variant(value, not unspecialized & {name, index})))
    launch = tuple(options.get(name) for name in LAUNCH_OPTIONS)
    return function.fn.__name__, launch, tuple(parts)


def variant(value: object, specialized: bool) -> object:
    """What a kernel is compiled for, of one argument."""
    if isinstance(value, FakeTensor):
        return value.dtype
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = 32 if -(1 << 31) <= value < 1 << 31 else 64
        return (width, value == 1, value % 16 == 0) if specialized else width
    return type(value)


def describe(news: set[Any], known: set[Any]) -> str:
    """Each new kernel beside the known one that is most like it."""
    lines = []
    for new in news:
        alike: Callable[[Any], int] = lambda old: len(set(old[2]) & set(new[2]))  # noqa: E731, B023
        nearest = max((old for old in known if old[0] == new[0]), key=alike, default=None)
        differences = set(new[2]) - set(nearest[2]) if nearest else "nothing like it"
        lines.append(f"{new[0]}: {differences}")
    return "\n".join(lines)
