"""What a quantized layer loses, in fp64 and independently of what the solver accounted for."""

from __future__ import annotations

from torch import Tensor


def relative_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """||(W - Q) X||^2 / ||W X||^2 for H = X X^T. [N, K] twice, [K, K]."""
    weight, quantized, hessian = weight.double(), quantized.double(), hessian.double()
    return _squared_output(weight - quantized, hessian) / _squared_output(weight, hessian)


def _squared_output(matrix: Tensor, hessian: Tensor) -> float:
    return float(((matrix @ hessian) * matrix).sum())
