from __future__ import annotations

import itertools

import pytest
import torch
from lowbit.quant.hessian import PANEL_ROWS, HessianSum
from torch import Tensor


def batches(num_features: int, sizes: tuple[int, ...] = (7, 300, 64)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_features)
    scales = torch.logspace(-3, 3, num_features)
    return [torch.randn(size, num_features, generator=generator) * scales for size in sizes]


def summed(inputs: list[Tensor]) -> HessianSum:
    hessian = HessianSum(inputs[0].shape[-1])
    for batch in inputs:
        hessian.add(batch)
    return hessian


@pytest.mark.parametrize("size", [1, 33, PANEL_ROWS - 1, PANEL_ROWS, PANEL_ROWS + 1, 600])
def test_the_sum_is_that_of_fp64(size: int) -> None:
    inputs = batches(size)
    hessian = summed(inputs)
    assert hessian.num_tokens == 371
    found = hessian.finish()
    rows = torch.cat(inputs).double()
    expected = rows.t() @ rows
    spread = expected.diagonal().sqrt()
    assert found.dtype == torch.float32
    assert ((found - expected).abs() / spread / spread[:, None]).max() < 1e-6
    assert torch.equal(found, found.t())


def test_products_of_bfloat16_are_off_by_their_rounding() -> None:
    """2 ** -9 of a number when it is rounded: x, y, and their sum."""
    inputs = batches(300)
    rounded = HessianSum(300, products=torch.bfloat16)
    for batch in inputs:
        rounded.add(batch)
    found, exact = rounded.finish(), summed(inputs).finish()
    spread = exact.diagonal().sqrt()
    off = (found - exact).abs() / spread / spread[:, None]
    assert 2**-14 < off.max() < 3 * 2**-9
    assert off.mean() < 2**-10
    assert torch.equal(found, found.t())


def test_the_order_of_the_batches_is_no_matter() -> None:
    inputs = batches(300, (16, 16, 40, 8))
    first = summed(inputs).finish()
    for order in itertools.islice(itertools.permutations(inputs), 1, None, 5):
        assert torch.equal(summed(list(order)).finish(), first)


def test_partial_sums_add_up_to_the_same_numbers() -> None:
    """What the processes of a run do: each adds its batches, then the panels are added."""
    inputs = batches(300, (16, 16, 40, 8))
    parts = [summed(inputs[::2]), summed(inputs[1::2])]
    for mine, theirs in zip(parts[0].panels, parts[1].panels, strict=True):
        mine.add_(theirs)
    assert torch.equal(parts[0].finish(), summed(inputs).finish())


def test_inputs_may_have_any_number_of_dimensions_and_no_tokens() -> None:
    (inputs,) = batches(40, (24,))
    hessian = summed([inputs.view(2, 3, 4, 40), inputs[:0]])
    assert hessian.num_tokens == 24
    assert torch.equal(hessian.finish(), summed([inputs]).finish())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("feature", [0, 299])
def test_what_is_not_finite_is_noticed(value: float, feature: int) -> None:
    inputs = batches(300)
    assert summed(inputs).is_finite()
    inputs[1][5, feature] = value
    assert not summed(inputs).is_finite()
