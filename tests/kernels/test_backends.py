"""Every backend against float64 arithmetic, and the CPU backend's promise on rows."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from kv_rounding import walsh
from lowbit.kernels import cpu_attention, triton_backend
from lowbit.kernels.cpu import CpuBackend, DenseLinear, Int4Linear
from lowbit.kernels.interface import (
    Activation,
    AttentionSpec,
    BackendUnavailable,
    ForwardBatch,
    KernelBackend,
    KVCache,
    load_backend,
)
from lowbit.kernels.packing import DenseWeight, PackedEmbedding, dequantize
from lowbit.kernels.reference import ReferenceBackend
from tiny import random_packed_weight

BACKENDS = {
    "reference": (ReferenceBackend, 1e-6),
    "cpu-float32": (lambda: CpuBackend("float32"), 1e-6),
    "cpu-bfloat16": (lambda: CpuBackend("bfloat16"), 6e-3),
    "cpu-bfloat16-int8-cache": (lambda: CpuBackend("bfloat16", "int8"), 6e-3),
}
BLOCK_SIZE = 16
PLAIN = AttentionSpec(scale=0.25)


@pytest.fixture(params=BACKENDS)
def backend_and_tolerance(request: pytest.FixtureRequest) -> tuple[KernelBackend, float]:
    create, tolerance = BACKENDS[request.param]
    return create(), tolerance


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().mean() / expected.abs().mean()).item()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size"),
    [(576, 192, 64), (576, 100, 128), (128, 64, -1), (100, 33, 32), (192, 17, 96), (80, 64, 16)],
)
def test_linear_agrees_with_float64(
    backend_and_tolerance: tuple[KernelBackend, float],
    bits: int,
    sym: bool,
    in_features: int,
    out_features: int,
    group_size: int,
) -> None:
    backend, tolerance = backend_and_tolerance
    torch.manual_seed(bits)
    weight = random_packed_weight(
        in_features, out_features, bits=bits, group_size=group_size, sym=sym
    )
    weight = replace(
        weight, bias=torch.randn(out_features), input_permutation=torch.randperm(in_features)
    )
    layer = backend.prepare_linear(weight)
    assert layer.out_features == out_features
    for rows in (1, 5, 17):
        x = torch.randn(rows, in_features)
        expected = x.double() @ dequantize(weight).double().T + weight.bias.double()
        assert relative_error(backend.linear(x, layer), expected) < tolerance


def test_scales_that_bfloat16_rounds_cost_little() -> None:
    weight = random_packed_weight(576, 192)
    weight = replace(weight, scales=weight.scales * (1 + 2**-9))  # half a bfloat16 step off
    x = torch.randn(9, 576)
    expected = x.double() @ dequantize(weight).double().T
    backend = CpuBackend("bfloat16")
    assert relative_error(backend.linear(x, backend.prepare_linear(weight)), expected) < 1e-2


def test_a_one_hot_row_returns_the_dequantized_column() -> None:
    weight = random_packed_weight(128, 64, group_size=32, sym=False)
    # Scales that bfloat16 holds exactly: what is left is the int4 layout itself.
    weight = replace(weight, scales=torch.full_like(weight.scales, 2**-6))
    backend = CpuBackend("bfloat16")
    layer = backend.prepare_linear(weight)
    assert isinstance(layer, Int4Linear)
    assert torch.equal(backend.linear(torch.eye(128), layer).float(), dequantize(weight).T)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_alone_equals_the_row_in_a_batch(bits: int) -> None:
    backend = CpuBackend("bfloat16")
    layer = backend.prepare_linear(random_packed_weight(576, 192, bits=bits))
    x = torch.randn(67, 576)
    together = backend.linear(x, layer)
    for row in range(67):
        assert torch.equal(backend.linear(x[row : row + 1], layer)[0], together[row])


def test_group_sizes_without_an_int4_form_are_held_exactly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = CpuBackend("bfloat16").prepare_linear(random_packed_weight(80, 64, group_size=16))
    assert isinstance(layer, DenseLinear)
    assert "group_size 16" in caplog.text


def test_rms_norm_and_silu_mul(backend_and_tolerance: tuple[KernelBackend, float]) -> None:
    backend, _ = backend_and_tolerance
    x, weight = torch.randn(7, 96) * 3, torch.randn(96)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(
        backend.rms_norm(x, weight, 1e-5).double(), expected, atol=1e-5, rtol=1e-5
    )
    gate, up = wide.chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    torch.testing.assert_close(backend.silu_mul(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_rope_is_a_rotation_by_position(
    backend_and_tolerance: tuple[KernelBackend, float],
) -> None:
    backend, _ = backend_and_tolerance
    x = torch.randn(3, 2, 8)
    angles = torch.randn(3, 4)
    pairs = torch.complex(x[..., :4].double(), x[..., 4:].double())
    turned = pairs * torch.polar(torch.ones(3, 1, 4).double(), angles[:, None, :].double())
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    actual = backend.rope(x, angles.cos(), angles.sin()).double()
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


def test_rope_passes_on_what_lies_beyond_the_rotated_features(
    backend_and_tolerance: tuple[KernelBackend, float],
) -> None:
    backend, _ = backend_and_tolerance
    x, angles = torch.randn(3, 2, 10), torch.randn(3, 3)
    rotated = backend.rope(x, angles.cos(), angles.sin())
    alone = backend.rope(x[..., :6].contiguous(), angles.cos(), angles.sin())
    assert torch.equal(rotated, torch.cat((alone, x[..., 6:]), dim=-1))
    assert torch.equal(backend.rope(x, angles[:, :0], angles[:, :0]), x)


ACTIVATIONS = {
    Activation.SILU: lambda x: x / (1 + (-x).exp()),
    Activation.GELU: lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    Activation.GELU_TANH: lambda x: (
        x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
    Activation.RELU: lambda x: x * (x > 0),
}


@pytest.mark.parametrize("activation", Activation)
def test_activations(
    backend_and_tolerance: tuple[KernelBackend, float], activation: Activation
) -> None:
    backend, _ = backend_and_tolerance
    x = torch.randn(7, 96) * 3
    close = {"atol": 1e-5, "rtol": 1e-5}
    expected = ACTIVATIONS[activation](x.double())
    torch.testing.assert_close(backend.activate(x, activation).double(), expected, **close)
    expected = expected[:, :48] * x[:, 48:].double()
    torch.testing.assert_close(backend.activate_mul(x, activation).double(), expected, **close)


def test_layer_norm_and_norms_of_heads(backend_and_tolerance: tuple[KernelBackend, float]) -> None:
    backend, _ = backend_and_tolerance
    close = {"atol": 1e-5, "rtol": 1e-5}
    x, weight, bias = torch.randn(5, 80) * 3 + 1, torch.randn(80), torch.randn(80)
    wide = x.double()
    centered = wide - wide.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = expected * weight.double() + bias.double()
    actual = backend.layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(actual.double(), expected, **close)
    # 3 query heads and one key-value head of 16
    q_norm, k_norm = torch.randn(16), torch.randn(16)
    heads = wide.view(5, 5, 16)
    normed = heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = torch.cat((normed[:, :3] * q_norm, normed[:, 3:4] * k_norm, heads[:, 4:]), dim=1)
    actual = backend.norm_heads(x, q_norm, k_norm, 1e-5, 3)
    torch.testing.assert_close(actual.double(), expected.flatten(1), **close)


def random_step(
    backend: KernelBackend, contexts: list[int], queries: list[int], heads: int, kv_heads: int
) -> tuple[torch.Tensor, KVCache, ForwardBatch, list[list[int]]]:
    """A cache with random keys and values in every slot, also in those that no sequence owns."""
    needed = [-(-context // BLOCK_SIZE) for context in contexts]
    cache = backend.allocate_kv_cache(1, sum(needed) + 3, BLOCK_SIZE, kv_heads, 16)[0]
    order = torch.randperm(sum(needed)).tolist()
    tables = [[order.pop() for _ in range(count)] for count in needed]
    slots = [
        [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in range(context)]
        for table, context in zip(tables, contexts, strict=True)
    ]
    all_slots = torch.arange(cache.keys.shape[0] * BLOCK_SIZE)
    rows = torch.randn(2, len(all_slots), kv_heads, 16)
    backend.store(rows[0], rows[1], cache, all_slots)
    widest = max(needed)
    starts = [sum(queries[:i]) for i in range(len(queries) + 1)]
    batch = ForwardBatch(
        query_start=torch.tensor(starts, dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [0] * (widest - len(table)) for table in tables], dtype=torch.int32
        ),
        slot_mapping=torch.tensor(
            [s for all_, n in zip(slots, queries, strict=True) for s in all_[-n:]]
        ),
        block_size=BLOCK_SIZE,
    )
    return torch.randn(starts[-1], heads, 16), cache, batch, slots


def stored_numbers(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all slots as the cache holds them: [slots, Hkv, D] float64.

    With scales, keys are held rotated by Walsh's matrix, which is its own inverse.
    """
    keys, values = (tensor.flatten(0, 1).double() for tensor in (cache.keys, cache.values))
    if cache.key_scales is None:
        return keys, values
    keys = keys * cache.key_scales.flatten(0, 1).double()[..., None]
    values = values * cache.value_scales.flatten(0, 1).double()[..., None]
    return keys @ walsh(keys.shape[-1]), values


