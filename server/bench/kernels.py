"""`lowbit bench kernels`: correctness, then time, of the low-bit linear layers on this GPU.

Of every shape and number of rows M: seconds, spread, speed-up over cuBLAS in fp16, and the share of
the roofline, max(bytes / copy bandwidth, operations / fp16 rate), both measured first. What did not
fit the run's seconds, or could not be run, is named with the reason and has no figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ...kernels import triton_linear as low_bit
from ...kernels.packing import (
    FragmentWeight,
    PackedWeight,
    dequantize,
    pack_codes,
)
from .timing import Budget, Timer, Timing

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024)
FEW_ROWS = (1, 16, 64)
GROUP_SIZE = 128
MAX_ERROR = 1e-3  # mean |difference| / mean |expected| in fp16
_DTYPE = torch.float16


class Wrong(RuntimeError):
    """A kernel's result is not what float64 gives; its time would say nothing."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A linear layer of a model."""

    name: str
    in_features: int
    out_features: int


SHAPES = (  # what the bars are for comes first: seconds may run out
    Shape("square 8192", 8192, 8192),
    Shape("square 16384", 16384, 16384),
    Shape("square 4096", 4096, 4096),
    Shape("Llama-3-8B qkv", 4096, 6144),
    Shape("Llama-3-8B o", 4096, 4096),
    Shape("Llama-3-8B gate+up", 4096, 28672),
    Shape("Llama-3-8B down", 14336, 4096),
    Shape("Llama-3-70B qkv", 8192, 10240),
    Shape("Llama-3-70B o", 8192, 8192),
    Shape("Llama-3-70B gate+up", 8192, 57344),
    Shape("Llama-3-70B down", 28672, 8192),
    Shape("Llama-2-13B qkv", 5120, 15360),
    Shape("Llama-2-13B o", 5120, 5120),
    Shape("Llama-2-13B gate+up", 5120, 27648),
    Shape("Llama-2-13B down", 13824, 5120),
)
QUICK_SHAPES = tuple(shape for shape in SHAPES if shape.name in ("Llama-3-8B qkv", "square 8192"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device does at best, measured."""

    bytes_per_second: float  # read plus written, of a copy
    operations_per_second: float  # of a large fp16 product, 2 M N K


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One layer, one width, one number of rows."""

    shape: str
    bits: int  # 16: cuBLAS
    kernel: str  # lowbit's tier, cublas or a peer
    num_rows: int
    median_seconds: float
    lowest_seconds: float
    highest_seconds: float
    speedup: float  # over cuBLAS in fp16, of medians
    roofline_ratio: float  # of the floor


@dataclass(frozen=True, slots=True, kw_only=True)
class NotMeasured:
    """What has no figure, and why."""

    what: str
    reason: str


def random_weight(shape: Shape, bits: int, device: torch.device, seed: int = 0) -> PackedWeight:
    """Codes, and scales of about the size that layers have."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.in_features, shape.out_features)
    codes = torch.randint(0, 1 << bits, size, dtype=torch.uint8, device=device, generator=generator)
    groups = (-(-shape.in_features // GROUP_SIZE), shape.out_features)
    step = 12**0.5 / (1 << bits) / shape.in_features**0.5
    spread = torch.rand(groups, device=device, generator=generator) + 0.5
    return PackedWeight(
        bits=bits,
        group_size=GROUP_SIZE,
        in_features=shape.in_features,
        out_features=shape.out_features,
        qweight=pack_codes(codes, bits),
        scales=(step * spread).to(_DTYPE),
        zeros=torch.full(groups, 1 << (bits - 1), dtype=torch.uint8, device=device),
    )


def check(device: torch.device, shape: Shape, rows: Sequence[int] = FEW_ROWS) -> Iterator[str]:
    """One line per width. Raises Wrong where a result differs from float64's."""
    for bits in (2, 3, 4, 8):
        weight = random_weight(shape, bits, device)
        layer = low_bit.prepare(weight, device, _DTYPE)
        exact = dequantize(weight).double()
        errors = []
        for num_rows in rows:
            x = torch.randn(num_rows, shape.in_features, device=device).to(_DTYPE)
            errors.append(mean_error(low_bit.linear(x, layer), x.double() @ exact.t()))
            if not errors[-1] < MAX_ERROR:
                raise Wrong(
                    f"W{bits} {shape.name} at M = {num_rows}: mean error {errors[-1]:.1e}; "
                    f"it must be below {MAX_ERROR:.0e}"
                )
        yield f"W{bits}: mean error {max(errors):.1e} for M = {', '.join(map(str, rows))}"


def mean_error(actual: Tensor, expected: Tensor) -> float:
    """mean |difference| / mean |expected|."""
    return float((actual.double() - expected).abs().mean() / expected.abs().mean())


def measure_rates(
    device: torch.device, timer: Timer, num_bytes: int = 1 << 30, side: int = 8192
) -> Rates:
    """The floor's two slopes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timer([lambda: target.copy_(source)])
    a, b = (torch.randn(side, side, device=device).to(_DTYPE) for _ in range(2))
    product = timer([lambda: torch.mm(a, b)])
    return Rates(
        bytes_per_second=2 * num_bytes / copy.median_seconds,
        operations_per_second=2 * side**3 / product.median_seconds,
    )


def floor_seconds(shape: Shape, bits: int, num_rows: int, rates: Rates) -> float:
    """No kernel can be faster: everything is read or written once, every product computed."""
    weight_bits = 16.0 if bits == 16 else bits + 16 / GROUP_SIZE
    weights = shape.in_features * shape.out_features
    activations = num_rows * (shape.in_features + shape.out_features)
    num_bytes = weights * weight_bits / 8 + activations * _DTYPE.itemsize
    return max(
        num_bytes / rates.bytes_per_second, 2 * weights * num_rows / rates.operations_per_second
    )


def measure(
    device: torch.device,
    timer: Timer,
    copies_of: Callable[[int], int],  # bytes of weights -> copies that no cache holds
    rates: Rates,
    shapes: Sequence[Shape] = SHAPES,
    rows: Sequence[int] = ROWS,
    budget: Budget | None = None,
) -> Iterator[Result | NotMeasured]:
    """W4 at all rows, the other widths at a few, cuBLAS beside."""
    budget = budget or Budget(math.inf)
    for shape in shapes:
        if not budget.left():
            yield NotMeasured(what=shape.name, reason=f"{budget.seconds:.0f} seconds were spent")
            continue
        dense = _measure_dense(device, timer, copies_of, rates, shape, rows)
        yield from dense.values()
        for bits in (4, 3, 2, 8):
            if not budget.left():
                reason = f"{budget.seconds:.0f} seconds were spent"
                yield NotMeasured(what=f"{shape.name} at {bits} bits", reason=reason)
                continue
            chosen = [m for m in rows if bits == 4 or m in FEW_ROWS]
            layer = low_bit.prepare(random_weight(shape, bits, device), device, _DTYPE)
            layers = copies(layer, copies_of(layer_bytes(layer)))
            for num_rows in chosen:
                x = torch.randn(num_rows, shape.in_features, device=device).to(_DTYPE)
                timing = timer([_call(x, copy) for copy in layers])
                tier = low_bit.tier_of(num_rows, low_bit.tuning_of(device))
                floor = floor_seconds(shape, bits, num_rows, rates)
                seconds = dense[num_rows].median_seconds
                yield result_of(shape, bits, tier, num_rows, timing, seconds, floor)


def copies(layer: FragmentWeight, count: int) -> list[FragmentWeight]:
    """The layer and further ones like it, in memory of their own."""
    return [layer, *(_clone(layer) for _ in range(count - 1))]


def layer_bytes(layer: FragmentWeight) -> int:
    """What a call reads of it."""
    return sum(t.numel() * t.element_size() for t in (*layer.planes, layer.scales))


def _clone(layer: FragmentWeight) -> FragmentWeight:
    planes = tuple(plane.clone() for plane in layer.planes)
    return replace(layer, planes=planes, scales=layer.scales.clone())


def _call(x: Tensor, layer: FragmentWeight) -> Callable[[], Tensor]:
    return lambda: low_bit.linear(x, layer)


def _measure_dense(
    device: torch.device,
    timer: Timer,
    copies_of: Callable[[int], int],
    rates: Rates,
    shape: Shape,
    rows: Sequence[int],
) -> dict[int, Result]:
    size = (shape.out_features, shape.in_features)
    weights = [
        torch.randn(size, device=device, dtype=_DTYPE)
        for _ in range(copies_of(2 * shape.in_features * shape.out_features))
    ]
    results = {}
    for num_rows in rows:
        x = torch.randn(num_rows, shape.in_features, device=device).to(_DTYPE)
        timing = timer([_dense_call(x, weight) for weight in weights])
        floor = floor_seconds(shape, 16, num_rows, rates)
        results[num_rows] = result_of(
            shape, 16, "cublas", num_rows, timing, timing.median_seconds, floor
        )
    return results


def _dense_call(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.mm(x, weight.t())


def result_of(
    shape: Shape,
    bits: int,
    kernel: str,
    num_rows: int,
    timing: Timing,
    dense_seconds: float,  # cuBLAS, median
    floor: float,
) -> Result:
    """The timing beside cuBLAS and the roofline."""
    return Result(
        shape=shape.name,
        bits=bits,
        kernel=kernel,
        num_rows=num_rows,
        **asdict(timing),
        speedup=dense_seconds / timing.median_seconds,
        roofline_ratio=floor / timing.median_seconds,
    )


HEADING = (
    f"{'layer':<22}{'bits':>5}  {'kernel':<11}{'M':>5}{'us':>10}{'lowest':>10}{'highest':>10}"
    f"{'x fp16':>8}{'% roof':>8}"
)


def format_result(result: Result | NotMeasured) -> str:
    """A row below HEADING."""
    if isinstance(result, NotMeasured):
        return f"{result.what}: not measured: {result.reason}"
    microseconds = (
        result.median_seconds * 1e6,
        result.lowest_seconds * 1e6,
        result.highest_seconds * 1e6,
    )
    times = "".join(f"{value:>10.1f}" for value in microseconds)
    return (
        f"{result.shape:<22}{result.bits:>5}  {result.kernel:<11}{result.num_rows:>5}{times}"
        f"{result.speedup:>8.2f}{100 * result.roofline_ratio:>8.0f}"
    )


def as_lists(found: Sequence[Result | NotMeasured]) -> dict[str, list[dict[str, object]]]:
    """For JSON: `results`, and `not_measured` with reasons."""
    return {
        "results": [asdict(each) for each in found if isinstance(each, Result)],
        "not_measured": [asdict(each) for each in found if isinstance(each, NotMeasured)],
    }
