"""THE bit layouts: GPTQ words <-> integer codes, and the form every backend repacks from.

Pure torch, no device code. A code is an unsigned integer of `bits` bits; a packed tensor is one
little-endian bit stream of codes along its first dimension, cut into 32-bit words (GPTQ v1/v2;
for 3 bits a code may straddle two words). Shapes: K input features, N output features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUPPORTED_BITS = (2, 3, 4, 8)
WORD_BITS = 32

# A tensor core's left operand is 16 rows (outputs) by 16 columns (inputs) over 32 lanes.
FRAGMENT_ROWS = 16
LANES = 32
K_WIDTHS = (2, 4)  # neighbouring inputs in a lane: 2 for wgmma (sm_90), 4 for mma.sync
FRAGMENT_K_MULTIPLE = 128
FRAGMENT_N_MULTIPLE = 128
_SLAB_OUTPUTS = 512  # outputs that are shuffled at once: bounds what loading a layer takes


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A quantized linear layer in canonical form.

    W[k, n] = scales[g, n] * (code[k, n] - zeros[g, n]), where g = k // group_size is the group of
    row k; the last group may be short. Whatever convention the checkpoint used for zero points or
    `g_idx` is resolved before this object exists.
    """

    bits: int
    group_size: int  # input rows that share a scale; never -1
    in_features: int  # K
    out_features: int  # N
    qweight: Tensor  # [ceil(K * bits / 32), N] int32, codes packed along K
    scales: Tensor  # [G, N] float16, bfloat16 or float32
    zeros: Tensor  # [G, N] uint8, true zero points
    input_permutation: Tensor | None = None  # [K] int64: the layer reads x[..., permutation]
    bias: Tensor | None = None  # [N]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseWeight:
    """A linear layer that is not quantized: y = x @ weight.T + bias."""

    weight: Tensor  # [N, K]
    bias: Tensor | None = None  # [N]


LinearWeight = PackedWeight | DenseWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedEmbedding:
    """A quantized table of V rows with C features, looked up without unpacking the rest.

    `by_row`: the table is the matrix [N = V, K = C] of `weight`, groups lie inside a row
    (compressed-tensors). Else it is that matrix transposed, [K = V, N = C]: groups are of rows that
    share a scale per feature (GPTQModel).
    """

    weight: PackedWeight
    by_row: bool

    def to(self, device: torch.device) -> PackedEmbedding:
        return replace(self, weight=move(self.weight, device))

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of token ids [T], dequantized: [T, C] float32."""
        if self.by_row:
            return dequantize(select_outputs(self.weight, ids))
        return dequantize_inputs(self.weight, ids)

    def as_linear(self) -> LinearWeight:
        """The table as the layer that makes logits: x @ table.T."""
        if self.by_row:
            return self.weight
        return DenseWeight(weight=dequantize(self.weight).t().contiguous())


EmbeddingWeight = PackedEmbedding | Tensor  # a dense table is [V, C]


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentWeight:
    """A quantized linear layer in the order in which tensor cores take their left operand.

    N and K are padded to multiples of 128 with codes that stand for 0 x scale 0. A plane holds
    1, 2, 4 or 8 bits of every code; 3 bits are a plane of the low 2 and a plane of the high 1.
    A tile is 16 outputs by `tile_inputs(bits)` inputs, in it each of the 32 lanes owns
    neighbouring words: 16 bytes, 8 in the plane of 1 bit.

    Lane 4 g + t holds the codes of outputs g and g + 8; they come in pairs of neighbouring
    inputs, pair s = 4 f + 2 c + r of a tile being output 8 r + g and inputs
        16 f + 8 c + 2 t + {0, 1}  where k_width is 2 (wgmma),
        16 f + 4 t + 2 c + {0, 1}  where it is 4 (mma.sync).
    A plane of b bits has pair s in word s // (16 / b), at bits b (s % (16 / b)) and 16 above. The
    plane of 1 bit has, of the 16 pairs 8 a + 4 b + c of a word, each at bit 8 a + 2 c + b: as far
    apart as in the plane of 2 bits, so that one shift serves four.
    """

    bits: int
    group_size: int  # a multiple of 16
    in_features: int  # K without padding
    out_features: int  # N without padding
    k_width: int
    planes: tuple[Tensor, ...]  # low bits first: [N / 16, K / tile, 32, words] int32
    scales: Tensor  # [G, N / 16, 8] int32: 16-bit scales of output g and, above, of g + 8
    scale_dtype: torch.dtype  # float16 or bfloat16
    zeros: Tensor | None  # like scales: 16-bit zero points; None: all are 2 ** (bits - 1)
    input_permutation: Tensor | None  # [K] int32: the layer reads x[..., permutation]
    bias: Tensor | None  # [N without padding], in the dtype of the outputs

    @property
    def padded_in_features(self) -> int:
        return self.planes[0].shape[1] * tile_inputs(self.bits)

    @property
    def padded_out_features(self) -> int:
        return self.planes[0].shape[0] * FRAGMENT_ROWS


def tile_inputs(bits: int) -> int:
    """Inputs of a tile: as many as fill 16 bytes of a lane (3 bits: of its plane of 2)."""
    return {2: 128, 3: 128, 4: 64, 8: 32}[bits]


def num_groups(in_features: int, group_size: int) -> int:
    """Groups along K; `group_size` -1 means one group."""
    return 1 if group_size == -1 else -(-in_features // group_size)


def packed_rows(num_codes: int, bits: int) -> int:
    """32-bit words that hold `num_codes` codes."""
    return -(-num_codes * bits // WORD_BITS)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack along the first dimension: [R, C] integer codes -> [ceil(R * bits / 32), C] int32.

    Raises ValueError for an unsupported width or a code outside [0, 2**bits).
    """
    _check_bits(bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 1 << bits):
        raise ValueError(f"codes must lie in [0, {(1 << bits) - 1}] for {bits} bits")
    rows, columns = codes.shape
    num_words = packed_rows(rows, bits)
    padding = -rows % WORD_BITS
    # A period of 32 codes fills exactly `bits` words, so one pass per code of the period suffices.
    periods = torch.nn.functional.pad(codes.to(torch.int64), (0, 0, 0, padding)).view(
        -1, WORD_BITS, columns
    )
    words = torch.zeros(periods.shape[0], bits, columns, dtype=torch.int64, device=codes.device)
    for j in range(WORD_BITS):
        word, shift = divmod(j * bits, WORD_BITS)
        words[:, word] |= periods[:, j] << shift
        if shift + bits > WORD_BITS:
            words[:, word + 1] |= periods[:, j] >> (WORD_BITS - shift)
    return _to_int32(words.view(-1, columns)[:num_words])