def attention_oracle(
    q: torch.Tensor,
    cache: KVCache,
    batch: ForwardBatch,
    slots: list[list[int]],
    spec: AttentionSpec = PLAIN,
) -> torch.Tensor:
    """Masked softmax attention in float64 over explicitly gathered keys and values."""
    starts = batch.query_start.tolist()
    group = q.shape[1] // cache.keys.shape[2]
    outs = []
    for i, context_slots in enumerate(slots):
        keys, values = (
            rows[context_slots].repeat_interleave(group, dim=1) for rows in stored_numbers(cache)
        )
        queries = q[starts[i] : starts[i + 1]].double()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * (scores / spec.soft_cap).tanh()
        num_queries, context = scores.shape[1:]
        distance = torch.arange(context - num_queries, context)[:, None] - torch.arange(context)
        visible = (distance >= 0) & (distance < (spec.window or context))
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
    return torch.cat(outs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize(
    ("contexts", "queries"),
    [
        ([1], [1]),
        ([16, 17, 5, 200], [1, 1, 1, 1]),
        ([33], [33]),
        ([40, 33, 100, 7], [1, 33, 12, 1]),
        ([300, 257, 700, 256, 5], [1, 1, 1, 1, 1]),
        ([400], [400]),
        ([500, 300, 290, 10], [1, 60, 1, 10]),
    ],
)
def test_attention_agrees_with_float64(
    backend_and_tolerance: tuple[KernelBackend, float],
    heads: int,
    kv_heads: int,
    contexts: list[int],
    queries: list[int],
) -> None:
    backend, _ = backend_and_tolerance
    torch.manual_seed(len(contexts))
    q, cache, batch, slots = random_step(backend, contexts, queries, heads, kv_heads)
    expected = attention_oracle(q, cache, batch, slots)
    actual = backend.attention(q, cache, backend.plan_attention(batch), PLAIN)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-6)


