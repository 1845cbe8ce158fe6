"""What a run computes on: the processor, or one CUDA device for each of its processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .errors import QuantError

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")
CPU = torch.device("cpu")


def resolve_device(name: str) -> torch.device:
    """One of DEVICES -> this process's device: of a machine's CUDA devices the one of LOCAL_RANK.

    auto is cuda where there is a CUDA device. Raises QuantError for another name, and where CUDA
    was asked for, or is there, but not for every process that torchrun started on this machine.
    """
    if name not in DEVICES:
        raise QuantError(f"device is {name!r}; it must be one of {', '.join(DEVICES)}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise QuantError("device is 'cuda'; PyTorch finds no CUDA device on this machine")
    found, needed = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if needed > found:
        raise QuantError(
            f"device is {name!r}; {needed} processes were started on this machine, which has "
            f"{found} CUDA devices: one is needed for each"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_nccl_available():
        raise QuantError(f"device is {name!r}; this PyTorch has no NCCL to add up over GPUs with")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)  # NCCL's, too
    logger.info("computing on %s (%s)", device, torch.cuda.get_device_name(device))
    return device


@contextmanager
def reporting_full_memory(device: torch.device) -> Iterator[None]:
    """A device whose memory is full raises QuantError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise QuantError(
            f"the memory of {device} is full; with a smaller activation_memory_bytes less of it is "
            "needed"
        ) from error
