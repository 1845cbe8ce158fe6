"""Grids of quantization groups: weights and their importance in, scale and zero point out.

Code c of b bits stands for scale * (c - zero). Works on one group at a time for many output
features at once. Shapes: g inputs of the group, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SCALE = 2.0**-14  # the smallest normal fp16 number
MAX_SCALE = 255.0 * 2.0**8  # the largest fp16 number with 8 significant bits

# Shrunken ranges that are tried, as fractions of the one that just covers all weights.
NUM_CANDIDATES = 24
MIN_SHRINK = 0.4
ZERO_SHIFTS = (0, -1, 1)  # of an asymmetric grid's zero point, around the middle of the range


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What the codes of one group, or of several on top of each other, stand for."""

    scale: Tensor  # [N] or [G, N] fp32, never zero
    zero: Tensor  # like scale, fp32 with the value of an integer in [0, 2**bits - 1]
    bits: int

    def quantize(self, values: Tensor, *, out: Tensor | None = None) -> Tensor:
        """round(values / scale) + zero, clamped to [0, 2**bits - 1], as floats."""
        codes = torch.div(values, self.scale, out=out)
        return codes.round_().add_(self.zero).clamp_(0, (1 << self.bits) - 1)

    def error(self, values: Tensor, codes: Tensor, *, out: Tensor | None = None) -> Tensor:
        """What the codes lack, values - scale * (codes - zero)."""
        centered = torch.sub(codes, self.zero, out=out)
        return torch.addcmul(values, centered, self.scale, value=-1, out=centered)

    def __getitem__(self, group: int) -> Grid:
        return Grid(scale=self.scale[group], zero=self.zero[group], bits=self.bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridSearch:
    """What `search` looks through, and what it minimises."""

    bits: int
    sym: bool  # the zero point is the middle code
    signed: bool = True  # symmetric scales may be negative
    exponent: float = 2.0  # of the absolute error
    num_candidates: int = NUM_CANDIDATES  # 1: the range that covers all weights

    def search(self, weight: Tensor, importance: Tensor) -> Grid:
        """The grid of each output feature's group that loses least. [g, N], [g] -> [N] fp32.

        Starting from the grid that covers all weights, the range is shrunk in steps: clipping the
        few largest weights buys a finer step for all others. The winner minimises

            sum_k importance[k] * abs(weight[k] - dequantized[k]) ** exponent,

        for exponent 2 and the Hessian's diagonal as `importance` the diagonal part of the GPTQ
        objective. Candidates are rounded before they are compared, so the winner is what the
        checkpoint will hold. A group of zeros gets scale 1.
        """
        importance = importance.to(weight.dtype)
        candidates = self._candidates(weight)
        best = next(candidates)
        least = self._loss(weight, importance, best)
        for grid in candidates:
            loss = self._loss(weight, importance, grid)
            better = loss < least
            least = torch.where(better, loss, least)
            best = Grid(
                scale=torch.where(better, grid.scale, best.scale),
                zero=torch.where(better, grid.zero, best.zero),
                bits=self.bits,
            )
        return best

    def _loss(self, weight: Tensor, importance: Tensor, grid: Grid) -> Tensor:
        error = grid.error(weight, grid.quantize(weight))
        error = error.square_() if self.exponent == 2 else error.abs_().pow_(self.exponent)
        return importance @ error

    def _candidates(self, weight: Tensor) -> Iterator[Grid]:
        shrinks = torch.linspace(1, MIN_SHRINK, self.num_candidates).tolist()
        if self.sym:
            covering = self._symmetric_cover(weight)
            zero = torch.full_like(covering, middle_code(self.bits))
            for shrink in shrinks:
                yield Grid(scale=round_scale(covering * shrink), zero=zero, bits=self.bits)
            return
        largest_code = (1 << self.bits) - 1
        # Zero lies in every range: codes reach from -zero * scale to (largest_code - zero) * scale.
        low, high = weight.amin(dim=0).clamp(max=0), weight.amax(dim=0).clamp(min=0)
        covering = (high - low) / largest_code
        covering = torch.where(covering == 0, 1.0, covering)
        middle = (low + high) / 2
        for shrink in shrinks:
            scale = round_scale(covering * shrink)
            centred = (largest_code / 2 - middle / scale).round()
            for shift in ZERO_SHIFTS[: 1 if self.num_candidates == 1 else None]:
                zero = (centred + shift).clamp_(0, largest_code)
                yield Grid(scale=scale, zero=zero, bits=self.bits)

    def _symmetric_cover(self, weight: Tensor) -> Tensor:
        """There is one code more below the middle than above it.

        A signed scale puts the weight of largest magnitude there, so that the covering scale is
        that magnitude / 2**(b-1). Without a sign it is / (2**(b-1) - 1/2), as in the paper's code.
        """
        largest = weight.gather(0, weight.abs().argmax(dim=0, keepdim=True)).squeeze(0)
        middle = middle_code(self.bits)
        covering = -largest / middle if self.signed else largest.abs() / (middle - 0.5)
        return torch.where(largest == 0, 1.0, covering)


def middle_code(bits: int) -> int:
    """The code that stands for zero, which is every symmetric group's zero point."""
    return 1 << (bits - 1)


def round_scale(scale: Tensor) -> Tensor:
    """The nearest fp32 numbers that fp16 and bfloat16 both hold exactly.

    That is 8 significant bits in the normal range of fp16. The checkpoint stores fp16 and some
    kernels compute with bfloat16 scales: both then see the very scale that the codes were chosen
    for.
    """
    magnitude = scale.abs().clamp(MIN_SCALE, MAX_SCALE).copysign(scale)
    return magnitude.to(torch.bfloat16).to(torch.float32)
