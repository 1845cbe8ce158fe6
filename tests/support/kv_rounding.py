"""What the triton backend's caches of 8 bits make of keys and values, in PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST = {"int8": 127.0, "fp8": 448.0}


def rounded(rows: Tensor, kind: str) -> Tensor:
    """Heads [..., D] float32 as they come back from the cache."""
    largest = LARGEST[kind]
    scales = (rows.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30)
    codes = (rows / scales).clamp(-largest, largest)
    codes = codes.round() if kind == "int8" else codes.to(torch.float8_e4m3fn).to(torch.float32)
    return codes * scales


def rounded_keys(rows: Tensor, kind: str) -> Tensor:
    """Keys [..., D] float32 as they come back, in int8 after they were rotated back."""
    if kind != "int8":
        return rounded(rows, kind)
    matrix = walsh(rows.shape[-1])
    rotated = (rows.to(torch.float64) @ matrix).to(torch.float32)
    return (rounded(rotated, kind).to(torch.float64) @ matrix).to(torch.float32)


def walsh(head_dim: int) -> Tensor:
    """The rotation [D, D] float64 of int8 keys, its own inverse: in blocks of the largest power of
    2 that divides D."""
    size = next(1 << n for n in range(16, -1, -1) if head_dim % (1 << n) == 0)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    matrix = torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)
    return torch.block_diag(*[matrix] * (head_dim // size))
