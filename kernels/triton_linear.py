"""Low-bit linear layers on NVIDIA GPUs: y = x W^T + b (+ residual), dequantized in registers.

Three tiers by the number of rows M, over one copy of the weights in fragment order
(`packing.FragmentWeight`):
  - a few rows: products and sums in fp32 on the ordinary cores (`_gemv_kernel`);
  - up to about 192: tensor cores, the weights as the left operand so that what is dequantized
    stays in registers (`_gemm_kernel`);
  - more: slices of W are dequantized to memory and multiplied by cuBLAS (`_dequantize_kernel`).
The first two cut K into parts that depend on N, K and the GPU alone, and add them up in a fixed
order (`_reduce_kernel`): equal inputs give equal bits, whatever else is in the batch of a tier.
A kernel is compiled for a width and a block of rows, not for each number of rows or layer.

Codes become numbers two at a time: the bits of a code, put below those of 1024 (fp16) or 128
(bf16), are 1024 + code or 128 + code (Kim et al. 2022, "Who says elephants can't run").
The products are of integers; a scale is applied to the fp32 sum of its group, or, where a
group is smaller than a tile, to the weights before the product.

Shapes: M rows, K inputs, N outputs, G groups, S parts of K.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import FragmentWeight, PackedWeight, move, tile_inputs, to_fragments
from .triton_launch import interpreted, on_device_of
from .tuning import BLOCK_K, GpuTuning, default_tuning, load_tuning, row_block

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_WEIGHT_SLICE_BYTES = 64 << 20  # of dequantized weights at a time, beyond the tensor-core tier
_REDUCE_BLOCK = 1024
DEQUANTIZE_N = 64  # outputs per program


@triton.jit
def _selected_halves(
    words,
    high,
    MASK: tl.constexpr,
    HIGH_MASK: tl.constexpr,  # 0: there is no high plane
    ONES: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """The 16-bit halves of (words & MASK) | (high & HIGH_MASK) | ONES.

    In PTX because the compiler makes two instructions of one `lop3`, and repacks halves that it
    took apart itself.
    """
    if PTX:
        if HIGH_MASK == 0:
            low, upper = tl.inline_asm_elementwise(
                "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xEA; mov.b32 {$0, $1}, t; }",
                "=h,=h,r,n,r",
                [words, MASK, ONES],
                dtype=(tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
        else:
            low, upper = tl.inline_asm_elementwise(
                "{ .reg .b32 t; lop3.b32 t, $2, $3, $4, 0xEA; lop3.b32 t, $5, $6, t, 0xEA; "
                "mov.b32 {$0, $1}, t; }",
                "=h,=h,r,n,r,r,n",
                [words, MASK, ONES, high, HIGH_MASK],
                dtype=(tl.int16, tl.int16),
                is_pure=True,
                pack=1,
            )
    else:
        pair = (words & MASK) | (high & HIGH_MASK) | ONES
        low, upper = (pair & 0xFFFF).to(tl.int16), (pair >> 16).to(tl.int16)
    return low.to(DTYPE, bitcast=True), upper.to(DTYPE, bitcast=True)


@triton.jit
def _byte_as_bf16(words, SHIFT: tl.constexpr):
    """bf16 counts to 256 only: code - 128 through the fp32 numbers 2 ** 23 + code."""
    code = ((words >> SHIFT) & 0xFF) | 0x4B000000
    return (code.to(tl.float32, bitcast=True) - 8388736.0).to(tl.bfloat16)


@triton.jit
def _pair(
    words,
    high,
    INDEX: tl.constexpr,  # of the pair among the 16 / BITS of a word (3 bits: among 16)
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """code - 2 ** (BITS - 1) of both codes of a pair in every word: [..., p]."""
    if BITS == 8 and DTYPE == tl.bfloat16:
        return tl.join(_byte_as_bf16(words, 8 * INDEX), _byte_as_bf16(words, 8 * INDEX + 16))
    else:
        # The mantissa has room for a few codes side by side, each of which is masked where it
        # stands; a shift brings the next few.
        STRIDE: tl.constexpr = 2 if BITS == 3 else BITS
        MANTISSA: tl.constexpr = 10 if DTYPE == tl.float16 else 7
        ROOM: tl.constexpr = (MANTISSA - BITS) // STRIDE + 1
        IN_WORD: tl.constexpr = INDEX % 8
        AT: tl.constexpr = STRIDE * (IN_WORD % ROOM)
        MASK: tl.constexpr = (((1 << STRIDE) - 1) * 0x00010001) << AT
        HIGH_MASK: tl.constexpr = (0x00040004 << AT) if BITS == 3 else 0
        if BITS == 3:
            HIGH_AT: tl.constexpr = 2 * (IN_WORD % 4) + IN_WORD // 4 + (INDEX - IN_WORD)
            if HIGH_AT >= AT + 2:
                high = high >> (HIGH_AT - AT - 2)
            else:
                high = high << (AT + 2 - HIGH_AT)
        ONES: tl.constexpr = 0x64006400 if DTYPE == tl.float16 else 0x43004300
        low, upper = _selected_halves(
            words >> (STRIDE * IN_WORD - AT), high, MASK, HIGH_MASK, ONES, DTYPE, PTX
        )
        UNIT: tl.constexpr = 1.0 / (1 << AT)
        OFFSET: tl.constexpr = (1024 if DTYPE == tl.float16 else 128) * UNIT + (1 << (BITS - 1))
        return tl.join(low, upper) * UNIT - OFFSET


@triton.jit
def _two(
    words, high, FIRST: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """Pairs FIRST and FIRST + 1 of every word: [..., p, r]."""
    a = _pair(words, high, FIRST, BITS, DTYPE, PTX)
    b = _pair(words, high, FIRST + 1, BITS, DTYPE, PTX)
    return tl.join(a, b)


@triton.jit
def _four(
    words, high, FIRST: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """Pairs FIRST to FIRST + 3: [..., p, r, c]."""
    a = _two(words, high, FIRST, BITS, DTYPE, PTX)
    b = _two(words, high, FIRST + 2, BITS, DTYPE, PTX)
    return tl.join(a, b)


@triton.jit
def _eight(
    words, high, FIRST: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr
):
    """Pairs FIRST to FIRST + 7: [..., p, r, c, f]."""
    a = _four(words, high, FIRST, BITS, DTYPE, PTX)
    b = _four(words, high, FIRST + 4, BITS, DTYPE, PTX)
    return tl.join(a, b)


@triton.jit
def _fragments(
    words,
    high,
    NT: tl.constexpr,
    KT: tl.constexpr,
    BITS: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Centered codes of NT x KT tiles: [NT, KT, 8 g, 4 t, f, 2 r, 2 c, 2 p].

    From words [NT, KT, 128] and, for 3 bits, high [NT, KT, 64]. The letters are those of
    `FragmentWeight`; f, r, c and p stand for registers of a lane, so that reordering them costs
    nothing.
    """
    if BITS == 8:  # words are (f, c)
        codes = tl.reshape(_two(words, high, 0, BITS, DTYPE, PTX), (NT, KT, 8, 4, 2, 2, 2, 2))
        return tl.permute(codes, (0, 1, 2, 3, 4, 7, 5, 6))  # was n k g t f c p r
    elif BITS == 4:  # words are f
        codes = tl.reshape(_four(words, high, 0, BITS, DTYPE, PTX), (NT, KT, 8, 4, 4, 2, 2, 2))
        return tl.permute(codes, (0, 1, 2, 3, 4, 6, 7, 5))  # was n k g t f p r c
    elif BITS == 2:  # words are f / 2
        codes = tl.reshape(_eight(words, high, 0, BITS, DTYPE, PTX), (NT, KT, 8, 4, 4, 2, 2, 2, 2))
        codes = tl.permute(codes, (0, 1, 2, 3, 4, 8, 6, 7, 5))  # was n k g t f/2 p r c f%2
        return tl.reshape(codes, (NT, KT, 8, 4, 8, 2, 2, 2))
    else:  # words are f / 2; one of the high plane serves two of them
        even, odd = tl.split(tl.reshape(words, (NT, KT, 64, 2)))
        a = _eight(even, high, 0, BITS, DTYPE, PTX)
        b = _eight(odd, high, 8, BITS, DTYPE, PTX)
        codes = tl.reshape(tl.join(a, b), (NT, KT, 8, 4, 2, 2, 2, 2, 2, 2))
        codes = tl.permute(codes, (0, 1, 2, 3, 4, 9, 8, 6, 7, 5))  # was .. f/4 p r c f%2 f/2%2
        return tl.reshape(codes, (NT, KT, 8, 4, 8, 2, 2, 2))


