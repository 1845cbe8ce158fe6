"""A checkpoint folder -> a Decoder. Every tensor of the checkpoint is consumed, or an error."""

from __future__ import annotations

from pathlib import Path

import torch

from ...kernels.interface import KernelBackend, PreparedLinear
from ...kernels.packing import DenseWeight, LinearWeight, PackedWeight, concatenate
from ...quant.checkpoint import CheckpointReader
from ...quant.errors import CheckpointError
from .config import ModelConfig
from .decoder import Decoder, DecoderLayer


def load_decoder(folder: Path, backend: KernelBackend) -> Decoder:
    """Memory-map the checkpoint and hand each weight to the backend, layer by layer.

    Raises CheckpointError naming the file, the tensor and the reason.
    """
    reader = CheckpointReader(folder)
    config = ModelConfig.from_hf(reader.config, reader.generation_config)
    hidden = config.hidden_size
    embedding = reader.take("model.embed_tokens.weight", shape=(config.vocab_size, hidden))
    if config.tie_word_embeddings:
        head_weight: LinearWeight = DenseWeight(weight=embedding)
    else:
        head_weight = reader.take_linear("lm_head", hidden, config.vocab_size)
    decoder = Decoder(
        config,
        backend,
        embedding=embedding.to(backend.device),
        layers=[_load_layer(reader, config, backend, i) for i in range(config.num_layers)],
        norm=reader.take("model.norm.weight", shape=(hidden,)).to(torch.float32),
        head=backend.prepare_head(head_weight),
    )
    reader.check_all_consumed()
    return decoder


def _load_layer(
    reader: CheckpointReader, config: ModelConfig, backend: KernelBackend, index: int
) -> DecoderLayer:
    prefix = f"model.layers.{index}"
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim

    def fused(parent: str, in_features: int, **parts: int) -> PreparedLinear:
        names = [f"{prefix}.{parent}.{name}" for name in parts]
        sizes = zip(names, parts.values(), strict=True)
        weights = [reader.take_linear(name, in_features, size) for name, size in sizes]
        return backend.prepare_linear(_fuse(names, weights))

    return DecoderLayer(
        input_norm=_norm(reader, f"{prefix}.input_layernorm", hidden),
        qkv=fused("self_attn", hidden, q_proj=q_size, k_proj=kv_size, v_proj=kv_size),
        output=fused("self_attn", q_size, o_proj=hidden),
        post_attention_norm=_norm(reader, f"{prefix}.post_attention_layernorm", hidden),
        gate_up=fused("mlp", hidden, gate_proj=intermediate, up_proj=intermediate),
        down=fused("mlp", intermediate, down_proj=hidden),
    )


def _norm(reader: CheckpointReader, prefix: str, size: int) -> torch.Tensor:
    return reader.take(f"{prefix}.weight", shape=(size,)).to(torch.float32)


def _fuse(names: list[str], weights: list[LinearWeight]) -> LinearWeight:
    packed = [weight for weight in weights if isinstance(weight, PackedWeight)]
    dense = [weight for weight in weights if isinstance(weight, DenseWeight)]
    if packed and dense:
        raise CheckpointError(f"{', '.join(names)}: some are quantized and some are not")
    if dense:
        return _concatenate_dense(dense)
    try:
        return concatenate(packed)
    except ValueError as error:
        raise CheckpointError(f"{', '.join(names)}: {error}") from error


def _concatenate_dense(weights: list[DenseWeight]) -> DenseWeight:
    has_bias = any(weight.bias is not None for weight in weights)
    biases = [w.bias if w.bias is not None else torch.zeros(len(w.weight)) for w in weights]
    return DenseWeight(
        weight=torch.cat([weight.weight for weight in weights]),
        bias=torch.cat(biases) if has_bias else None,
    )
