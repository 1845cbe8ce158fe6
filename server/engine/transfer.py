"""Numbers between the host and the device, in the order of its work but without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of them on `device`; a host tensor is taken as it is."""
    return stage(values, dtype, device).to(device, non_blocking=True)


def stage(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of them on the host, from where a copy to `device` need not be waited for.

    From memory that is not pinned, a copy first waits for all that the device has to do.
    """
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else host


class Download:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._host = tensor
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._host
