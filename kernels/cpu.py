"""The embedded default backend: PyTorch's own CPU operators.

Linear layers of 2, 3, 4 and 8 bits run on PyTorch's int4-packed product with bfloat16 activations
and float32 accumulation; an 8-bit code becomes two 4-bit planes along K. Where that operator is
not vectorised, or a group size does not fit it, weights are dequantized to float32 at load.

A row's result never depends on which other rows are in the step: the int4 product accumulates
each row alone, and attention sees to it (`cpu_attention`). So a preempted sequence recomputes the
very keys and values in one prefill that it had first computed token by token.
"""

from __future__ import annotations

import logging
import math
import mmap
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_attention import CpuPlan, attend
from .interface import (
    AttentionPlan,
    AttentionSpec,
    BackendUnavailable,
    ForwardBatch,
    KernelBackend,
    KVCache,
    PreparedLinear,
)
from .packing import (
    DenseWeight,
    LinearWeight,
    PackedWeight,
    dequantize,
    select_outputs,
    unpack_codes,
)
from .rotation import rotation

logger = logging.getLogger(__name__)

_INT4_GROUP_SIZES = (256, 128, 64, 32)  # what the operator takes, preferred first
_INT4_COLUMNS = 64  # N is padded to the operator's widest column block
_VECTORISED = ("AVX2", "AVX512")  # elsewhere the operator is a scalar loop, 20x slower
_SCALE_DTYPE = torch.float16  # of an int8 KV cache
_MIN_SCALE = 2.0**-24  # the smallest that float16 holds
_RESCORED = 64  # candidates whose logits are recomputed in float32


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """[N, K] in PyTorch's int4 layout; K counts a plane of 8-bit codes twice."""

    packed: Tensor  # [N, K / 2] uint8
    scales_and_zeros: Tensor  # [K / group_size, N, 2] bfloat16: s, (8 - z) s
    group_size: int
    num_planes: int
    input_padding: int
    out_features: int
    permutation: Tensor | None  # [K] int64
    bias: Tensor | None  # [N] float32


@dataclass(frozen=True, slots=True)
class DenseLinear:
    weight: Tensor  # [N, K] float32
    bias: Tensor | None  # [N] float32

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class RescoredHead:
    """A logits layer computed in bfloat16, its best candidates again in float32."""

    fast: Tensor | Int4Linear  # [N, K] bfloat16, or packed
    exact: LinearWeight  # [N, K] as stored in the checkpoint

    @property
    def out_features(self) -> int:
        return self.fast.shape[0] if isinstance(self.fast, Tensor) else self.fast.out_features