def unpack_codes(packed: Tensor, bits: int, num_codes: int) -> Tensor:
    """Inverse of `pack_codes`: [words, C] int32 -> [num_codes, C] uint8.

    Raises ValueError when the words cannot hold exactly `num_codes` codes.
    """
    _check_bits(bits)
    num_words, columns = packed.shape
    if num_words != packed_rows(num_codes, bits):
        raise ValueError(
            f"{num_words} packed rows cannot hold {num_codes} codes of {bits} bits; "
            f"expected {packed_rows(num_codes, bits)}"
        )
    words = torch.nn.functional.pad(packed, (0, 0, 0, -num_words % bits)).view(-1, bits, columns)
    codes = torch.empty(words.shape[0], WORD_BITS, columns, dtype=torch.uint8, device=packed.device)
    mask = (1 << bits) - 1
    for j in range(WORD_BITS):
        word, shift = divmod(j * bits, WORD_BITS)
        present = min(bits, WORD_BITS - shift)
        # int32 shifts drag the sign bit along; the mask takes it away again.
        code = (words[:, word] >> shift) & ((1 << present) - 1)
        if present < bits:
            code |= (words[:, word + 1] << present) & mask
        codes[:, j] = code
    return codes.view(-1, columns)[:num_codes].contiguous()


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Pack along N as GPTQ's `qzeros`: [G, N] -> [G, ceil(N * bits / 32)] int32."""
    return pack_codes(zeros.t(), bits).t().contiguous()


