"""How far a linear layer's outputs are from what the 16-bit model computes at the same place.

Both models read the same tokens; the quantized one's inputs x carry the errors of everything before
them, the 16-bit one's y do not. What GPTQ should give back for x is W y (and, where the output is
added to the residual stream, what that stream has lost as well). Shapes: K input and N output
features, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DriftSum:
    """A growing sum over tokens of (wanted output - W x) x^T, for layers that read the same inputs.

    W (y - x) + residual is what the output lacks. The sum is kept as [N, K], or, where that is
    smaller, as that of (y - x) x^T, [K, K], with the residual's part beside it. Products with x are
    taken in fp32 and added in fp64, as the Hessian's are (see `HessianSum`); W (y - x), which is
    itself a small correction, in the dtype `products`.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        *,
        has_residual: bool,
        products: torch.dtype = torch.float32,
    ) -> None:
        """weights [N_i, K] fp32."""
        self._weights = weights
        self._sizes = [len(weight) for weight in weights]
        num_outputs, num_features = sum(self._sizes), weights[0].shape[1]
        self._by_input = num_outputs > num_features
        rows = num_features if self._by_input else num_outputs
        # What the inputs' drift is multiplied with, where that is done batch by batch.
        self._matrix = torch.empty(0) if self._by_input else torch.cat(list(weights)).to(products)
        self._moved = torch.zeros(rows, num_features, dtype=torch.float64)
        self._residual = (
            torch.zeros(num_outputs, num_features, dtype=torch.float64)
            if has_residual and self._by_input
            else None
        )

    @property
    def sums(self) -> list[Tensor]:
        """What the processes of a run add up."""
        return [self._moved] if self._residual is None else [self._moved, self._residual]

    def add(self, inputs: Tensor, wanted_inputs: Tensor, residual: Tensor | None) -> None:
        """A batch: x and y, [..., K], and what the residual stream lacks, [..., N], all fp32."""
        x = inputs.reshape(-1, inputs.shape[-1])
        moved = wanted_inputs.reshape(x.shape) - x
        if not self._by_input:
            moved = (moved.to(self._matrix.dtype) @ self._matrix.t()).to(torch.float32)
        if residual is not None:
            lacking = residual.reshape(len(x), -1)
            if self._residual is None:
                moved += lacking
            else:
                self._residual += lacking.t() @ x
        self._moved += moved.t() @ x

    def finish(self) -> list[Tensor]:
        """The sum of each layer, [N_i, K] fp32."""
        moved = self._moved.to(torch.float32)
        parts = (
            [weight @ moved for weight in self._weights]
            if self._by_input
            else list(moved.split(self._sizes))
        )
        if self._residual is None:
            return parts
        residuals = self._residual.split(self._sizes)
        return [
            (part + residual).to(torch.float32)
            for part, residual in zip(parts, residuals, strict=True)
        ]
