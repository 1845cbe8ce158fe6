"""What a backend must do, cut where backends will want to fuse. Tensors only.

Shapes: T tokens in the step, B sequences, H heads, Hkv key-value heads, D head size,
C hidden size. A new backend implements the abstract operations and inherits the compositions;
it overrides a composition when it can fuse it. The decoder never asks which backend it has.
"""

from __future__ import annotations

import importlib
import logging
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import EmbeddingWeight, LinearWeight, PackedEmbedding

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "cpu", "reference")
_MODULES = {"triton": "triton_backend"}  # where it is not the backend's own name
_CHOICES = {
    "triton": ("dtype", "kv_cache_dtype"),
    "cpu": ("cpu_precision", "kv_cache_dtype"),
    "reference": (),
}


class BackendUnavailable(ValueError):
    """The backend that was asked for by name cannot work here. The text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The tokens of one step, sequences laid end to end, and where their keys and values live."""

    query_start: Tensor  # [B + 1] int32, first row of each sequence; the last entry is T
    context_lens: Tensor  # [B] int32, tokens in the cache once this step is done
    block_tables: Tensor  # [B, max blocks] int32, padded with a block of the sequence
    slot_mapping: Tensor  # [T] int64, flat KV slot (block * block_size + offset) of each token
    block_size: int  # tokens per block


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCache:
    """Keys and values of one layer in blocks: two tensors [num_blocks, block_size, Hkv, D].

    Where they are of 8 bits, a number of theirs is times its token's and head's scale.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None  # [num_blocks, block_size, Hkv]
    value_scales: Tensor | None = None  # the same

    @property
    def tensors(self) -> list[Tensor]:
        """All that a block consists of."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return [part for part in parts if part is not None]


class Activation(StrEnum):
    """What stands between the two linear layers of an MLP."""

    SILU = "silu"
    GELU = "gelu"  # x times the normal distribution's function of x (Hendrycks & Gimpel 2016)
    GELU_TANH = "gelu_tanh"  # its approximation by tanh, from the same paper
    RELU = "relu"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """How a layer's queries score the cached keys, and how far back they look."""

    scale: float
    window: int | None = None  # positions that a query sees, its own and those before; None: all
    soft_cap: float | None = None  # a score s becomes soft_cap * tanh(s / soft_cap)


class PreparedLinear(Protocol):
    """A linear layer in a backend's own layout; opaque to everyone else."""

    @property
    def out_features(self) -> int: ...


class AttentionPlan(Protocol):
    """What a backend derives from a ForwardBatch once per step; opaque to everyone else."""


