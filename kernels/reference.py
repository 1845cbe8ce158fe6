"""Slow and obvious: the oracle of every kernel test, and the exact path of last resort.

Weights are dequantized to float32 once; attention loops over sequences and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .interface import (
    AttentionPlan,
    AttentionSpec,
    ForwardBatch,
    KernelBackend,
    KVCache,
    PreparedLinear,
)
from .packing import DenseWeight, LinearWeight, dequantize


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    weight: Tensor  # [N, K] float32
    bias: Tensor | None  # [N] float32

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    batch: ForwardBatch


class ReferenceBackend(KernelBackend):
    def __init__(self) -> None:
        self.name = "reference, float32"
        self.device = torch.device("cpu")
        self.hidden_dtype = torch.float32
        self.kv_dtype = torch.float32

    def prepare_linear(self, weight: LinearWeight) -> ReferenceLinear:
        matrix = weight.weight if isinstance(weight, DenseWeight) else dequantize(weight)
        bias = None if weight.bias is None else weight.bias.to(torch.float32)
        return ReferenceLinear(matrix.to(torch.float32), bias)

    def linear(self, x: Tensor, layer: PreparedLinear) -> Tensor:
        assert isinstance(layer, ReferenceLinear)
        y = x @ layer.weight.T
        return y if layer.bias is None else y + layer.bias

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat((half, half), dim=-1)[:, None, :] for half in (cos, sin))
        rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = rotated.chunk(2, dim=-1)
        rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((rotated, rest), dim=-1)

    def plan_attention(self, batch: ForwardBatch) -> ReferencePlan:
        return ReferencePlan(batch)

    def attention(
        self, q: Tensor, cache: KVCache, plan: AttentionPlan, spec: AttentionSpec
    ) -> Tensor:
        assert isinstance(plan, ReferencePlan)
        batch = plan.batch
        size, num_kv_heads, head_dim = batch.block_size, *cache.keys.shape[2:]
        group = q.shape[1] // num_kv_heads
        out = torch.empty_like(q)
        starts = batch.query_start.tolist()
        for i, context_len in enumerate(batch.context_lens.tolist()):
            table = batch.block_tables[i].tolist()
            slots = [table[p // size] * size + p % size for p in range(context_len)]
            keys = cache.keys.view(-1, num_kv_heads, head_dim)[slots]
            values = cache.values.view(-1, num_kv_heads, head_dim)[slots]
            first_position = context_len - (starts[i + 1] - starts[i])
            for offset, row in enumerate(range(starts[i], starts[i + 1])):
                end = first_position + offset + 1
                visible = slice(max(0, end - (spec.window or end)), end)
                for head in range(q.shape[1]):
                    scores = keys[visible, head // group] @ q[row, head] * spec.scale
                    if spec.soft_cap is not None:
                        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
                    out[row, head] = torch.softmax(scores, 0) @ values[visible, head // group]
        return out.flatten(1)


def create() -> ReferenceBackend:
    return ReferenceBackend()
