"""The backend for NVIDIA GPUs: low-bit linear layers and what stands between them, in Triton.

Hidden states, keys and values are float16, sums float32. Attention gathers a sequence's blocks and
calls PyTorch's kernel. Under TRITON_INTERPRET=1 all of it runs on the CPU, to be tested.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_elementwise as elementwise
from . import triton_linear as low_bit
from .interface import (
    AttentionPlan,
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
class SequenceSpan:
    """One sequence's rows of the step, its blocks, and what its rows may see."""

    rows: slice
    blocks: Tensor  # [blocks] int64
    context_len: int
    mask: Tensor | None  # [rows, context_len] bool; None: everything


@dataclass(frozen=True, slots=True)
class TritonPlan:
    spans: list[SequenceSpan]


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
        self, x: Tensor, norm: Tensor, eps: float, gate_up: PreparedLinear, down: PreparedLinear
    ) -> Tensor:
        halves = self.norm_linear(x, norm, eps, gate_up)
        return _product(elementwise.silu_mul(halves, _permutation(down)), down, x)

    # Elementwise

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return elementwise.rms_norm(x, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return elementwise.silu_mul(gate_up)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)

    # Attention

    def plan_attention(self, batch: ForwardBatch) -> TritonPlan:
        starts = batch.query_start.tolist()
        contexts = batch.context_lens.tolist()
        return TritonPlan([_plan_span(batch, starts, contexts, i) for i in range(len(contexts))])

    def attention(self, q: Tensor, cache: KVCache, plan: AttentionPlan, scale: float) -> Tensor:
        assert isinstance(plan, TritonPlan)
        out = torch.empty_like(q)
        for span in plan.spans:
            out[span.rows] = _attend(q[span.rows], cache, span, scale)
        return out.flatten(1)

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


def _plan_span(
    batch: ForwardBatch, starts: list[int], contexts: list[int], index: int
) -> SequenceSpan:
    start, end, context_len = starts[index], starts[index + 1], contexts[index]
    num_blocks = -(-context_len // batch.block_size)
    positions = torch.arange(context_len, device=batch.block_tables.device)
    visible = positions[None, :] <= positions[context_len - (end - start) :, None]
    return SequenceSpan(
        rows=slice(start, end),
        blocks=batch.block_tables[index, :num_blocks].to(torch.int64),
        context_len=context_len,
        mask=None if end - start == 1 else visible,
    )


def _attend(q: Tensor, cache: KVCache, span: SequenceSpan, scale: float) -> Tensor:
    """q [t, H, D] -> [t, H, D]."""
    keys, values = (
        blocks.index_select(0, span.blocks).flatten(0, 1)[: span.context_len].transpose(0, 1)[None]
        for blocks in (cache.keys, cache.values)
    )
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, span.mask, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)


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
