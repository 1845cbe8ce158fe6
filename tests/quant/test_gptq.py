from __future__ import annotations

import pytest
import torch
from lowbit.kernels.packing import dequantize, unpack_codes
from lowbit.quant.errors import SolverError
from lowbit.quant.gptq import (
    BLOCK_SIZE,
    Factor,
    accumulate_hessian,
    factorize,
    quantize_weight,
    relative_error,
)
from lowbit.quant.grid import search_scale
from torch import Tensor


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations with outlier features, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    spread = torch.logspace(-1, 1, features)[torch.randperm(features, generator=generator)]
    return (torch.randn(tokens, features, generator=generator) @ mixing + 0.1) * spread


def hessian_of(inputs: Tensor) -> Tensor:
    hessian = torch.zeros(inputs.shape[-1], inputs.shape[-1])
    accumulate_hessian(hessian, inputs)
    return hessian


def textbook_obq(
    weight: Tensor, hessian: Tensor, scales: Tensor, order: list[int], group_size: int, bits: int
) -> Tensor:
    """Optimal Brain Quantization in a given order, fp64, the inverse formed anew for each column.

    Frantar & Alistarh 2022 (arXiv:2208.11580), equation 3: with F the columns not yet quantized,
    w_F -= (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_{:, q}. Returns signed codes [N, K].
    """
    left = weight.to(torch.float64).clone()
    codes = torch.zeros_like(left)
    for step, column in enumerate(order):
        free = order[step:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        scale = scales[column // group_size].to(torch.float64)
        code = (left[:, column] / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        error = (left[:, column] - code * scale) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0][None, :]
        codes[:, column] = code
    return codes


@pytest.mark.parametrize(
    ("features", "group_size", "bits"),
    [(24, 8, 4), (72, 32, 4), (150, 64, 4), (150, 128, 3), (40, -1, 2), (37, 16, 8)],
)
def test_codes_are_those_of_the_textbook(features: int, group_size: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(features)
    weight = torch.randn(11, features, generator=generator)
    hessian = hessian_of(correlated_inputs(4 * features, features))
    factor = factorize(hessian, group_size=group_size, damp_percent=0.01)
    solved = quantize_weight(weight, factor, bits=bits)

    size = features if group_size == -1 else group_size
    exact = hessian.to(torch.float64)
    order = torch.argsort(exact.diagonal(), descending=True).tolist()
    exact += 0.01 * exact.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    expected = textbook_obq(weight, exact, solved.scales, order, size, bits)
    found = solved.codes.t().to(torch.float64) - 2 ** (bits - 1)
    # A value half way between two codes may round either way in fp32, and moves its row's rest.
    same_rows = (found == expected).all(dim=1)
    assert int(same_rows.sum()) >= 10
    lost = relative_error(weight, solved.dequantize(), hessian)
    scales = solved.scales.float()[torch.arange(features) // size].t()
    assert lost == pytest.approx(
        relative_error(weight, expected.float() * scales, hessian), rel=0.02
    )


def test_group_scales_are_those_of_the_search() -> None:
    weight = torch.randn(5, 72, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(correlated_inputs(200, 72))
    factor = factorize(hessian, group_size=32, damp_percent=0.01)
    solved = quantize_weight(weight, factor, bits=4)
    for group, columns in enumerate([slice(0, 32), slice(32, 64), slice(64, 72)]):
        expected = search_scale(weight.t()[columns], hessian.diagonal()[columns], 4)
        assert torch.equal(solved.scales[group].float(), expected)


def test_the_result_does_not_depend_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 200, generator=torch.Generator().manual_seed(2))
    factor = factorize(hessian_of(correlated_inputs(500, 200)), group_size=64, damp_percent=0.01)
    whole = quantize_weight(weight, factor, bits=4)
    assert weight.shape[1] > BLOCK_SIZE
    monkeypatch.setattr("lowbit.quant.gptq.BLOCK_SIZE", 1)
    single = quantize_weight(weight, factor, bits=4)
    assert (whole.codes == single.codes).float().mean() > 0.99


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compensation_beats_rounding_to_nearest(bits: int) -> None:
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(3))
    hessian = hessian_of(correlated_inputs(2000, 192))
    factor = factorize(hessian, group_size=64, damp_percent=0.01)
    solved = quantize_weight(weight, factor, bits=bits)
    diagonal = torch.diag(hessian.diagonal())
    nearest = quantize_weight(
        weight, factorize(diagonal, group_size=64, damp_percent=0.01), bits=bits
    )
    better = relative_error(weight, solved.dequantize(), hessian)
    assert better < 0.7 * relative_error(weight, nearest.dequantize(), hessian)


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight = torch.randn(6, 48, generator=torch.Generator().manual_seed(4))
    factor = factorize(torch.eye(48), group_size=16, damp_percent=0.0)
    solved = quantize_weight(weight, factor, bits=4)
    scales = solved.scales.float()[torch.arange(48) // 16]
    expected = (weight.t() / scales).round().clamp(-8, 7) + 8
    assert torch.equal(solved.codes, expected.to(torch.uint8))


def test_concatenated_layers_come_out_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(n, 72, generator=generator) for n in (12, 4, 4)]
    factor = factorize(hessian_of(correlated_inputs(300, 72)), group_size=64, damp_percent=0.01)
    together = quantize_weight(torch.cat(parts), factor, bits=4).split([12, 4, 4])
    for part, joint in zip(parts, together, strict=True):
        alone = quantize_weight(part, factor, bits=4)
        assert torch.equal(alone.scales, joint.scales)
        assert (alone.codes == joint.codes).float().mean() > 0.99


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("features", [5, 72, 129])
def test_packed_codes_are_the_solvers(bits: int, features: int) -> None:
    weight = torch.randn(13, features, generator=torch.Generator().manual_seed(6))
    factor = factorize(
        hessian_of(correlated_inputs(300, features)), group_size=64, damp_percent=0.01
    )
    solved = quantize_weight(weight, factor, bits=bits)
    packed = solved.pack()
    assert torch.equal(unpack_codes(packed.qweight, bits, features), solved.codes)
    assert torch.equal(dequantize(packed), solved.dequantize())


def test_hessian_matches_fp64_in_any_cut() -> None:
    inputs = correlated_inputs(1000, 40).view(10, 100, 40)
    expected = inputs.double().flatten(0, 1).t() @ inputs.double().flatten(0, 1)
    for cut in (1, 3, 10):
        hessian = torch.zeros(40, 40)
        for batch in inputs.split(cut):
            accumulate_hessian(hessian, batch)
        torch.testing.assert_close(hessian.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("features", [1, 17, 130])
def test_the_factor_is_the_inverses_cholesky(features: int) -> None:
    hessian = hessian_of(correlated_inputs(3 * features + 3, features))
    factor = factorize(hessian, group_size=64, damp_percent=0.05)
    assert torch.equal(factor.upper, factor.upper.triu())
    assert (factor.upper.diagonal() > 0).all()
    damped = hessian.double()[factor.order][:, factor.order]
    damped += 0.05 * damped.diagonal().mean() * torch.eye(features, dtype=torch.float64)
    upper = factor.upper.double()
    identity = upper.t() @ upper @ damped
    torch.testing.assert_close(
        identity, torch.eye(features, dtype=torch.float64), rtol=0, atol=1e-3
    )


def test_dead_features_are_left_out() -> None:
    inputs = correlated_inputs(200, 40)
    inputs[:, [3, 17, 39]] = 0
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(7))
    weight[:, 17] = 1e6  # must not spoil its group's scale
    hessian = hessian_of(inputs)
    factor = factorize(hessian, group_size=16, damp_percent=0.01)
    solved = quantize_weight(weight, factor, bits=4)
    assert not solved.dequantize()[:, [3, 17, 39]].any()
    assert relative_error(weight, solved.dequantize(), hessian) < 0.02


def test_inputs_that_are_all_zero_give_zero_weights() -> None:
    factor = factorize(torch.zeros(20, 20), group_size=-1, damp_percent=0.01)
    solved = quantize_weight(torch.ones(3, 20), factor, bits=4)
    assert not solved.dequantize().any()


def test_a_singular_hessian_gets_more_damping() -> None:
    inputs = correlated_inputs(5, 60)  # rank 5 of 60
    factor = factorize(hessian_of(inputs), group_size=32, damp_percent=0.0)
    assert 0 < factor.damp_percent <= 1
    weight = torch.randn(4, 60, generator=torch.Generator().manual_seed(8))
    solved = quantize_weight(weight, factor, bits=4)
    assert relative_error(weight, solved.dequantize(), hessian_of(inputs)) < 0.01


def test_an_indefinite_hessian_is_an_error_never_rounding() -> None:
    with pytest.raises(SolverError, match=r"not positive definite even with damp_percent 1;"):
        factorize(torch.eye(8) - 5 * torch.ones(8, 8) * (1 - torch.eye(8)), **FACTOR)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_errors(bad: float) -> None:
    hessian = torch.eye(8)
    factor = factorize(hessian, **FACTOR)
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(SolverError, match="weight holds values that are not finite"):
        quantize_weight(weight, factor, bits=4)
    hessian[2, 2] = bad
    with pytest.raises(SolverError, match="Hessian of its inputs holds values that are not finite"):
        factorize(hessian, **FACTOR)


def test_the_caller_keeps_its_tensors() -> None:
    hessian = hessian_of(correlated_inputs(100, 24))
    weight = torch.randn(3, 24)
    before = hessian.clone(), weight.clone()
    factor: Factor = factorize(hessian, **FACTOR)
    quantize_weight(weight, factor, bits=4)
    assert torch.equal(hessian, before[0])
    assert torch.equal(weight, before[1])


FACTOR = {"group_size": 4, "damp_percent": 0.01}
