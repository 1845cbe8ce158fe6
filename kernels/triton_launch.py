"""Where, and on what, a Triton kernel is launched."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

interpreted: bool = triton.knobs.runtime.interpret  # kernels run on the CPU, in numpy


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """A kernel launches on the current device, which need not be that of its arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