def unpack_zeros(packed: Tensor, bits: int, out_features: int) -> Tensor:
    """Inverse of `pack_zeros`: [G, words] int32 -> [G, N] uint8."""
    return unpack_codes(packed.t(), bits, out_features).t().contiguous()


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix the packed weight stands for, [N, K], in its original column order."""
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features)
    groups = torch.arange(weight.in_features, device=codes.device) // weight.group_size
    centered = codes.to(torch.float32) - weight.zeros[groups].to(torch.float32)
    rows = centered * weight.scales[groups].to(torch.float32)  # [K, N]
    if weight.input_permutation is not None:
        rows = torch.empty_like(rows).index_copy_(0, weight.input_permutation, rows)
    return rows.t().contiguous().to(dtype)


def select_outputs(weight: PackedWeight, outputs: Tensor) -> PackedWeight:
    """The layer that has only those outputs, in that order; `outputs` [R] int64."""
    return replace(
        weight,
        out_features=len(outputs),
        qweight=weight.qweight[:, outputs],
        scales=weight.scales[:, outputs],
        zeros=weight.zeros[:, outputs],
        bias=None if weight.bias is None else weight.bias[outputs],
    )


def dequantize_inputs(weight: PackedWeight, inputs: Tensor) -> Tensor:
    """What each of those inputs adds to the outputs: `inputs` [R] int64 -> [R, N] float32.

    Raises ValueError for a weight with an input permutation.
    """
    if weight.input_permutation is not None:
        raise ValueError("a weight with an input permutation has no rows to look up")
    word, shift = inputs * weight.bits // WORD_BITS, inputs * weight.bits % WORD_BITS
    following = (word + 1).clamp(max=weight.qweight.shape[0] - 1)  # a code may straddle two words
    low, high = (weight.qweight[index].to(torch.int64) & 0xFFFFFFFF for index in (word, following))
    codes = ((low | high << WORD_BITS) >> shift[:, None]) & ((1 << weight.bits) - 1)
    groups = inputs // weight.group_size
    centered = codes.to(torch.float32) - weight.zeros[groups].to(torch.float32)
    return centered * weight.scales[groups].to(torch.float32)


def move(weight: PackedWeight, device: torch.device) -> PackedWeight:
    """The same weight on another device."""
    permutation, bias = weight.input_permutation, weight.bias
    return replace(
        weight,
        qweight=weight.qweight.to(device),
        scales=weight.scales.to(device),
        zeros=weight.zeros.to(device),
        input_permutation=None if permutation is None else permutation.to(device),
        bias=None if bias is None else bias.to(device),
    )


def to_fragments(
    weight: PackedWeight, k_width: int, dtype: torch.dtype = torch.float16
) -> FragmentWeight:
    """The layer in fragment order, on the device of its codes.

    Scales keep their 16-bit dtype; those of 32 bits are rounded to `dtype`, which is also that of
    the bias. Raises ValueError for a k_width, group size or permutation that has no such form.
    """
    if k_width not in K_WIDTHS:
        raise ValueError(f"k_width is {k_width}; it must be one of {K_WIDTHS}")
    single_group = weight.group_size >= weight.in_features
    if not single_group and weight.group_size % FRAGMENT_ROWS:
        raise ValueError(
            f"group_size is {weight.group_size}; in fragment order it must be a multiple of "
            f"{FRAGMENT_ROWS}, or at least in_features ({weight.in_features})"
        )
    permutation = weight.input_permutation
    _check_permutation(permutation, weight.in_features)
    padded_k = -(-weight.in_features // FRAGMENT_K_MULTIPLE) * FRAGMENT_K_MULTIPLE
    group_size = padded_k if single_group else weight.group_size
    scale_dtype = dtype if weight.scales.dtype == torch.float32 else weight.scales.dtype
    all_centered = bool((weight.zeros == 1 << (weight.bits - 1)).all())
    groups = num_groups(padded_k, group_size)
    return FragmentWeight(
        bits=weight.bits,
        group_size=group_size,
        in_features=weight.in_features,
        out_features=weight.out_features,
        k_width=k_width,
        planes=_fragment_planes(weight, padded_k, k_width),
        scales=_row_pairs(weight.scales.to(scale_dtype).view(torch.int16), groups),
        scale_dtype=scale_dtype,
        zeros=None if all_centered else _row_pairs(weight.zeros.to(torch.int16), groups),
        input_permutation=None if permutation is None else permutation.to(torch.int32),
        bias=None if weight.bias is None else weight.bias.to(dtype),
    )


def _check_permutation(permutation: Tensor | None, in_features: int) -> None:
    if permutation is None:
        return
    expected = torch.arange(in_features, device=permutation.device)
    if permutation.shape != expected.shape or not torch.equal(permutation.sort().values, expected):
        raise ValueError(
            f"input_permutation must hold every input of [0, {in_features}) once; "
            f"it has {permutation.numel()} entries"
        )


def _fragment_planes(weight: PackedWeight, padded_k: int, k_width: int) -> tuple[Tensor, ...]:
    plane_bits = (2, 1) if weight.bits == 3 else (weight.bits,)
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features)
    padding_n = -weight.out_features % FRAGMENT_N_MULTIPLE
    codes = torch.nn.functional.pad(codes, (0, padding_n, 0, padded_k - weight.in_features))
    slabs: list[list[Tensor]] = [[] for _ in plane_bits]
    for slab in codes.split(_SLAB_OUTPUTS, dim=1):
        pairs = _lane_pairs(slab.t(), tile_inputs(weight.bits), k_width)
        lowest = 0
        for planes, bits in zip(slabs, plane_bits, strict=True):
            planes.append(_pack_pairs(pairs >> lowest & (1 << bits) - 1, bits))
            lowest += bits
    return tuple(torch.cat(planes) for planes in slabs)


def _lane_pairs(codes: Tensor, tile: int, k_width: int) -> Tensor:
    """[N, K] codes -> [N / 16, K / tile, 32, pairs of a lane, 2]."""
    num_outputs, num_inputs = codes.shape
    outputs, inputs = num_outputs // FRAGMENT_ROWS, num_inputs // tile
    if k_width == 2:
        split = codes.reshape(outputs, 2, 8, inputs, tile // 16, 2, 4, 2)  # n r g k f c t p
        ordered = split.permute(0, 3, 2, 6, 4, 5, 1, 7)
    else:
        split = codes.reshape(outputs, 2, 8, inputs, tile // 16, 4, 2, 2)  # n r g k f t c p
        ordered = split.permute(0, 3, 2, 5, 4, 6, 1, 7)
    return ordered.reshape(outputs, inputs, LANES, tile // 4, 2)  # n k (g t) (f c r) p


def _pack_pairs(pairs: Tensor, bits: int) -> Tensor:
    """[..., pairs, 2] codes of `bits` bits -> [..., words] int32."""
    if bits == 1:
        pairs = pairs.unflatten(-2, (-1, 2, 4)).transpose(-3, -2).flatten(-4, -2)
    per_word = 16 // bits
    shifts = bits * torch.arange(per_word)[:, None] + torch.tensor([0, 16])
    words = pairs.unflatten(-2, (-1, per_word)).to(torch.int64) << shifts.to(pairs.device)
    return _to_int32(words.sum((-2, -1)))


def _row_pairs(rows: Tensor, groups: int) -> Tensor:
    """[G, N] int16 -> [groups, N / 16, 8] int32, outputs g and g + 8 of a tile in one word."""
    padding = (0, -rows.shape[1] % FRAGMENT_N_MULTIPLE, 0, groups - rows.shape[0])
    low, high = (
        torch.nn.functional.pad(rows, padding)
        .to(torch.int64)
        .unflatten(1, (-1, 2, FRAGMENT_ROWS // 2))
        .unbind(2)
    )
    return _to_int32(low & 0xFFFF | (high & 0xFFFF) << 16)


def concatenate(weights: list[PackedWeight]) -> PackedWeight:
    """Stack layers that read the same input along N, so that one product serves them all.

    Raises ValueError when bits, group size, K or the input permutation differ.
    """
    first = weights[0]
    for other in weights[1:]:
        if not fits_beside(first, other):
            raise ValueError(
                f"(bits, group_size, in_features) {_form(first)} and {_form(other)} "
                f"cannot share one matrix"
            )
    has_bias = any(w.bias is not None for w in weights)
    biases = [
        torch.zeros(w.out_features, device=w.qweight.device) if w.bias is None else w.bias
        for w in weights
    ]
    return PackedWeight(
        bits=first.bits,
        group_size=first.group_size,
        in_features=first.in_features,
        out_features=sum(w.out_features for w in weights),
        qweight=torch.cat([w.qweight for w in weights], dim=1),
        scales=torch.cat([w.scales for w in weights], dim=1),
        zeros=torch.cat([w.zeros for w in weights], dim=1),
        input_permutation=first.input_permutation,
        bias=torch.cat(biases) if has_bias else None,
    )


def fits_beside(a: PackedWeight, b: PackedWeight) -> bool:
    """Whether `concatenate` takes both: bits, group size, K and input permutation agree."""
    return _form(a) == _form(b) and _same_permutation(a, b)


def _form(weight: PackedWeight) -> tuple[int, int, int]:
    return weight.bits, weight.group_size, weight.in_features


def _same_permutation(a: PackedWeight, b: PackedWeight) -> bool:
    if a.input_permutation is None or b.input_permutation is None:
        return a.input_permutation is b.input_permutation
    return torch.equal(a.input_permutation, b.input_permutation)


def _check_bits(bits: int) -> None:
    if bits not in SUPPORTED_BITS:
        raise ValueError(f"bits is {bits}; supported are {', '.join(map(str, SUPPORTED_BITS))}")


def _to_int32(words: Tensor) -> Tensor:
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    return signed.to(torch.int32).contiguous()
