"""Attention of the cpu backend: a row's result is the same, bit for bit, whatever the step.

A row that sees few keys goes through PyTorch's fused attention in float64, where another order of
summation makes a difference of 1e-16 that vanishes in the rounding to float32. One that sees more
goes over tiles in float32, which takes a third of the time, if `rows_stand_alone` on this machine.
Which way a row goes depends on its own position alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_tiles import QUERIES_AT_A_TIME, TILE_TOKENS, TiledPart, attend_tiles, rows_stand_alone
from .interface import AttentionSpec, ForwardBatch, KVCache

TILED_FROM = 256  # the position of the first row that goes over tiles
_FEW_QUERIES = 8  # up to here grouping them by head takes half the time (6,000 keys)
_SCORE_NUMBERS = 1 << 22  # of explicit scores that are held at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class Queries:
    """Consecutive new tokens of one sequence."""

    sequence: int  # its place in the step
    row: int  # of the first one
    number: int
    context_len: int  # tokens up to the last one, which counts

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.number)

    @property
    def first_position(self) -> int:
        return self.context_len - self.number

    def split(self, position: int | None) -> tuple[Queries | None, Queries | None]:
        """Those before that position, and those from there on."""
        if position is None or self.context_len <= position:
            return self, None
        if self.first_position >= position:
            return None, self
        number = position - self.first_position
        before = Queries(self.sequence, self.row, number, position)
        rest = Queries(self.sequence, self.row + number, self.number - number, self.context_len)
        return before, rest


class Work(Protocol):
    """Some of a step's rows, attended together."""

    @property
    def rows(self) -> Tensor | slice: ...

    def attend(self, q: Tensor, cache: KVCache, spec: AttentionSpec) -> Tensor:
        """Those rows [r, H, D] -> the same in float32."""


@dataclass(frozen=True, slots=True)
class CpuPlan:
    batch: ForwardBatch
    by_window: dict[int | None, list[Work]] = field(default_factory=dict)

    def of(self, window: int | None, *, tiled: bool) -> list[Work]:
        """Made when the first layer with that window asks for it."""
        if window not in self.by_window:
            self.by_window[window] = _plan(self.batch, window, tiled)
        return self.by_window[window]


def attend(q: Tensor, cache: KVCache, plan: CpuPlan, spec: AttentionSpec) -> Tensor:
    """q [T, H, D] -> [T, H, D] float32."""
    tiled = rows_stand_alone(q.shape[2], _tile_blocks(plan.batch) * plan.batch.block_size)
    works = plan.of(spec.window, tiled=tiled)
    if len(works) == 1:  # of all rows, in their order
        return works[0].attend(q, cache, spec)
    out = torch.empty(q.shape, dtype=torch.float32)
    for work in works:
        out[work.rows] = work.attend(q[work.rows], cache, spec)
    return out


def _plan(batch: ForwardBatch, window: int | None, tiled: bool) -> list[Work]:
    starts = batch.query_start.tolist()
    contexts = batch.context_lens.tolist()
    border = TILED_FROM if tiled and (window is None or window > TILED_FROM) else None
    works: list[Work] = []
    alone: dict[tuple[bool, int], list[Queries]] = {}
    for i, context_len in enumerate(contexts):
        queries = Queries(i, starts[i], starts[i + 1] - starts[i], context_len)
        for over_tiles, part in enumerate(queries.split(border)):
            if part is None:
                continue
            if part.number == 1:
                length = len(_visible_blocks(batch.block_size, part, window)).bit_length()
                alone.setdefault((bool(over_tiles), length), []).append(part)
            elif over_tiles:
                works.append(_tiled_chunk(batch, part, window))
            else:
                works.append(_prefill_chunk(batch, part, window))
    for (over_tiles, _), members in alone.items():
        make = _tiled_decodes if over_tiles else _decode_group
        works.append(make(batch, members, window))
    return works