class CpuBackend(KernelBackend):
    def __init__(self, precision: str = "auto", kv_cache_dtype: str = "auto") -> None:
        """`precision` float32 is exact and keeps float32 weights; bfloat16 keeps packed ones.

        `kv_cache_dtype` int8 holds keys and values in 8 bits with a scale for each token and head;
        auto holds them in the precision. Raises BackendUnavailable for an unknown one.
        """
        capability = torch.backends.cpu.get_cpu_capability()
        if precision == "auto":
            precision = "bfloat16" if capability in _VECTORISED else "float32"
        if precision not in ("bfloat16", "float32"):
            raise BackendUnavailable(
                f"cpu precision is {precision!r}; it must be auto, bfloat16 or float32"
            )
        if kv_cache_dtype not in ("auto", "int8"):
            raise BackendUnavailable(
                f"kv_cache_dtype is {kv_cache_dtype!r}; it must be auto or int8"
            )
        self.exact = precision == "float32"
        self.device = torch.device("cpu")
        self.hidden_dtype = torch.float32
        self.kv_dtype = torch.float32 if self.exact else torch.bfloat16
        if kv_cache_dtype == "int8":
            self.kv_dtype = torch.int8
        self.name = (
            f"cpu, {precision}, KV cache {str(self.kv_dtype).removeprefix('torch.')}, "
            f"{capability}, {torch.get_num_threads()} threads"
        )

    # Linear layers

    def prepare_linear(self, weight: LinearWeight) -> PreparedLinear:
        if isinstance(weight, DenseWeight):
            return DenseLinear(weight.weight.to(torch.float32), _float32(weight.bias))
        group_size = None if self.exact else _int4_group_size(weight)
        if group_size is None:
            return DenseLinear(dequantize(weight), _float32(weight.bias))
        return _prepare_int4(weight, group_size)

    def linear(self, x: Tensor, layer: PreparedLinear) -> Tensor:
        if isinstance(layer, DenseLinear):
            return F.linear(x.to(torch.float32), layer.weight, layer.bias)
        assert isinstance(layer, Int4Linear)
        if layer.permutation is not None:
            x = x[:, layer.permutation]
        x = F.pad(x, (0, layer.input_padding)) if layer.input_padding else x
        x = x.to(torch.bfloat16)
        x = x.repeat(1, layer.num_planes) if layer.num_planes > 1 else x
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.contiguous(), layer.packed, layer.group_size, layer.scales_and_zeros
        )
        y = y[:, : layer.out_features]
        return y if layer.bias is None else y + layer.bias

    def prepare_head(self, weight: LinearWeight) -> PreparedLinear:
        if isinstance(weight, PackedWeight):
            layer = self.prepare_linear(weight)
            return RescoredHead(layer, weight) if isinstance(layer, Int4Linear) else layer
        if self.exact or weight.bias is not None:
            return self.prepare_linear(weight)
        return RescoredHead(weight.weight.to(torch.bfloat16), weight)

    def logits(self, x: Tensor, head: PreparedLinear) -> Tensor:
        """[S, C] -> [S, vocabulary] float32.

        A bfloat16 product rounds logits near 20 to steps of 1/8, which would tie the best
        candidates; those are computed again in float32, so greedy choices are exact.
        """
        if not isinstance(head, RescoredHead):
            return super().logits(x, head)
        if isinstance(head.fast, Int4Linear):
            logits = self.linear(x, head.fast).to(torch.float32)
        else:
            logits = F.linear(x.to(torch.bfloat16), head.fast).to(torch.float32)
        best = logits.topk(min(_RESCORED, logits.shape[1]), dim=1).indices  # [S, _RESCORED]
        for row, candidates in enumerate(best):
            logits[row, candidates] = _exact_logits(x[row], head.exact, candidates)
        return logits

    # The KV cache

    def kv_head_bytes(self, head_dim: int) -> int:
        scale_bytes = _SCALE_DTYPE.itemsize if self.kv_dtype is torch.int8 else 0
        return super().kv_head_bytes(head_dim) + scale_bytes

    def allocate_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> list[KVCache]:
        """Zeros that take memory only once they are written to."""
        heads = (num_blocks, block_size, num_kv_heads)
        scaled = self.kv_dtype is torch.int8
        return [
            KVCache(
                keys=_untouched_zeros((*heads, head_dim), self.kv_dtype),
                values=_untouched_zeros((*heads, head_dim), self.kv_dtype),
                key_scales=_untouched_zeros(heads, _SCALE_DTYPE) if scaled else None,
                value_scales=_untouched_zeros(heads, _SCALE_DTYPE) if scaled else None,
            )
            for _ in range(num_layers)
        ]

    def store(self, keys: Tensor, values: Tensor, cache: KVCache, slots: Tensor) -> None:
        """As they are, or in int8: keys rotated then, in float64, so that a token's key does not
        depend on the others of the step."""
        if cache.key_scales is None or cache.value_scales is None:
            super().store(keys, values, cache, slots)
            return
        rotated = keys.to(torch.float64) @ rotation(keys.shape[2])
        codes, scales = _quantize_heads(torch.cat((rotated.to(torch.float32), values), dim=1))
        num_kv_heads = keys.shape[1]
        super().store(codes[:, :num_kv_heads], codes[:, num_kv_heads:], cache, slots)
        cache.key_scales.view(-1, num_kv_heads).index_copy_(0, slots, scales[:, :num_kv_heads])
        cache.value_scales.view(-1, num_kv_heads).index_copy_(0, slots, scales[:, num_kv_heads:])

    # Elementwise

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        size = 2 * cos.shape[-1]
        first, second = x[..., :size].to(torch.float32).chunk(2, dim=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        rotated = first * cos - second * sin, second * cos + first * sin
        return torch.cat(rotated if size == x.shape[-1] else (*rotated, x[..., size:]), dim=-1)

    # Attention

    def plan_attention(self, batch: ForwardBatch) -> CpuPlan:
        return CpuPlan(batch)

    def attention(
        self, q: Tensor, cache: KVCache, plan: AttentionPlan, spec: AttentionSpec
    ) -> Tensor:
        assert isinstance(plan, CpuPlan)
        if cache.key_scales is not None:
            q = q.to(torch.float64) @ rotation(q.shape[2])
        return attend(q, cache, plan, spec).flatten(1)


def _quantize_heads(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [T, heads, D] -> codes in [-127, 127] int8, scales [T, heads]: the largest is 127.

    A row that holds a NaN has a NaN for its scale.
    """
    rows = rows.to(torch.float32)
    scales = (rows.abs().amax(dim=-1) / 127).clamp_(min=_MIN_SCALE).to(_SCALE_DTYPE)
    codes = (rows / scales.to(torch.float32)[..., None]).round_().clamp_(-127, 127)
    return codes.nan_to_num_(0).to(torch.int8), scales


def _exact_logits(x: Tensor, weight: LinearWeight, candidates: Tensor) -> Tensor:
    """float32 products of x [K] with those rows of the weight: [R]."""
    if isinstance(weight, DenseWeight):
        return weight.weight[candidates].to(torch.float32) @ x
    rows = select_outputs(weight, candidates)
    logits = dequantize(rows) @ x
    return logits if rows.bias is None else logits + rows.bias.to(torch.float32)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # torch.zeros writes its zeros: the whole cache would be resident from the start.
    pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def _float32(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.to(torch.float32)


def _int4_group_size(weight: PackedWeight) -> int | None:
    """The largest operator group size whose groups each lie inside one group of the weight."""
    whole = weight.group_size >= weight.in_features
    fitting = [g for g in _INT4_GROUP_SIZES if whole or weight.group_size % g == 0]
    dividing = [g for g in fitting if weight.in_features % g == 0]
    if not fitting:
        logger.warning(
            "group_size %d fits no int4 group of %s; this layer is held in float32",
            weight.group_size,
            _INT4_GROUP_SIZES,
        )
        return None
    return dividing[0] if dividing else fitting[-1]


def _prepare_int4(weight: PackedWeight, group_size: int) -> Int4Linear:
    input_padding = -weight.in_features % group_size
    column_padding = -weight.out_features % _INT4_COLUMNS
    # Every operator group reads the scale of the weight's group that holds its first row.
    source = torch.arange(0, weight.in_features + input_padding, group_size) // weight.group_size
    scales = F.pad(weight.scales.to(torch.float32)[source], (0, column_padding))
    zeros = F.pad(weight.zeros.to(torch.int16)[source], (0, column_padding))
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features).to(torch.int16)
    codes = F.pad(codes, (0, column_padding, 0, input_padding))
    planes = _int4_planes(codes, zeros, scales, group_size)
    stacked = torch.cat([plane[0] for plane in planes]).t().to(torch.int32).contiguous()
    scales_and_zeros = torch.cat([torch.stack(plane[1:], dim=-1) for plane in planes])
    return Int4Linear(
        packed=torch.ops.aten._convert_weight_to_int4pack_for_cpu(stacked, 1),
        scales_and_zeros=scales_and_zeros.to(torch.bfloat16).contiguous(),
        group_size=group_size,
        num_planes=len(planes),
        input_padding=input_padding,
        out_features=weight.out_features,
        permutation=weight.input_permutation,
        bias=_float32(weight.bias),
    )


def _int4_planes(
    codes: Tensor, zeros: Tensor, scales: Tensor, group_size: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Planes (q, s, o) with q in [0, 15] whose s (q - 8) + o add up to scales * (codes - zeros).

    codes [K, N] int16, zeros and scales [G, N]. The offsets o are kept to numbers that bfloat16
    holds exactly wherever the range of codes - zeros allows it.
    """
    centered = codes - zeros.repeat_interleave(group_size, dim=0)
    offsets = torch.zeros_like(scales)
    low, high = int(centered.min()), int(centered.max())
    if high < 8 and low >= -8:
        return [(centered + 8, scales, offsets)]
    if high < 16 and low >= -15:
        return [(codes, scales, (8 - zeros) * scales)]
    if high >= 128 or low < -128:
        centered = codes - 128
        offsets = (128 - zeros) * scales
    coarse = centered >> 4  # in [-8, 7]; centered = 16 coarse + fine, fine in [0, 15]
    rounded = offsets.to(torch.bfloat16).to(torch.float32)
    return [
        (coarse + 8, 16 * scales, rounded),
        (centered & 15, scales, 8 * scales + (offsets - rounded)),
    ]


def create(cpu_precision: str = "auto", kv_cache_dtype: str = "auto") -> CpuBackend:
    return CpuBackend(cpu_precision, kv_cache_dtype)
