from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lowbit.quant.grid import (
    MAX_SCALE,
    MIN_SCALE,
    MIN_SHRINK,
    NUM_CANDIDATES,
    Grid,
    GridSearch,
    middle_code,
    round_scale,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = [
    pytest.param(True, True, id="signed"),
    pytest.param(True, False, id="unsigned"),
    pytest.param(False, True, id="asymmetric"),
]


def restored(grid: Grid, weight: Tensor) -> Tensor:
    return (grid.quantize(weight) - grid.zero) * grid.scale


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def eight_bits(value: float) -> float:
    """The nearest double with 8 significant bits, within the scales' bounds."""
    mantissa, power = math.frexp(min(max(abs(value), MIN_SCALE), MAX_SCALE))
    return math.copysign(math.ldexp(round(mantissa * 256), power - 8), value)


def covering_scale(column: list[float], bits: int, sym: bool, signed: bool) -> float:
    """Of a group with weights on both sides of zero."""
    if not sym:
        return (max(column) - min(column)) / (2.0**bits - 1)
    largest = max(column, key=abs)
    return -largest / 2.0 ** (bits - 1) if signed else 2 * abs(largest) / (2.0**bits - 1)


def candidates(
    column: list[float], bits: int, sym: bool, signed: bool
) -> Iterator[tuple[float, int]]:
    """(scale, zero) of all grids that are tried."""
    for i in range(NUM_CANDIDATES):
        shrink = 1 + (MIN_SHRINK - 1) * i / (NUM_CANDIDATES - 1)
        scale = eight_bits(covering_scale(column, bits, sym, signed) * shrink)
        if sym:
            yield scale, 2 ** (bits - 1)
            continue
        # The middle of the codes stands for the middle of the weights.
        zero = round((2**bits - 1) / 2 - (min(column) + max(column)) / 2 / scale)
        for shift in (-1, 0, 1):
            yield scale, min(max(zero + shift, 0), 2**bits - 1)


def loss_of(
    column: list[float],
    importance: list[float],
    bits: int,
    grid: tuple[float, int],
    exponent: float = 2.0,
) -> float:
    scale, zero = grid
    loss = 0.0
    for weight, factor in zip(column, importance, strict=True):
        code = min(max(round(weight / scale) + zero, 0), 2**bits - 1)
        loss += factor * abs(weight - scale * (code - zero)) ** exponent
    return loss


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "signed"), KINDS)
@pytest.mark.parametrize(("size", "exponent"), [(2, 2.0), (7, 2.4), (7, 1.0), (64, 2.0), (64, 3.5)])
def test_search_finds_what_brute_force_finds(
    bits: int, sym: bool, signed: bool, size: int, exponent: float
) -> None:
    weight = seeded(size, 9, seed=bits * 100 + size)
    weight[0], weight[1] = weight[0].abs(), -weight[1].abs()
    importance = torch.rand(size, generator=torch.Generator().manual_seed(size)) * 10
    search = GridSearch(bits=bits, sym=sym, signed=signed, exponent=exponent)
    found = search.search(weight, importance)
    assert found.scale.shape == found.zero.shape == (9,)
    for n in range(weight.shape[1]):
        column, factors = weight[:, n].tolist(), importance.tolist()
        chosen = (float(found.scale[n]), int(found.zero[n]))
        tried = candidates(column, bits, sym, signed)
        least = min(loss_of(column, factors, bits, grid, exponent) for grid in tried)
        lost = loss_of(column, factors, bits, chosen, exponent)
        assert lost == pytest.approx(least, rel=1e-4, abs=1e-9)


def test_one_weight_alone_is_nearly_exact() -> None:
    weight = torch.tensor([[0.7, -0.7, 123.0, -0.05]])
    for bits in (2, 3, 4, 8):
        for sym in (True, False):
            grid = GridSearch(bits=bits, sym=sym).search(weight, torch.ones(1))
            torch.testing.assert_close(restored(grid, weight), weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("sym", "signed"), KINDS)
def test_a_single_candidate_covers_all_weights(bits: int, sym: bool, signed: bool) -> None:
    """However little the largest weights count."""
    weight = seeded(40, 25, seed=bits)
    importance = torch.where(weight.abs().amax(dim=1) > 2, 1e-6, 1.0)
    search = GridSearch(bits=bits, sym=sym, signed=signed, num_candidates=1)
    grid = search.search(weight, importance)
    for n in range(weight.shape[1]):
        expected = eight_bits(covering_scale(weight[:, n].tolist(), bits, sym, signed))
        assert float(grid.scale[n]) == pytest.approx(expected, rel=2**-8)
    # A signed grid has no code for the opposite of its largest weight, and scales are rounded.
    steps = (1.0 if sym and signed else 0.5) + 2**bits * 2**-8
    assert ((restored(grid, weight) - weight).abs() <= steps * grid.scale.abs()).all()


