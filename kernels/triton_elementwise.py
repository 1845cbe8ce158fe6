"""What stands between a decoder's linear layers, one kernel each, summed and rounded in fp32.

Either kernel can put its outputs in another order: that of the inputs of the layer which follows,
where that layer was quantized with its inputs sorted (act-order). Shapes: T rows, C and F features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interface import Activation
from .triton_launch import on_device_of

_MUL_BLOCK = 1024


@triton.jit
def _rms_norm_kernel(
    x,
    weight,
    permutation,
    y,
    x_stride,
    num_features,
    eps,
    BLOCK: tl.constexpr,
    PERMUTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    features = tl.arange(0, BLOCK)
    inside = features < num_features
    values = tl.load(x + row * x_stride + features, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / num_features + eps)
    sources = features
    if PERMUTED:
        sources = tl.load(permutation + features, mask=inside, other=0)
        values = tl.load(x + row * x_stride + sources, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + sources, mask=inside, other=0.0).to(tl.float32)
    normed = (values * scale * gain).to(y.dtype.element_ty)
    tl.store(y + row * num_features + features, normed, mask=inside)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """`interface.Activation` of x in fp32."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(tl.minimum(-x, 80.0)))
    elif ACTIVATION == "gelu":
        y = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u))
        u = x * (1.0 + 0.044715 * x * x) * 0.7978845608028654
        y = x / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def _summed(source, inside, plane_stride, PARTS: tl.constexpr):
    """What stands at `source` in each plane, added up first to last in fp32."""
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        x += tl.load(source + part * plane_stride, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _activate_mul_kernel(
    gate_up,  # [PARTS, T, 2 F]
    permutation,
    y,
    num_features,
    BLOCK: tl.constexpr,
    PERMUTED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of a grid's dimensions only this one passes 65,535
    features = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = features < num_features
    sources = features
    if PERMUTED:
        sources = tl.load(permutation + features, mask=inside, other=0)
    start = gate_up + row * 2 * num_features
    plane_stride = tl.num_programs(0).to(tl.int64) * 2 * num_features
    gate = _summed(start + sources, inside, plane_stride, PARTS)
    up = _summed(start + num_features + sources, inside, plane_stride, PARTS)
    product = _activated(gate, ACTIVATION) * up
    tl.store(y + row * num_features + features, product.to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, permutation: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, in the order `permutation` [C] int32: [T, C] -> [T, C].

    Raises ValueError for shapes that do not fit.
    """
    _check_rows("x", x)
    num_features = x.shape[1]
    if weight.shape != (num_features,):
        raise ValueError(f"weight is {tuple(weight.shape)}; it must be [{num_features}]")
    _check_permutation(permutation, num_features)
    rows = x if x.stride(1) == 1 else x.contiguous()
    y: Tensor = _rms_norm(rows, weight, eps, permutation)
    return y


def activate_mul(
    gate_up: Tensor, activation: Activation, permutation: Tensor | None = None
) -> Tensor:
    """activation(gate) * up of a row's halves, in the order `permutation`: [T, 2 F] -> [T, F].

    Raises ValueError for shapes that do not fit.
    """
    _check_rows("gate_up", gate_up)
    if gate_up.shape[1] % 2:
        raise ValueError(f"gate_up is {tuple(gate_up.shape)}; its rows must have two equal halves")
    _check_permutation(permutation, gate_up.shape[1] // 2)
    y: Tensor = _activate_mul(gate_up.contiguous(), activation.value, permutation)
    return y


def activate_mul_parts(
    parts: Tensor, activation: Activation, permutation: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`activate_mul` of what the parts [S, T, 2 F] fp32 add up to: [T, F] in `dtype`.

    Raises ValueError for shapes that do not fit.
    """
    _check_rows("parts", parts[0])
    _check_permutation(permutation, parts.shape[2] // 2)
    y = parts.new_empty(parts.shape[1], parts.shape[2] // 2, dtype=dtype)
    _launch_activate_mul(parts, activation.value, permutation, y)
    return y


def _check_rows(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} is {tuple(x.shape)}; it must be rows of features")


def _check_permutation(permutation: Tensor | None, num_features: int) -> None:
    if permutation is not None and permutation.shape != (num_features,):
        raise ValueError(f"permutation is {tuple(permutation.shape)}; it must be [{num_features}]")


@torch.library.custom_op("lowbit::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float, permutation: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    num_rows, num_features = x.shape
    if num_rows == 0:
        return y
    with on_device_of(x):
        _rms_norm_kernel[(num_rows,)](
            x,
            weight,
            x if permutation is None else permutation,
            y,
            x.stride(0),
            num_features,
            eps,
            BLOCK=triton.next_power_of_2(num_features),
            PERMUTED=permutation is not None,
            num_warps=4 if num_features <= 4096 else 8,
        )
    return y


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, permutation: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("lowbit::activate_mul", mutates_args=())
def _activate_mul(gate_up: Tensor, activation: str, permutation: Tensor | None) -> Tensor:
    y = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    if len(y):
        _launch_activate_mul(gate_up[None], activation, permutation, y)
    return y


def _launch_activate_mul(
    parts: Tensor, activation: str, permutation: Tensor | None, y: Tensor
) -> None:
    num_rows, num_features = y.shape
    with on_device_of(y):
        _activate_mul_kernel[(num_rows, triton.cdiv(num_features, _MUL_BLOCK))](
            parts,
            parts if permutation is None else permutation,
            y,
            num_features,
            BLOCK=_MUL_BLOCK,
            PERMUTED=permutation is not None,
            ACTIVATION=activation,
            PARTS=len(parts),
        )


@_activate_mul.register_fake
def _(gate_up: Tensor, activation: str, permutation: Tensor | None) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
