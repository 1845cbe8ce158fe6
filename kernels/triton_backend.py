"""The backend for NVIDIA GPUs: low-bit linear layers, paged attention and the rest in Triton.

Hidden states, keys and values are float16, sums float32. Under TRITON_INTERPRET=1 all of it runs on
the CPU, to be tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_attention as paged
from . import triton_elementwise as elementwise
from . import triton_linear as low_bit
from .interface import (
    Activation,
    AttentionPlan,
    AttentionSpec,
    BackendUnavailable,
    ForwardBatch,
    KernelBackend,
    KVCache,
    PreparedLinear,
)
from .packing import DenseWeight, FragmentWeight, LinearWeight


@dataclass(frozen=True, slots=True)
class DenseLinear:
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class TritonPlan:
    batch: ForwardBatch


class TritonBackend(KernelBackend):
    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float16) -> None:
        tuning = low_bit.tuning_of(device)
        self.name = (
            f"triton, {str(dtype).removeprefix('torch.')}, {tuning.gpu}, {tuning.num_sms} SMs; "
            f"linear layers in fp32 sums to {tuning.gemv_max_rows} rows, on tensor cores to "
            f"{tuning.gemm_max_rows}, dequantized beyond; "
            + ("tiles as measured" if tuning.tiles else "default tiles (see `lowbit tune`)")
        )
        self.device = device
        self.hidden_dtype = dtype
        self.kv_dtype = dtype

    # Linear layers

    def prepare_linear(self, weight: LinearWeight) -> PreparedLinear:
        if isinstance(weight, DenseWeight):
            bias = None if weight.bias is None else self._hidden(weight.bias)
            return DenseLinear(self._hidden(weight.weight), bias)
        return low_bit.prepare(weight, self.device, self.hidden_dtype)

    def linear(self, x: Tensor, layer: PreparedLinear) -> Tensor:
        permutation = _permutation(layer)
        return _product(x if permutation is None else x.index_select(1, permutation), layer)

    def linear_residual(self, x: Tensor, layer: PreparedLinear, residual: Tensor) -> Tensor:
        permutation = _permutation(layer)
        x = x if permutation is None else x.index_select(1, permutation)
        return _product(x, layer, residual)

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, layer: PreparedLinear) -> Tensor:
        return _product(elementwise.rms_norm(x, norm, eps, _permutation(layer)), layer)

    def mlp(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        gate_up: PreparedLinear,
        down: PreparedLinear,
        activation: Activation = Activation.SILU,
    ) -> Tensor:
        if activation is not Activation.SILU:
            return super().mlp(x, norm, eps, gate_up, down, activation)
        halves = self.norm_linear(x, norm, eps, gate_up)
        return _product(elementwise.silu_mul(halves, _permutation(down)), down, x)

    # Elementwise

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return elementwise.silu_mul(gate_up)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = 2 * cos.shape[-1]
        first, second = x[..., :size].to(torch.float32).chunk(2, dim=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return torch.cat((rotated.to(x.dtype), x[..., size:]), dim=-1)

    def rope_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        cache: KVCache,
        batch: ForwardBatch,
    ) -> Tensor:
        if 2 * cos.shape[-1] != cache.keys.shape[-1]:
            return super().rope_and_store(qkv, cos, sin, num_heads, cache, batch)
        return paged.rope_and_store(
            qkv, cos, sin, num_heads, cache.keys, cache.values, batch.slot_mapping
        )

    # Attention

    def plan_attention(self, batch: ForwardBatch) -> TritonPlan:
        return TritonPlan(batch)

    def check_attention(self, spec: AttentionSpec) -> None:
        for name, value in (("window", spec.window), ("soft_cap", spec.soft_cap)):
            if value is not None:
                raise BackendUnavailable(
                    f"this model's attention has a {name} of {value}; "
                    "the triton backend does not support it, the cpu backend does"
                )

    def attention(
        self, q: Tensor, cache: KVCache, plan: AttentionPlan, spec: AttentionSpec
    ) -> Tensor:
        assert isinstance(plan, TritonPlan)
        batch = plan.batch
        attended = paged.paged_attention(
            q,
            cache.keys,
            cache.values,
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            spec.scale,
        )
        return attended.flatten(1)

    def _hidden(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.hidden_dtype)


def _permutation(layer: PreparedLinear) -> Tensor | None:
    return layer.input_permutation if isinstance(layer, FragmentWeight) else None


def _product(x: Tensor, layer: PreparedLinear, residual: Tensor | None = None) -> Tensor:
    """x W^T + b (+ residual), of an x in the layer's own order."""
    if isinstance(layer, FragmentWeight):
        return low_bit.linear(x, layer, residual)
    assert isinstance(layer, DenseLinear)
    y = F.linear(x, layer.weight, layer.bias)
    return y if residual is None else y + residual


def create() -> TritonBackend:
    """Raises BackendUnavailable where there is neither a GPU that will do nor the interpreter."""
    if not torch.cuda.is_available():
        if low_bit.interpreted:
            return TritonBackend(torch.device("cpu"))
        raise BackendUnavailable(
            "backend is 'triton'; it needs a CUDA device, and PyTorch finds none"
        )
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        raise BackendUnavailable(
            f"backend is 'triton'; it needs compute capability 8.0 or higher, and "
            f"{torch.cuda.get_device_name()} has {major}.{minor}"
        )
    return TritonBackend(torch.device("cuda", torch.cuda.current_device()))
