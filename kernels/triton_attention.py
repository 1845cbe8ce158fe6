"""Attention over paged keys and values, and what writes them, on NVIDIA GPUs.

Sequences with several new tokens (prefill, chunks of it) go through one kernel, which walks over
the keys up to the causal bound. Those with one (decode) go through another, which cuts the keys
into parts of a fixed length, so that a few long sequences still fill the GPU, and adds the parts up
first to last. What a sequence gets depends on nothing but itself, and no kernel's grid on numbers
that only the GPU knows: nothing waits for the device.

Softmax is computed in one pass with a running maximum (Milakov and Gimelshein 2018; Dao et al.
2022, algorithm 1). Heads that share keys are the rows of one product.

Shapes: T tokens in the step, B sequences, H heads, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import on_device_of

_PART_TOKENS = 512  # keys per program of a decode
_PREFILL_ROWS = 64  # rows (new tokens x heads that share keys) per program
_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tiles(
    q,  # [ROWS, D]
    keys,
    values,
    table,  # of this sequence
    head,
    positions,  # [ROWS]: a row sees keys up to its own
    begin,
    end,  # keys
    stride_block,
    stride_token,
    stride_head,
    scale,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Weighted values not yet divided, [ROWS, D] fp32; the sum of weights, and the maximum they
    are relative to, in powers of two."""
    features = tl.arange(0, PADDED_DIM)
    inside = features < HEAD_DIM
    acc = tl.zeros((ROWS, PADDED_DIM), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = start + tl.arange(0, TILE)
        known = tokens < end
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        offsets = blocks * stride_block + (tokens % BLOCK_SIZE) * stride_token + head * stride_head
        k = tl.load(
            keys + offsets[None, :] + features[:, None],
            mask=known[None, :] & inside[:, None],
            other=0.0,
        )
        v = tl.load(
            values + offsets[:, None] + features[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k) * scale
        visible = known[None, :] & (tokens[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: any finite maximum keeps its weights at zero.
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = now
    return acc, total, highest


@triton.jit
def _prefill_kernel(
    q,  # [T, H, D]
    keys,  # [blocks, BLOCK_SIZE, Hkv, D]
    values,
    block_tables,  # [B, blocks]
    query_start,  # [B + 1]
    context_lens,  # [B]
    out,  # [T, H, D]
    num_sequences,
    num_heads,
    q_stride,
    table_stride,
    stride_block,
    stride_token,
    stride_head,
    scale,
    GROUP: tl.constexpr,  # heads that share keys
    PADDED_GROUP: tl.constexpr,
    QUERIES: tl.constexpr,  # new tokens per program
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program i serves the i-th piece of QUERIES tokens, counting one more for every sequence."""
    piece = tl.program_id(0)
    head = tl.program_id(1)
    low, high = 0, num_sequences
    while low < high:  # the last sequence that begins at or before the piece
        middle = (low + high) // 2
        if tl.load(query_start + middle) // QUERIES + middle <= piece:
            low = middle + 1
        else:
            high = middle
    sequence = low - 1
    first = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first
    offset = (piece - (first // QUERIES + sequence)) * QUERIES
    if num_queries > 1 and offset < num_queries:
        ROWS: tl.constexpr = QUERIES * PADDED_GROUP
        rows = tl.arange(0, ROWS)
        queries = offset + rows // PADDED_GROUP
        heads = rows % PADDED_GROUP
        features = tl.arange(0, PADDED_DIM)
        inside = (queries < num_queries) & (heads < GROUP)
        mask = inside[:, None] & (features < HEAD_DIM)[None, :]
        tokens = (first + queries).to(tl.int64)
        q_heads = head * GROUP + heads
        q_offsets = tokens * q_stride + q_heads * HEAD_DIM
        rows_of_q = tl.load(q + q_offsets[:, None] + features[None, :], mask=mask, other=0.0)
        context = tl.load(context_lens + sequence)
        positions = context - num_queries + queries
        end = tl.minimum(context, context - num_queries + offset + QUERIES)
        table = block_tables + tl.cast(sequence, tl.int64) * table_stride
        acc, total, _ = _attend_tiles(
            rows_of_q, keys, values, table, head,
            positions, 0, end, stride_block, stride_token, stride_head, scale,
            ROWS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, STAGES,
        )  # fmt: skip
        out_offsets = tokens * (num_heads * HEAD_DIM) + q_heads * HEAD_DIM
        result = acc / total[:, None]
        tl.store(
            out + out_offsets[:, None] + features[None, :],
            result.to(out.dtype.element_ty),
            mask=mask,
        )


@triton.jit
def _decode_kernel(
    q,
    keys,
    values,
    block_tables,
    query_start,
    context_lens,
    partial,  # [S, B, H, D] fp32
    weights,  # [2, S, B, H] fp32: sums of weights, then their maxima
    num_sequences,
    num_heads,
    q_stride,
    table_stride,
    stride_block,
    stride_token,
    stride_head,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP padded to what a product takes
    PART: tl.constexpr,  # keys
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The heads that share keys, over one part of the keys of a sequence with one new token."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    first = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first
    context = tl.load(context_lens + sequence)
    begin = part * PART
    if num_queries == 1 and begin < context:
        rows = tl.arange(0, ROWS)
        features = tl.arange(0, PADDED_DIM)
        inside = rows < GROUP
        mask = inside[:, None] & (features < HEAD_DIM)[None, :]
        q_heads = head * GROUP + rows
        q_offsets = first.to(tl.int64) * q_stride + q_heads * HEAD_DIM
        rows_of_q = tl.load(q + q_offsets[:, None] + features[None, :], mask=mask, other=0.0)
        positions = tl.zeros((ROWS,), tl.int32) + context
        table = block_tables + tl.cast(sequence, tl.int64) * table_stride
        acc, total, highest = _attend_tiles(
            rows_of_q, keys, values, table, head,
            positions, begin, tl.minimum(begin + PART, context),
            stride_block, stride_token, stride_head, scale,
            ROWS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, STAGES,
        )  # fmt: skip
        slots = (part * num_sequences + sequence).to(tl.int64) * num_heads + q_heads
        tl.store(partial + slots[:, None] * HEAD_DIM + features[None, :], acc, mask=mask)
        tl.store(weights + slots, total, mask=inside)
        plane = tl.num_programs(2).to(tl.int64) * num_sequences * num_heads
        tl.store(weights + plane + slots, highest, mask=inside)


@triton.jit
def _combine_kernel(
    partial,
    weights,
    query_start,
    context_lens,
    out,  # [T, H, D]
    num_sequences,
    num_heads,
    num_parts,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    """One head of one sequence with one new token: its parts, added up first to last."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    first = tl.load(query_start + sequence)
    if tl.load(query_start + sequence + 1) - first == 1:
        features = tl.arange(0, PADDED_DIM)
        inside = features < HEAD_DIM
        plane = tl.full((), num_parts, tl.int64) * num_sequences * num_heads
        acc = tl.zeros((PADDED_DIM,), tl.float32)
        total = tl.full((), 0.0, tl.float32)
        highest = tl.full((), float("-inf"), tl.float32)
        for part in range(tl.cdiv(tl.load(context_lens + sequence), PART)):
            slot = (part * num_sequences + sequence).to(tl.int64) * num_heads + head
            part_highest = tl.load(weights + plane + slot)
            now = tl.maximum(highest, part_highest)
            shrink, grow = tl.exp2(highest - now), tl.exp2(part_highest - now)
            part_values = tl.load(partial + slot * HEAD_DIM + features, mask=inside, other=0.0)
            acc = acc * shrink + part_values * grow
            total = total * shrink + tl.load(weights + slot) * grow
            highest = now
        offsets = (first.to(tl.int64) * num_heads + head) * HEAD_DIM + features
        tl.store(out + offsets, (acc / total).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rope_and_store_kernel(
    qkv,  # [T, (H + 2 Hkv) * D]
    cos,  # [T, D / 2] fp32
    sin,
    slots,  # [T] int64
    queries,  # [T, H, D]
    keys,
    values,
    num_heads,
    num_kv_heads,
    qkv_stride,
    HEAD_DIM: tl.constexpr,
    PADDED_HALF: tl.constexpr,
):
    """One head of one token: a query, a key or a value."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    HALF: tl.constexpr = HEAD_DIM // 2
    features = tl.arange(0, PADDED_HALF)
    inside = features < HALF
    source = qkv + token * qkv_stride + head * HEAD_DIM + features
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    slot = tl.load(slots + token)
    if head < num_heads + num_kv_heads:
        c = tl.load(cos + token * HALF + features, mask=inside, other=0.0)
        s = tl.load(sin + token * HALF + features, mask=inside, other=0.0)
        a, b = first.to(tl.float32), second.to(tl.float32)
        first = (a * c - b * s).to(first.dtype)
        second = (b * c + a * s).to(second.dtype)
    if head < num_heads:
        target = queries + (token * num_heads + head) * HEAD_DIM + features
        tl.store(target, first, mask=inside)
        tl.store(target + HALF, second, mask=inside)
    elif head < num_heads + num_kv_heads:
        target = keys + (slot * num_kv_heads + head - num_heads) * HEAD_DIM + features
        tl.store(target, first.to(keys.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(keys.dtype.element_ty), mask=inside)
    else:
        own = head - num_heads - num_kv_heads
        target = values + (slot * num_kv_heads + own) * HEAD_DIM + features
        tl.store(target, first.to(values.dtype.element_ty), mask=inside)
        tl.store(target + HALF, second.to(values.dtype.element_ty), mask=inside)


def paged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Causal attention over cached keys and values: q [T, H, D] -> [T, H, D].

    keys and values [blocks, block size, Hkv, D], alike in layout; block_tables [B, blocks],
    query_start [B + 1] and context_lens [B] int32, as in `interface.ForwardBatch`. Raises
    ValueError for shapes that do not fit.
    """
    num_tokens, num_heads, head_dim = q.shape
    block_size, num_kv_heads = keys.shape[1:3]
    if num_heads % num_kv_heads or keys.shape[3] != head_dim or values.shape != keys.shape:
        raise ValueError(
            f"q is {tuple(q.shape)}, keys are {tuple(keys.shape)}, values {tuple(values.shape)}; "
            "they must agree in D, and H must be a multiple of Hkv"
        )
    if values.stride() != keys.stride() or keys.stride(3) != 1:
        raise ValueError(f"keys and values have strides {keys.stride()} and {values.stride()}")
    q = q if q.stride(2) == 1 and q.stride(1) == head_dim else q.contiguous()
    out = q.new_empty(num_tokens, num_heads, head_dim)
    num_sequences = len(context_lens)
    group = num_heads // num_kv_heads
    padded_group = triton.next_power_of_2(group)
    padded_dim = triton.next_power_of_2(head_dim)
    # The size of the tables bounds every context without a look at the device.
    num_parts = triton.cdiv(block_tables.shape[1] * block_size, _PART_TOKENS)
    shared = (q, keys, values, block_tables, query_start, context_lens)
    strides = (q.stride(0), block_tables.stride(0), *keys.stride()[:3], scale * _LOG2_E)
    constants = {
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": padded_dim,
        "BLOCK_SIZE": block_size,
        "TILE": tile_keys(padded_dim),
        "STAGES": 2,
    }
    with on_device_of(q):
        if num_tokens > num_sequences:
            queries = max(1, _PREFILL_ROWS // padded_group)
            _prefill_kernel[(num_tokens // queries + num_sequences, num_kv_heads)](
                *shared, out, num_sequences, num_heads, *strides,
                PADDED_GROUP=padded_group, QUERIES=queries, **constants,
                num_warps=prefill_warps(padded_dim),
            )  # fmt: skip
        sizes = (num_parts, num_sequences, num_heads)
        partial = q.new_empty(*sizes, head_dim, dtype=torch.float32)
        weights = q.new_empty(2, *sizes, dtype=torch.float32)
        _decode_kernel[(num_sequences, num_kv_heads, num_parts)](
            *shared, partial, weights, num_sequences, num_heads, *strides,
            ROWS=max(16, padded_group), PART=_PART_TOKENS, **constants, num_warps=4,
        )  # fmt: skip
        _combine_kernel[(num_sequences, num_heads)](
            partial, weights, query_start, context_lens, out, num_sequences, num_heads, num_parts,
            PART=_PART_TOKENS, HEAD_DIM=head_dim, PADDED_DIM=padded_dim, num_warps=1,
        )  # fmt: skip
    return out


def tile_keys(padded_dim: int) -> int:
    """Keys at a time: more would spill registers."""
    return 64 if padded_dim <= 64 else 32


def prefill_warps(padded_dim: int) -> int:
    """Warps that share the rows of a prefill program."""
    return 4 if padded_dim <= 128 else 8


def rope_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their slots, return the queries.

    qkv [T, (H + 2 Hkv) * D], cos and sin [T, D / 2] float32, keys and values contiguous
    [blocks, block size, Hkv, D], slots [T] int64 -> [T, H, D].
    """
    num_kv_heads, head_dim = keys.shape[2:]
    queries = qkv.new_empty(len(qkv), num_heads, head_dim)
    if not len(qkv):
        return queries
    with on_device_of(qkv):
        _rope_and_store_kernel[(len(qkv), num_heads + 2 * num_kv_heads)](
            qkv, cos, sin, slots, queries, keys, values, num_heads, num_kv_heads, qkv.stride(0),
            HEAD_DIM=head_dim, PADDED_HALF=triton.next_power_of_2(head_dim // 2), num_warps=1,
        )  # fmt: skip
    return queries
