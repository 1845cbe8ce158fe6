"""How one quantized layer lies in a checkpoint: GPTQ v1 and v2, AWQ, compressed-tensors.

Named tensors <-> the canonical PackedWeight, and what each format cannot hold. Knows nothing of
files, of models or of how codes were found. Shapes: K input features, N output features, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.packing import (
    WORD_BITS,
    PackedWeight,
    num_groups,
    pack_codes,
    pack_zeros,
    packed_rows,
    unpack_codes,
    unpack_zeros,
)
from .config import ModuleConfig, QuantConfig
from .errors import CheckpointError

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)

# The tensor that tells that a layer is packed.
CODES_NAME = {
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "awq": "qweight",
    "compressed-tensors": "weight_packed",
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column whose code is a word's j-th nibble
_OLD_CODES_PER_WORD = 10  # 3-bit words of compressed-tensors before 0.17


class TensorSource(Protocol):
    """Where a layer's tensors come from; a CheckpointReader."""

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def take_raw(
        self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
    ) -> Tensor: ...

    def error(self, name: str, reason: str) -> CheckpointError: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A layer's place and size in a checkpoint."""

    prefix: str
    in_features: int
    out_features: int
    module: ModuleConfig

    @property
    def group_size(self) -> int:
        """Never -1."""
        return self.in_features if self.module.group_size == -1 else self.module.group_size

    @property
    def groups(self) -> int:
        return num_groups(self.in_features, self.group_size)


def check_format(config: QuantConfig, name: str, in_features: int, out_features: int) -> None:
    """Raises CheckpointError when no reader of the config's format takes such a layer.

    A GPTQ checkpoint whose K or N does not fill its last word is fine: it ends in zero codes, as
    GPTQModel writes and reads it (with 3 bits GPTQModel takes whole periods of 32 codes only).
    """
    module = config.for_module(name)
    if module is not None:
        check_layer(config.checkpoint_format, name, module, in_features, out_features)


def check_layer(
    checkpoint_format: str, name: str, module: ModuleConfig, in_features: int, out_features: int
) -> None:
    """`check_format` for a layer that is quantized as `module` says."""
    if checkpoint_format == "awq":
        raise CheckpointError(f"{name}: AWQ checkpoints are read, never written")
    if checkpoint_format == "gptq" and not module.sym:
        raise CheckpointError(f"{name}: asymmetric codes need checkpoint_format 'gptq_v2'")
    if checkpoint_format == "compressed-tensors":
        if module.group_size != -1 and in_features % module.group_size:
            raise CheckpointError(
                f"{name}: in_features is {in_features}; compressed-tensors needs a multiple of "
                f"group_size {module.group_size}"
            )
    elif module.bits == 3:
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if size % WORD_BITS:
                raise CheckpointError(
                    f"{name}: {what} is {size}; 3-bit GPTQ needs a multiple of {WORD_BITS} "
                    f"(checkpoint_format 'compressed-tensors' does not)"
                )


def weight_bytes(
    module: ModuleConfig, in_features: int, out_features: int, checkpoint_format: str
) -> int:
    """Bytes of a packed layer's codes, scales and zero points."""
    groups = num_groups(in_features, module.group_size)
    has_zeros = checkpoint_format != "compressed-tensors" or not module.sym
    words = packed_rows(in_features, module.bits) * out_features
    words += has_zeros * packed_rows(out_features, module.bits) * groups
    return 4 * words + 2 * groups * out_features


def linear_tensors(
    prefix: str,
    weight: PackedWeight,
    config: QuantConfig,
    *,
    scale_dtype: torch.dtype = torch.float16,
) -> dict[str, Tensor]:
    """The tensors of one packed layer under their names on disk; the codes are written as they are.

    GPTQ: qweight [ceil(K*bits/32), N] int32, qzeros [G, ceil(N*bits/32)] int32, scales [G, N] fp16,
    g_idx [K] int32. compressed-tensors: weight_packed [N, ceil(K*bits/32)] int32, weight_scale
    [N, G] of `scale_dtype` (the model's) where that holds them exactly, weight_zero_point
    [ceil(N*bits/32), G] int32 if asymmetric, weight_shape [2] int64. Both: bias [N].

    A weight that differs from the config, or that `check_format` refuses, raises CheckpointError;
    so do scales that fp16 cannot hold.
    """
    module = config.for_module(prefix)
    if module is None:
        raise CheckpointError(f"{prefix}: the quantization config leaves this layer at 16 bits")
    check_format(config, prefix, weight.in_features, weight.out_features)
    _check_agreement(prefix, weight, module)
    if config.checkpoint_format == "compressed-tensors":
        return _compressed_tensors(prefix, weight, module, scale_dtype)
    return _gptq_tensors(prefix, weight, minus_one=config.checkpoint_format == "gptq")


