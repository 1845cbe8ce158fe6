"""Several processes that share one run: who they are, what they add up, and errors that end all.

Wraps torch.distributed and knows nothing of models. Without `torchrun` there is one rank, and
nothing is initialized. Processes of one run see the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import PeerError

MAX_MESSAGE_BYTES = 1024
# A peer that died is noticed at once, by its closed connection; one that works may take long.
TIMEOUT = timedelta(days=1)


class Ranks:
    """The processes of a run. Every method but `share` must be called by all of them in step."""

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank = rank
        self.world_size = world_size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` items are this rank's."""
        return range(self.rank, count, self.world_size)

    def slices(self, count: int) -> list[slice]:
        """One contiguous part of `count` rows for every rank; some may be empty."""
        bounds = [count * rank // self.world_size for rank in range(self.world_size + 1)]
        return [slice(*pair) for pair in pairwise(bounds)]

    def add(self, tensor: Tensor) -> None:
        """tensor = its sum over all ranks, in place."""
        if self.world_size > 1:
            with _peers():
                dist.all_reduce(tensor)

    def gather_columns(self, part: Tensor, sizes: Sequence[int]) -> Tensor:
        """The ranks' parts [R, sizes[rank]] side by side, on every rank. Any dtype."""
        if self.world_size == 1:
            return part
        parts = []
        for rank, size in enumerate(sizes):
            held = part.contiguous() if rank == self.rank else part.new_empty(part.shape[0], size)
            if held.numel():
                with _peers():
                    dist.broadcast(held.view(torch.uint8), src=rank)
            parts.append(held)
        return torch.cat(parts, dim=1)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work that every rank does at the same time; an error of one of them ends all.

        It is raised as it is on the first rank that failed, as a PeerError on the others.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        messages = self._exchange("" if failure is None else _describe(failure))
        failed = [rank for rank, message in enumerate(messages) if message]
        if not failed:
            return
        if failure is not None and failed[0] == self.rank:
            raise failure
        raise PeerError(f"process {failed[0]} of the run: {messages[failed[0]]}")

    def _exchange(self, message: str) -> list[str]:
        """Every rank's message."""
        if self.world_size == 1:
            return [message]
        table = torch.zeros(self.world_size, MAX_MESSAGE_BYTES, dtype=torch.int32)
        content = message.encode()[:MAX_MESSAGE_BYTES]
        table[self.rank, : len(content)] = torch.tensor(list(content), dtype=torch.int32)
        self.add(table)
        return [bytes(row[row > 0].tolist()).decode(errors="ignore") for row in table]


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone.

    What is on the processor is added up by gloo, what is on GPUs by NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the connection is closed: that process is gone
        raise PeerError(f"another process of the run has ended ({_describe(error)})") from None


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
