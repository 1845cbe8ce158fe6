"""Rotary positions, and what writes keys and values to the paged cache, on NVIDIA GPUs.

One kernel: it turns a head by its position, and rounds it to what the cache holds, with a scale of
its own where that is 8 bits. Keys in int8, and queries alike, are also rotated (see `rotation`):
while they are in registers, so for no byte and no launch more. Those in fp8 are not: a number's
error is in proportion to the number, whatever the scale. A token is stored alike alone and in a
crowd.

Shapes: T tokens in the step, H heads, Hkv key-value heads, D head size, R of it rotated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interface import KVCache
from .rotation import rotation_size
from .triton_attention import stored_numbers
from .triton_launch import on_device_of

# The largest number of a dtype, to which the largest of a head is scaled; 16 bits take no scale.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@triton.jit
def _rotated(x, source, cos, sin, features, ROTARY_HALF: tl.constexpr):
    """x [D] with the halves of its first 2 ROTARY_HALF features rotated against each other."""
    rotary = features < 2 * ROTARY_HALF
    first = features < ROTARY_HALF
    pair = tl.where(first, features, features - ROTARY_HALF)
    partner = tl.where(first, features + ROTARY_HALF, pair)
    other = tl.load(source + partner, mask=rotary, other=0.0).to(tl.float32)
    c = tl.load(cos + pair, mask=rotary, other=1.0)
    s = tl.load(sin + pair, mask=rotary, other=0.0)
    return x * c + tl.where(first, -other, other) * s


@triton.jit
def _spread(x, PADDED_DIM: tl.constexpr, ROTATION_STAGES: tl.constexpr):
    """x [D] times `rotation.rotation`: sums and differences of features 1, 2, 4, ... apart.

    A warp's lanes exchange them, no memory does. From the sum a + b, a - b is (a + b) - 2 b, which
    takes one exchange where a + b and a - b would take two.
    """
    for stage in tl.static_range(ROTATION_STAGES):
        pairs = tl.reshape(x, (PADDED_DIM // (2 << stage), 2, 1 << stage))
        sums = tl.sum(pairs, axis=1, keep_dims=True)
        is_first = tl.arange(0, 2)[None, :, None] == 0
        x = tl.reshape(tl.where(is_first, sums, sums - 2 * pairs), (PADDED_DIM,))
    return x * 2.0 ** (-0.5 * ROTATION_STAGES)


@triton.jit
def _round_to_float8(x):
    """fp32 -> the nearest number of e4m3 in fp32, ties to even; |x| <= 448.

    The conversion itself would round, but for Triton's interpreter, which loses the carry.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # 3 bits of the mantissa
    normal = bits.to(tl.float32, bitcast=True)
    subnormal = (x + 24576.0) - 24576.0  # 1.5 x 2 ** 14: in steps of 2 ** -9
    return tl.where(tl.abs(x) < 0.015625, subnormal, normal)


@triton.jit
def _store_head(x, target, scale_target, inside, LARGEST: tl.constexpr):
    """x [D] as it is, or divided by a scale that makes its largest number LARGEST.

    A head that holds a NaN has a NaN for its scale.
    """
    if LARGEST > 0:
        numbers = tl.where(x == x, x, 0.0)
        scale = tl.maximum(tl.max(tl.abs(numbers), axis=0) / LARGEST, 1e-30)
        scale += tl.sum(x * 0.0, axis=0)
        tl.store(scale_target, scale)
        x = tl.where(scale == scale, tl.clamp(x / scale, -LARGEST, LARGEST), 0.0)
        if target.dtype.element_ty == tl.int8:  # 1.5 x 2 ** 23 rounds to the nearest, even
            x = (x + 12582912.0) - 12582912.0
        else:
            x = _round_to_float8(x)
    tl.store(target, x.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _rope_and_store_kernel(
    qkv,  # [T, (H + 2 Hkv) * D]
    cos,  # [T, R / 2] fp32
    sin,
    slots,  # [T] int64
    queries,  # [T, H, D]
    keys,  # [blocks, BLOCK_SIZE, Hkv, D]
    values,
    key_scales,  # [blocks, BLOCK_SIZE, Hkv] fp32, where LARGEST is not 0
    value_scales,
    num_heads,
    num_kv_heads,
    qkv_stride,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ROTARY_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    ROTATION_STAGES: tl.constexpr,  # of the rotation of queries and keys; 0: there is none
):
    """One head of one token: a query, a key or a value."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    features = tl.arange(0, PADDED_DIM)
    inside = features < HEAD_DIM
    source = qkv + token * qkv_stride + head * HEAD_DIM
    x = tl.load(source + features, mask=inside, other=0.0).to(tl.float32)
    if head < num_heads + num_kv_heads:
        if ROTARY_HALF > 0:
            angles = token * ROTARY_HALF
            x = _rotated(x, source, cos + angles, sin + angles, features, ROTARY_HALF)
        if ROTATION_STAGES > 0:
            x = _spread(x, PADDED_DIM, ROTATION_STAGES)
    if head < num_heads:
        target = queries + (token * num_heads + head) * HEAD_DIM + features
        tl.store(target, x.to(queries.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + token)
        own = (head - num_heads) % num_kv_heads
        scale_offset = (slot // BLOCK_SIZE) * scale_stride_block + own * scale_stride_head
        scale_offset += (slot % BLOCK_SIZE) * scale_stride_token
        offsets = (slot * num_kv_heads + own) * HEAD_DIM + features
        if head < num_heads + num_kv_heads:
            _store_head(x, keys + offsets, key_scales + scale_offset, inside, LARGEST)
        else:
            _store_head(x, values + offsets, value_scales + scale_offset, inside, LARGEST)


def rope_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, cache: KVCache, slots: Tensor
) -> Tensor:
    """Turn queries and keys, write keys and values to their slots, return the queries.

    qkv [T, (H + 2 Hkv) * D]; cos and sin [T, R / 2] float32, where R <= D features of a head are
    turned, the others left; contiguous keys and values; slots [T] int64 -> [T, H, D]. Where the
    cache is int8, queries and keys are then rotated by `rotation.rotation`.
    """
    block_size, num_kv_heads, head_dim = cache.keys.shape[1:]
    queries = qkv.new_empty(len(qkv), num_heads, head_dim)
    if not len(qkv):
        return queries
    keys, values = stored_numbers(cache.keys), stored_numbers(cache.values)
    scaled = cache.key_scales is not None and cache.value_scales is not None
    scales = (cache.key_scales, cache.value_scales) if scaled else (keys, values)
    rotated = keys.dtype is torch.int8
    stages = rotation_size(head_dim).bit_length() - 1 if rotated else 0
    strides = cache.key_scales.stride() if cache.key_scales is not None else (0, 0, 0)
    with on_device_of(qkv):
        _rope_and_store_kernel[(len(qkv), num_heads + 2 * num_kv_heads)](
            qkv, cos.contiguous(), sin.contiguous(), slots, queries, keys, values, *scales,
            num_heads, num_kv_heads, qkv.stride(0), *strides,
            HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
            ROTARY_HALF=cos.shape[1], BLOCK_SIZE=block_size,
            LARGEST=LARGEST[keys.dtype] if scaled else 0.0, ROTATION_STAGES=stages, num_warps=1,
        )  # fmt: skip
    return queries
