"""The Llama family: grouped-query attention, rotary positions, RMSNorm, SwiGLU.

The decoder says what is computed, a KernelBackend how. Context is an argument of `forward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.interface import (
    AttentionPlan,
    AttentionSpec,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What all layers of one step share."""

    rotation: Rotation
    batch: ForwardBatch
    plan: AttentionPlan
    caches: list[KVCache]  # one per layer


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
    attention: AttentionSpec
    output: PreparedLinear
    post_attention_norm: Tensor  # [C]
    gate_up: FusedLinear
    down: PreparedLinear

    def forward(
        self,
        x: Tensor,
        context: StepContext,
        cache: KVCache,
        config: ModelConfig,
        backend: KernelBackend,
    ) -> Tensor:
        """Hidden states [T, C] -> [T, C]; writes this step's keys and values to the cache."""
        rotation, batch = context.rotation, context.batch
        eps = config.rms_norm_eps
        qkv = _norm_linear(backend, x, self.input_norm, eps, self.qkv)
        q = backend.rope_and_store(qkv, rotation.cos, rotation.sin, config.num_heads, cache, batch)
        attended = backend.attention(q, cache, context.plan, self.attention)
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
        self,
        input_ids: Tensor,
        positions: Tensor,
        batch: ForwardBatch,
        caches: list[KVCache],
        rows: Tensor,
    ) -> Tensor:
        """Token ids [T], positions [T] -> logits [S, vocabulary] float32 of rows [S]."""
        context = self.context(positions, batch, caches)
        x = self.embed(input_ids, positions)
        x = self.run_layers(x, context, 0, len(self.layers))
        return self.logits(x, rows)

    def context(self, positions: Tensor, batch: ForwardBatch, caches: list[KVCache]) -> StepContext:
        """What the layers need of a step whose tokens stand at `positions` [T]."""
        angles = positions[:, None].to(torch.float32) * self._inverse_frequencies
        return StepContext(
            rotation=Rotation(angles.cos(), angles.sin()),
            batch=batch,
            plan=self.backend.plan_attention(batch),
            caches=caches,
        )

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids [T], positions [T] -> hidden states [T, C] that enter the first layer."""
        return self.backend.embed(input_ids, self.embedding)

    def run_layers(self, x: Tensor, context: StepContext, first: int, last: int) -> Tensor:
        """Hidden states [T, C] through the layers from `first` to before `last`: [T, C].

        Writes the step's keys and values to those layers' caches. Layers run in turn over the same
        context give what they give in one call.
        """
        for layer, cache in zip(self.layers[first:last], context.caches[first:last], strict=True):
            x = layer.forward(x, context, cache, self.config, self.backend)
        return x

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Hidden states [T, C] behind the last layer -> logits [S, vocabulary] of rows [S]."""
        x = self.backend.rms_norm(x[rows], self.norm, self.config.rms_norm_eps)
        return self.backend.logits(x, self.head)
