"""The Llama family: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

The decoder says what is computed, a KernelBackend how. Context is an argument of `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.interface import (
    AttentionPlan,
    ForwardBatch,
    KernelBackend,
    KVCache,
    PreparedLinear,
)
from ...kernels.packing import EmbeddingWeight
from .config import ModelConfig


@dataclass(frozen=True, slots=True)
class Rotation:
    """Rotary embedding of one step's positions, RoFormer (Su et al. 2021), section 3.2.2."""

    cos: Tensor  # [T, D / 2] float32
    sin: Tensor  # [T, D / 2] float32


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Layers that read the same input but differ in bits, groups or order: no one matrix."""

    parts: tuple[PreparedLinear, ...]


FusedLinear = PreparedLinear | SideBySide


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """x + attention(norm(x)), then x + mlp(norm(x)). Q, K, V and gate, up are one matrix each.

    Where a checkpoint gives their parts different forms, their outputs are put side by side.
    """

    input_norm: Tensor  # [C]
    qkv: FusedLinear
    output: PreparedLinear
    post_attention_norm: Tensor  # [C]
    gate_up: FusedLinear
    down: PreparedLinear

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        batch: ForwardBatch,
        plan: AttentionPlan,
        cache: KVCache,
        config: ModelConfig,
        backend: KernelBackend,
    ) -> Tensor:
        """Hidden states [T, C] -> [T, C]; writes this step's keys and values to the cache."""
        eps = config.rms_norm_eps
        qkv = _norm_linear(backend, x, self.input_norm, eps, self.qkv)
        q = backend.rope_and_store(qkv, rotation.cos, rotation.sin, config.num_heads, cache, batch)
        attended = backend.attention(q, cache, plan, config.head_dim**-0.5)
        x = backend.linear_residual(attended, self.output, x)
        if not isinstance(self.gate_up, SideBySide):
            return backend.mlp(x, self.post_attention_norm, eps, self.gate_up, self.down)
        gate_up = _norm_linear(backend, x, self.post_attention_norm, eps, self.gate_up)
        return backend.linear_residual(backend.silu_mul(gate_up), self.down, x)


def _norm_linear(
    backend: KernelBackend, x: Tensor, norm: Tensor, eps: float, layer: FusedLinear
) -> Tensor:
    if not isinstance(layer, SideBySide):
        return backend.norm_linear(x, norm, eps, layer)
    normed = backend.rms_norm(x, norm, eps)
    return torch.cat([backend.linear(normed, part) for part in layer.parts], dim=-1)


class Decoder:
    def __init__(
        self,
        config: ModelConfig,
        backend: KernelBackend,
        *,
        embedding: EmbeddingWeight,  # [vocabulary, C]
        layers: list[DecoderLayer],
        norm: Tensor,  # [C]
        head: PreparedLinear,
    ) -> None:
        self.config = config
        self.backend = backend
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        exponents = torch.arange(0, config.head_dim, 2, device=backend.device) / config.head_dim
        self._inverse_frequencies = 1.0 / config.rope_theta**exponents  # [D / 2] float32

    def forward(
        self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch, caches: list[KVCache]
    ) -> Tensor:
        """Token ids [T], positions [T] -> logits [S, vocabulary] float32 of `batch.logit_rows`."""
        x = self.backend.embed(input_ids, self.embedding)
        angles = positions[:, None].to(torch.float32) * self._inverse_frequencies
        rotation = Rotation(angles.cos(), angles.sin())
        plan = self.backend.plan_attention(batch)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.forward(x, rotation, batch, plan, cache, self.config, self.backend)
        x = self.backend.rms_norm(x[batch.logit_rows], self.norm, self.config.rms_norm_eps)
        return self.backend.logits(x, self.head)
