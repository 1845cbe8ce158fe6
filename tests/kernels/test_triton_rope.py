"""Rotary positions and what is written to the cache; in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
from kv_rounding import rounded, rounded_keys, walsh
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import AttentionSpec, ForwardBatch, KVCache
from lowbit.kernels.triton_backend import TritonBackend
from lowbit.kernels.triton_rope import rope_and_store

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
HEADS, KV_HEADS, BLOCK_SIZE = 4, 2, 4
SLOTS = [7, 0, 11, 3, 4]
KV_DTYPES = {"float16": torch.float16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


def empty_cache(head_dim: int, kind: str = "float16") -> KVCache:
    backend = TritonBackend(DEVICE, torch.float16, KV_DTYPES[kind])
    return backend.allocate_kv_cache(1, 3, BLOCK_SIZE, KV_HEADS, head_dim)[0]


def random_qkv(head_dim: int) -> torch.Tensor:
    return torch.randn(len(SLOTS), (HEADS + 2 * KV_HEADS) * head_dim).to(DEVICE, torch.float16)


def run(qkv: torch.Tensor, angles: torch.Tensor, cache: KVCache) -> torch.Tensor:
    slots = torch.tensor(SLOTS, device=DEVICE)
    return rope_and_store(qkv, angles.cos(), angles.sin(), HEADS, cache, slots)


def rotated(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Complex products, in float64, of the first features; the others as they are."""
    rotary = 2 * angles.shape[1]
    pairs = torch.complex(*rows[..., :rotary].chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones(1).double(), angles.cpu().double())[:, None]
    return torch.cat((turned.real, turned.imag, rows[..., rotary:]), dim=-1)


def stored(numbers: torch.Tensor, scales: torch.Tensor | None, kind: str) -> torch.Tensor:
    """[slots, Hkv, D] in float64."""
    wide = numbers.view(torch.float8_e4m3fn) if kind == "fp8" else numbers
    wide = wide.cpu().double() if scales is None else wide.cpu().double() * scales.cpu()[..., None]
    return wide.flatten(0, 1)


def as_held(keys: torch.Tensor, kind: str) -> torch.Tensor:
    """[..., D] rotated where the cache's are, and back again the same way."""
    return keys @ walsh(keys.shape[-1]) if kind == "int8" else keys