class KernelBackend(Protocol):
    """Operations of a decoder step. Hidden states are [T, C] in `hidden_dtype`."""

    name: str
    device: torch.device
    hidden_dtype: torch.dtype
    kv_dtype: torch.dtype

    @abstractmethod
    def prepare_linear(self, weight: LinearWeight) -> PreparedLinear:
        """Repack a layer into this backend's layout, once, at load."""

    @abstractmethod
    def linear(self, x: Tensor, layer: PreparedLinear) -> Tensor:
        """y = x W^T + b: [T, K] -> [T, N]."""

    @abstractmethod
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension: [T, C] -> [T, C]."""

    @abstractmethod
    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of the two halves of the last dimension: [T, 2 F] -> [T, F]."""

    @abstractmethod
    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the halves of each head's first R features, pass on the rest.

        x [T, heads, D], cos and sin [T, R / 2] with R <= D -> like x.
        """

    @abstractmethod
    def plan_attention(self, batch: ForwardBatch) -> AttentionPlan:
        """Work that all layers share, done once per step."""

    @abstractmethod
    def attention(
        self, q: Tensor, cache: KVCache, plan: AttentionPlan, spec: AttentionSpec
    ) -> Tensor:
        """Causal attention over the cached keys and values: q [T, H, D] -> [T, H * D].

        Queries as `rope_and_store` returned them: a backend may rotate them with the keys there.
        """

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension, like x."""
        return F.layer_norm(x.to(torch.float32), x.shape[-1:], weight, bias, eps).to(x.dtype)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(x) of each element, computed in float32: like x in `hidden_dtype`."""
        return _activate(x.to(torch.float32), activation).to(self.hidden_dtype)

    def activate_mul(self, gate_up: Tensor, activation: Activation) -> Tensor:
        """activation(gate) * up of the two halves of the last dimension: [T, 2 F] -> [T, F]."""
        if activation is Activation.SILU:
            return self.silu_mul(gate_up)
        gate, up = gate_up.to(torch.float32).chunk(2, dim=-1)
        return (_activate(gate, activation) * up).to(self.hidden_dtype)

    def norm_heads(
        self, qkv: Tensor, q_norm: Tensor, k_norm: Tensor, eps: float, num_heads: int
    ) -> Tensor:
        """RMS norm of each query head by q_norm [D] and of each key head by k_norm [D].

        qkv [T, (H + 2 Hkv) * D] -> the same, values as they are.
        """
        head_dim = len(q_norm)
        heads = qkv.to(self.hidden_dtype).view(len(qkv), -1, head_dim)
        num_kv_heads = (heads.shape[1] - num_heads) // 2
        q, k, v = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
        normed = (
            self.rms_norm(part.reshape(-1, head_dim), norm, eps).view(len(qkv), -1)
            for part, norm in ((q, q_norm), (k, k_norm))
        )
        return torch.cat((*normed, v.flatten(1)), dim=1)

    def prepare_embedding(self, weight: EmbeddingWeight) -> EmbeddingWeight:
        """The table on this backend's device, packed if it came packed."""
        return weight.to(self.device)

    def embed(self, ids: Tensor, embedding: EmbeddingWeight) -> Tensor:
        """Rows of the table: token ids [T] -> [T, C] in `hidden_dtype`."""
        if isinstance(embedding, PackedEmbedding):
            return embedding.rows(ids).to(self.hidden_dtype)
        return F.embedding(ids, embedding).to(self.hidden_dtype)

    def prepare_head(self, weight: LinearWeight) -> PreparedLinear:
        """The same as `prepare_linear`, for the layer that makes logits."""
        return self.prepare_linear(weight)

    def logits(self, x: Tensor, head: PreparedLinear) -> Tensor:
        """[S, C] -> [S, vocabulary] float32."""
        return self.linear(x, head).to(torch.float32)

    def kv_head_bytes(self, head_dim: int) -> int:
        """What the cache takes for one token's keys, or values, of one head."""
        return head_dim * self.kv_dtype.itemsize

    def allocate_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int
    ) -> list[KVCache]:
        """Zeroed keys and values of all layers: a masked slot must never hold a NaN."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return [
            KVCache(
                keys=torch.zeros(shape, dtype=self.kv_dtype, device=self.device),
                values=torch.zeros(shape, dtype=self.kv_dtype, device=self.device),
            )
            for _ in range(num_layers)
        ]

    def clear_blocks(self, caches: Sequence[KVCache], blocks: Tensor) -> None:
        """Zero these blocks [n] int64 in all layers."""
        for cache in caches:
            for tensor in cache.tensors:
                tensor.index_fill_(0, blocks, 0)

    def copy_blocks(self, caches: Sequence[KVCache], pairs: Tensor) -> None:
        """Copy blocks [n, 2] int64, source to target, in all layers, as if all at once."""
        source, target = pairs.unbind(1)
        for cache in caches:
            for tensor in cache.tensors:
                tensor.index_copy_(0, target, tensor.index_select(0, source))

    def rope_and_store(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
        cache: KVCache,
        batch: ForwardBatch,
    ) -> Tensor:
        """Rotate queries and keys, write keys and values to their slots, return the queries.

        qkv [T, (H + 2 Hkv) * D], cos and sin [T, R / 2] as in `rope` -> [T, H, D].
        """
        num_kv_heads, head_dim = cache.keys.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        rotated = self.rope(heads[:, : num_heads + num_kv_heads], cos, sin)
        values = heads[:, num_heads + num_kv_heads :]
        self.store(rotated[:, num_heads:], values, cache, batch.slot_mapping)
        return rotated[:, :num_heads]

    def store(self, keys: Tensor, values: Tensor, cache: KVCache, slots: Tensor) -> None:
        """Write keys and values [T, Hkv, D] to their slots [T]."""
        for tensor, rows in ((cache.keys, keys), (cache.values, values)):
            tensor.view(-1, *tensor.shape[2:]).index_copy_(0, slots, rows.to(tensor.dtype))

    def norm_linear(self, x: Tensor, norm: Tensor, eps: float, layer: PreparedLinear) -> Tensor:
        """linear(rms_norm(x)): [T, C] -> [T, N]."""
        return self.linear(self.rms_norm(x, norm, eps), layer)

    def linear_residual(self, x: Tensor, layer: PreparedLinear, residual: Tensor) -> Tensor:
        """residual + linear(x), in the residual's dtype."""
        return residual + self.linear(x, layer)

    def mlp(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        gate_up: PreparedLinear,
        down: PreparedLinear,
        activation: Activation = Activation.SILU,
    ) -> Tensor:
        """x + down(activate_mul(gate_up(rms_norm(x)))): [T, C] -> [T, C]."""
        halves = self.norm_linear(x, norm, eps, gate_up)
        return self.linear_residual(self.activate_mul(halves, activation), down, x)


def _numbers_on(device: torch.device, numbers: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
    """int64; a GPU is not waited for, as it would be for memory that is not pinned."""
    host = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _activate(x: Tensor, activation: Activation) -> Tensor:
    match activation:
        case Activation.SILU:
            return F.silu(x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.RELU:
            return F.relu(x)


def _has_tensor_core_gpu() -> bool:
    """Whether the triton backend can work: compute capability 8.0 or higher."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def load_backend(
    name: str,
    cpu_precision: str = "auto",
    kv_cache_dtype: str = "auto",
    dtype: str = "auto",
    model_dtype: torch.dtype | None = None,
) -> KernelBackend:
    """The backend of that name; `auto` is triton where there is a GPU, else cpu, and says so once.

    `cpu_precision` is for the cpu backend alone, `dtype` (with auto, the model's own) for triton,
    `kv_cache_dtype` for both. Raises BackendUnavailable for a name that is unknown or cannot work
    on this machine.
    """
    if name not in BACKENDS:
        raise BackendUnavailable(f"backend is {name!r}; it must be one of {', '.join(BACKENDS)}")
    chosen = name
    if name == "auto":
        chosen = "triton" if _has_tensor_core_gpu() else "cpu"
    # Imported by name so that a backend's own dependencies load only where it is used.
    module = importlib.import_module(f".{_MODULES.get(chosen, chosen)}", __package__)
    choices = {"cpu_precision": cpu_precision, "kv_cache_dtype": kv_cache_dtype, "dtype": dtype}
    for choice, value in choices.items():
        if choice not in _CHOICES[chosen] and value != "auto":
            raise BackendUnavailable(
                f"{choice} is {value!r}; the {chosen} backend has no such choice"
            )
    taken = {choice: choices[choice] for choice in _CHOICES[chosen]}
    own = {"model_dtype": model_dtype} if chosen == "triton" else {}
    backend: KernelBackend = module.create(**taken, **own)
    logger.info("backend %s: %s", chosen, backend.name)
    return backend