@triton.jit
def _as_matrix(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K_WIDTH: tl.constexpr):
    """Fragments [n, k, g, t, f, r, c, p] -> [ROWS, COLUMNS]."""
    if K_WIDTH == 2:
        codes = tl.permute(codes, (0, 5, 2, 1, 4, 6, 3, 7))  # n r g k f c t p
    else:
        codes = tl.permute(codes, (0, 5, 2, 1, 4, 3, 6, 7))  # n r g k f t c p
    return tl.reshape(codes, (ROWS, COLUMNS))


@triton.jit
def _rows_of_pairs(low, high, NT: tl.constexpr, SEGMENTS: tl.constexpr):
    """Values of outputs g and g + 8 [NT, 8, SEGMENTS] -> [16 NT, SEGMENTS]."""
    joined = tl.permute(tl.join(low, high), (0, 3, 1, 2))
    return tl.reshape(joined, (NT * 16, SEGMENTS))


@triton.jit
def _scale_rows(pairs, NT: tl.constexpr, SEGMENTS: tl.constexpr, BF16_SCALES: tl.constexpr):
    """fp32 scales [16 NT, SEGMENTS] from words [NT, 8, SEGMENTS]."""
    if BF16_SCALES:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return _rows_of_pairs(low, high, NT, SEGMENTS)