def embedding_matrix(table: Tensor, config: QuantConfig) -> Tensor:
    """The matrix [N, K] as which a format quantizes an embedding table [V, C].

    compressed-tensors groups the features of a row; GPTQModel's layout groups rows, feature by
    feature: there the table stands for a layer that reads one-hot tokens.
    """
    return table if config.checkpoint_format == "compressed-tensors" else table.t()


def packed_features(
    source: TensorSource, prefix: str, module: ModuleConfig, config: QuantConfig
) -> tuple[int, int]:
    """(in_features, out_features) of a packed layer, from its tensors' shapes alone."""
    codes = source.shape(f"{prefix}.{CODES_NAME[config.checkpoint_format]}")
    if len(codes) != 2:
        name = f"{prefix}.{CODES_NAME[config.checkpoint_format]}"
        raise source.error(name, f"shape is {list(codes)}, expected two dimensions")
    if config.checkpoint_format == "compressed-tensors":
        shape = source.take_raw(f"{prefix}.weight_shape", INDEX_DTYPES, (2,)).tolist()
        return shape[1], shape[0]
    if config.checkpoint_format == "awq":
        return codes[0], codes[1] * WORD_BITS // module.bits
    if f"{prefix}.g_idx" in source:
        return source.shape(f"{prefix}.g_idx")[0], codes[1]
    return codes[0] * WORD_BITS // module.bits, codes[1]


def read_linear(
    source: TensorSource, layer: LayerShape, config: QuantConfig, bias: Tensor | None
) -> PackedWeight:
    """One packed layer in canonical form, every convention of its format resolved.

    Raises CheckpointError when a tensor is missing, has another dtype or shape, or when `g_idx`
    names groups that do not exist.
    """
    codes, scales, zeros = _READERS[config.checkpoint_format](source, layer, config)
    if not bool(torch.isfinite(scales[1]).all()):
        raise source.error(scales[0], "holds values that are not finite")
    order = _take_order(source, layer, config)
    group_size, values = layer.group_size, (scales[1], zeros)
    if order is not None:
        permutation, group_size, groups = order
        values = (scales[1][groups], zeros[groups])
        codes = pack_codes(
            unpack_codes(codes, layer.module.bits, layer.in_features)[permutation],
            layer.module.bits,
        )
    return PackedWeight(
        bits=layer.module.bits,
        group_size=group_size,
        in_features=layer.in_features,
        out_features=layer.out_features,
        qweight=codes,
        scales=values[0],
        zeros=values[1],
        input_permutation=None if order is None else order[0],
        bias=bias,
    )


# reading: -> (qweight [words, N], (name, scales [G, N]), zeros [G, N] uint8)

_Parts = tuple[Tensor, tuple[str, Tensor], Tensor]


def _read_gptq(source: TensorSource, layer: LayerShape, config: QuantConfig) -> _Parts:
    prefix, bits, columns = layer.prefix, layer.module.bits, layer.out_features
    words = (packed_rows(layer.in_features, bits), columns)
    qweight = source.take_raw(f"{prefix}.qweight", (torch.int32,), words)
    scales = source.take_raw(f"{prefix}.scales", FLOAT_DTYPES, (layer.groups, columns))
    zero_words = (layer.groups, packed_rows(columns, bits))
    packed = source.take_raw(f"{prefix}.qzeros", (torch.int32,), zero_words)
    zeros = _true_zeros(unpack_zeros(packed, bits, columns), layer.module, config)
    return qweight, (f"{prefix}.scales", scales), zeros


def _true_zeros(stored: Tensor, module: ModuleConfig, config: QuantConfig) -> Tensor:
    if config.checkpoint_format == "gptq_v2":
        return stored
    # Some symmetric checkpoints carry v2 words under the v1 label (vllm-project/vllm#38966):
    # a symmetric zero point is always the middle code, so the words themselves tell.
    if module.sym and bool((stored == 1 << (module.bits - 1)).all()):
        return stored
    return (stored + 1) & ((1 << module.bits) - 1)  # per field: a carry must not spread


