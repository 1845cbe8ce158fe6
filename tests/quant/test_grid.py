from __future__ import annotations

import pytest
import torch
from lowbit.quant.grid import (
    MAX_SCALE,
    MIN_SCALE,
    MIN_SHRINK,
    NUM_CANDIDATES,
    middle_code,
    quantize,
    round_scale,
    search_scale,
)


def brute_force(column: list[float], importance: list[float], bits: int) -> tuple[float, float]:
    """(least error, its scale) of one group, number by number in Python's doubles."""
    middle = 2 ** (bits - 1)
    largest = max(column, key=abs)
    best = (float("inf"), 0.0)
    for i in range(NUM_CANDIDATES):
        shrink = 1 + (MIN_SHRINK - 1) * i / (NUM_CANDIDATES - 1)
        scale = float(round_scale(torch.tensor(-largest / middle * shrink)))
        error = 0.0
        for weight, h in zip(column, importance, strict=True):
            code = min(max(round(weight / scale), -middle), middle - 1)
            error += h * (weight - scale * code) ** 2
        best = min(best, (error, scale))
    return best


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_search_finds_what_brute_force_finds(bits: int, size: int) -> None:
    generator = torch.Generator().manual_seed(bits * 100 + size)
    weight = torch.randn(size, 9, generator=generator)
    importance = torch.rand(size, generator=generator) * 10
    scales = search_scale(weight, importance, bits)
    for n in range(weight.shape[1]):
        least, _ = brute_force(weight[:, n].tolist(), importance.tolist(), bits)
        lost = (quantize(weight[:, n], scales[n], bits) * scales[n] - weight[:, n]).square()
        assert float(importance @ lost) == pytest.approx(least, rel=1e-4, abs=1e-9)


def test_the_most_important_weight_decides() -> None:
    weight = torch.tensor([[8.0], [0.3], [-0.29], [0.31]])
    for important in range(4):
        importance = torch.full((4,), 1e-6)
        importance[important] = 1e6
        scale = search_scale(weight, importance, 4)
        found = float((quantize(weight, scale, 4) * scale)[important, 0])
        assert found == pytest.approx(float(weight[important, 0]), abs=0.31)
    importance = torch.tensor([1e6, 1e-6, 1e-6, 1e-6])
    assert abs(float(search_scale(weight, importance, 4))) == 1.0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_weight_of_either_sign_is_exact_at_full_range(sign: float) -> None:
    """All four codes of 2 bits are used: a scale that is always positive would clip one end."""
    weight = sign * torch.tensor([[-2.0], [-1.0], [0.0], [1.0]])
    scale = search_scale(weight, torch.ones(4), 2)
    torch.testing.assert_close(quantize(weight, scale, 2) * scale, weight, rtol=0, atol=0)


def test_a_group_of_zeros_stays_zero() -> None:
    scale = search_scale(torch.zeros(5, 3), torch.ones(5), 4)
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert not quantize(torch.zeros(5, 3), scale, 4).any()


def test_a_group_without_importance_still_gets_a_usable_scale() -> None:
    weight = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    scale = search_scale(weight, torch.zeros(8), 4)
    assert torch.isfinite(scale).all()
    assert ((quantize(weight, scale, 4) * scale - weight).abs() <= scale.abs() * 1.01).all()


def test_scales_are_exact_in_fp16_and_in_bf16() -> None:
    scales = torch.cat([torch.logspace(-12, 8, 1001), -torch.logspace(-12, 8, 1001)])
    rounded = round_scale(scales)
    assert torch.equal(rounded.to(torch.float16).float(), rounded)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    assert float(rounded.abs().min()) == MIN_SCALE
    assert float(rounded.abs().max()) == MAX_SCALE
    assert torch.equal(rounded.sign(), scales.sign())
    inside = (scales.abs() > MIN_SCALE) & (scales.abs() < MAX_SCALE)
    relative = ((rounded - scales) / scales)[inside].abs()
    assert float(relative.max()) <= 2**-8


def test_the_middle_code() -> None:
    assert [middle_code(bits) for bits in (2, 3, 4, 8)] == [2, 4, 8, 128]
