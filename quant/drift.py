"""How far a linear layer's outputs are from what the 16-bit model computes at the same place.

Both models read the same tokens; the quantized one's inputs x carry the errors of everything before
them, the 16-bit one's y do not. What GPTQ should give back for x is W y (and, where the output is
added to the residual stream, what that stream has lost as well). Shapes: K input and N output
features, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from .hessian import PANEL_ROWS


class DriftSum:
    """A growing sum over tokens of (wanted output - W x) x^T, for layers that read the same inputs.

    W (y - x) + residual is what the output lacks. The sum is kept as [N, K], or, where that is
    smaller, as that of (y - x) x^T, [K, K], with the residual's part beside it. Products are taken
    in the dtype `products` and added in fp64, as the Hessian's are (see `HessianSum`).
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        has_residual: bool,
        products: torch.dtype = torch.float32,
    ) -> None:
        """weights [N_i, K], on the device that the inputs will be on; a single one that is of the
        dtype `products` is not copied.
        """
        self._weights = weights
        self._products = products
        self._sizes = [len(weight) for weight in weights]
        self._lock = Lock()
        num_outputs, num_features = sum(self._sizes), weights[0].shape[1]
        self._by_input = num_outputs > num_features
        # What the inputs' drift is multiplied with, where that is done batch by batch.
        self._matrix = torch.empty(0) if self._by_input else _stacked(weights).to(products)
        zeros = partial(_zeros, num_columns=num_features, device=weights[0].device)
        self._moved = zeros(num_features if self._by_input else num_outputs)
        keeps_residual = has_residual and self._by_input
        self._residual = zeros(num_outputs) if keeps_residual else []

    @property
    def sums(self) -> list[Tensor]:
        """What the processes of a run add up, fp64."""
        return [*self._moved, *self._residual]

    def add(self, inputs: Tensor, wanted_inputs: Tensor, residual: Tensor | None) -> None:
        """A batch: x and y, [..., K], and what the residual stream lacks, [..., N], all fp32.

        Several threads may.
        """
        x = inputs.reshape(-1, inputs.shape[-1])
        moved = wanted_inputs.reshape(x.shape) - x
        if not self._by_input:
            moved = (moved.to(self._products) @ self._matrix.t()).to(torch.float32)
        if residual is not None:
            lacking = residual.reshape(len(x), -1)
            if self._by_input:
                self._add_product(self._residual, lacking, x)
            else:
                moved += lacking
        self._add_product(self._moved, moved, x)

    def _add_product(self, panels: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
        """Add left.T @ right."""
        left, right = left.to(self._products), right.to(self._products)
        for panel, rows in zip(panels, left.split(PANEL_ROWS, 1), strict=True):
            product = rows.t() @ right
            with self._lock:
                panel.add_(product)

    def finish(self) -> list[Tensor]:
        """The sum of each layer, [N_i, K] fp32. Gives the sum's memory back as it goes."""
        moved = _take_whole(self._moved)
        parts = (
            [weight.to(torch.float32) @ moved for weight in self._weights]
            if self._by_input
            else list(moved.split(self._sizes))
        )
        if self._residual:
            residuals = _take_whole(self._residual).split(self._sizes)
            for part, residual in zip(parts, residuals, strict=True):
                part += residual
        return parts


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _zeros(num_rows: int, *, num_columns: int, device: torch.device) -> list[Tensor]:
    """Panels of PANEL_ROWS rows, fp64."""
    return [
        torch.zeros(
            min(PANEL_ROWS, num_rows - start), num_columns, dtype=torch.float64, device=device
        )
        for start in range(0, num_rows, PANEL_ROWS)
    ]


def _take_whole(panels: list[Tensor]) -> Tensor:
    """All panels in fp32, put together; the list is empty then."""
    whole = torch.empty(sum(map(len, panels)), panels[0].shape[1], device=panels[0].device)
    for rows in whole.split(PANEL_ROWS):
        rows.copy_(panels.pop(0))
    return whole