@triton.jit
def _zero_rows(
    pairs, NT: tl.constexpr, SEGMENTS: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr
):
    """Zero points - 2 ** (BITS - 1), [16 NT, SEGMENTS] from words [NT, 8, SEGMENTS]."""
    CENTER: tl.constexpr = 1 << (BITS - 1)
    low = ((pairs & 0xFFFF) - CENTER).to(tl.float32)
    high = ((pairs >> 16) - CENTER).to(tl.float32)
    return _rows_of_pairs(low, high, NT, SEGMENTS).to(DTYPE)


@triton.jit
def _tile_inputs(BITS: tl.constexpr):
    """`packing.tile_inputs`."""
    return 128 if BITS < 4 else 256 // BITS


@triton.jit
def _load_tile(
    plane,
    high_plane,
    scales,
    zeros,
    first_tile,  # of 16 outputs
    k,  # first input, a multiple of SUB_K
    padded_inputs,
    pairs_stride,  # words of scales per group
    BLOCK_N: tl.constexpr,
    SUB_K: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    ASYM: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """Fragments of BLOCK_N outputs and SUB_K inputs; centered zero points and fp32 scales of them.

    SPAN inputs in a row share a scale, for certain: [BLOCK_N, SUB_K / SPAN]. Without ASYM the
    zero points are not to be used.
    """
    NT: tl.constexpr = BLOCK_N // 16
    TILE: tl.constexpr = _tile_inputs(BITS)
    KT: tl.constexpr = SUB_K // TILE
    SEGMENTS: tl.constexpr = SUB_K // SPAN
    nt = first_tile + tl.arange(0, NT)
    tiles = nt.to(tl.int64)[:, None, None] * (padded_inputs // TILE)
    tiles += (k // TILE + tl.arange(0, KT))[None, :, None]
    words = tl.load(plane + tiles * 128 + tl.arange(0, 128)[None, None, :])
    high = words
    if BITS == 3:
        high = tl.load(high_plane + tiles * 64 + tl.arange(0, 64)[None, None, :])
    fragments = _fragments(words, high, NT, KT, BITS, DTYPE, PTX)

    group = (k + SPAN * tl.arange(0, SEGMENTS)) // GROUP
    pairs = (nt[:, None] * 8 + tl.arange(0, 8)[None, :])[:, :, None]
    pairs = pairs + group.to(tl.int64)[None, None, :] * pairs_stride
    scale = _scale_rows(tl.load(scales + pairs), NT, SEGMENTS, BF16_SCALES)
    zero = scale
    if ASYM:
        zero = _zero_rows(tl.load(zeros + pairs), NT, SEGMENTS, BITS, DTYPE)
    return fragments, zero, scale


@triton.jit
def _codes_matrix(
    fragments,
    zero,
    BLOCK_N: tl.constexpr,
    SUB_K: tl.constexpr,
    SPAN: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ASYM: tl.constexpr,
):
    """code - zero point, [BLOCK_N, SUB_K]."""
    codes = _as_matrix(fragments, BLOCK_N, SUB_K, K_WIDTH)
    if ASYM:
        segments = tl.reshape(codes, (BLOCK_N, SUB_K // SPAN, SPAN)) - zero[:, :, None]
        codes = tl.reshape(segments, (BLOCK_N, SUB_K))
    return codes


@triton.jit
def _scaled(
    codes,
    scale,
    BLOCK_N: tl.constexpr,
    SUB_K: tl.constexpr,
    SPAN: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The weights [BLOCK_N, SUB_K] themselves, rounded once."""
    segments = tl.reshape(codes, (BLOCK_N, SUB_K // SPAN, SPAN))
    if BF16_SCALES == (DTYPE == tl.bfloat16):
        segments = segments * scale.to(DTYPE)[:, :, None]
    else:
        segments = (segments.to(tl.float32) * scale[:, :, None]).to(DTYPE)
    return tl.reshape(segments, (BLOCK_N, SUB_K))


@triton.jit
def _store_rows(
    acc,  # [BLOCK_N, BLOCK_M] fp32
    y,
    bias,
    residual,
    rows,
    columns,
    part,
    num_rows,
    num_outputs,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """To y [M, N], or to the part's plane of it [S, M, N] in fp32."""
    inside = (rows < num_rows)[None, :] & (columns < num_outputs)[:, None]
    offsets = rows[None, :].to(tl.int64) * num_outputs + columns[:, None]
    if SPLIT:
        plane = part.to(tl.int64) * num_rows * num_outputs
        tl.store(y + plane + offsets, acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + columns, mask=columns < num_outputs, other=0.0).to(tl.float32)[
                :, None
            ]
        if HAS_RESIDUAL:
            acc += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "blocks_per_part"])
def _gemm_kernel(
    x,  # [M, K], rows x_stride apart
    plane,
    high_plane,
    scales,
    zeros,
    bias,
    residual,
    y,
    num_rows,
    num_inputs,
    padded_inputs,
    num_outputs,
    pairs_stride,
    x_stride,
    blocks_per_part,  # of BLOCK_K inputs
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB_K: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ASYM: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,  # K is cut into parts, which `_reduce_kernel` adds up
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile [BLOCK_N, BLOCK_M] of W x^T over one part of K, on tensor cores."""
    first_tile = tl.program_id(0) * (BLOCK_N // 16)
    part = tl.program_id(1)
    rows = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = part * blocks_per_part * BLOCK_K
    end = tl.minimum(begin + blocks_per_part * BLOCK_K, padded_inputs)
    x_rows = x + rows.to(tl.int64)[None, :] * x_stride
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        for sub in tl.static_range(BLOCK_K // SUB_K):
            k = block + sub * SUB_K
            inputs = k + tl.arange(0, SUB_K)
            inside = (rows < num_rows)[None, :]
            if not EVEN_K:
                inside = inside & (inputs < num_inputs)[:, None]
            xt = tl.load(x_rows + inputs[:, None], mask=inside, other=0.0)
            fragments, zero, scale = _load_tile(
                plane, high_plane, scales, zeros, first_tile, k, padded_inputs, pairs_stride,
                BLOCK_N, SUB_K, SPAN, GROUP, BITS, ASYM, BF16_SCALES, DTYPE, PTX,
            )  # fmt: skip
            codes = _codes_matrix(fragments, zero, BLOCK_N, SUB_K, SPAN, K_WIDTH, ASYM)
            if SPAN == SUB_K:
                acc += tl.dot(codes, xt) * scale
            else:
                weights = _scaled(codes, scale, BLOCK_N, SUB_K, SPAN, BF16_SCALES, DTYPE)
                acc = tl.dot(weights, xt, acc)
    columns = first_tile * 16 + tl.arange(0, BLOCK_N)
    _store_rows(
        acc, y, bias, residual, rows, columns, part, num_rows, num_outputs,
        SPLIT, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "blocks_per_part"])
def _gemv_kernel(
    x,  # [M, K], rows x_stride apart
    plane,
    high_plane,
    scales,
    zeros,
    bias,
    residual,
    y,
    num_rows,
    num_inputs,
    padded_inputs,
    num_outputs,
    pairs_stride,
    x_stride,
    blocks_per_part,  # of BLOCK_K inputs
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB_K: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ASYM: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,  # K is cut into parts, which `_reduce_kernel` adds up
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_N outputs of one row over one part of K, in fp32 on the ordinary cores.

    Lanes sum what they hold; the four lanes that share an output meet once, at the end.
    """
    LANE_K: tl.constexpr = SUB_K // 4
    LANE_SPAN: tl.constexpr = SPAN // 4
    first_tile = tl.program_id(0) * (BLOCK_N // 16)
    part = tl.program_id(1)
    row = tl.program_id(2)
    begin = part * blocks_per_part * BLOCK_K
    end = tl.minimum(begin + blocks_per_part * BLOCK_K, padded_inputs)
    x_row = x + row.to(tl.int64) * x_stride
    in_lane = tl.arange(0, LANE_K)
    lane = tl.arange(0, 4)
    if K_WIDTH == 2:
        offsets = in_lane // 4 * 16 + in_lane // 2 % 2 * 8 + in_lane % 2
        lane_inputs = (2 * lane)[:, None] + offsets[None, :]
    else:
        offsets = in_lane // 4 * 16 + in_lane % 4
        lane_inputs = (4 * lane)[:, None] + offsets[None, :]
    acc = tl.zeros((BLOCK_N, 4), tl.float32)
    for block in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        for sub in tl.static_range(BLOCK_K // SUB_K):
            k = block + sub * SUB_K
            inputs = k + lane_inputs
            if EVEN_K:
                x_lanes = tl.load(x_row + inputs).to(tl.float32)
            else:
                x_lanes = tl.load(x_row + inputs, mask=inputs < num_inputs, other=0.0)
                x_lanes = x_lanes.to(tl.float32)
            fragments, zero, scale = _load_tile(
                plane, high_plane, scales, zeros, first_tile, k, padded_inputs, pairs_stride,
                BLOCK_N, SUB_K, SPAN, GROUP, BITS, ASYM, BF16_SCALES, DTYPE, PTX,
            )  # fmt: skip
            codes = tl.permute(fragments, (0, 5, 2, 3, 1, 4, 6, 7))  # n r g t k f c p
            codes = tl.reshape(codes, (BLOCK_N, 4, SUB_K // SPAN, LANE_SPAN))
            if ASYM:
                codes = codes - zero[:, None, :, None]
            codes = codes.to(tl.float32)
            if SPAN == SUB_K:
                codes = tl.reshape(codes, (BLOCK_N, 4, LANE_K))
                acc += tl.sum(codes * x_lanes[None, :, :], axis=2) * scale
            else:
                weights = tl.reshape(codes * scale[:, None, :, None], (BLOCK_N, 4, LANE_K))
                acc += tl.sum(weights * x_lanes[None, :, :], axis=2)
    columns = first_tile * 16 + tl.arange(0, BLOCK_N)
    _store_rows(
        tl.sum(acc, axis=1)[:, None], y, bias, residual, row + tl.arange(0, 1), columns, part,
        num_rows, num_outputs, SPLIT, HAS_BIAS, HAS_RESIDUAL,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _reduce_kernel(
    planes,  # [S, M, N] fp32
    bias,
    residual,
    y,
    num_rows,
    num_outputs,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """y = the planes, added up first to last, + bias + residual."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = columns < num_outputs
    offsets = row * num_outputs + columns
    acc = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        plane = tl.full((), part, tl.int64) * num_rows * num_outputs
        acc += tl.load(planes + plane + offsets, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        acc += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + offsets, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_output", "slice_outputs"])
def _dequantize_kernel(
    plane,
    high_plane,
    scales,
    zeros,
    w,  # [rows of the slice, K]
    first_output,  # of the slice, a multiple of BLOCK_N
    num_inputs,
    padded_inputs,
    slice_outputs,
    pairs_stride,
    BLOCK_N: tl.constexpr,
    SUB_K: tl.constexpr,
    SPAN: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    K_WIDTH: tl.constexpr,
    ASYM: tl.constexpr,
    BF16_SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
):
    """A tile [BLOCK_N, SUB_K] of the weights themselves."""
    k = tl.program_id(0) * SUB_K
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_tile = (first_output + tl.program_id(1) * BLOCK_N) // 16
    fragments, zero, scale = _load_tile(
        plane, high_plane, scales, zeros, first_tile, k, padded_inputs, pairs_stride,
        BLOCK_N, SUB_K, SPAN, GROUP, BITS, ASYM, BF16_SCALES, DTYPE, PTX,
    )  # fmt: skip
    codes = _codes_matrix(fragments, zero, BLOCK_N, SUB_K, SPAN, K_WIDTH, ASYM)
    weights = _scaled(codes, scale, BLOCK_N, SUB_K, SPAN, BF16_SCALES, DTYPE)
    inputs = k + tl.arange(0, SUB_K)
    inside = (outputs < slice_outputs)[:, None] & (inputs < num_inputs)[None, :]
    tl.store(w + outputs.to(tl.int64)[:, None] * num_inputs + inputs[None, :], weights, mask=inside)


def prepare(
    weight: PackedWeight, device: torch.device, dtype: torch.dtype, k_width: int | None = None
) -> FragmentWeight:
    """The layer in the order that the device's tensor cores take; `k_width` forces one.

    Raises ValueError for a layer or device that the kernels cannot serve.
    """
    _check_dtype("dtype", dtype)
    _check_device("device", device)
    width = tuning_of(device).k_width if k_width is None else k_width
    return to_fragments(move(weight, device), width, dtype)


def linear(x: Tensor, layer: FragmentWeight, residual: Tensor | None = None) -> Tensor:
    """x W^T + bias (+ residual): [M, K] -> [M, N], float16 or bfloat16.

    `x` is in the layer's own order of inputs: who has a permutation applies it before, see
    `packing.FragmentWeight.input_permutation`. Raises ValueError naming the argument.
    """
    _check_input(x, layer)
    if residual is not None:
        _check_residual(residual, x, layer)
        residual = residual.contiguous()
    y: Tensor = _linear(
        x if x.stride(1) == 1 else x.contiguous(),
        list(layer.planes),
        layer.scales,
        layer.zeros,
        layer.bias,
        residual,
        layer.bits,
        layer.group_size,
        layer.out_features,
        layer.k_width,
        layer.scale_dtype == torch.bfloat16,
    )
    return y


def part_sums(x: Tensor, layer: FragmentWeight) -> Tensor | None:
    """x W^T of each part of K [S, M, N] float32, for a kernel that adds them up as it reads them.

    None where K is not cut, or where there would be more to do: then `linear` is the way. Raises
    ValueError naming the argument.
    """
    _check_input(x, layer)
    tuning = tuning_of(x.device)
    tier = tier_of(len(x), tuning)
    num_parts = tuning.num_parts(layer.in_features, layer.out_features)
    if tier == "dequantize" or num_parts == 1 or layer.bias is not None or not len(x):
        return None
    with on_device_of(x):
        return _Launch(
            x if x.stride(1) == 1 else x.contiguous(),
            list(layer.planes),
            layer.scales,
            layer.zeros,
            layer.bits,
            layer.group_size,
            layer.out_features,
            layer.k_width,
            layer.scale_dtype == torch.bfloat16,
        ).sums(tier)


def tier_of(num_rows: int, tuning: GpuTuning) -> str:
    """gemv, gemm or dequantize: which kernels serve that many rows."""
    if num_rows <= tuning.gemv_max_rows:
        return "gemv"
    return "gemm" if num_rows <= tuning.gemm_max_rows else "dequantize"


_tunings: dict[torch.device, GpuTuning] = {}


def tuning_of(device: torch.device) -> GpuTuning:
    """How that device runs the kernels; measured, or the defaults for its generation."""
    if device not in _tunings:
        _tunings[device] = _find_tuning(device)
    return _tunings[device]


@contextlib.contextmanager
def use_tuning(device: torch.device, tuning: GpuTuning) -> Iterator[None]:
    """Run the device's kernels so for a while: for measuring, and for tests."""
    before = tuning_of(device)
    _tunings[device] = tuning
    try:
        yield
    finally:
        _tunings[device] = before


def _find_tuning(device: torch.device) -> GpuTuning:
    if device.type == "cpu":
        return GpuTuning(gpu="interpreter", num_sms=4, k_width=2)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    defaults = default_tuning(properties.name, properties.multi_processor_count, capability)
    return load_tuning(defaults, triton.__version__)


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"{name} is {dtype}; the kernels compute in float16 or bfloat16")


def _check_device(name: str, device: torch.device) -> None:
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
        return
    raise ValueError(
        f"{name} is {device}; the Triton kernels need a CUDA device "
        "(or TRITON_INTERPRET=1, to be tested on the CPU)"
    )


def _check_input(x: Tensor, layer: FragmentWeight) -> None:
    if x.dim() != 2 or x.shape[1] != layer.in_features:
        raise ValueError(f"x is {tuple(x.shape)}; it must be [M, {layer.in_features}]")
    _check_dtype("x.dtype", x.dtype)
    _check_device("x.device", x.device)
    if x.device != layer.scales.device:
        raise ValueError(f"x is on {x.device}; the layer is on {layer.scales.device}")


def _check_residual(residual: Tensor, x: Tensor, layer: FragmentWeight) -> None:
    expected = (x.shape[0], layer.out_features)
    if residual.shape != expected or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}; "
            f"it must be {expected} {x.dtype} on {x.device}"
        )


@torch.library.custom_op("lowbit::linear", mutates_args=())
def _linear(
    x: Tensor,
    planes: list[Tensor],
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    k_width: int,
    bf16_scales: bool,
) -> Tensor:
    launch = _Launch(x, planes, scales, zeros, bits, group_size, out_features, k_width, bf16_scales)
    if x.shape[0] == 0:
        return x.new_empty(0, out_features)
    with on_device_of(x):
        tier = tier_of(x.shape[0], launch.tuning)
        if tier == "dequantize":
            return launch.dequantize_and_multiply(bias, residual)
        return launch.fused(tier, bias, residual)


@_linear.register_fake
def _(
    x: Tensor,
    planes: list[Tensor],
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    bits: int,
    group_size: int,
    out_features: int,
    k_width: int,
    bf16_scales: bool,
) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def tile_constants(
    bits: int,
    group_size: int,
    k_width: int,
    asym: bool,
    bf16_scales: bool,
    dtype: tl.dtype,
    ptx: bool = not interpreted,
) -> dict[str, Any]:
    """The compile-time arguments that say what the weights are."""
    # Inputs that share a scale wherever a step begins: a power of two.
    span = math.gcd(group_size, BLOCK_K)
    return {
        "SUB_K": span if span >= tile_inputs(bits) else BLOCK_K,
        "SPAN": span,
        "GROUP": group_size,
        "BITS": bits,
        "K_WIDTH": k_width,
        "ASYM": asym,
        "BF16_SCALES": bf16_scales,
        "DTYPE": dtype,
        "PTX": ptx,
    }


class _Launch:
    """One call: the arguments that its kernels share."""

    def __init__(
        self,
        x: Tensor,
        planes: list[Tensor],
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group_size: int,
        out_features: int,
        k_width: int,
        bf16_scales: bool,
    ) -> None:
        self.x = x
        self.bits = bits
        self.num_rows, self.in_features = x.shape
        self.out_features = out_features
        self.padded_in = planes[0].shape[1] * tile_inputs(bits)
        self.padded_out = planes[0].shape[0] * 16
        self.tuning = tuning_of(x.device)
        self.num_parts = self.tuning.num_parts(self.in_features, out_features)
        self.weights = (planes[0], planes[-1], scales, scales if zeros is None else zeros)
        self.pairs_stride = self.padded_out // 2
        self.constants = tile_constants(
            bits, group_size, k_width, zeros is not None, bf16_scales, _DTYPES[x.dtype]
        )

    def fused(self, tier: str, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """The gemv or the gemm kernel, and the sum of the parts of K."""
        y = self.x.new_empty(self.num_rows, self.out_features)
        if self.num_parts == 1:
            self._multiply(tier, y, bias, residual)
        else:
            self._reduce(self.sums(tier), y, bias, residual)
        return y

    def sums(self, tier: str) -> Tensor:
        """The gemv or the gemm kernel alone: [S, M, N] float32."""
        size = (self.num_parts, self.num_rows, self.out_features)
        planes = self.x.new_empty(size, dtype=torch.float32)
        self._multiply(tier, planes, None, None)
        return planes

    def _multiply(
        self, tier: str, out: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> None:
        rows = 1 if tier == "gemv" else row_block(self.num_rows)
        kernel = _gemv_kernel if tier == "gemv" else _gemm_kernel
        shape = {} if tier == "gemv" else {"BLOCK_M": rows}
        tile = self.tuning.tile(self.bits, rows)
        blocks = self.padded_in // BLOCK_K
        grid = (self.padded_out // tile.block_n, self.num_parts, -(-self.num_rows // rows))
        kernel[grid](
            self.x,
            *self.weights,
            self.x if bias is None else bias,
            self.x if residual is None else residual,
            out,
            self.num_rows,
            self.in_features,
            self.padded_in,
            self.out_features,
            self.pairs_stride,
            self.x.stride(0),
            -(-blocks // self.num_parts),
            **shape,
            BLOCK_N=tile.block_n,
            BLOCK_K=BLOCK_K,
            **self.constants,
            EVEN_K=self.in_features == self.padded_in,
            SPLIT=self.num_parts > 1,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )

    def _reduce(
        self, planes: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> None:
        _reduce_kernel[(-(-self.out_features // _REDUCE_BLOCK), self.num_rows)](
            planes,
            y if bias is None else bias,
            y if residual is None else residual,
            y,
            self.num_rows,
            self.out_features,
            PARTS=self.num_parts,
            BLOCK=_REDUCE_BLOCK,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
        )

    def dequantize_and_multiply(self, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        """cuBLAS over slices of W, which bound the memory that the weights take for a moment."""
        y = self.x.new_empty(self.num_rows, self.out_features)
        row_bytes = self.in_features * self.x.element_size()
        slice_outputs = max(DEQUANTIZE_N, _WEIGHT_SLICE_BYTES // row_bytes)
        slice_outputs -= slice_outputs % DEQUANTIZE_N
        scratch = self.x.new_empty(min(slice_outputs, self.out_features), self.in_features)
        for first in range(0, self.out_features, slice_outputs):
            w = scratch[: self.out_features - first]
            self._dequantize(w, first)
            torch.mm(self.x, w.t(), out=y[:, first : first + len(w)])
        if bias is not None:
            y += bias
        return y if residual is None else y.add_(residual)

    def _dequantize(self, w: Tensor, first_output: int) -> None:
        step = self.constants["SUB_K"]
        _dequantize_kernel[(self.padded_in // step, -(-len(w) // DEQUANTIZE_N))](
            *self.weights,
            w,
            first_output,
            self.in_features,
            self.padded_in,
            len(w),
            self.pairs_stride,
            BLOCK_N=DEQUANTIZE_N,
            **self.constants,
            num_warps=4,
        )
