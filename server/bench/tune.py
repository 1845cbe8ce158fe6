"""`lowbit tune`: times the linear kernels' tiles on this GPU and keeps the fastest.

In an order in which every choice stands on the last one: how often K is cut, the tile of each
width and row block, then the two row counts at which another tier takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product

import torch

from ...kernels import triton_linear as low_bit
from ...kernels.packing import FragmentWeight
from ...kernels.tuning import ROW_BLOCKS, GpuTuning, TileConfig
from .kernels import Shape, copies, layer_bytes, random_weight
from .timing import Timer

SHAPES = (Shape("qkv of 8B", 4096, 6144), Shape("square 8192", 8192, 8192))
BITS = (4, 8, 3, 2)
CTAS_PER_SM = (1, 2, 3, 4, 6)
GEMV_ROWS = (1, 2, 4, 8)
GEMM_ROWS = (64, 128, 192, 256, 384, 512, 1024)
_EVERY_ROW = 1 << 30


def tile_candidates(rows: int) -> list[TileConfig]:
    """Few: a width's wave of them takes seconds. `rows` 1 is the fp32 kernel."""
    warps = {32: (2, 4), 64: (4,), 128: (4, 8)}
    if rows == 1:
        warps = {32: (2,), 64: (4,), 128: (4,)}
    stages = (3, 4, 6) if rows <= 32 else (2, 3, 4)
    return [
        TileConfig(block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        for block_n, choices in warps.items()
        for num_warps, num_stages in product(choices, stages)
    ]


class Tuner:
    """Measures whole calls of `triton_linear.linear` under one tuning after another."""

    def __init__(
        self,
        device: torch.device,
        timer: Timer,
        copies_of: Callable[[int], int],
        shapes: Sequence[Shape] = SHAPES,
    ) -> None:
        self._device = device
        self._timer = timer
        self._copies_of = copies_of
        self._shapes = shapes

    def run(self, tuning: GpuTuning, bits: Sequence[int] = BITS) -> Iterator[tuple[str, GpuTuning]]:
        """What was found so far, in words and as a tuning; the last one is the result."""
        for width in bits:
            layers = self._layers(width)
            if width == bits[0]:
                tuning = self._best_ctas(tuning, layers)
                yield f"K is cut for {tuning.ctas_per_sm} programs per SM", tuning
            for rows in (1, *ROW_BLOCKS):
                tuning = self._best_tile(tuning, layers, width, rows)
                yield f"W{width}, {rows} rows: {tuning.tile(width, rows)}", tuning
            if width == bits[0]:
                tuning = self._best_limits(tuning, layers)
                limits = f"{tuning.gemv_max_rows} rows in fp32, {tuning.gemm_max_rows}"
                yield f"{limits} on tensor cores", tuning

    def _layers(self, bits: int) -> list[list[FragmentWeight]]:
        weights = (random_weight(shape, bits, self._device) for shape in self._shapes)
        layers = [low_bit.prepare(weight, self._device, torch.float16) for weight in weights]
        return [copies(layer, self._copies_of(layer_bytes(layer))) for layer in layers]

    def _seconds(
        self, tuning: GpuTuning, layers: list[list[FragmentWeight]], num_rows: int
    ) -> float:
        """Of one call of each shape."""
        total = 0.0
        with low_bit.use_tuning(self._device, tuning):
            for same in layers:
                x = torch.randn(num_rows, same[0].in_features, device=self._device)
                half = x.to(torch.float16)
                calls = [lambda layer=layer, x=half: low_bit.linear(x, layer) for layer in same]
                total += self._timer(calls).median_seconds
        return total

    def _fastest(
        self, candidates: Sequence[GpuTuning], layers: list[list[FragmentWeight]], num_rows: int
    ) -> GpuTuning:
        return min(candidates, key=lambda candidate: self._seconds(candidate, layers, num_rows))

    def _best_ctas(self, tuning: GpuTuning, layers: list[list[FragmentWeight]]) -> GpuTuning:
        candidates = [replace(tuning, ctas_per_sm=count) for count in CTAS_PER_SM]
        return self._fastest(candidates, layers, 1)

    def _best_tile(
        self, tuning: GpuTuning, layers: list[list[FragmentWeight]], bits: int, rows: int
    ) -> GpuTuning:
        candidates = [
            replace(
                tuning,
                gemv_max_rows=_EVERY_ROW if rows == 1 else 0,
                gemm_max_rows=_EVERY_ROW,
                tiles={**tuning.tiles, (bits, rows): tile},
            )
            for tile in tile_candidates(rows)
        ]
        return replace(tuning, tiles=self._fastest(candidates, layers, rows).tiles)

    def _best_limits(self, tuning: GpuTuning, layers: list[list[FragmentWeight]]) -> GpuTuning:
        """The last row count of a list up to which a tier wins at each."""
        gemv_max_rows = gemm_max_rows = 0
        gemm = replace(tuning, gemv_max_rows=0, gemm_max_rows=_EVERY_ROW)
        gemv = replace(gemm, gemv_max_rows=_EVERY_ROW)
        for num_rows in GEMV_ROWS:
            if self._fastest([gemm, gemv], layers, num_rows) is gemm:
                break
            gemv_max_rows = num_rows
        dequantized = replace(gemm, gemm_max_rows=0)
        for num_rows in GEMM_ROWS:
            if self._fastest([gemm, dequantized], layers, num_rows) is dequantized:
                break
            gemm_max_rows = num_rows
        return replace(tuning, gemv_max_rows=gemv_max_rows, gemm_max_rows=gemm_max_rows)