def _read_awq(source: TensorSource, layer: LayerShape, config: QuantConfig) -> _Parts:
    prefix, bits, columns = layer.prefix, layer.module.bits, layer.out_features
    if columns * bits % WORD_BITS:
        raise source.error(f"{prefix}.qweight", f"out_features is {columns}; AWQ packs by 8")
    width = columns * bits // WORD_BITS
    packed = source.take_raw(f"{prefix}.qweight", (torch.int32,), (layer.in_features, width))
    scales = source.take_raw(f"{prefix}.scales", FLOAT_DTYPES, (layer.groups, columns))
    zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8)
    if not layer.module.sym or f"{prefix}.qzeros" in source:
        words = source.take_raw(f"{prefix}.qzeros", (torch.int32,), (layer.groups, width))
        zeros = _unpack_awq(words)
    return pack_codes(_unpack_awq(packed), bits), (f"{prefix}.scales", scales), zeros


def _unpack_awq(packed: Tensor) -> Tensor:
    """[R, W] int32 -> [R, 8 W] uint8; a word holds eight columns in AWQ's order."""
    nibbles = torch.empty(*packed.shape, len(_AWQ_ORDER), dtype=torch.uint8)
    for nibble, column in enumerate(_AWQ_ORDER):
        nibbles[..., column] = (packed >> (4 * nibble)) & 0xF
    return nibbles.flatten(1)


def _read_compressed(source: TensorSource, layer: LayerShape, config: QuantConfig) -> _Parts:
    prefix, bits, columns = layer.prefix, layer.module.bits, layer.out_features
    shape = source.take_raw(f"{prefix}.weight_shape", INDEX_DTYPES, (2,)).tolist()
    if shape != [columns, layer.in_features]:
        expected = [columns, layer.in_features]
        raise source.error(f"{prefix}.weight_shape", f"is {shape}, expected {expected}")
    old = bits == 3 and _is_old(source, layer)
    packed = _take_stream(
        source, f"{prefix}.weight_packed", bits, (columns, layer.in_features), along=1, old=old
    )
    scales = source.take_raw(f"{prefix}.weight_scale", FLOAT_DTYPES, (columns, layer.groups))
    zeros = torch.full((layer.groups, columns), 1 << (bits - 1), dtype=torch.uint8)
    if not layer.module.sym:
        words = _take_stream(
            source, f"{prefix}.weight_zero_point", bits, (columns, layer.groups), along=0, old=old
        )
        zeros = unpack_codes(words, bits, columns).t().contiguous()
    return packed, (f"{prefix}.weight_scale", scales.t().contiguous()), zeros