SPECS = {
    "scale": AttentionSpec(scale=0.6),
    "window 1": AttentionSpec(scale=0.25, window=1),
    "window 5": AttentionSpec(scale=0.25, window=5),
    "window of a block": AttentionSpec(scale=0.25, window=16),
    "window of blocks and one": AttentionSpec(scale=0.25, window=33),
    "window beyond all": AttentionSpec(scale=0.25, window=1000),
    "soft cap": AttentionSpec(scale=1.0, soft_cap=3.0),
    "both": AttentionSpec(scale=1.0, window=20, soft_cap=3.0),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_windows_and_soft_caps_agree_with_float64(
    backend_and_tolerance: tuple[KernelBackend, float], spec: AttentionSpec
) -> None:
    backend, _ = backend_and_tolerance
    torch.manual_seed(0)
    contexts, queries = [40, 33, 100, 7, 60, 16, 90], [1, 33, 12, 1, 5, 1, 1]
    q, cache, batch, slots = random_step(backend, contexts, queries, 6, 2)
    plan = backend.plan_attention(batch)
    expected = attention_oracle(q, cache, batch, slots)
    torch.testing.assert_close(
        backend.attention(q, cache, plan, PLAIN).double(), expected, atol=2e-6, rtol=2e-6
    )
    expected = attention_oracle(q, cache, batch, slots, spec)
    actual = backend.attention(q, cache, plan, spec)
    torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_a_query_alone_attends_as_in_a_chunk(spec: AttentionSpec, cache_dtype: str) -> None:
    """Bit for bit, whatever the chunk and the sequences beside it."""
    backend = CpuBackend("bfloat16", cache_dtype)
    torch.manual_seed(1)
    q, cache, whole, _ = random_step(backend, [70, 40], [70, 9], 6, 2)
    together = backend.attention(q, cache, backend.plan_attention(whole), spec)
    for start, end in ((0, 1), (30, 47), (47, 70), (69, 70), (15, 19)):
        part = replace(
            whole,
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=whole.block_tables[:1],
        )
        apart = backend.attention(q[start:end], cache, backend.plan_attention(part), spec)
        assert torch.equal(apart, together[start:end])


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        AttentionSpec(scale=0.25, window=300),
        AttentionSpec(scale=0.25, window=400, soft_cap=3.0),
        AttentionSpec(scale=0.25, soft_cap=3.0),
    ],
)
@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_a_query_with_many_keys_attends_as_in_a_chunk(
    spec: AttentionSpec, cache_dtype: str
) -> None:
    """Bit for bit, alone, in chunks of all kinds, and beside sequences of all lengths."""
    backend = CpuBackend("bfloat16", cache_dtype)
    torch.manual_seed(1)
    q, cache, whole, slots = random_step(backend, [700, 40], [700, 9], 6, 2)
    together = backend.attention(q, cache, backend.plan_attention(whole), spec)
    expected = attention_oracle(q, cache, whole, slots, spec)
    torch.testing.assert_close(together.double(), expected, atol=2e-6, rtol=2e-6)
    spans = [(i, i + size) for size in (1, 2, 3, 8, 31, 100) for i in range(230, 600, 67)]
    for start, end in [*spans, (250, 270), (255, 257), (256, 257), (0, 699), (699, 700)]:
        part = replace(
            whole,
            query_start=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            block_tables=whole.block_tables[:1],
        )
        apart = backend.attention(q[start:end], cache, backend.plan_attention(part), spec)
        assert torch.equal(apart, together[start:end])
    ends = [700, 20, 300, 257, 256, 690, 2]
    crowd = replace(
        whole,
        query_start=torch.arange(len(ends) + 1, dtype=torch.int32),
        context_lens=torch.tensor(ends, dtype=torch.int32),
        block_tables=whole.block_tables[:1].repeat(len(ends), 1),
    )
    rows = torch.tensor(ends) - 1
    decoded = backend.attention(q[rows], cache, backend.plan_attention(crowd), spec)
    assert torch.equal(decoded, together[rows])


