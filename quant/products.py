"""What linear layers compute in while calibration text passes through them, and what is added up.

Processors that multiply bfloat16 do so twice as fast as fp32, GPUs many times as fast. Sums stay in
fp32 or fp64, and so does all else: the residual stream, the solver. What that costs stands in
docs/performance.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .devices import CPU

ROWS_AT_ONCE = 8192  # of a matrix as it is stored, converted to fp32 at a time
MAX_ROUNDED_BITS = 4  # of weights beside which rounded products are negligible
BFLOAT16_CAPABILITY = (8, 0)  # of the first GPUs that multiply it
PRECISIONS = ("auto", "bfloat16", "float32")


def resolve_precision(name: str, bits: int, device: torch.device = CPU) -> str:
    """One of PRECISIONS -> "bfloat16" or "float32", for weights of so many bits.

    auto is the faster one on this processor or GPU; but at 8 bits, where rounded products are no
    longer negligible beside rounded weights (KL divergence 0.00043 instead of 0.00017), it is
    float32.
    """
    if name != "auto":
        return name
    if bits > MAX_ROUNDED_BITS:
        return "float32"
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def product_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def project(hidden: Tensor, *, linear: Any) -> Tensor:
    """hidden @ weight.T + bias in fp32; on a bfloat16 weight all but the sums is rounded to that.

    The weight's dtype is looked at when it is used: a layer may get another one in mid-pass.
    """
    if linear.weight.dtype != torch.bfloat16:
        return F.linear(hidden, linear.weight, linear.bias)
    output = F.linear(hidden.to(torch.bfloat16), linear.weight).to(torch.float32)
    return output if linear.bias is None else output + linear.bias


def project_in_fp32(hidden: Tensor, *, linear: Any) -> Tensor:
    """hidden @ weight.T + bias, with few of the rows of a 16-bit weight converted at a time."""
    parts = [F.linear(hidden, rows.float()) for rows in linear.weight.split(ROWS_AT_ONCE)]
    output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return output if linear.bias is None else output + linear.bias


def compute_with(projection: Callable[..., Tensor], linear: nn.Linear) -> None:
    """Make `projection`, one of the two, the layer's forward pass."""
    # A proxy: a cycle would keep the layer until the garbage collector comes by.
    linear.forward = partial(projection, linear=weakref.proxy(linear))  # type: ignore[method-assign]
