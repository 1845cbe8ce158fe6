from __future__ import annotations

import pytest
import torch
from lowbit.quant.drift import DriftSum
from torch import Tensor

FEATURES = 24
FEW, MANY = (5, 6), (20, 30)  # outputs: fewer than features together, and more


def batches(num_outputs: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(inputs, wanted inputs, what the residual stream lacks), the batches of several sizes."""
    generator = torch.Generator().manual_seed(num_outputs)
    found = []
    for shape in ((2, 7), (1, 3), (3, 1)):
        x = torch.randn(*shape, FEATURES, generator=generator)
        y = x + 0.1 * torch.randn(*shape, FEATURES, generator=generator)
        found.append((x, y, 0.1 * torch.randn(*shape, num_outputs, generator=generator)))
    return found


def weights_of(sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(size, FEATURES, generator=generator) for size in sizes]


@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("sizes", [FEW, MANY])
@pytest.mark.parametrize(("products", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_sum_is_that_of_fp64(
    sizes: tuple[int, ...], has_residual: bool, products: torch.dtype, tolerance: float
) -> None:
    weights, data = weights_of(sizes), batches(sum(sizes))
    drift = DriftSum(weights, has_residual=has_residual, products=products)
    expected = torch.zeros(sum(sizes), FEATURES, dtype=torch.float64)
    for x, y, lacking in data:
        drift.add(x, y, lacking if has_residual else None)
        x, y = x.double().flatten(0, 1), y.double().flatten(0, 1)
        wanted = (y - x) @ torch.cat(weights).double().t()
        if has_residual:
            wanted += lacking.double().flatten(0, 1)
        expected += wanted.t() @ x
    found = drift.finish()
    assert [len(part) for part in found] == list(sizes)
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", [FEW, MANY])
def test_the_parts_of_several_processes_add_up(sizes: tuple[int, ...]) -> None:
    weights, data = weights_of(sizes), batches(sum(sizes))
    whole, parts = DriftSum(weights, has_residual=True), []
    for batch in data:
        whole.add(*batch)
        parts.append(DriftSum(weights, has_residual=True))
        parts[-1].add(*batch)
    for other in parts[1:]:
        for mine, theirs in zip(parts[0].sums, other.sums, strict=True):
            mine += theirs
    for mine, expected in zip(parts[0].finish(), whole.finish(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


def test_equal_inputs_have_no_drift() -> None:
    drift = DriftSum(weights_of(FEW), has_residual=False)
    for x, _, _ in batches(sum(FEW)):
        drift.add(x, x, None)
    assert not any(part.any() for part in drift.finish())
