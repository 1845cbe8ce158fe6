"""Attention in float32 over tiles of keys at fixed places of a sequence, in PyTorch's own products.

Every product has the same shape but for its number of rows, and what is added up over tiles is
added in float64. So a row's result depends on no other row, wherever the machine's matrix product
computes each row alike for whatever rows stand beside it; `rows_stand_alone` finds that out.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import AttentionSpec

TILE_TOKENS = 128  # at least, and whole blocks; 64 and 256 take as long
QUERIES_AT_A_TIME = 32  # of a sequence: their scores stay in the processor's cache
_MIN_ROWS = 4  # products of fewer rows go other ways in Intel's library


@dataclass(frozen=True, slots=True)
class TiledPart:
    """Some of the queries of each sequence, and the tiles that they see."""

    queries: slice
    num_tiles: int  # n, the first ones
    hidden: Tensor  # [b or 1, h, 1, q, 1, T] bool: what the queries do not see of the last h tiles


def attend_tiles(
    q: Tensor, keys: Tensor, values: Tensor, parts: list[TiledPart], spec: AttentionSpec
) -> Tensor:
    """q [b, t, H, D], keys and values [b, tiles, Hkv, T, D], all float32 -> [b, t, H, D]."""
    num_kv_heads = keys.shape[2]
    scale = spec.scale if spec.soft_cap is None else spec.scale / spec.soft_cap
    # [b, Hkv, t, H / Hkv, D]: the heads of a group stand beside each other as rows.
    grouped = (q * scale).unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    outs = []
    for part in parts:
        rows = grouped[:, :, part.queries].flatten(2, 3)
        tiles = (keys[:, : part.num_tiles], values[:, : part.num_tiles])
        out = _attend_rows(rows, *tiles, part.hidden, spec.soft_cap)
        outs.append(out.unflatten(2, (-1, grouped.shape[3])))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out.transpose(1, 2).reshape(q.shape)


def _attend_rows(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, soft_cap: float | None
) -> Tensor:
    """q [b, Hkv, r, D], keys and values [b, n, Hkv, T, D] -> [b, Hkv, r, D]."""
    num_rows, num_tiles = q.shape[2], keys.shape[1]
    if num_rows < _MIN_ROWS:
        q = F.pad(q, (0, 0, 0, _MIN_ROWS - num_rows))
    repeated = q[:, None].expand(-1, num_tiles, -1, -1, -1)
    scores = repeated @ keys.transpose(-1, -2)  # [b, n, Hkv, r, T]
    if soft_cap is not None:
        scores.tanh_().mul_(soft_cap)
    num_masked, num_queries = hidden.shape[1], hidden.shape[3]
    masked = scores[:, num_tiles - num_masked :, :, :num_rows]
    masked.unflatten(3, (num_queries, -1)).masked_fill_(hidden, float("-inf"))
    weights = scores.sub_(scores.amax(dim=(1, 4), keepdim=True)).exp_()
    sums = weights.sum(-1)[..., :num_rows].sum(1, dtype=torch.float64)
    outs = (weights @ values)[..., :num_rows, :].sum(1, dtype=torch.float64)
    return (outs / sums[..., None]).to(torch.float32)


@functools.cache
def rows_stand_alone(head_dim: int, tile_tokens: int) -> bool:
    """Whether this machine computes a row alike, bit for bit, in whatever product it stands.

    No library promises that of its matrix products. Here it is tried: with numbers of rows, tiles
    and sequences of all kinds, once per process.
    """
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 96, head_dim, generator=generator)
    keys, values = torch.randn(2, 1, 4, 2, tile_tokens, head_dim, generator=generator)
    whole = _attend_rows(q, keys, values, _all_seen(96, tile_tokens), None)
    for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 24, 31, 32, 48, 63, 64, 95):
        for rows in (slice(0, size), slice(96 - size, 96)):
            alone = _attend_rows(q[:, :, rows], keys, values, _all_seen(size, tile_tokens), None)
            if not torch.equal(alone, whole[:, :, rows]):
                return False
    few, seen = q[:, :, :4], _all_seen(4, tile_tokens)
    alone = _attend_rows(few, keys[:, :3], values[:, :3], seen, None)
    five = [torch.cat([tensor] * 5) for tensor in (few, keys[:, :3], values[:, :3])]
    together = _attend_rows(five[0], five[1], five[2], seen, None)
    hidden = torch.ones(1, 1, 1, 4, 1, tile_tokens, dtype=torch.bool)
    beside_hidden = _attend_rows(few, keys, values, hidden, None)
    return torch.equal(together, alone.expand_as(together)) and torch.equal(beside_hidden, alone)


def _all_seen(num_rows: int, tile_tokens: int) -> Tensor:
    return torch.empty(1, 0, 1, num_rows, 1, tile_tokens, dtype=torch.bool)
