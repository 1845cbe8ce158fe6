"""What the triton backend's caches of 8 bits make of keys and values, in PyTorch."""

from __future__ import annotations

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
