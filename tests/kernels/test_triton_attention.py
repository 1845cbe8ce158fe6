"""Paged attention against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lowbit.kernels import triton_attention as kernels
from lowbit.kernels.interface import AttentionSpec, KVCache
from ptx import run as run_ptx

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CACHE_FIELDS = ("keys", "values", "key_scales", "value_scales")
Step = tuple[list[int], list[int]]  # contexts, new tokens at their ends


class Cache:
    """Random keys and values in shuffled blocks; what no token owns is NaN.

    `kind` int8 and fp8 have a random scale for each token and head.
    """

    def __init__(
        self,
        contexts: list[int],
        kv_heads: int,
        head_dim: int,
        block_size: int,
        kind: str = "float16",
    ) -> None:
        self.block_size = block_size
        needed = [-(-context // block_size) for context in contexts]
        order = torch.randperm(sum(needed) + 2).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in needed]
        self.slots = [
            torch.tensor(
                [table[p // block_size] * block_size + p % block_size for p in range(context)]
            )
            for table, context in zip(self.tables, contexts, strict=True)
        ]
        owned = torch.zeros((sum(needed) + 2) * block_size, dtype=torch.bool)
        owned[torch.cat(self.slots)] = True
        heads = (sum(needed) + 2, block_size, kv_heads)
        numbers = [random_numbers((*heads, head_dim), owned, kind) for _ in range(2)]
        self.exact = [stored.double() for stored in numbers]
        scales: list[torch.Tensor | None] = [None, None]
        if kind in ("int8", "fp8"):
            for i in range(2):
                scale = torch.rand(heads) * 0.02 + 0.001
                scale.flatten(0, 1)[~owned] = torch.nan
                self.exact[i] *= scale.double()[..., None]
                scales[i] = scale.transpose(1, 2).contiguous().to(DEVICE).transpose(1, 2)
        numbers = [n.view(torch.uint8) if kind == "fp8" else n for n in numbers]
        keys, values = (n.to(DEVICE) for n in numbers)
        self.tensors = KVCache(
            keys=keys, values=values, key_scales=scales[0], value_scales=scales[1]
        )

    def block_tables(self, widest: int = 0) -> torch.Tensor:
        widest = max(widest, max(map(len, self.tables)) + 1)
        rows = [table + [0] * (widest - len(table)) for table in self.tables]
        return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def random_numbers(shape: tuple[int, ...], owned: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "int8":
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    wide = torch.randn(shape) * (100 if kind == "fp8" else 1)
    wide.flatten(0, 1)[~owned] = torch.nan
    return wide.to(torch.float8_e4m3fn if kind == "fp8" else torch.float16)


def attend(
    q: torch.Tensor,
    cache: Cache,
    step: Step,
    window: int | None = None,
    soft_cap: float | None = None,
    lse: torch.Tensor | None = None,
    widest: int = 0,
) -> torch.Tensor:
    contexts, queries = step
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    return kernels.paged_attention(
        q,
        cache.tensors,
        cache.block_tables(widest),
        torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        AttentionSpec(scale=q.shape[2] ** -0.5, window=window, soft_cap=soft_cap),
        lse,
    )


def oracle(
    q: torch.Tensor,
    cache: Cache,
    step: Step,
    window: int | None = None,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Results and the logarithms of the sums of exp(score)."""
    outs, sums, first = [], [], 0
    for slots, num_queries in zip(cache.slots, step[1], strict=True):
        group = q.shape[1] // cache.exact[0].shape[2]
        keys, values = (
            exact.flatten(0, 1)[slots].repeat_interleave(group, dim=1) for exact in cache.exact
        )
        rows = q[first : first + num_queries].cpu().double()
        first += num_queries
        scores = torch.einsum("qhd,khd->hqk", rows, keys) / math.sqrt(q.shape[2])
        scores = soft_cap * torch.tanh(scores / soft_cap) if soft_cap else scores
        visible = torch.ones(num_queries, len(slots)).tril(len(slots) - num_queries).bool()
        if window:
            visible &= ~torch.ones_like(visible).tril(len(slots) - num_queries - window)
        scores = scores.masked_fill(~visible, -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.nan_to_num()))
        sums.append(scores.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(sums)


def queries_for(step: Step, heads: int, head_dim: int) -> torch.Tensor:
    return torch.randn(sum(step[1]), heads, head_dim).to(DEVICE, torch.float16)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.cpu().double(), expected, atol=2e-3, rtol=2e-3)


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
    [(4, 4, 64, 16), (6, 2, 80, 16), (8, 1, 128, 64), (16, 1, 96, 32), (2, 1, 256, 16)],
)
def test_agrees_with_float64(
    step: Step, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    torch.manual_seed(heads)
    cache = Cache(step[0], kv_heads, head_dim, block_size)
    q = queries_for(step, heads, head_dim)
    assert_close(attend(q, cache, step), oracle(q, cache, step)[0])


@pytest.mark.parametrize("block_size", [24, 48, 1])  # no power of two; less than a product takes
def test_any_block_size_will_do(block_size: int) -> None:
    step = ([40, 33, 130], [1, 33, 3])
    cache = Cache(step[0], 1, 64, block_size)
    q = queries_for(step, 3, 64)
    assert_close(attend(q, cache, step), oracle(q, cache, step)[0])


@pytest.mark.parametrize("step", [STEPS["decodes in parts"], STEPS["mixed"]])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_caches_of_8_bits_agree_with_float64(step: Step, kind: str) -> None:
    torch.manual_seed(8)
    cache = Cache(step[0], 2, 80, 16, kind)
    q = queries_for(step, 6, 80)
    assert_close(attend(q, cache, step), oracle(q, cache, step)[0])


@pytest.mark.parametrize(
    ("window", "soft_cap"), [(20, None), (1, None), (600, 5.0), (33, 0.7), (None, 3.0)]
)
@pytest.mark.parametrize("step", [STEPS["decodes in parts"], STEPS["mixed"]])
def test_windows_and_soft_caps_agree_with_float64(
    step: Step, window: int | None, soft_cap: float | None
) -> None:
    torch.manual_seed(window or 0)
    cache = Cache(step[0], 2, 64, 16)
    q = queries_for(step, 4, 64)
    expected, sums = oracle(q, cache, step, window, soft_cap)
    lse = torch.full(q.shape[:2], torch.nan, device=DEVICE)
    assert_close(attend(q, cache, step, window, soft_cap, lse), expected)
    assert_close(lse, sums)


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_nothing_before_the_window_is_read(kind: str) -> None:
    step, window = ([700, 90], [1, 12]), 30
    cache = Cache(step[0], 1, 64, 16, kind)
    q = queries_for(step, 2, 64)
    expected = oracle(q, cache, step, window)[0]
    poisoned = cache.tensors.keys if kind == "float16" else cache.tensors.key_scales
    for slots, queries in zip(cache.slots, step[1], strict=True):
        before = slots[: len(slots) - queries - window + 1].to(DEVICE)
        poisoned[before // 16, before % 16] = torch.nan
    assert_close(attend(q, cache, step, window), expected)


def test_results_over_two_sets_of_keys_can_be_merged() -> None:
    """By the logarithms of the sums of exp(score), as for a prefix that sequences share."""
    contexts, shared = [230, 100, 81], 80
    cache = Cache(contexts, 2, 64, 16)
    q = queries_for((contexts, [1, 1, 1]), 4, 64)
    results, sums = [], []
    suffix, prefix = Cache.__new__(Cache), Cache.__new__(Cache)
    suffix.tensors = prefix.tensors = cache.tensors
    prefix.tables = [table[: shared // 16] for table in cache.tables]
    suffix.tables = [table[shared // 16 :] for table in cache.tables]
    for part, lengths in ((prefix, [shared] * 3), (suffix, [c - shared for c in contexts])):
        lse = torch.empty(q.shape[:2], device=DEVICE)
        results.append(attend(q, part, (lengths, [1, 1, 1]), lse=lse).cpu().double())
        sums.append(lse.cpu().double())
    weights = torch.stack(sums).softmax(0)[..., None]
    merged = (torch.stack(results) * weights).sum(0)
    expected, whole = oracle(q, cache, (contexts, [1, 1, 1]))
    assert_close(merged, expected)
    assert_close(torch.stack(sums).logsumexp(0), whole)


def test_a_sequence_gets_the_same_bits_alone_and_in_a_crowd() -> None:
    step = ([600, 33, 90, 7], [1, 33, 12, 1])
    cache = Cache(step[0], 2, 64, 16)
    q = queries_for(step, 6, 64)
    together = attend(q, cache, step).split(step[1])
    rows = q.split(step[1])
    for i, (context, num_queries) in enumerate(zip(*step, strict=True)):
        alone = Cache.__new__(Cache)
        alone.tensors, alone.tables = cache.tensors, cache.tables[i : i + 1]
        assert torch.equal(attend(rows[i], alone, ([context], [num_queries])), together[i])


@pytest.mark.parametrize("window", [None, 520])
def test_one_grid_serves_all_lengths(window: int | None) -> None:
    """Tables wide enough for the longest sequence change no bit of a short one's result."""
    step = ([40, 1030], [1, 1])
    cache = Cache(step[0], 1, 64, 16)
    q = queries_for(step, 2, 64)
    narrow = attend(q, cache, step, window)
    assert torch.equal(attend(q, cache, step, window, widest=4096), narrow)


def test_a_sequence_longer_than_the_parts_have_room_for_has_longer_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_PART_TOKENS", 64)
    step = ([kernels.max_parts(8) * 64 + 100, 70], [1, 1])
    cache = Cache(step[0], 8, 16, 16)
    q = queries_for(step, 8, 16)
    assert_close(attend(q, cache, step), oracle(q, cache, step)[0])


def test_a_cache_may_have_more_than_2_to_the_31_numbers() -> None:
    step = ([40, 20], [1, 20])
    cache = Cache(step[0], 1, 64, 16, "int8")
    q = queries_for(step, 2, 64)
    expected = attend(q, cache, step)
    first = (1 << 31) // (16 * 64) - 2
    small, moved = cache.tensors, []
    for part in small.tensors:  # memory that nobody touches is not taken
        large = part.new_empty_strided((first + len(part), *part.shape[1:]), part.stride())
        large[first:] = part
        moved.append(large)
    cache.tensors = KVCache(**dict(zip(CACHE_FIELDS, moved, strict=True)))
    cache.tables = [[block + first for block in table] for table in cache.tables]
    assert torch.equal(attend(q, cache, step), expected)


@pytest.mark.parametrize(
    ("code", "stored", "wide"),
    [
        (kernels.INT8_TO_FP16, torch.int8, torch.float16),
        (kernels.FLOAT8_TO_BF16, torch.float8_e4m3fn, torch.bfloat16),
    ],
)
def test_inline_assembly_widens_every_byte(
    code: Any, stored: torch.dtype, wide: torch.dtype
) -> None:
    """No GPU runs it here, and the interpreter takes its plain twin."""
    numbers = torch.arange(256, dtype=torch.uint8).view(stored)
    words = numbers.view(torch.int32).tolist()
    outputs = [out for word in words for out in run_ptx(code.value, word & 0xFFFFFFFF)]
    found = torch.tensor(outputs, dtype=torch.uint32).view(torch.int32).view(wide).float()
    expected = numbers.float()
    known = ~expected.isnan()  # which is stored as a scale, never as a code
    assert torch.equal(found[known], expected[known])


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    cache = Cache([16], 3, 64, 16)
    q = torch.randn(1, 4, 64).to(DEVICE, torch.float16)
    with pytest.raises(ValueError, match=r"q is \(1, 4, 64\).*multiple of Hkv"):
        attend(q, cache, ([16], [1]))
