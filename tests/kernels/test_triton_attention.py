"""Paged attention against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math

import pytest
import torch
from lowbit.kernels import triton_attention as kernels

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
Step = tuple[list[int], list[int]]  # contexts, new tokens at their ends


class Cache:
    """Random keys and values in shuffled blocks; what no token owns is NaN."""

    def __init__(self, contexts: list[int], kv_heads: int, head_dim: int, block_size: int) -> None:
        self.block_size = block_size
        needed = [-(-context // block_size) for context in contexts]
        order = torch.randperm(sum(needed) + 2).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        shape = (sum(needed) + 2, block_size, kv_heads, head_dim)
        self.keys, self.values = (
            torch.full(shape, torch.nan, dtype=torch.float16, device=DEVICE) for _ in range(2)
        )
        self.slots = [
            torch.tensor(
                [table[p // block_size] * block_size + p % block_size for p in range(context)]
            )
            for table, context in zip(self.tables, contexts, strict=True)
        ]
        for slots in self.slots:
            for tensor in (self.keys, self.values):
                rows = torch.randn(len(slots), kv_heads, head_dim).to(DEVICE, torch.float16)
                tensor.flatten(0, 1)[slots.to(DEVICE)] = rows

    def block_tables(self) -> torch.Tensor:
        widest = max(map(len, self.tables)) + 1
        rows = [table + [0] * (widest - len(table)) for table in self.tables]
        return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def attend(q: torch.Tensor, cache: Cache, step: Step) -> torch.Tensor:
    contexts, queries = step
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    return kernels.paged_attention(
        q,
        cache.keys,
        cache.values,
        cache.block_tables(),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        q.shape[2] ** -0.5,
    )


def oracle(q: torch.Tensor, cache: Cache, step: Step) -> torch.Tensor:
    outs, first = [], 0
    for slots, num_queries in zip(cache.slots, step[1], strict=True):
        group = q.shape[1] // cache.keys.shape[2]
        keys, values = (
            tensor.cpu().flatten(0, 1)[slots].double().repeat_interleave(group, dim=1)
            for tensor in (cache.keys, cache.values)
        )
        rows = q[first : first + num_queries].cpu().double()
        first += num_queries
        scores = torch.einsum("qhd,khd->hqk", rows, keys) / math.sqrt(q.shape[2])
        visible = torch.ones(num_queries, len(slots)).tril(len(slots) - num_queries).bool()
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


STEPS: dict[str, Step] = {
    "one token": ([1], [1]),
    "decodes": ([16, 17, 5, 200], [1, 1, 1, 1]),
    "decodes in parts": ([1100, 512, 513], [1, 1, 1]),
    "a prompt": ([100], [100]),
    "mixed": ([40, 33, 100, 7, 90], [1, 33, 12, 1, 2]),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"),
    [(4, 4, 64, 16), (6, 2, 80, 16), (8, 1, 128, 64), (16, 1, 96, 32)],
)
def test_agrees_with_float64(
    step: Step, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    torch.manual_seed(heads)
    cache = Cache(step[0], kv_heads, head_dim, block_size)
    q = torch.randn(sum(step[1]), heads, head_dim).to(DEVICE, torch.float16)
    expected = oracle(q, cache, step)
    actual = attend(q, cache, step).cpu().double()
    torch.testing.assert_close(actual, expected, atol=2e-3, rtol=2e-3)


def test_a_sequence_gets_the_same_bits_alone_and_in_a_crowd() -> None:
    step = ([600, 33, 90, 7], [1, 33, 12, 1])
    cache = Cache(step[0], 2, 64, 16)
    q = torch.randn(sum(step[1]), 6, 64).to(DEVICE, torch.float16)
    together = attend(q, cache, step).split(step[1])
    rows = q.split(step[1])
    for i, (context, num_queries) in enumerate(zip(*step, strict=True)):
        alone = Cache.__new__(Cache)
        alone.keys, alone.values, alone.tables = cache.keys, cache.values, cache.tables[i : i + 1]
        assert torch.equal(attend(rows[i], alone, ([context], [num_queries])), together[i])


@pytest.mark.parametrize("head_dim", [16, 80])
def test_queries_and_keys_are_rotated_and_stored(head_dim: int) -> None:
    heads, kv_heads, tokens = 4, 2, 5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim).to(DEVICE, torch.float16)
    angles = torch.randn(tokens, head_dim // 2, device=DEVICE) * 3
    keys, values = (
        torch.zeros(3, 4, kv_heads, head_dim, dtype=torch.float16, device=DEVICE) for _ in range(2)
    )
    slots = torch.tensor([7, 0, 11, 3, 4], device=DEVICE)
    queries = kernels.rope_and_store(qkv, angles.cos(), angles.sin(), heads, keys, values, slots)
    rows = qkv.cpu().double().view(tokens, -1, head_dim)
    pairs = torch.complex(*rows[:, : heads + kv_heads].chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(1).double(), angles.cpu().double())[:, None]
    rotated = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(queries.cpu().double(), rotated[:, :heads], atol=5e-3, rtol=1e-3)
    stored = keys.cpu().double().flatten(0, 1)
    torch.testing.assert_close(stored[slots.cpu()], rotated[:, heads:], atol=5e-3, rtol=1e-3)
    assert torch.equal(values.cpu().double().flatten(0, 1)[slots.cpu()], rows[:, -kv_heads:])
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert not stored[untouched].any()


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    cache = Cache([16], 3, 64, 16)
    q = torch.randn(1, 4, 64).to(DEVICE, torch.float16)
    with pytest.raises(ValueError, match=r"q is \(1, 4, 64\).*multiple of Hkv"):
        attend(q, cache, ([16], [1]))
