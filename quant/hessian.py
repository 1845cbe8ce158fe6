"""Second moments of a linear layer's inputs, added up so that the order of batches is no matter.

The sum over tokens of x x^T is the paper's H up to a positive factor, which no result depends on.
Shapes: K input features, T tokens.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor

from .devices import CPU

PANEL_ROWS = 256  # of 128, 256 and 512 the fastest on a CPU: 0.62 of the time of the whole matrix


class HessianSum:
    """A growing Hessian: its upper triangle in fp64, as panels of PANEL_ROWS rows.

    Every batch's product is taken in the dtype `products` and added in fp64. Such a sum is exact,
    so that it has the same value however the batches are spread over processes, unless two products
    of one element differ by a factor of 2 ** 29; even then it is off by 2 ** -53 before it is
    rounded to fp32. The fp64 triangle takes the memory of the fp32 matrix that it becomes.
    """

    def __init__(
        self,
        num_features: int,
        *,
        products: torch.dtype = torch.float32,
        device: torch.device = CPU,
    ) -> None:
        """The sum is kept on `device`, where its inputs must be."""
        self.num_features = num_features
        self._products = products
        self.num_tokens = 0
        self._lock = Lock()
        self.panels = [  # each [rows, K - start] fp64: the triangle from its first row on
            torch.zeros(
                min(PANEL_ROWS, num_features - start),
                num_features - start,
                dtype=torch.float64,
                device=device,
            )
            for start in range(0, num_features, PANEL_ROWS)
        ]

    def add(self, inputs: Tensor) -> None:
        """Add a batch of inputs, [..., K] fp32. Several threads may."""
        rows = inputs.reshape(-1, self.num_features).to(self._products)
        with self._lock:
            self.num_tokens += len(rows)
        if len(rows):
            for i, panel in enumerate(self.panels):
                start = i * PANEL_ROWS
                product = rows[:, start : start + PANEL_ROWS].t() @ rows[:, start:]
                with self._lock:
                    panel.add_(product)

    def include(self, other: HessianSum) -> None:
        """Add another sum's batches."""
        self.num_tokens += other.num_tokens
        for mine, theirs in zip(self.panels, other.panels, strict=True):
            mine.add_(theirs)

    def is_finite(self) -> bool:
        """An input that is not finite, or whose square is not, leaves its mark on the diagonal."""
        return all(bool(torch.isfinite(panel.diagonal()).all()) for panel in self.panels)

    def finish(self) -> Tensor:
        """The whole matrix, [K, K] fp32. Gives the panels' memory back as it goes."""
        whole = torch.empty(self.num_features, self.num_features, device=self.panels[0].device)
        for start in range(0, self.num_features, PANEL_ROWS):
            panel = self.panels.pop(0)
            end = start + len(panel)
            whole[start:end, start:] = panel
            whole[end:, start:end] = panel[:, end - start :].t()
        # A panel's own square was computed whole; its lower half may differ in the last bit.
        for start in range(0, self.num_features, PANEL_ROWS):
            square = whole[start : start + PANEL_ROWS, start : start + PANEL_ROWS]
            square.copy_(square.triu() + square.triu(1).t())
        return whole
