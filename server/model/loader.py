"""A checkpoint folder -> a Decoder. Every tensor of the checkpoint is consumed, or an error."""

from __future__ import annotations

from pathlib import Path

import torch

from ...kernels.interface import AttentionSpec, KernelBackend, PreparedLinear
from ...kernels.packing import (
    DenseWeight,
    EmbeddingWeight,
    LinearWeight,
    PackedEmbedding,
    PackedWeight,
    concatenate,
    fits_beside,
)
from ...quant.checkpoint import CheckpointReader
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer, FusedLinear, SideBySide


def load_decoder(folder: Path, backend: KernelBackend) -> Decoder:
    """Memory-map the checkpoint and hand each weight to the backend, layer by layer.

    Raises CheckpointError naming the file, the tensor and the reason.
    """
    return build_decoder(CheckpointReader(folder), backend)


def build_decoder(reader: CheckpointReader, backend: KernelBackend) -> Decoder:
    """The same from an open checkpoint, or from what takes its place."""
    config = ModelConfig.from_hf(reader.config, reader.generation_config)
    hidden = config.hidden_size
    embedding = reader.take_embedding("model.embed_tokens", config.vocab_size, hidden)
    decoder = Decoder(
        config,
        backend,
        embedding=backend.prepare_embedding(embedding),
        layers=[_load_layer(reader, config, backend, i) for i in range(config.num_layers)],
        norm=_norm(reader, backend, "model.norm", hidden),
        head=backend.prepare_head(_take_head(reader, config, embedding)),
    )
    reader.check_all_consumed()
    return decoder


def _take_head(
    reader: CheckpointReader, config: ModelConfig, embedding: EmbeddingWeight
) -> LinearWeight:
    # A head that is packed is a matrix of its own, whatever config.json says of it.
    if not config.tie_word_embeddings or "lm_head" in reader.packed_prefixes():
        return reader.take_linear("lm_head", config.hidden_size, config.vocab_size)
    if isinstance(embedding, PackedEmbedding):
        return embedding.as_linear()
    return DenseWeight(weight=embedding)


def _load_layer(
    reader: CheckpointReader, config: ModelConfig, backend: KernelBackend, index: int
) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim

    def take(parent: str, in_features: int, **parts: int) -> list[LinearWeight]:
        sizes = [(f"{prefix}.{parent}.{name}", size) for name, size in parts.items()]
        return [reader.take_linear(name, in_features, size) for name, size in sizes]

    def single(parent: str, in_features: int, **part: int) -> PreparedLinear:
        return backend.prepare_linear(*take(parent, in_features, **part))

    def fused(parent: str, in_features: int, **parts: int) -> FusedLinear:
        return _prepare_fused(backend, take(parent, in_features, **parts))

    attention = AttentionSpec(scale=config.head_dim**-0.5)
    backend.check_attention(attention)
    return DecoderLayer(
        input_norm=_norm(reader, backend, f"{prefix}.input_layernorm", hidden),
        qkv=fused("self_attn", hidden, q_proj=q_size, k_proj=kv_size, v_proj=kv_size),
        attention=attention,
        output=single("self_attn", q_size, o_proj=hidden),
        post_attention_norm=_norm(reader, backend, f"{prefix}.post_attention_layernorm", hidden),
        gate_up=fused("mlp", hidden, gate_proj=intermediate, up_proj=intermediate),
        down=single("mlp", intermediate, down_proj=hidden),
    )


def _norm(reader: CheckpointReader, backend: KernelBackend, prefix: str, size: int) -> torch.Tensor:
    weight = reader.take(f"{prefix}.weight", shape=(size,))
    return weight.to(backend.device, torch.float32)


def _prepare_fused(backend: KernelBackend, weights: list[LinearWeight]) -> FusedLinear:
    """One matrix where the parts agree in bits, groups and order; else the parts themselves."""
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    dense = [weight for weight in weights if isinstance(weight, DenseWeight)]
    if not packed:
        return backend.prepare_linear(_concatenate_dense(dense))
    if not dense and all(fits_beside(packed[0], other) for other in packed[1:]):
        return backend.prepare_linear(concatenate(packed))
    return SideBySide(tuple(backend.prepare_linear(weight) for weight in weights))


def _concatenate_dense(weights: list[DenseWeight]) -> DenseWeight:
    has_bias = any(weight.bias is not None for weight in weights)
    biases = [w.bias if w.bias is not None else torch.zeros(len(w.weight)) for w in weights]
    return DenseWeight(
        weight=torch.cat([weight.weight for weight in weights]),
        bias=torch.cat(biases) if has_bias else None,
    )