def test_more_candidates_clip_what_counts_little() -> None:
    weight = torch.cat([torch.full((1, 1), 8.0), seeded(63, 1, seed=5)])
    importance = torch.ones(64)
    whole = GridSearch(bits=4, sym=True, num_candidates=1).search(weight, importance)
    importance[0] = 1e-3
    shrunk = GridSearch(bits=4, sym=True).search(weight, importance)
    assert float(shrunk.scale.abs()) < 0.6 * float(whole.scale.abs())


def test_the_most_important_weight_decides() -> None:
    weight = torch.tensor([[8.0], [0.3], [-0.29], [0.31]])
    for important in range(4):
        importance = torch.full((4,), 1e-6)
        importance[important] = 1e6
        grid = GridSearch(bits=4, sym=True).search(weight, importance)
        found = float(restored(grid, weight)[important, 0])
        assert found == pytest.approx(float(weight[important, 0]), abs=0.31)
    importance = torch.tensor([1e6, 1e-6, 1e-6, 1e-6])
    assert float(GridSearch(bits=4, sym=True).search(weight, importance).scale) == -1.0


def test_a_higher_exponent_spares_the_largest_error() -> None:
    weight = seeded(64, 200, seed=6)
    worst = []
    for exponent in (1.0, 2.0, 8.0):
        search = GridSearch(bits=3, sym=True, exponent=exponent)
        grid = search.search(weight, torch.ones(64))
        worst.append(float((restored(grid, weight) - weight).abs().amax(dim=0).mean()))
    assert worst[0] > 1.1 * worst[1] > 1.2 * worst[2]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_weight_of_either_sign_is_exact_at_full_range(sign: float) -> None:
    """All four codes of 2 bits are used: a scale that is always positive would clip one end."""
    weight = sign * torch.tensor([[-2.0], [-1.0], [0.0], [1.0]])
    grid = GridSearch(bits=2, sym=True).search(weight, torch.ones(4))
    assert torch.equal(restored(grid, weight), weight)
    unsigned = GridSearch(bits=2, sym=True, signed=False).search(weight, torch.ones(4))
    assert float(unsigned.scale) > 0
    assert not torch.equal(restored(unsigned, weight), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_an_asymmetric_grid_restores_weights_that_lie_on_one(bits: int, first: int) -> None:
    steps = torch.arange(2**bits, dtype=torch.float32) - first
    weight = torch.stack([0.375 * steps, -0.375 * steps], dim=1)
    grid = GridSearch(bits=bits, sym=False).search(weight, torch.ones(2**bits))
    assert torch.equal(restored(grid, weight), weight)
    assert grid.zero.tolist() == [first, 2**bits - 1 - first]


@pytest.mark.parametrize(("sym", "signed"), KINDS)
@pytest.mark.parametrize("num_candidates", [1, NUM_CANDIDATES])
def test_a_group_of_zeros_stays_zero(sym: bool, signed: bool, num_candidates: int) -> None:
    search = GridSearch(bits=4, sym=sym, signed=signed, num_candidates=num_candidates)
    grid = search.search(torch.zeros(5, 3), torch.ones(5))
    assert grid.scale.tolist() == [1.0, 1.0, 1.0]
    assert not restored(grid, torch.zeros(5, 3)).any()


@pytest.mark.parametrize(("sym", "signed"), KINDS)
def test_a_group_without_importance_still_gets_a_usable_grid(sym: bool, signed: bool) -> None:
    weight = seeded(8, 3, seed=0)
    grid = GridSearch(bits=4, sym=sym, signed=signed).search(weight, torch.zeros(8))
    assert torch.isfinite(grid.scale).all()
    assert ((restored(grid, weight) - weight).abs() <= grid.scale.abs() * 1.05).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("value", [3.3, -3.3, 0.1, -700.0])
def test_an_asymmetric_group_of_constants_is_nearly_exact(bits: int, value: float) -> None:
    for num_candidates in (1, NUM_CANDIDATES):
        search = GridSearch(bits=bits, sym=False, num_candidates=num_candidates)
        weight = torch.full((6, 2), value)
        grid = search.search(weight, torch.ones(6))
        torch.testing.assert_close(restored(grid, weight), weight, rtol=2**-7, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.05, 1.0), (1.0, 2.0), (5.0, 5.01)])
