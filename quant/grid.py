"""Scales of quantization groups: weights and their importance in, one scale per group out.

Symmetric grids only: code c of b bits stands for scale * (c - 2 ** (b - 1)), with a scale of
either sign. Works on one group at a time for all output features at once. Shapes: g inputs of the
group, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_SCALE = 2.0**-14  # the smallest normal fp16 number
MAX_SCALE = 255.0 * 2.0**8  # the largest fp16 number with 8 significant bits

# Shrunken ranges that are tried, as fractions of the one that just covers the largest weight.
NUM_CANDIDATES = 24
MIN_SHRINK = 0.4


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


def quantize(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Signed codes, round(values / scale) clamped to [-2**(b-1), 2**(b-1) - 1], as floats."""
    middle = middle_code(bits)
    return (values / scale).round_().clamp_(-middle, middle - 1)


def search_scale(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """The scale of each output feature's group that loses least. [g, N], [g] -> [N] fp32.

    There is one code more below the middle than above it. The scale's sign puts the weight of
    largest magnitude there, so that its covering scale is that magnitude / 2**(b-1) instead of
    / (2**(b-1) - 1/2). From there the range is shrunk in steps: clipping the few largest weights
    buys a finer step for all others. The winner minimises

        sum_k importance[k] * (weight[k] - scale * code[k]) ** 2,

    the diagonal part of the GPTQ objective when `importance` is the Hessian's diagonal.
    Candidates are rounded before they are compared, so the winner is what the checkpoint will
    hold. A group of zeros gets scale 1.
    """
    largest = weight.gather(0, weight.abs().argmax(dim=0, keepdim=True)).squeeze(0)
    covering = torch.where(largest == 0, 1.0, -largest / middle_code(bits))
    importance = importance.to(weight.dtype)
    best = torch.empty_like(covering)
    least = torch.full_like(covering, torch.inf)
    for shrink in torch.linspace(1, MIN_SHRINK, NUM_CANDIDATES).tolist():
        scale = round_scale(covering * shrink)
        error = importance @ (quantize(weight, scale, bits) * scale).sub_(weight).square_()
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
    return best