def _visible_blocks(block_size: int, queries: Queries, window: int | None) -> range:
    """Which blocks of a sequence hold what these of its tokens see."""
    first = 0 if window is None else max(0, queries.first_position + 1 - window)
    return range(first // block_size, -(-queries.context_len // block_size))


def _gather(tensor: Tensor, scales: Tensor | None, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks [b] of the cache as [b, block_size, Hkv, D]."""
    rows = tensor.index_select(0, blocks).to(dtype)
    if scales is not None:
        rows *= scales.index_select(0, blocks).to(dtype)[..., None]
    return rows


def _tensors_and_scales(cache: KVCache) -> tuple[tuple[Tensor, Tensor | None], ...]:
    return (cache.keys, cache.key_scales), (cache.values, cache.value_scales)


def _rows(members: Iterable[Queries]) -> Tensor:
    return torch.tensor([queries.row for queries in members])


def _blocks(batch: ForwardBatch, members: list[Queries], firsts: Tensor, number: int) -> Tensor:
    """So many blocks of each sequence from firsts [b] on, laid end to end: [b * number] int32.

    Beyond a table's end its last entry stands for more padding.
    """
    sequences = torch.tensor([queries.sequence for queries in members])
    columns = firsts[:, None] + torch.arange(number)
    columns.clamp_(max=batch.block_tables.shape[1] - 1)
    return batch.block_tables[sequences[:, None], columns].flatten()


def _hidden(positions: Tensor, own: Tensor, window: int | None) -> Tensor:
    """Which positions a query at its `own` one does not see."""
    hidden = positions > own
    return hidden if window is None else hidden | (positions <= own - window)


# Over tiles


@dataclass(frozen=True, slots=True)
class TiledQueries:
    """As many queries of each sequence, in float32 over tiles of their keys."""

    rows: Tensor | slice
    num_sequences: int
    blocks: Tensor  # [b * tiles * blocks per tile] int32
    tile_blocks: int
    parts: list[TiledPart]

    def attend(self, q: Tensor, cache: KVCache, spec: AttentionSpec) -> Tensor:
        queries = q.to(torch.float32).unflatten(0, (self.num_sequences, -1))
        keys, values = (self._tiles(*each) for each in _tensors_and_scales(cache))
        out = attend_tiles(queries, keys, values, self.parts, spec)
        return out.flatten(0, 1)

    def _tiles(self, tensor: Tensor, scales: Tensor | None) -> Tensor:
        """[b, tiles, Hkv, T, D] float32."""
        if scales is not None:
            rows = _gather(tensor, scales, self.blocks, torch.float32)
        else:
            rows = tensor.index_select(0, self.blocks)
        shape = (self.num_sequences, -1, self.tile_blocks * rows.shape[1], *rows.shape[2:])
        tiles = rows.view(shape)
        return tiles.transpose(2, 3).to(torch.float32, memory_format=torch.contiguous_format)


def _tile_blocks(batch: ForwardBatch) -> int:
    """How many blocks a tile has; it has whole ones."""
    return max(1, TILE_TOKENS // batch.block_size)


def _tiled_decodes(batch: ForwardBatch, members: list[Queries], window: int | None) -> TiledQueries:
    tile_blocks = _tile_blocks(batch)
    tile_tokens = tile_blocks * batch.block_size
    spans = [_visible_blocks(tile_tokens, queries, window) for queries in members]
    num_tiles = max(len(span) for span in spans)
    firsts = torch.tensor([span.start for span in spans])
    own = torch.tensor([queries.first_position for queries in members])
    positions = (firsts * tile_tokens)[:, None] + torch.arange(num_tiles * tile_tokens)
    hidden = _hidden(positions, own[:, None], window).view(len(members), num_tiles, 1, 1, 1, -1)
    blocks = _blocks(batch, members, firsts * tile_blocks, num_tiles * tile_blocks)
    part = TiledPart(slice(0, 1), num_tiles, hidden)
    return TiledQueries(_rows(members), len(members), blocks, tile_blocks, [part])


def _tiled_chunk(batch: ForwardBatch, queries: Queries, window: int | None) -> TiledQueries:
    tile_blocks = _tile_blocks(batch)
    tile_tokens = tile_blocks * batch.block_size
    span = _visible_blocks(tile_tokens, queries, window)
    parts = []
    for start in range(0, queries.number, QUERIES_AT_A_TIME):
        stop = min(start + QUERIES_AT_A_TIME, queries.number)
        own = queries.first_position + torch.arange(start, stop)
        last_tile = int(own[-1]) // tile_tokens
        # Without a window all see the tiles before their own.
        first_masked = span.start if window is not None else int(own[0]) // tile_tokens
        masked = torch.arange(first_masked * tile_tokens, (last_tile + 1) * tile_tokens)
        hidden = _hidden(masked, own[:, None], window)
        hidden = hidden.unflatten(1, (-1, tile_tokens)).transpose(0, 1)[None, :, None, :, None]
        parts.append(TiledPart(slice(start, stop), last_tile + 1 - span.start, hidden))
    firsts = torch.tensor([span.start * tile_blocks])
    blocks = _blocks(batch, [queries], firsts, len(span) * tile_blocks)
    return TiledQueries(queries.rows, 1, blocks, tile_blocks, parts)


# In float64


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query each that see contexts of similar length, in any order."""

    rows: Tensor  # [b] int64
    blocks: Tensor  # [b * blocks] int32
    mask: Tensor  # [b, 1, 1, blocks * block_size] float64, 0 or -inf

    def attend(self, q: Tensor, cache: KVCache, spec: AttentionSpec) -> Tensor:
        """The heads of a group stand where queries stand."""
        num_sequences, num_heads, head_dim = q.shape
        num_kv_heads = cache.keys.shape[2]
        keys, values = (
            _gather(tensor, scales, self.blocks, torch.float64)
            .view(num_sequences, -1, num_kv_heads, head_dim)
            .transpose(1, 2)
            for tensor, scales in _tensors_and_scales(cache)
        )
        wide = q.to(torch.float64)
        grouped = wide.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
        out = _attend(grouped, keys, values, self.mask, spec)
        return out.reshape(q.shape).to(torch.float32)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Several queries of one sequence, and the n positions that any of them sees."""

    rows: slice
    blocks: Tensor  # [blocks] int32
    num_keys: int  # n, the first of these blocks' tokens
    mask: Tensor | None  # [rows, n] float64; None: plain causal

    def attend(self, q: Tensor, cache: KVCache, spec: AttentionSpec) -> Tensor:
        keys, values = (
            _gather(tensor, scales, self.blocks, torch.float64)
            .flatten(0, 1)[: self.num_keys]
            .transpose(0, 1)[None]
            for tensor, scales in _tensors_and_scales(cache)
        )
        return self._attend(q.to(torch.float64), keys, values, spec).to(torch.float32)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, spec: AttentionSpec) -> Tensor:
        if spec.soft_cap is not None:
            return _attend_pieces(q, keys, values, self.mask, spec)
        if self.mask is not None and q.shape[0] <= _FEW_QUERIES:
            return _attend_grouped(q, keys, values, self.mask, spec)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=self.mask,
            is_causal=self.mask is None,
            scale=spec.scale,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)


def _decode_group(batch: ForwardBatch, members: list[Queries], window: int | None) -> DecodeGroup:
    spans = [_visible_blocks(batch.block_size, queries, window) for queries in members]
    num_blocks = max(len(span) for span in spans)
    firsts = torch.tensor([span.start for span in spans])
    own = torch.tensor([queries.first_position for queries in members])
    positions = (firsts * batch.block_size)[:, None] + torch.arange(num_blocks * batch.block_size)
    return DecodeGroup(
        rows=_rows(members),
        blocks=_blocks(batch, members, firsts, num_blocks),
        mask=_additive_mask(_hidden(positions, own[:, None], window))[:, None, None, :],
    )


def _prefill_chunk(batch: ForwardBatch, queries: Queries, window: int | None) -> PrefillChunk:
    span = _visible_blocks(batch.block_size, queries, window)
    first, context_len = span.start * batch.block_size, queries.context_len
    mask = None
    if queries.number < context_len or (window is not None and window < context_len):
        own = torch.arange(queries.first_position, context_len)[:, None]
        mask = _additive_mask(_hidden(torch.arange(first, context_len), own, window))
    return PrefillChunk(
        rows=queries.rows,
        blocks=batch.block_tables[queries.sequence, span.start : span.stop],
        num_keys=context_len - first,
        mask=mask,
    )


def _additive_mask(hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill_(hidden, float("-inf"))


def _attend_grouped(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, spec: AttentionSpec
) -> Tensor:
    """For few queries: the heads of a group stand beside each other as queries, where PyTorch would
    repeat the keys and values for each of them."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    grouped = q.transpose(0, 1).reshape(1, num_kv_heads, group * num_queries, head_dim)
    out = _attend(grouped, keys, values, mask.repeat(group, 1), spec)
    return out.view(num_heads, num_queries, head_dim).transpose(0, 1)


def _attend_pieces(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """With scores that are written out, for as many queries at a time as memory allows."""
    num_queries, num_heads, _ = q.shape
    num_keys = keys.shape[2]
    if mask is None:
        mask = _additive_mask(torch.ones(num_queries, num_keys, dtype=torch.bool).triu_(1))
    num_rows = max(1, _SCORE_NUMBERS // (num_heads * num_keys))
    pieces = zip(q.split(num_rows), mask.split(num_rows), strict=True)
    return torch.cat([_attend_grouped(rows, keys, values, m, spec) for rows, m in pieces])


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, spec: AttentionSpec) -> Tensor:
    """q [b, Hkv, r, D], keys and values [b, Hkv, n, D], mask broadcast to [b, Hkv, r, n]."""
    if spec.soft_cap is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=spec.scale)
    scores = (q @ keys.transpose(-1, -2)).mul_(spec.scale / spec.soft_cap).tanh_()
    return scores.mul_(spec.soft_cap).add_(mask).softmax(dim=-1) @ values
