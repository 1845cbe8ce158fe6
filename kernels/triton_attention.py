"""Attention over paged keys and values on NVIDIA GPUs.

Sequences with several new tokens (prefill, chunks of it) go through one kernel, which walks over
the keys from the window's edge to the causal bound. Those with one (decode) go through another,
which cuts the keys into parts, so that a few long sequences still fill the GPU, and a third one
adds the parts up. What a sequence gets depends on nothing but itself, and no kernel's grid on
numbers that only the GPU knows: nothing waits for the device, and one grid serves all lengths.

Softmax is computed in one pass with a running maximum (Milakov and Gimelshein 2018; Dao et al.
2022, algorithm 1). Heads that share keys are the rows of one product. Keys and values of 8 bits
become numbers of the queries' dtype as they are; the scales of keys multiply scores, those of
values the weights.

Shapes: T tokens in the step, B sequences, H heads, Hkv key-value heads, D head size, S parts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interface import AttentionSpec, KVCache
from .triton_launch import interpreted, on_device_of

# Keys per program of a decode, where those make few enough programs: few, because at a small batch
# a step waits for one program after another's loads, not for bandwidth.
_PART_TOKENS = 128
_PREFILL_ROWS = 64  # rows (new tokens x heads that share keys) per program
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
# A weight times its value's scale is a number of 16 bits: this much keeps it from underflowing,
# and it overflows only where the value itself would.
_SCALE_UNIT = tl.constexpr(128.0)


@triton.jit
def _block_numbers(table, start, tokens, known, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Of the blocks that hold the tokens of a tile, int64; read once per block where that fits."""
    if TILE % BLOCK_SIZE == 0:
        COUNT: tl.constexpr = TILE // BLOCK_SIZE
        places = start // BLOCK_SIZE + tl.arange(0, COUNT)
        blocks = tl.load(table + places, mask=places * BLOCK_SIZE < end, other=0)
        blocks = tl.reshape(tl.broadcast_to(blocks[:, None], (COUNT, BLOCK_SIZE)), (TILE,))
    elif BLOCK_SIZE % TILE == 0:
        blocks = tl.load(table + start // BLOCK_SIZE) + tl.zeros((TILE,), tl.int32)
    else:
        blocks = tl.load(table + tokens // BLOCK_SIZE, mask=known, other=0)
    return blocks.to(tl.int64)


# Four bytes at a time. Below the bytes of 1024 a byte b stands for 1024 + b, as in `triton_linear`;
# a conversion of the ordinary kind issues at a quarter of the rate.
INT8_TO_FP16 = tl.constexpr(
    "{ .reg .b32 t, u, offset; mov.b32 offset, 0x64806480; "  # 1024 + 128, twice
    "xor.b32 t, $2, 0x80808080; "
    "prmt.b32 u, t, 0x64646464, 0x4140; sub.f16x2 $0, u, offset; "
    "prmt.b32 u, t, 0x64646464, 0x4342; sub.f16x2 $1, u, offset; }"
)
# The exponent's and the mantissa's bits where those of bfloat16 are, times the ratio of the biases.
FLOAT8_TO_BF16 = tl.constexpr(
    "{ .reg .b32 t, u, ratio, none; "
    "mov.b32 ratio, 0x7B807B80; mov.b32 none, 0x80008000; "  # 2 ** 120 and -0, twice
    "prmt.b32 t, $2, 0, 0x1404; shr.b32 u, t, 4; and.b32 t, t, 0x80008000; "
    "lop3.b32 t, u, 0x07F007F0, t, 0xEA; fma.rn.bf16x2 $0, t, ratio, none; "
    "prmt.b32 t, $2, 0, 0x3424; shr.b32 u, t, 4; and.b32 t, t, 0x80008000; "
    "lop3.b32 t, u, 0x07F007F0, t, 0xEA; fma.rn.bf16x2 $1, t, ratio, none; }"
)


@triton.jit
def _widened(numbers, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """What the cache holds in the dtype of the product, without its scale."""
    if PTX and numbers.dtype == tl.int8 and DTYPE == tl.float16:
        wide = tl.inline_asm_elementwise(
            INT8_TO_FP16, "=r,=r,r", [numbers], dtype=tl.float16, is_pure=True, pack=4
        )
    elif PTX and numbers.dtype == tl.float8e4nv and DTYPE == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            FLOAT8_TO_BF16, "=r,=r,r", [numbers], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        wide = numbers.to(DTYPE)
    return wide


@triton.jit
def _attend_tiles(
    q,  # [ROWS, D]
    keys,
    values,
    key_scales,
    value_scales,
    table,  # of this sequence
    head,
    positions,  # [ROWS]: a row sees keys up to its own
    begin,  # a multiple of TILE
    first,  # key that any row sees
    end,  # keys
    stride_block,
    stride_token,
    stride_head,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    scale,  # of scores, in powers of two; with SOFT_CAP that of the exponent of tanh
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
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
        if WINDOW > 0:  # what lies before may be anything, a NaN too
            known = known & (tokens >= first)
        blocks = _block_numbers(table, start, tokens, known, end, BLOCK_SIZE, TILE)
        places = tokens % BLOCK_SIZE
        offsets = blocks * stride_block + places * stride_token + head * stride_head
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
        scores = tl.dot(q, _widened(k, q.dtype, PTX)) * scale
        if SCALED:
            scale_offsets = blocks * scale_stride_block + places * scale_stride_token
            scale_offsets += head * scale_stride_head
            scores *= tl.load(key_scales + scale_offsets, mask=known, other=0.0)[None, :]
        if SOFT_CAP > 0:  # tanh(s) = 1 - 2 / (exp(2 s) + 1)
            CAP: tl.constexpr = SOFT_CAP * _LOG2_E
            exponent = tl.where(scores > 126.0, 126.0, scores)  # a NaN stays one
            scores = CAP - 2 * CAP / (tl.exp2(exponent) + 1.0)
        visible = known[None, :] & (tokens[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        now = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen nothing yet: any finite maximum keeps its weights at zero.
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if SCALED:
            value_scale = tl.load(value_scales + scale_offsets, mask=known, other=0.0)
            weights *= (value_scale * _SCALE_UNIT)[None, :]
        v = _widened(v, q.dtype, PTX)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v)
        highest = now
    if SCALED:
        acc *= 1.0 / _SCALE_UNIT
    return acc, total, highest


@triton.jit(do_not_specialize=["num_sequences", "num_heads", "table_stride"])
def _prefill_kernel(
    q,  # [T, H, D]
    keys,  # [blocks, BLOCK_SIZE, Hkv, D]
    values,
    key_scales,  # [blocks, BLOCK_SIZE, Hkv], where SCALED
    value_scales,
    block_tables,  # [B, blocks]
    query_start,  # [B + 1]
    context_lens,  # [B]
    out,  # [T, H, D]
    lse,  # [T, H] fp32, where HAS_LSE
    num_sequences,
    num_heads,
    q_stride,
    table_stride,
    stride_block,
    stride_token,
    stride_head,
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    scale,
    GROUP: tl.constexpr,  # heads that share keys
    PADDED_GROUP: tl.constexpr,
    QUERIES: tl.constexpr,  # new tokens per program
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,  # keys that a query sees, its own the last; 0: all
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_LSE: tl.constexpr,
    PTX: tl.constexpr,
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
        first_key = 0
        if WINDOW > 0:
            first_key = tl.maximum(context - num_queries + offset + 1 - WINDOW, 0)
        end = tl.minimum(context, context - num_queries + offset + QUERIES)
        table = block_tables + tl.cast(sequence, tl.int64) * table_stride
        acc, total, highest = _attend_tiles(
            rows_of_q, keys, values, key_scales, value_scales, table, head,
            positions, first_key // TILE * TILE, first_key, end,
            stride_block, stride_token, stride_head,
            scale_stride_block, scale_stride_token, scale_stride_head, scale,
            ROWS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, STAGES, WINDOW, SOFT_CAP, SCALED, PTX,
        )  # fmt: skip
        out_offsets = tokens * (num_heads * HEAD_DIM) + q_heads * HEAD_DIM
        # A row that is none, beyond the last query, may have seen nothing.
        total = tl.where(total > 0, total, 1.0)
        result = acc / total[:, None]
        tl.store(
            out + out_offsets[:, None] + features[None, :],
            result.to(out.dtype.element_ty),
            mask=mask,
        )
        if HAS_LSE:
            sums = (highest + tl.log2(total)) * _LN_2
            tl.store(lse + tokens * num_heads + q_heads, sums, mask=inside)


@triton.jit
def _parts_of(
    context,
    PART: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Where a decode of that many keys begins to read, and how many keys a part of it has."""
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(context - WINDOW, 0) // TILE * TILE
    length = tl.cdiv(tl.cdiv(context - begin, MAX_PARTS), TILE) * TILE
    return begin, tl.maximum(length, PART)


@triton.jit(do_not_specialize=["num_sequences", "num_heads", "table_stride"])
def _decode_kernel(
    q,
    keys,
    values,
    key_scales,
    value_scales,
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
    scale_stride_block,
    scale_stride_token,
    scale_stride_head,
    scale,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,  # GROUP padded to what a product takes
    PART: tl.constexpr,  # keys at least
    MAX_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PTX: tl.constexpr,
):
    """The heads that share keys, over one part of the keys of a sequence with one new token."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    first = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first
    context = tl.load(context_lens + sequence)
    begin, length = _parts_of(context, PART, MAX_PARTS, TILE, WINDOW)
    begin += part * length
    if num_queries == 1 and begin < context:
        rows = tl.arange(0, ROWS)
        features = tl.arange(0, PADDED_DIM)
        inside = rows < GROUP
        mask = inside[:, None] & (features < HEAD_DIM)[None, :]
        q_heads = head * GROUP + rows
        q_offsets = first.to(tl.int64) * q_stride + q_heads * HEAD_DIM
        rows_of_q = tl.load(q + q_offsets[:, None] + features[None, :], mask=mask, other=0.0)
        positions = tl.zeros((ROWS,), tl.int32) + (context - 1)
        table = block_tables + tl.cast(sequence, tl.int64) * table_stride
        acc, total, highest = _attend_tiles(
            rows_of_q, keys, values, key_scales, value_scales, table, head,
            positions, begin, context - WINDOW, tl.minimum(begin + length, context),
            stride_block, stride_token, stride_head,
            scale_stride_block, scale_stride_token, scale_stride_head, scale,
            ROWS, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, STAGES, WINDOW, SOFT_CAP, SCALED, PTX,
        )  # fmt: skip
        slots = (part * num_sequences + sequence).to(tl.int64) * num_heads + q_heads
        tl.store(partial + slots[:, None] * HEAD_DIM + features[None, :], acc, mask=mask)
        tl.store(weights + slots, total, mask=inside)
        plane = tl.num_programs(2).to(tl.int64) * num_sequences * num_heads
        tl.store(weights + plane + slots, highest, mask=inside)


@triton.jit(do_not_specialize=["num_sequences", "num_heads", "num_parts"])
def _combine_kernel(
    partial,
    weights,
    query_start,
    context_lens,
    out,  # [T, H, D]
    lse,  # [T, H] fp32, where HAS_LSE
    num_sequences,
    num_heads,
    num_parts,  # that there is room for
    PART: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    """One head of one sequence with one new token: its parts, CHUNK of them at a time.

    What a sequence gets depends on how many it has, not on how many there is room for.
    """
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
        context = tl.load(context_lens + sequence)
        begin, length = _parts_of(context, PART, MAX_PARTS, TILE, WINDOW)
        count = tl.cdiv(context - begin, length)
        for start in range(0, count, CHUNK):
            parts = start + tl.arange(0, CHUNK)
            known = parts < count
            slots = (parts * num_sequences + sequence).to(tl.int64) * num_heads + head
            part_values = tl.load(
                partial + slots[:, None] * HEAD_DIM + features[None, :],
                mask=known[:, None] & inside[None, :],
                other=0.0,
            )
            part_totals = tl.load(weights + slots, mask=known, other=0.0)
            part_highest = tl.load(weights + plane + slots, mask=known, other=float("-inf"))
            now = tl.maximum(highest, tl.max(part_highest, axis=0))
            shrink, grow = tl.exp2(highest - now), tl.exp2(part_highest - now)
            acc = acc * shrink + tl.sum(part_values * grow[:, None], axis=0)
            total = total * shrink + tl.sum(part_totals * grow, axis=0)
            highest = now
        row = first.to(tl.int64) * num_heads + head
        target = out + row * HEAD_DIM + features
        tl.store(target, (acc / total).to(out.dtype.element_ty), mask=inside)
        if HAS_LSE:
            tl.store(lse + row, (highest + tl.log2(total)) * _LN_2)


def paged_attention(
    q: Tensor,
    cache: KVCache,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    spec: AttentionSpec,
    lse: Tensor | None = None,
) -> Tensor:
    """Causal attention over cached keys and values: q [T, H, D] -> [T, H, D].

    block_tables [B, blocks], query_start [B + 1] and context_lens [B] int32, as in
    `interface.ForwardBatch`. The logarithms of the sums of exp(score) go to `lse` [T, H] float32:
    with them, results over several sets of keys can be merged. Raises ValueError for shapes that
    do not fit.
    """
    _check(q, cache)
    q = q if q.stride(2) == 1 and q.stride(1) == q.shape[2] else q.contiguous()
    out = q.new_empty(q.shape)
    launch = _Launch(q, cache, block_tables, query_start, context_lens, spec, out, lse)
    with on_device_of(q):
        if len(q) > len(context_lens):
            launch.prefill()
        launch.decode()
    return out


class _Launch:
    """One call: the arguments that its kernels share."""

    def __init__(
        self,
        q: Tensor,
        cache: KVCache,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        spec: AttentionSpec,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        self.num_tokens, self.num_heads, head_dim = q.shape
        self.num_sequences = len(context_lens)
        block_size, self.num_kv_heads = cache.keys.shape[1:3]
        self.group = self.num_heads // self.num_kv_heads
        self.head_dim = head_dim
        self.padded_dim = triton.next_power_of_2(head_dim)
        self.scaled = cache.key_scales is not None
        self.window = spec.window or 0
        # The size of the tables bounds every context without a look at the device.
        self.longest = block_tables.shape[1] * block_size
        keys, values = stored_numbers(cache.keys), stored_numbers(cache.values)
        scales = (cache.key_scales, cache.value_scales) if self.scaled else (keys, values)
        scale_strides = (0, 0, 0) if cache.key_scales is None else cache.key_scales.stride()
        self.steps = (query_start, context_lens)
        self.inputs = (q, keys, values, *scales, block_tables, *self.steps)
        self.outputs = (out, out if lse is None else lse)
        exponent = 2 * spec.scale / spec.soft_cap if spec.soft_cap else spec.scale
        self.sizes = (
            self.num_sequences, self.num_heads, q.stride(0), block_tables.stride(0),
            *keys.stride()[:3], *scale_strides, exponent * _LOG2_E.value,
        )  # fmt: skip
        self.has_lse = lse is not None
        self.dimensions = {
            "HEAD_DIM": head_dim,
            "PADDED_DIM": self.padded_dim,
            "WINDOW": self.window,
        }
        self.constants = self.dimensions | {
            "GROUP": self.group,
            "BLOCK_SIZE": block_size,
            "STAGES": stages(self.scaled),
            "SOFT_CAP": spec.soft_cap or 0.0,
            "SCALED": self.scaled,
            "PTX": not interpreted,
        }

    def prefill(self) -> None:
        """Of sequences with several new tokens."""
        padded_group = triton.next_power_of_2(self.group)
        queries = max(1, _PREFILL_ROWS // padded_group)
        _prefill_kernel[(self.num_tokens // queries + self.num_sequences, self.num_kv_heads)](
            *self.inputs,
            *self.outputs,
            *self.sizes,
            PADDED_GROUP=padded_group,
            QUERIES=queries,
            TILE=tile_keys(self.head_dim, "prefill", self.scaled),
            HAS_LSE=self.has_lse,
            **self.constants,
            num_warps=prefill_warps(self.head_dim, self.scaled),
        )

    def decode(self) -> None:
        """Of sequences with one."""
        out = self.outputs[0]
        tile = tile_keys(self.head_dim, "decode", self.scaled)
        parts = {
            "PART": _PART_TOKENS,
            "MAX_PARTS": max_parts(self.num_kv_heads),
            "TILE": tile,
        }
        longest = min(self.longest, self.window + tile) if self.window else self.longest
        num_parts = min(parts["MAX_PARTS"], triton.cdiv(longest, _PART_TOKENS))
        sizes = (num_parts, self.num_sequences, self.num_heads)
        partial = out.new_empty(*sizes, out.shape[2], dtype=torch.float32)
        weights = out.new_empty(2, *sizes, dtype=torch.float32)
        _decode_kernel[(self.num_sequences, self.num_kv_heads, num_parts)](
            *self.inputs,
            partial,
            weights,
            *self.sizes,
            ROWS=max(16, triton.next_power_of_2(self.group)),
            **parts,
            **self.constants,
            num_warps=4,
        )
        _combine_kernel[(self.num_sequences, self.num_heads)](
            partial,
            weights,
            *self.steps,
            *self.outputs,
            self.num_sequences,
            self.num_heads,
            num_parts,
            CHUNK=combined_parts(self.padded_dim),
            HAS_LSE=self.has_lse,
            **parts,
            **self.dimensions,
            num_warps=1,
        )


def _check(q: Tensor, cache: KVCache) -> None:
    keys, values = cache.keys, cache.values
    if q.shape[1] % keys.shape[2] or keys.shape[3] != q.shape[2] or values.shape != keys.shape:
        raise ValueError(
            f"q is {tuple(q.shape)}, keys are {tuple(keys.shape)}, values {tuple(values.shape)}; "
            "they must agree in D, and H must be a multiple of Hkv"
        )
    if values.stride() != keys.stride() or keys.stride(3) != 1:
        raise ValueError(f"keys and values have strides {keys.stride()} and {values.stride()}")


def stored_numbers(tensor: Tensor) -> Tensor:
    """A cache's keys or values as the kernels read them: bytes are bits of float8_e4m3fn."""
    return tensor.view(torch.float8_e4m3fn) if tensor.dtype is torch.uint8 else tensor


def tile_keys(head_dim: int, tier: str, scaled: bool) -> int:
    """Keys at a time: more would spill registers, and at some sizes fewer would, too."""
    padded_dim = triton.next_power_of_2(head_dim)
    if tier == "decode":
        return 32 if not scaled and (padded_dim > 128 or head_dim == 128) else 64
    if padded_dim <= 64:
        return 64
    return 16 if scaled and padded_dim > 128 else 32


def max_parts(num_kv_heads: int) -> int:
    """Parts of a decode: enough for one long sequence to fill a GPU, few enough that most of a
    grid which serves all lengths does not come for nothing."""
    return max(32, min(128, 256 // num_kv_heads))


def stages(scaled: bool) -> int:
    """In 3, the numbers of a tile's blocks are loaded ahead, like its keys; with 8 bits that would
    take registers that there are not."""
    return 2 if scaled else 3


def combined_parts(padded_dim: int) -> int:
    """Parts that one warp loads at a time: one after the other, each would be waited for."""
    return 2048 // padded_dim


def prefill_warps(head_dim: int, scaled: bool) -> int:
    """Warps that share the rows of a prefill program: as few as spill no registers."""
    padded_dim = triton.next_power_of_2(head_dim)
    needs_more = padded_dim > 128 or head_dim < padded_dim or (scaled and padded_dim <= 64)
    return 8 if needs_more else 4
