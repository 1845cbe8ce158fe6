"""Fused elementwise kernels against float64; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lowbit.kernels import triton_elementwise as kernels
from lowbit.kernels.interface import Activation

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def permutation_or_none(size: int, permuted: bool) -> torch.Tensor | None:
    return torch.randperm(size).to(DEVICE, torch.int32) if permuted else None


def reordered(expected: torch.Tensor, permutation: torch.Tensor | None) -> torch.Tensor:
    return expected if permutation is None else expected[:, permutation.cpu().long()]


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("rows", "features"), [(1, 64), (7, 96), (3, 1000), (0, 64)])
def test_rms_norm(rows: int, features: int, permuted: bool) -> None:
    wide_rows = torch.full((rows, features + 8), torch.nan, dtype=torch.float16, device=DEVICE)
    x = wide_rows[:, :features]
    x.copy_(torch.randn(rows, features) * 30)
    weight = torch.randn(features, device=DEVICE)
    permutation = permutation_or_none(features, permuted)
    wide = x.cpu().double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.cpu().double()
    actual = kernels.rms_norm(x, weight, 1e-5, permutation)
    assert actual.dtype == torch.float16
    torch.testing.assert_close(
        actual.cpu().double(), reordered(expected, permutation), atol=1e-3, rtol=1e-3
    )


ACTIVATIONS = {  # in float64
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU: torch.nn.functional.gelu,
    Activation.GELU_TANH: partial(torch.nn.functional.gelu, approximate="tanh"),
    Activation.RELU: torch.relu,
}


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("rows", "features"), [(1, 64), (5, 1100), (0, 64)])
def test_activate_mul(rows: int, features: int, permuted: bool, activation: Activation) -> None:
    gate_up = (torch.randn(rows, 2 * features) * 8).to(DEVICE, torch.float16)
    gate, up = gate_up.cpu().double().chunk(2, dim=-1)
    permutation = permutation_or_none(features, permuted)
    expected = reordered(ACTIVATIONS[activation](gate) * up, permutation)
    actual = kernels.activate_mul(gate_up, activation, permutation).cpu().double()
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("permuted", [False, True])
def test_the_operators_are_what_torch_expects_of_them(permuted: bool) -> None:
    """Their schemas, their fake implementations, and that they mutate nothing."""
    x = torch.randn(3, 64).to(DEVICE, torch.float16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lowbit.rms_norm.default,
        (x, torch.ones(64, device=DEVICE), 1e-5, permutation_or_none(64, permuted)),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.lowbit.activate_mul.default,
        (x, "gelu", permutation_or_none(32, permuted)),
        test_utils=tests,
    )


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    x = torch.zeros(2, 64, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight is \(63,\); it must be \[64\]"):
        kernels.rms_norm(x, torch.ones(63), 1e-5)
    with pytest.raises(ValueError, match=r"permutation is \(64,\); it must be \[32\]"):
        kernels.activate_mul(x, Activation.SILU, torch.arange(64))
    with pytest.raises(ValueError, match="two equal halves"):
        kernels.activate_mul(x[:, :63], Activation.SILU)
    with pytest.raises(ValueError, match=r"x is \(64,\)"):
        kernels.rms_norm(x[0], torch.ones(64), 1e-5)