def test_where_rows_do_not_stand_alone_all_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "rows_stand_alone", lambda *_: False)
    backend = CpuBackend("bfloat16")
    q, cache, batch, slots = random_step(backend, [700, 300], [1, 20], 6, 2)
    expected = attention_oracle(q, cache, batch, slots)
    actual = backend.attention(q, cache, backend.plan_attention(batch), PLAIN)
    assert torch.equal(actual, expected.float())


def test_a_window_reads_no_block_before_it() -> None:
    """What no query sees is not even loaded: a NaN there would spread."""
    backend = CpuBackend("bfloat16")
    for queries in (1, 10):
        q, cache, batch, slots = random_step(backend, [100], [queries], 4, 2)
        spec = AttentionSpec(scale=0.25, window=20)
        expected = attention_oracle(q, cache, batch, slots, spec)
        unseen = batch.block_tables[0, : (100 - queries + 1 - 20) // BLOCK_SIZE]
        for tensor in cache.tensors:
            tensor[unseen.long()] = torch.nan
        actual = backend.attention(q, cache, backend.plan_attention(batch), spec)
        torch.testing.assert_close(actual.double(), expected, atol=2e-6, rtol=2e-6)


def int8_cache(num_blocks: int = 3) -> tuple[CpuBackend, KVCache]:
    backend = CpuBackend("bfloat16", "int8")
    return backend, backend.allocate_kv_cache(1, num_blocks, BLOCK_SIZE, 2, 64)[0]


def test_an_int8_cache_is_half_a_step_off_at_most() -> None:
    backend, cache = int8_cache()
    torch.manual_seed(0)
    # Heads and tokens of very different size, with an outlier in each, and one that is zero.
    keys = torch.randn(20, 2, 64) * torch.logspace(-4, 3, 20)[:, None, None]
    keys[..., 5] *= 30
    keys[3, 1] = 0
    values = torch.randn(20, 2, 64)
    slots = torch.randperm(3 * BLOCK_SIZE)[:20]
    backend.store(keys, values, cache, slots)
    stored_keys, stored_values = stored_numbers(cache)
    for rows, stored in (
        (keys.double() @ walsh(64), stored_keys @ walsh(64)),
        (values.double(), stored_values),
    ):
        steps = rows.abs().amax(-1, keepdim=True) / 127
        error = (stored[slots] - rows).abs()
        # float16 holds a scale to one part in 2048, and the largest code may be clamped by that.
        assert (error <= steps * (0.5 + 127 / 2048) + 2**-25).all()


def test_one_large_channel_costs_the_others_of_a_key_little() -> None:
    backend, cache = int8_cache()
    keys = torch.randn(BLOCK_SIZE, 2, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 5] += 50
    backend.store(keys, keys, cache, torch.arange(BLOCK_SIZE))
    stored_keys, stored_values = stored_numbers(cache)
    others = torch.arange(64) != 5
    key_error = (stored_keys[:BLOCK_SIZE] - keys)[..., others].square().mean()
    value_error = (stored_values[:BLOCK_SIZE] - keys)[..., others].square().mean()
    assert key_error < value_error / 10


def test_a_token_is_stored_alike_alone_and_in_a_crowd() -> None:
    torch.manual_seed(1)
    rows = torch.randn(2, 30, 2, 64)
    backend, together = int8_cache()
    backend.store(rows[0], rows[1], together, torch.arange(30))
    _, apart = int8_cache()
    for i in range(30):
        backend.store(rows[0, i : i + 1], rows[1, i : i + 1], apart, torch.tensor([i]))
    for left, right in zip(together.tensors, apart.tensors, strict=True):
        assert torch.equal(left, right)


def test_what_is_not_a_number_stays_so_in_an_int8_cache_and_can_be_cleared() -> None:
    backend, cache = int8_cache()
    rows = torch.ones(2, 1, 2, 64)
    rows[0, 0, 1, 7] = torch.nan
    backend.store(rows[0], rows[1], cache, torch.tensor([BLOCK_SIZE]))
    keys, _ = stored_numbers(cache)
    assert keys[BLOCK_SIZE, 1].isnan().all()
    assert keys[BLOCK_SIZE, 0].isfinite().all()
    backend.copy_blocks([cache], torch.tensor([(1, 2)], device=backend.device))
    assert stored_numbers(cache)[0][2 * BLOCK_SIZE, 1].isnan().all()
    backend.clear_blocks([cache], torch.tensor([1, 2], device=backend.device))
    assert all(not tensor.any() for tensor in cache.tensors)


def test_an_int8_cache_holds_almost_twice_the_tokens() -> None:
    for head_dim in (64, 128):
        wide = CpuBackend("bfloat16").kv_head_bytes(head_dim)
        backend = CpuBackend("bfloat16", "int8")
        assert wide / backend.kv_head_bytes(head_dim) >= 1.9
        (cache,) = backend.allocate_kv_cache(1, 5, BLOCK_SIZE, 3, head_dim)
        taken = sum(tensor.nbytes for tensor in cache.tensors)
        assert taken == 5 * BLOCK_SIZE * 3 * 2 * backend.kv_head_bytes(head_dim)


def test_head_keeps_the_order_that_bfloat16_would_tie() -> None:
    backend = CpuBackend("bfloat16")
    weight = torch.randn(1000, 64)
    weight[17] = weight[3] * (1 + 2**-12)  # equal in bfloat16, not in float32
    x = weight[3:4] * 5
    logits = backend.logits(x, backend.prepare_head(DenseWeight(weight=weight)))
    assert logits.argmax().item() == 17
    best = (x.double() @ weight.double().T).topk(5).indices
    assert torch.equal(logits.topk(5).indices, best)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_head_keeps_the_order_of_the_best(bits: int, sym: bool, bias: bool) -> None:
    """Logits near 100, where a bfloat16 product has steps of a half."""
    torch.manual_seed(bits)
    weight = random_packed_weight(96, 1000, bits=bits, group_size=32, sym=sym, magnitude=10)
    weight = replace(weight, input_permutation=torch.randperm(96))
    weight = replace(weight, bias=torch.randn(1000)) if bias else weight
    x = torch.randn(5, 96) + dequantize(weight)[7]
    expected = x.double() @ dequantize(weight).double().T
    expected = expected + weight.bias.double() if weight.bias is not None else expected
    backend = CpuBackend("bfloat16")
    head = backend.prepare_head(weight)
    assert head.out_features == 1000
    logits = backend.logits(x, head)
    assert torch.equal(logits.topk(10).indices, expected.topk(10).indices)
    best = expected.topk(10).values
    torch.testing.assert_close(logits.topk(10).values.double(), best, atol=1e-4, rtol=1e-5)
    assert relative_error(logits, expected) < 1e-2


@pytest.mark.parametrize("by_row", [True, False])
def test_embed_gathers_rows(
    backend_and_tolerance: tuple[KernelBackend, float], by_row: bool
) -> None:
    backend, _ = backend_and_tolerance
    weight = random_packed_weight(96, 64, bits=3, group_size=32, sym=False)
    table = dequantize(weight) if by_row else dequantize(weight).T
    packed = backend.prepare_embedding(PackedEmbedding(weight=weight, by_row=by_row))
    ids = torch.tensor([0, 63, 10, 10, 21, 31, 32])
    assert torch.equal(backend.embed(ids, packed), table[ids])
    dense = backend.prepare_embedding(table.half())
    assert torch.equal(backend.embed(ids, dense), table.half().float()[ids])


@pytest.mark.parametrize("spec", [PLAIN, SPECS["both"]])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_the_triton_backend_stores_and_attends(kv_cache_dtype: str, spec: AttentionSpec) -> None:
    backend = load_backend("triton", kv_cache_dtype=kv_cache_dtype)
    with backend.device:
        q, cache, batch, slots = random_step(backend, [40, 33, 7], [1, 33, 5], 6, 2)
        q = q.to(backend.hidden_dtype)
    expected = attention_oracle(q.cpu(), cache_in_float64(cache), batch, slots, spec)
    actual = backend.attention(q, cache, backend.plan_attention(batch), spec)
    torch.testing.assert_close(actual.cpu().double(), expected, atol=2e-3, rtol=2e-3)


def cache_in_float64(cache: KVCache) -> KVCache:
    """Without scales; fp8 is stored as bytes."""
    numbers = []
    for stored, scales in ((cache.keys, cache.key_scales), (cache.values, cache.value_scales)):
        stored = stored.view(torch.float8_e4m3fn) if stored.dtype is torch.uint8 else stored
        wide = stored.cpu().double()
        numbers.append(wide if scales is None else wide * scales.cpu().double()[..., None])
    return KVCache(keys=numbers[0], values=numbers[1])


def test_auto_takes_the_gpu_where_there_is_one() -> None:
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load_backend("auto").device.type == expected


def test_what_was_chosen_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    load_backend("triton", kv_cache_dtype="int8")
    (line,) = caplog.messages
    assert line.startswith("backend triton: triton, float16, KV cache int8")
    assert "on tensor cores to" in line
    assert "default tiles" in line


def test_without_a_gpu_triton_is_refused_by_name() -> None:
    code = "from lowbit.kernels.interface import load_backend; load_backend('triton')"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert "backend is 'triton'; it needs a CUDA device" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton finds its driver here")
def test_a_gpu_that_triton_cannot_launch_on_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(BackendUnavailable, match=r"cannot launch .+; .* C compiler"):
        load_backend("triton")


def test_unknown_and_impossible_choices_are_refused_by_name() -> None:
    with pytest.raises(BackendUnavailable, match="backend is 'metal'"):
        load_backend("metal")
    with pytest.raises(BackendUnavailable, match="precision is 'int8'"):
        CpuBackend("int8")
    with pytest.raises(
        BackendUnavailable, match="kv_cache_dtype is 'fp8'; it must be auto or int8"
    ):
        CpuBackend("bfloat16", "fp8")
    with pytest.raises(BackendUnavailable, match="kv_cache_dtype is 'int8'; the reference backend"):
        load_backend("reference", kv_cache_dtype="int8")
    with pytest.raises(BackendUnavailable, match="dtype is 'bfloat16'; the cpu backend has no"):
        load_backend("cpu", dtype="bfloat16")
    with pytest.raises(BackendUnavailable, match="dtype is 'float32'; it must be one of auto, flo"):
        load_backend("triton", dtype="float32")
    with pytest.raises(BackendUnavailable, match=r"kv_cache_dtype is 'int4'; .* fp8, int8"):
        load_backend("triton", kv_cache_dtype="int4")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """As if there were a GPU of that compute capability, and no interpreter."""
    device = torch.device("cpu")
    monkeypatch.setattr(triton_backend, "_find_device", lambda: (device, capability))
    monkeypatch.setattr(triton_backend, "interpreted", False)


def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (8, 6))
    with pytest.raises(BackendUnavailable, match=r"'fp8'; .* 8.9 or higher, .* GPU has 8.6"):
        load_backend("triton", kv_cache_dtype="fp8")
    assert load_backend("triton", kv_cache_dtype="int8").kv_dtype is torch.int8
    pretend_gpu(monkeypatch, (8, 9))
    assert load_backend("triton", kv_cache_dtype="fp8").kv_dtype is torch.float8_e4m3fn


def test_auto_computes_in_the_models_own_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0))
    assert load_backend("triton").hidden_dtype is torch.float16
    for model, expected in (
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float16),
    ):
        backend = load_backend("triton", model_dtype=model)
        assert (backend.hidden_dtype, backend.kv_dtype) == (expected, expected)
    backend = load_backend("triton", dtype="float16", model_dtype=torch.bfloat16)
    assert backend.hidden_dtype is torch.float16
    mixed = load_backend("triton", dtype="bfloat16", kv_cache_dtype="float16")
    assert (mixed.hidden_dtype, mixed.kv_dtype) == (torch.bfloat16, torch.float16)


def test_the_interpreter_has_no_bfloat16() -> None:
    if torch.cuda.is_available():
        pytest.skip("kernels run on the GPU")
    for choice in ("dtype", "kv_cache_dtype"):
        with pytest.raises(BackendUnavailable, match=f"{choice} is 'bfloat16'; Triton's interp"):
            load_backend("triton", **{choice: "bfloat16"})
    assert load_backend("triton", model_dtype=torch.bfloat16).hidden_dtype is torch.float16