@pytest.mark.parametrize(("head_dim", "rotary"), [(16, 16), (80, 80), (80, 32), (96, 0)])
def test_queries_and_keys_are_rotated_and_stored(head_dim: int, rotary: int) -> None:
    qkv, cache = random_qkv(head_dim), empty_cache(head_dim)
    angles = torch.randn(len(SLOTS), rotary // 2, device=DEVICE) * 3
    queries = run(qkv, angles, cache)
    rows = qkv.cpu().double().view(len(SLOTS), -1, head_dim)
    expected = rotated(rows[:, : HEADS + KV_HEADS], angles)
    torch.testing.assert_close(queries.cpu().double(), expected[:, :HEADS], atol=5e-3, rtol=1e-3)
    keys = stored(cache.keys, None, "float16")
    torch.testing.assert_close(keys[SLOTS], expected[:, HEADS:], atol=5e-3, rtol=1e-3)
    assert torch.equal(stored(cache.values, None, "float16")[SLOTS], rows[:, -KV_HEADS:])
    assert not keys[[slot for slot in range(12) if slot not in SLOTS]].any()


@pytest.mark.parametrize(
    ("head_dim", "rotary"), [(64, 64), (80, 32), (96, 96), (128, 0), (256, 256), (36, 36)]
)
def test_queries_are_rotated_like_keys_in_int8(head_dim: int, rotary: int) -> None:
    qkv, cache = random_qkv(head_dim), empty_cache(head_dim, "int8")
    angles = torch.randn(len(SLOTS), rotary // 2, device=DEVICE)
    queries = run(qkv, angles, cache).cpu().double()
    rows = qkv.cpu().double().view(len(SLOTS), -1, head_dim)
    exact = rotated(rows[:, : HEADS + KV_HEADS], angles)
    torch.testing.assert_close(queries, exact[:, :HEADS] @ walsh(head_dim), atol=5e-3, rtol=1e-3)
    keys = stored(cache.keys, cache.key_scales, "int8")[SLOTS]
    scores = torch.einsum("thd,tkd->thk", queries, keys)
    expected = torch.einsum("thd,tkd->thk", exact[:, :HEADS], exact[:, HEADS:])
    assert (scores - expected).abs().max() < 0.05 * head_dim**0.5


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_caches_of_8_bits_are_half_a_step_off_at_most(kind: str, head_dim: int) -> None:
    """Heads and tokens of very different size, with an outlier in each, and one that is zero."""
    qkv, cache = random_qkv(head_dim), empty_cache(head_dim, kind)
    heads = qkv.view(len(SLOTS), -1, head_dim)
    heads *= torch.logspace(-2, 3, len(SLOTS), device=DEVICE)[:, None, None]
    heads[..., 5] *= 20
    heads[2, HEADS] = 0
    angles = torch.randn(len(SLOTS), head_dim // 2, device=DEVICE)
    run(qkv, angles, cache)
    rows = heads.cpu().double()
    for exact, numbers, scales in (
        (
            as_held(rotated(rows[:, HEADS:-KV_HEADS], angles), kind),
            cache.keys,
            cache.key_scales,
        ),
        (rows[:, -KV_HEADS:], cache.values, cache.value_scales),
    ):
        largest = exact.abs().amax(-1, keepdim=True)
        step = largest / 127 if kind == "int8" else (exact.abs() / 8).clamp(min=largest / 448 / 512)
        error = (stored(numbers, scales, kind)[SLOTS] - exact).abs()
        assert (error <= step * 0.501 + largest * 1e-6).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_not_a_number_stays_so_and_can_be_cleared(kind: str) -> None:
    backend = TritonBackend(DEVICE, torch.float16, KV_DTYPES[kind])
    (cache,) = backend.allocate_kv_cache(1, 3, BLOCK_SIZE, KV_HEADS, 64)
    rows = torch.ones(2, 1, KV_HEADS, 64).to(DEVICE, torch.float16)
    rows[0, 0, 1, 7] = torch.nan
    backend.store(rows[0], rows[1], cache, torch.tensor([BLOCK_SIZE], device=DEVICE))
    keys = stored(cache.keys, cache.key_scales, kind)
    assert keys[BLOCK_SIZE, 1].isnan().all()
    assert (as_held(keys[BLOCK_SIZE, 0], kind) - 1).abs().max() < 0.01
    backend.copy_blocks([cache], torch.tensor([(1, 2)], device=backend.device))
    assert stored(cache.keys, cache.key_scales, kind)[2 * BLOCK_SIZE, 1].isnan().all()
    backend.clear_blocks([cache], torch.tensor([1, 2], device=backend.device))
    assert all(not tensor.any() for tensor in cache.tensors)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_caches_of_8_bits_hold_almost_twice_the_tokens(kind: str) -> None:
    for head_dim, gain in ((64, 1.88), (128, 1.93)):
        backend = TritonBackend(DEVICE, torch.float16, KV_DTYPES[kind])
        assert 2 * head_dim / backend.kv_head_bytes(head_dim) > gain
        (cache,) = backend.allocate_kv_cache(1, 5, BLOCK_SIZE, 3, head_dim)
        taken = sum(tensor.nbytes for tensor in cache.tensors)
        assert taken == 5 * BLOCK_SIZE * 3 * 2 * backend.kv_head_bytes(head_dim)


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_a_token_is_stored_alike_alone_and_in_a_crowd(kind: str) -> None:
    qkv = random_qkv(64)
    angles = torch.randn(len(SLOTS), 32, device=DEVICE)
    together, apart = empty_cache(64, kind), empty_cache(64, kind)
    run(qkv, angles, together)
    for i, slot in enumerate(SLOTS):
        angle = angles[i : i + 1]
        slots = torch.tensor([slot], device=DEVICE)
        rope_and_store(qkv[i : i + 1], angle.cos(), angle.sin(), HEADS, apart, slots)
    for left, right in zip(together.tensors, apart.tensors, strict=True):
        assert torch.equal(left, right)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU divides and multiplies otherwise")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_what_is_stored_is_what_the_quality_was_measured_with(kind: str) -> None:
    """`tests/benchmarks/kv_cache.py` computes the rounding in PyTorch."""
    qkv, cache = random_qkv(64), empty_cache(64, kind)
    run(qkv, torch.zeros(len(SLOTS), 0, device=DEVICE), cache)
    keys, values = qkv.view(len(SLOTS), -1, 64)[:, HEADS:].float().split(KV_HEADS, dim=1)
    found = stored(cache.values, cache.value_scales, kind)[SLOTS]
    torch.testing.assert_close(found.float(), rounded(values, kind), atol=0, rtol=1e-6)
    found = as_held(stored(cache.keys, cache.key_scales, kind)[SLOTS], kind)
    # The kernel rotates in float32: a number in a thousand lies so near to half a step that it is
    # rounded to the other side.
    off = (found - rounded_keys(keys, kind).double()).abs() > 1e-5
    assert off.any(-1).double().mean() < 0.1


@pytest.mark.parametrize("head_dim", [64, 80])
def test_int8_keys_are_the_cpu_backends(head_dim: int) -> None:
    """But for scales, which that one holds in float16, and so for one code up or down."""
    qkv, cache = random_qkv(head_dim), empty_cache(head_dim, "int8")
    cpu = CpuBackend("bfloat16", "int8")
    (other,) = cpu.allocate_kv_cache(1, 3, BLOCK_SIZE, KV_HEADS, head_dim)
    angles = torch.randn(len(SLOTS), head_dim // 2)
    run(qkv, angles.to(DEVICE), cache)
    cpu.rope_and_store(qkv.cpu().float(), angles.cos(), angles.sin(), HEADS, other, batch_of(SLOTS))
    for ours, theirs in ((cache.keys, other.keys), (cache.values, other.values)):
        assert (ours.cpu().int() - theirs.int()).abs().max() <= 1
    for ours, theirs in (
        (cache.key_scales, other.key_scales),
        (cache.value_scales, other.value_scales),
    ):
        torch.testing.assert_close(ours.cpu(), theirs.float(), atol=1e-6, rtol=1e-3)


def batch_of(slots: list[int]) -> ForwardBatch:
    """One sequence whose tokens are anywhere: what storing looks at."""
    return ForwardBatch(
        query_start=torch.tensor([0, len(slots)], dtype=torch.int32, device=DEVICE),
        context_lens=torch.tensor([len(slots)], dtype=torch.int32, device=DEVICE),
        block_tables=torch.arange(3, dtype=torch.int32, device=DEVICE)[None],
        slot_mapping=torch.tensor(slots, device=DEVICE),
        block_size=BLOCK_SIZE,
    )


def test_one_large_channel_of_keys_costs_attention_little() -> None:
    """All the way: stored, rotated, attended to; beside what plain rounding would give."""
    slots, head_dim = list(range(3 * BLOCK_SIZE)), 128
    backend = TritonBackend(DEVICE, torch.float16, torch.int8)
    (cache,) = backend.allocate_kv_cache(1, 3, BLOCK_SIZE, KV_HEADS, head_dim)
    heads = torch.randn(len(slots), HEADS + 2 * KV_HEADS, head_dim)
    heads[:, HEADS:-KV_HEADS, 5] += 60
    heads = heads.to(torch.float16)
    q, k, v = heads.double().split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    unturned = torch.zeros(len(slots), 0, device=DEVICE)
    batch = batch_of(slots)
    queries = backend.rope_and_store(
        heads.flatten(1).to(DEVICE), unturned, unturned, HEADS, cache, batch
    )
    spec = AttentionSpec(scale=head_dim**-0.5)
    found = backend.attention(queries, cache, backend.plan_attention(batch), spec)
    error = found.cpu().double().view(q.shape) - attended(q, k, v)
    plain = attended(q, rounded(k.float(), "int8").double(), v) - attended(q, k, v)
    assert error.square().mean() < plain.square().mean() / 4


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence, in float64."""
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)
