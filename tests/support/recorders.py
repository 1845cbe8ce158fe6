"""Recording of decode steps without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class EagerRecorder:
    """Runs the work again into the memory of its first result, as a CUDA graph does."""

    def __init__(self, bytes_of_row: int = 1) -> None:
        self._bytes_of_row = bytes_of_row
        self.largest = 0
        self.num_replays = 0
        self.too_large = 1 << 30

    def record(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        output = work()
        if len(output) >= self.too_large:
            raise torch.OutOfMemoryError("injected")
        self.largest = max(self.largest, len(output))

        def replay() -> None:
            self.num_replays += 1
            output.copy_(work())

        return replay, output

    def held_bytes(self) -> int:
        return self.largest * self._bytes_of_row

    def forget(self) -> None:
        self.largest = 0
