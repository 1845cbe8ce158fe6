"""A checkpoint folder -> a Decoder. Every tensor of the checkpoint is consumed, or an error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...kernels.interface import KernelBackend
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
from ...quant.errors import CheckpointError
from .config import ModelConfig
from .decoder import AttentionBlock, Decoder, DecoderLayer, FusedLinear, MlpBlock, Norm, SideBySide
from .families import Family, NormKind, PartNames, family_of, read_config


def load_decoder(folder: Path, backend: KernelBackend, max_model_len: int | None = None) -> Decoder:
    """Memory-map the checkpoint and hand each weight to the backend, layer by layer.

    `max_model_len` chooses between the two models that some checkpoints hold, for short contexts
    and for long ones (LongRoPE).

    Raises CheckpointError naming the file, the tensor and the reason, or BackendUnavailable for
    attention that the backend does not implement.
    """
    return build_decoder(CheckpointReader(folder), backend, max_model_len)


def build_decoder(
    reader: CheckpointReader, backend: KernelBackend, max_model_len: int | None = None
) -> Decoder:
    """The same from an open checkpoint, or from what takes its place."""
    config = read_config(reader.config, reader.generation_config, max_model_len)
    decoder = _Loader(reader, config, family_of(reader.config), backend).load()
    reader.check_all_consumed()
    return decoder


class _Loader:
    def __init__(
        self, reader: CheckpointReader, config: ModelConfig, family: Family, backend: KernelBackend
    ) -> None:
        self._reader = reader
        self._config = config
        self._family = family
        self._names = _names_in(reader, family.names)
        self._backend = backend

    def load(self) -> Decoder:
        config, names = self._config, self._names
        embedding = self._reader.take_embedding(
            names.embedding, config.vocab_size, config.hidden_size
        )
        return Decoder(
            config,
            self._backend,
            embedding=self._backend.prepare_embedding(embedding),
            position_embedding=self._position_embedding(),
            layers=[self._layer(i) for i in range(config.num_layers)],
            norm=self._norm(names.norm, config.hidden_size),
            head=self._backend.prepare_head(self._head(embedding)),
        )

    def _head(self, embedding: EmbeddingWeight) -> LinearWeight:
        config, name = self._config, self._names.head
        # A head that is packed is a matrix of its own, whatever config.json says of it.
        if not config.tie_word_embeddings or name in self._reader.packed_prefixes():
            return self._reader.take_linear(name, config.hidden_size, config.vocab_size)
        if isinstance(embedding, PackedEmbedding):
            return embedding.as_linear()
        return DenseWeight(weight=embedding)

    def _position_embedding(self) -> Tensor | None:
        name, offset = self._names.position_embedding, self._family.position_offset
        if name is None:
            return None
        num_rows = self._config.max_position_embeddings + offset
        table = self._reader.take(f"{name}.weight", shape=(num_rows, self._config.hidden_size))
        return table[offset:].to(self._backend.device)

    def _layer(self, index: int) -> DecoderLayer:
        prefix = f"{self._names.layers}.{index}"
        return DecoderLayer(attention=self._attention(prefix, index), mlp=self._mlp(prefix))

    def _attention(self, prefix: str, index: int) -> AttentionBlock:
        config, names, layer = self._config, self._names, self._config.layers[index]
        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv = self._linears(
            prefix, names.qkv, hidden, (q_size, kv_size, kv_size), bias=config.qkv_bias
        )
        output = self._linears(prefix, (names.output,), q_size, (hidden,), bias=config.output_bias)
        head_norms = None
        if names.q_norm is not None and names.k_norm is not None:
            q_norm = self._norm(f"{prefix}.{names.q_norm}", head_dim)
            head_norms = (q_norm, self._norm(f"{prefix}.{names.k_norm}", head_dim))
        return AttentionBlock(
            norm=self._norm(f"{prefix}.{names.input_norm}", hidden),
            qkv=_prepare_fused(self._backend, qkv),
            head_norms=head_norms,
            rotation=config.ropes.index(layer.rope),
            spec=layer.attention,
            output=self._backend.prepare_linear(output[0]),
            output_norm=self._optional_norm(prefix, names.attention_output_norm),
        )

    def _mlp(self, prefix: str) -> MlpBlock:
        config, names, gated = self._config, self._names, self._family.gated
        hidden, inner = config.hidden_size, config.intermediate_size
        sizes = (inner, inner) if gated else (inner,)
        up = self._linears(prefix, names.up, hidden, sizes, bias=config.mlp_bias)
        down = self._linears(prefix, (names.down,), inner, (hidden,), bias=config.mlp_bias)
        return MlpBlock(
            norm=self._norm(f"{prefix}.{names.mlp_norm}", hidden),
            up=_prepare_fused(self._backend, up),
            gated=gated,
            down=self._backend.prepare_linear(down[0]),
            output_norm=self._optional_norm(prefix, names.mlp_output_norm),
        )

    def _linears(
        self,
        prefix: str,
        names: tuple[str, ...],
        in_features: int,
        sizes: tuple[int, ...],
        *,
        bias: bool,
    ) -> list[LinearWeight]:
        """Layers of these output sizes, or the one that is all of them."""
        if len(names) == 1:
            sizes = (sum(sizes),)
        transposed = self._family.transposed
        parts = [
            self._reader.take_linear(f"{prefix}.{name}", in_features, size, transposed=transposed)
            for name, size in zip(names, sizes, strict=True)
        ]
        for name, part in zip(names, parts, strict=True):
            if bias and part.bias is None:
                raise CheckpointError(
                    f"{self._reader.folder}: tensor {prefix}.{name}.bias is missing"
                )
        return parts

    def _optional_norm(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self._norm(f"{prefix}.{name}", self._config.hidden_size)

    def _norm(self, name: str, size: int) -> Norm:
        kind = self._family.norm
        weight = self._vector(f"{name}.weight", size)
        if kind is NormKind.RMS_PLUS_ONE:
            weight = weight + 1
        bias = self._vector(f"{name}.bias", size) if kind is NormKind.LAYER else None
        return Norm(weight, bias, self._config.norm_eps)

    def _vector(self, name: str, size: int) -> Tensor:
        return self._reader.take(name, shape=(size,)).to(self._backend.device, torch.float32)


def _names_in(reader: CheckpointReader, names: PartNames) -> PartNames:
    """Some checkpoints hold the bare model: the first part of its names is missing there."""
    if any(name.startswith(f"{names.embedding}.") for name in reader.names()):
        return names
    bare = {
        part: name.partition(".")[2]
        for part in ("embedding", "position_embedding", "layers", "norm")
        if (name := getattr(names, part)) is not None
    }
    if any(name.startswith(f"{bare['embedding']}.") for name in reader.names()):
        return replace(names, **bare)
    return names


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