def _is_old(source: TensorSource, layer: LayerShape) -> bool:
    """Whether 3-bit words hold ten codes each. Some sizes take as many words in either layout:
    the codes tell where the zero points do not, and the other way round.
    """
    sizes = {"weight_packed": (1, layer.in_features), "weight_zero_point": (0, layer.out_features)}
    for suffix, (along, size) in sizes.items():
        name = f"{layer.prefix}.{suffix}"
        found = source.shape(name)[along : along + 1] if name in source else ()
        if found == (-(-size // _OLD_CODES_PER_WORD),) != (packed_rows(size, 3),):
            return True
    return False


def _take_stream(
    source: TensorSource, name: str, bits: int, shape: tuple[int, int], *, along: int, old: bool
) -> Tensor:
    """Codes of that shape, packed along one dimension -> [words, others], along the first."""
    num_codes, others = shape[along], shape[1 - along]
    count = -(-num_codes // _OLD_CODES_PER_WORD) if old else packed_rows(num_codes, bits)
    words = source.take_raw(name, (torch.int32,), (others, count) if along else (count, others))
    words = (words.t() if along else words).contiguous()
    return pack_codes(_unpack_old(words, num_codes), bits) if old else words


def _unpack_old(words: Tensor, num_codes: int) -> Tensor:
    """3-bit codes of which a word holds ten, its last two bits empty: [W, C] -> [num_codes, C]."""
    shifts = 3 * torch.arange(_OLD_CODES_PER_WORD, dtype=torch.int32)
    codes = (words[:, None, :] >> shifts[:, None]) & 0b111
    return codes.flatten(0, 1)[:num_codes]


_READERS = {
    "gptq": _read_gptq,
    "gptq_v2": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
}


def _take_order(
    source: TensorSource, layer: LayerShape, config: QuantConfig
) -> tuple[Tensor, int, Tensor] | None:
    """None when the groups lie in order, else (permutation [K], group size, group of each group).

    Groups of unequal sizes become smaller ones of one size that share scales.
    """
    ours = config.checkpoint_format == "compressed-tensors"
    name = f"{layer.prefix}.{'weight_g_idx' if ours else 'g_idx'}"
    if name not in source:
        return None
    g_idx = source.take_raw(name, INDEX_DTYPES, (layer.in_features,)).to(torch.int64)
    if torch.equal(g_idx, torch.arange(layer.in_features) // layer.group_size):
        return None
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= layer.groups:
        raise source.error(name, f"holds groups {low} to {high}, expected 0 to {layer.groups - 1}")
    permutation = torch.argsort(g_idx, stable=True)
    ordered = g_idx[permutation]
    if torch.equal(ordered, torch.arange(layer.in_features) // layer.group_size):
        return permutation, layer.group_size, torch.arange(layer.groups)
    sizes = torch.unique_consecutive(ordered, return_counts=True)[1].tolist()
    # The last group may be shorter than the others, also here.
    size = math.gcd(*sizes[:-1]) if len(sizes) > 1 else layer.in_features
    return permutation, size, ordered[::size]


# writing


def _check_agreement(prefix: str, weight: PackedWeight, module: ModuleConfig) -> None:
    whole = weight.in_features
    size = whole if module.group_size == -1 else module.group_size
    if weight.bits != module.bits or min(weight.group_size, whole) != min(size, whole):
        raise CheckpointError(
            f"{prefix}: has {weight.bits} bits and groups of {weight.group_size}; the quantization "
            f"config says {module.bits} and {module.group_size}"
        )
    if module.sym and not bool((weight.zeros == 1 << (module.bits - 1)).all()):
        raise CheckpointError(f"{prefix}: has asymmetric codes; the quantization config says sym")


def _gptq_tensors(prefix: str, weight: PackedWeight, *, minus_one: bool) -> dict[str, Tensor]:
    zeros = (weight.zeros - 1) & ((1 << weight.bits) - 1) if minus_one else weight.zeros
    qweight, g_idx = weight.qweight, torch.arange(weight.in_features) // weight.group_size
    if weight.input_permutation is not None:
        order = torch.argsort(weight.input_permutation)
        codes = unpack_codes(qweight, weight.bits, weight.in_features)
        qweight, g_idx = pack_codes(codes[order], weight.bits), g_idx[order]
    tensors = {
        f"{prefix}.qweight": qweight,
        f"{prefix}.qzeros": pack_zeros(zeros, weight.bits),
        f"{prefix}.scales": _exact_scales(prefix, weight.scales, torch.float16),
        f"{prefix}.g_idx": g_idx.to(torch.int32),
    }
    return tensors | _bias(prefix, weight, torch.float16)


def _compressed_tensors(
    prefix: str, weight: PackedWeight, module: ModuleConfig, scale_dtype: torch.dtype
) -> dict[str, Tensor]:
    if weight.input_permutation is not None:
        raise CheckpointError(f"{prefix}: compressed-tensors holds no activation order (g_idx)")
    tensors = {
        f"{prefix}.weight_packed": weight.qweight.t().contiguous(),
        f"{prefix}.weight_scale": _held(weight.scales, scale_dtype).t().contiguous(),
        f"{prefix}.weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not module.sym:
        zeros = pack_codes(weight.zeros.t(), weight.bits)
        tensors[f"{prefix}.weight_zero_point"] = zeros
    return tensors | _bias(prefix, weight, scale_dtype)


def _exact_scales(prefix: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    held = scales.to(dtype)
    changed = held.to(torch.float32) != scales.to(torch.float32)
    if bool(changed.any()):
        worst = float(scales[changed].abs().max())
        raise CheckpointError(f"{prefix}: fp16 cannot hold its scale {worst:g} exactly")
    return held


def _held(values: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype` where that changes nothing, else as they are: a reader may round, a file not."""
    held = values.to(dtype)
    return held if torch.equal(held.to(torch.float32), values.to(torch.float32)) else values


def _bias(prefix: str, weight: PackedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    return {} if weight.bias is None else {f"{prefix}.bias": _held(weight.bias, dtype)}