@pytest.mark.parametrize("num_candidates", [1, NUM_CANDIDATES])
def test_an_asymmetric_group_on_one_side_of_zero_is_covered(
    bits: int, sign: float, low: float, high: float, num_candidates: int
) -> None:
    """The zero point is a code, so that the range reaches from zero to the farthest weight."""
    generator = torch.Generator().manual_seed(bits)
    weight = sign * (low + (high - low) * torch.rand(24, 5, generator=generator))
    search = GridSearch(bits=bits, sym=False, num_candidates=num_candidates)
    grid = search.search(weight, torch.ones(24))
    for n in range(weight.shape[1]):
        column = weight[:, n].tolist()
        scale = eight_bits(max(map(abs, column)) / (2**bits - 1))
        covered = loss_of(column, [1.0] * 24, bits, (scale, 0 if sign > 0 else 2**bits - 1))
        chosen = (float(grid.scale[n]), int(grid.zero[n]))
        # One candidate may place its zero point, which is rounded, half a step off.
        allowed = 1.001 if num_candidates > 1 else 4.0
        assert loss_of(column, [1.0] * 24, bits, chosen) <= allowed * covered


@given(
    weight=st.lists(
        st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=12
    ),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    signed=st.booleans(),
    exponent=st.sampled_from([1.0, 2.0, 2.4]),
)
@example([[1e-30, -1e-30, 1e-7]], 4, False, True, 2.0)
@example([[1e4, -1e4, 9999.0], [1e4, -1e4, 9998.0]], 8, False, True, 2.0)
def test_any_grid_can_be_stored(
    weight: list[list[float]], bits: int, sym: bool, signed: bool, exponent: float
) -> None:
    group = torch.tensor(weight)
    search = GridSearch(bits=bits, sym=sym, signed=signed, exponent=exponent)
    grid = search.search(group, torch.ones(len(group)))
    assert grid.bits == bits
    assert torch.equal(grid.scale.to(torch.float16).float(), grid.scale)
    assert torch.equal(grid.scale.to(torch.bfloat16).float(), grid.scale)
    assert grid.scale.all()
    if not (sym and signed):
        assert (grid.scale > 0).all()
    codes = grid.quantize(group)
    for values in (codes, grid.zero):
        assert torch.equal(values.round(), values)
        assert values.min() >= 0
        assert values.max() <= 2**bits - 1
    if sym:
        assert (grid.zero == 2 ** (bits - 1)).all()
    lost = (restored(grid, group) - group).abs().double() ** exponent
    whole = group.abs().double() ** exponent
    # No grid loses more than all weights set to zero, but for the half step of a tiny weight.
    assert (lost.sum(dim=0) <= whole.sum(dim=0) * 1.001 + len(group) * MIN_SCALE**exponent).all()


def test_every_code_is_reached_and_no_other() -> None:
    for bits in (2, 3, 4, 8):
        grid = Grid(scale=torch.tensor([0.5, -0.5]), zero=torch.tensor([1.0, 2.0]), bits=bits)
        values = torch.linspace(-200, 200, 4001)[:, None].expand(-1, 2)
        codes = grid.quantize(values)
        for n in range(2):
            assert codes[:, n].unique().tolist() == list(range(2**bits))
        scale, zero = torch.tensor([0.5, -0.5]), torch.tensor([1, 2])
        error = grid.error(values, codes)
        torch.testing.assert_close(error, values - scale * (codes - zero), rtol=0, atol=1e-4)


def test_a_group_is_taken_out_of_several() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    grid = Grid(scale=scale, zero=scale + 1, bits=3)[1]
    assert (grid.scale.tolist(), grid.zero.tolist(), grid.bits) == ([3.0, 4.0], [4.0, 5.0], 3)


def test_the_search_leaves_its_inputs_alone() -> None:
    weight, importance = seeded(6, 4, seed=1), torch.rand(6)
    before = weight.clone(), importance.clone()
    for sym in (True, False):
        grid = GridSearch(bits=4, sym=sym, exponent=2.4).search(weight, importance)
        grid.error(weight, grid.quantize(weight))
    assert torch.equal(weight, before[0])
    assert torch.equal(importance, before[1])


def test_scales_are_exact_in_fp16_and_in_bf16() -> None:
    scales = torch.cat([torch.logspace(-12, 8, 1001), -torch.logspace(-12, 8, 1001)])
    rounded = round_scale(scales)
    assert torch.equal(rounded.to(torch.float16).float(), rounded)
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    assert rounded.tolist() == [eight_bits(scale) for scale in scales.tolist()]
    assert float(rounded.abs().min()) == MIN_SCALE
    assert float(rounded.abs().max()) == MAX_SCALE
    inside = (scales.abs() > MIN_SCALE) & (scales.abs() < MAX_SCALE)
    relative = ((rounded - scales) / scales)[inside].abs()
    assert float(relative.max()) <= 2**-8


def test_the_middle_code() -> None:
    assert [middle_code(bits) for bits in (2, 3, 4, 8)] == [2, 4, 8, 128]
