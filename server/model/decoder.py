"""A decoder of any family: attention and an MLP in each layer, norms around them.

The decoder says what is computed, a KernelBackend how. Context is an argument of `forward`.
Shapes: T tokens in the step, C hidden size, H heads, Hkv key-value heads, D head size, F
intermediate size.
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
    """Rotary embedding of one step's positions; R features of a head rotate."""

    cos: Tensor  # [T, R / 2] float32
    sin: Tensor  # [T, R / 2] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What all layers of one step share."""

    rotations: list[Rotation]
    batch: ForwardBatch
    plan: AttentionPlan
    caches: list[KVCache]  # one per layer


@dataclass(frozen=True, slots=True)
class Norm:
    """RMS norm, or layer norm where there is a bias."""

    weight: Tensor  # [C] float32
    bias: Tensor | None  # [C] float32
    eps: float

    def apply(self, x: Tensor, backend: KernelBackend) -> Tensor:
        """[T, C] -> [T, C]"""
        if self.bias is None:
            return backend.rms_norm(x, self.weight, self.eps)
        return backend.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Layers that read the same input but differ in bits, groups or order: no one matrix."""

    parts: tuple[PreparedLinear, ...]


FusedLinear = PreparedLinear | SideBySide


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBlock:
    """x + norm(output(attention(qkv(norm(x))))); what is None is left out.

    Q, K and V are one matrix, or where a checkpoint gives them different forms, side by side.
    """

    norm: Norm
    qkv: FusedLinear
    head_norms: tuple[Norm, Norm] | None  # of queries and of keys, before they are rotated
    rotation: int  # which of the step's
    spec: AttentionSpec
    output: PreparedLinear
    output_norm: Norm | None

    def forward(
        self,
        x: Tensor,
        context: StepContext,
        cache: KVCache,
        config: ModelConfig,
        backend: KernelBackend,
    ) -> Tensor:
        """Hidden states [T, C] -> [T, C]; writes this step's keys and values to the cache."""
        qkv = _norm_linear(backend, x, self.norm, self.qkv)
        if self.head_norms is not None:
            q_norm, k_norm = self.head_norms
            qkv = backend.norm_heads(
                qkv, q_norm.weight, k_norm.weight, q_norm.eps, config.num_heads
            )
        rotation = context.rotations[self.rotation]
        q = backend.rope_and_store(
            qkv, rotation.cos, rotation.sin, config.num_heads, cache, context.batch
        )
        attended = backend.attention(q, cache, context.plan, self.spec)
        return _add(backend, attended, self.output, self.output_norm, x)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpBlock:
    """x + norm(down(activation(up(norm(x))))); what is None is left out.

    `up` makes gate and up where the MLP is gated: activation(gate) * up.
    """

    norm: Norm
    up: FusedLinear
    gated: bool
    down: PreparedLinear
    output_norm: Norm | None

    def forward(self, x: Tensor, config: ModelConfig, backend: KernelBackend) -> Tensor:
        """Hidden states [T, C] -> [T, C]."""
        norm, up, activation = self.norm, self.up, config.activation
        plain = self.gated and norm.bias is None and self.output_norm is None
        if plain and not isinstance(up, SideBySide):
            return backend.mlp(x, norm.weight, norm.eps, up, self.down, activation)
        inner = _norm_linear(backend, x, norm, up)
        activate = backend.activate_mul if self.gated else backend.activate
        return _add(backend, activate(inner, activation), self.down, self.output_norm, x)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    attention: AttentionBlock
    mlp: MlpBlock

    def forward(
        self,
        x: Tensor,
        context: StepContext,
        cache: KVCache,
        config: ModelConfig,
        backend: KernelBackend,
    ) -> Tensor:
        """Hidden states [T, C] -> [T, C]; writes this step's keys and values to the cache."""
        x = self.attention.forward(x, context, cache, config, backend)
        return self.mlp.forward(x, config, backend)


def _norm_linear(backend: KernelBackend, x: Tensor, norm: Norm, layer: FusedLinear) -> Tensor:
    if isinstance(layer, SideBySide):
        normed = norm.apply(x, backend)
        return torch.cat([backend.linear(normed, part) for part in layer.parts], dim=-1)
    if norm.bias is None:
        return backend.norm_linear(x, norm.weight, norm.eps, layer)
    return backend.linear(norm.apply(x, backend), layer)


def _add(
    backend: KernelBackend, x: Tensor, layer: PreparedLinear, norm: Norm | None, residual: Tensor
) -> Tensor:
    if norm is None:
        return backend.linear_residual(x, layer, residual)
    return residual + norm.apply(backend.linear(x, layer).to(residual.dtype), backend)


class Decoder:
    def __init__(
        self,
        config: ModelConfig,
        backend: KernelBackend,
        *,
        embedding: EmbeddingWeight,  # [vocabulary, C]
        position_embedding: Tensor | None,  # [max_position_embeddings, C]; None: rotary
        layers: list[DecoderLayer],
        norm: Norm,
        head: PreparedLinear,
    ) -> None:
        self.config = config
        self.backend = backend
        self.embedding = embedding
        self.position_embedding = position_embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self._rotations = [
            (rope.frequencies().to(backend.device), rope.scaling.magnitude) for rope in config.ropes
        ]

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
        return StepContext(
            rotations=[_rotate(positions, *rotation) for rotation in self._rotations],
            batch=batch,
            plan=self.backend.plan_attention(batch),
            caches=caches,
        )

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token ids [T], positions [T] -> hidden states [T, C] that enter the first layer."""
        x = self.backend.embed(input_ids, self.embedding)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.position_embedding is not None:
            x = x + self.backend.embed(positions, self.position_embedding)
        return x

    def run_layers(self, x: Tensor, context: StepContext, first: int, last: int) -> Tensor:
        """Hidden states [T, C] through the layers from `first` to before `last`: [T, C].

        Writes the step's keys and values to those layers' caches. Layers run in several calls over
        the same context give what they give in one.
        """
        for layer, cache in zip(self.layers[first:last], context.caches[first:last], strict=True):
            x = layer.forward(x, context, cache, self.config, self.backend)
        return x

    def logits(self, x: Tensor, rows: Tensor) -> Tensor:
        """Hidden states [T, C] behind the last layer -> logits [S, vocabulary] of rows [S]."""
        logits = self.backend.logits(self.norm.apply(x[rows], self.backend), self.head)
        cap = self.config.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _rotate(positions: Tensor, frequencies: Tensor, magnitude: float) -> Rotation:
    """positions [T], frequencies [R / 2] float32 in radians per position."""
    angles = positions[:, None].to(torch.float32) * frequencies
    if magnitude == 1:
        return Rotation(angles.cos(), angles.sin())
    return Rotation(angles.cos() * magnitude, angles.sin() * magnitude)
