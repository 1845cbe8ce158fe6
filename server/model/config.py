"""The numbers of a decoder, whatever its family calls them."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.interface import Activation, AttentionSpec
from .rope import RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer."""

    attention: AttentionSpec
    rope: RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder: grouped-query attention and an MLP in each layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    activation: Activation
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    embedding_scale: float
    logit_soft_cap: float | None
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]
    layers: tuple[LayerConfig, ...]

    @property
    def ropes(self) -> list[RopeConfig]:
        """Those that differ, in the order of the first layer that has each."""
        return list(dict.fromkeys(layer.rope for layer in self.layers))

    @property
    def num_layers(self) -> int:
        return len(self.layers)
