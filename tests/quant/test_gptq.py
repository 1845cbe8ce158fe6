from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.kernels.packing import dequantize, unpack_codes
from lowbit.quant import gptq
from lowbit.quant.config import ModuleConfig
from lowbit.quant.errors import SolverError
from lowbit.quant.gptq import (
    ACT_ORDERS,
    BLOCK_SIZE,
    Factor,
    QuantizedWeight,
    Solution,
    SolverConfig,
    factorize,
    solve,
)
from lowbit.quant.grid import GridSearch
from oracles import relative_error
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = SolverConfig(descent_sweeps=0)  # GPTQ as in the paper, on searched grids


def correlated_inputs(tokens: int, features: int, seed: int = 0) -> Tensor:
    """Activations with outlier features, as language models have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator) / features**0.5
    spread = torch.logspace(-1, 1, features)[torch.randperm(features, generator=generator)]
    inputs: Tensor = (torch.randn(tokens, features, generator=generator) @ mixing + 0.1) * spread
    return inputs


def hessian_of(inputs: Tensor) -> Tensor:
    return inputs.t() @ inputs


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def indefinite(features: int) -> Tensor:
    return torch.eye(features) - 5 * torch.ones(features, features) * (1 - torch.eye(features))


def solve_one(
    weight: Tensor,
    hessian: Tensor,
    config: SolverConfig | None = None,
    *,
    bits: int = 4,
    group_size: int = 64,
    sym: bool = True,
    drift: Tensor | None = None,
    fallback: str | None = None,
) -> Solution:
    module = ModuleConfig(bits=bits, group_size=group_size, sym=sym)
    drifts = None if drift is None else [drift.clone()]
    (solution,) = solve(
        [weight], hessian.clone(), [module], config, drifts=drifts, fallback=fallback
    )
    return solution


def damped(hessian: Tensor, damp_percent: float = 0.01) -> Tensor:
    """H + damping in fp64, for a Hessian without dead features."""
    exact = hessian.double()
    mean = exact.diagonal().mean()
    return exact + damp_percent * mean * torch.eye(len(exact), dtype=torch.float64)


def objective(error: Tensor, hessian: Tensor) -> Tensor:
    """[N] fp64, e H e^T of each row. error [N, K]"""
    exact = error.double()
    return ((exact @ hessian.double()) * exact).sum(dim=1)


def restored(quantized: QuantizedWeight) -> Tensor:
    """[N, K] fp64, element by element from the checkpoint's definition."""
    groups = [k // quantized.group_size for k in range(len(quantized.codes))]
    centered = quantized.codes.double() - quantized.zeros.double()[groups]
    return (centered * quantized.scales.double()[groups]).t()


def expected_order(diagonal: Tensor, act_order: str, group_size: int) -> list[int]:
    importance = diagonal.tolist()
    columns = list(range(len(importance)))
    if act_order == "none":
        return columns
    if act_order == "static":
        return sorted(columns, key=lambda k: -importance[k])
    groups = [columns[start : start + group_size] for start in range(0, len(columns), group_size)]
    groups.sort(key=lambda group: -max(importance[k] for k in group))
    return [k for group in groups for k in sorted(group, key=lambda k: -importance[k])]


def textbook_obq(
    weight: Tensor,
    hessian: Tensor,
    order: list[int],
    search: GridSearch,
    group_size: int,
    *,
    live: bool,
) -> Tensor:
    """Optimal Brain Quantization in a given order, fp64, the inverse formed anew for each column.

    Frantar & Alistarh 2022 (arXiv:2208.11580), equation 3: with F the columns not yet quantized,
    w_F -= (w_q - quant(w_q)) / [H_F^-1]_qq * (H_F^-1)_{:, q}. A group's grid is searched on the
    original weights, or on `live` ones when the group is first visited. Returns [N, K] fp64.
    """
    left = weight.double().clone()
    importance = (1 / torch.linalg.inv(hessian).diagonal()).float()
    result = torch.zeros_like(left)
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    for step, column in enumerate(order):
        group = column // group_size
        if group not in grids:
            columns = slice(group * group_size, (group + 1) * group_size)
            source = left.float() if live else weight
            grid = search.search(source[:, columns].t().contiguous(), importance[columns])
            grids[group] = (grid.scale.double(), grid.zero.double())
        scale, zero = grids[group]
        free = order[step:]
        inverse = torch.linalg.inv(hessian[free][:, free])
        code = ((left[:, column] / scale).round() + zero).clamp(0, 2**search.bits - 1)
        result[:, column] = (code - zero) * scale
        error = (left[:, column] - result[:, column]) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0][None, :]
    return result


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize(
    ("features", "group_size", "bits", "sym"),
    [
        (24, 8, 4, True),
        (72, 32, 4, False),
        (150, 64, 4, True),
        (150, -1, 3, True),
        (40, -1, 2, False),
        (37, 16, 8, True),
    ],
)
def test_weights_are_those_of_the_textbook(
    features: int, group_size: int, bits: int, sym: bool, act_order: str
) -> None:
    weight = seeded(11, features, seed=features)
    hessian = hessian_of(correlated_inputs(4 * features, features))
    config = SolverConfig(act_order=act_order, descent_sweeps=0)
    solution = solve_one(weight, hessian, config, bits=bits, group_size=group_size, sym=sym)

    size = features if group_size == -1 else group_size
    order = expected_order(hessian.diagonal(), act_order, size)
    search = GridSearch(bits=bits, sym=sym)
    live = act_order != "static"
    expected = textbook_obq(weight, damped(hessian), order, search, size, live=live)
    # A value half way between two codes may round either way in fp32, and moves its row's rest.
    same_rows = (restored(solution.quantized) == expected).all(dim=1)
    assert int(same_rows.sum()) >= 10
    lost = objective(weight - expected, hessian).sum() / objective(weight, hessian).sum()
    assert solution.relative_error == pytest.approx(float(lost), rel=0.02)
    assert solution.fallback is None
    assert solution.damp_percent == 0.01


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("group_size", [8, 30, 64, -1])
def test_the_visiting_order(
    act_order: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def spy(hessian: Tensor, order: Tensor, damp_percent: float) -> Factor:
        seen.append(order)
        return factorize(hessian, order, damp_percent)

    monkeypatch.setattr(gptq, "factorize", spy)
    features = 70
    hessian = hessian_of(correlated_inputs(300, features))
    config = SolverConfig(act_order=act_order, descent_sweeps=0)
    solve_one(seeded(2, features, seed=20), hessian, config, group_size=group_size)
    size = features if group_size == -1 else group_size
    (order,) = seen
    assert order.tolist() == expected_order(hessian.diagonal(), act_order, size)
    if act_order == "group":
        visited = [group for group, _ in itertools.groupby(k // size for k in order.tolist())]
        assert sorted(visited) == list(range(-(-features // size)))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("config", "exponent", "num_candidates", "weighted"),
    [
        (PLAIN, 2.0, 24, True),
        (replace(PLAIN, scale_search="norm", scale_norm=3.1), 3.1, 24, False),
        (replace(PLAIN, scale_search="none"), 2.0, 1, False),
        (replace(PLAIN, signed_scales=False), 2.0, 24, True),
    ],
)
def test_grids_are_those_of_the_search(
    config: SolverConfig, exponent: float, num_candidates: int, weighted: bool, sym: bool
) -> None:
    weight = seeded(5, 72, seed=1)
    hessian = hessian_of(correlated_inputs(200, 72))
    solved = solve_one(weight, hessian, config, bits=3, group_size=32, sym=sym).quantized
    exact = 1 / torch.linalg.inv(damped(hessian)).diagonal()
    importance = exact.float() if weighted else torch.ones(72)
    search = GridSearch(
        bits=3,
        sym=sym,
        signed=config.signed_scales,
        exponent=exponent,
        num_candidates=num_candidates,
    )
    for group, columns in enumerate([slice(0, 32), slice(32, 64), slice(64, 72)]):
        expected = search.search(weight.t()[columns], importance[columns])
        assert torch.equal(solved.scales[group].float(), expected.scale)
        assert torch.equal(solved.zeros[group].float(), expected.zero)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize(("name", "value"), [("ROWS_AT_ONCE", 3), ("BLOCK_SIZE", 7)])
@pytest.mark.parametrize("sweeps", [0, 3])
def test_the_result_does_not_depend_on_slices(
    act_order: str, name: str, value: int, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, drift = seeded(40, 200, seed=2), seeded(40, 200, seed=19)
    hessian = hessian_of(correlated_inputs(500, 200))
    assert weight.shape[1] > BLOCK_SIZE
    config = SolverConfig(act_order=act_order, descent_sweeps=sweeps)
    whole = solve_one(weight, hessian, config, drift=drift)
    monkeypatch.setattr(gptq, name, value)
    sliced = solve_one(weight, hessian, config, drift=drift)
    # Rounding ties: a code that rounds the other way moves the rest of its row.
    same = (restored(whole.quantized) == restored(sliced.quantized)).all(dim=1)
    assert int(same.sum()) >= 36
    assert sliced.lost == pytest.approx(whole.lost, rel=0.01)
    assert sliced.energy == pytest.approx(whole.energy, rel=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 64, -1, 50])
@pytest.mark.parametrize("sym", [True, False])
def test_every_step_beats_rounding_to_nearest(bits: int, group_size: int, sym: bool) -> None:
    weight = seeded(32, 160, seed=3)
    hessian = hessian_of(correlated_inputs(1500, 160))
    lost = []
    for config, fallback in [(None, "none"), (PLAIN, None), (SolverConfig(), None)]:
        solution = solve_one(
            weight,
            hessian,
            config,
            bits=bits,
            group_size=group_size,
            sym=sym,
            fallback=fallback,
        )
        solved = solution.quantized
        num_groups = {16: 10, 64: 3, -1: 1, 50: 4}[group_size]
        assert solved.codes.shape == (160, 32)
        assert solved.scales.shape == solved.zeros.shape == (num_groups, 32)
        assert solved.group_size == (160 if group_size == -1 else group_size)
        assert (solved.codes.dtype, solved.zeros.dtype) == (torch.uint8, torch.uint8)
        assert int(solved.codes.max()) <= 2**bits - 1
        assert int(solved.zeros.max()) <= 2**bits - 1
        lost.append(float(objective(weight - restored(solved), hessian).sum()))
    nearest, compensated, descended = lost
    assert compensated < 0.7 * nearest
    assert descended < (0.999 if bits == 8 else 0.98) * compensated


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight = seeded(6, 48, seed=4)
    config = SolverConfig(damp_percent=0.0, descent_sweeps=0)
    solved = solve_one(weight, torch.eye(48), config, group_size=16).quantized
    scales = solved.scales.float()[torch.arange(48) // 16]
    expected = (weight.t() / scales).round().clamp(-8, 7) + 8
    assert torch.equal(solved.codes, expected.to(torch.uint8))


def test_drift_of_a_part_of_the_tokens_has_a_hessian_of_its_own() -> None:
    """The weight that is rounded is W + E (H' + damping)^-1, with H' of the part."""
    weight, inputs = seeded(40, 72, seed=1), correlated_inputs(300, 72)
    whole, part = hessian_of(inputs), hessian_of(inputs[:150])
    drift = 0.05 * seeded(40, 72, seed=2) @ part
    moved = weight.double() + drift.double() @ torch.linalg.inv(damped(part))
    module = ModuleConfig(bits=8, group_size=-1)
    (found,) = solve([weight], whole.clone(), [module], PLAIN, drifts=[drift], drift_hessian=part)
    (expected,) = solve([moved.float()], whole.clone(), [module], PLAIN)
    same = found.quantized.codes == expected.quantized.codes
    assert float(same.float().mean()) > 0.98


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_layers_that_share_a_hessian_come_out_as_if_alone(act_order: str) -> None:
    modules = [
        ModuleConfig(bits=4, group_size=64),
        ModuleConfig(bits=2, group_size=16, sym=False),
        ModuleConfig(bits=8, group_size=-1),
        ModuleConfig(bits=3, group_size=50, sym=False),
    ]
    weights = [seeded(rows, 72, seed=5 + rows) for rows in (12, 4, 1, 9)]
    drifts = [seeded(len(weight), 72, seed=len(weight)) for weight in weights]
    hessian = hessian_of(correlated_inputs(300, 72))
    config = SolverConfig(act_order=act_order)
    own = [drift.clone() for drift in drifts]  # rewritten
    together = solve(weights, hessian.clone(), modules, config, drifts=own)
    assert len(together) == 4
    for weight, module, drift, joint in zip(weights, modules, drifts, together, strict=True):
        (alone,) = solve([weight], hessian.clone(), [module], config, drifts=[drift])
        assert joint.quantized.bits == module.bits
        assert torch.equal(alone.quantized.codes, joint.quantized.codes)
        assert torch.equal(alone.quantized.scales, joint.quantized.scales)
        assert torch.equal(alone.quantized.zeros, joint.quantized.zeros)
        assert (alone.lost, alone.energy) == (joint.lost, joint.energy)


def test_concatenated_layers_come_out_as_if_alone() -> None:
    parts = [seeded(rows, 72, seed=rows) for rows in (24, 8, 9)]
    hessian = hessian_of(correlated_inputs(300, 72))
    together = solve_one(torch.cat(parts), hessian).quantized.split([24, 8, 9])
    for part, joint in zip(parts, together, strict=True):
        alone = solve_one(part, hessian).quantized
        assert (joint.bits, joint.group_size) == (4, 64)
        assert (alone.codes == joint.codes).float().mean() > 0.98
        assert (alone.scales == joint.scales).float().mean() > 0.9


def test_no_rows_and_no_layers() -> None:
    """A process of a run may have no rows of a small layer."""
    hessian = hessian_of(correlated_inputs(50, 20))
    solution = solve_one(torch.zeros(0, 20), hessian, group_size=8)
    assert solution.quantized.codes.shape == (20, 0)
    assert solution.quantized.scales.shape == (3, 0)
    assert (solution.lost, solution.energy, solution.relative_error) == (0.0, 0.0, 0.0)
    assert solve([], hessian, []) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("features", [5, 72, 129])
@pytest.mark.parametrize("sym", [True, False])
def test_packed_codes_are_the_solvers(bits: int, features: int, sym: bool) -> None:
    weight = seeded(13, features, seed=6)
    hessian = hessian_of(correlated_inputs(300, features))
    solved = solve_one(weight, hessian, bits=bits, sym=sym).quantized
    bias = torch.arange(13.0)
    packed = solved.pack(bias)
    assert torch.equal(unpack_codes(packed.qweight, bits, features), solved.codes)
    assert torch.equal(dequantize(packed), solved.dequantize())
    assert packed.bias is bias
    assert torch.equal(solved.dequantize().double(), restored(solved))


@pytest.mark.parametrize("features", [1, 17, 130, 300])
@pytest.mark.parametrize("damp_percent", [0.001, 0.05])
@pytest.mark.parametrize("panel_rows", [512, 50])
def test_the_factor_is_the_inverses_cholesky(
    features: int, damp_percent: float, panel_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "FACTOR_ROWS", panel_rows)
    hessian = hessian_of(correlated_inputs(3 * features + 3, features))
    order = torch.randperm(features, generator=torch.Generator().manual_seed(features))
    factor = factorize(hessian, order, damp_percent)
    assert torch.equal(factor.order, order)
    assert factor.damp_percent == damp_percent
    assert factor.damping == pytest.approx(
        damp_percent * float(hessian.double().diagonal().mean()), rel=1e-6
    )
    cuts = [0, features // 3, features // 2, features]
    upper = torch.cat([factor.rows(start, end) for start, end in itertools.pairwise(cuts)])
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal() > 0).all()
    expected = torch.linalg.inv(damped(hessian, damp_percent))[order][:, order]
    spread = expected.diagonal().sqrt()
    off = (upper.double().t() @ upper.double() - expected) / spread / spread[:, None]
    assert float(off.abs().max()) < 1e-5


@pytest.mark.parametrize("features", [1, 17, 130, 300])
@pytest.mark.parametrize("damp_percent", [0.001, 0.3])
def test_the_conditional_curvature_is_that_of_the_inverse(
    features: int, damp_percent: float
) -> None:
    hessian = hessian_of(correlated_inputs(2 * features + 5, features, seed=features))
    order = torch.randperm(features, generator=torch.Generator().manual_seed(1))
    found = factorize(hessian, order, damp_percent).conditional_curvature()
    expected = 1 / torch.linalg.inv(damped(hessian, damp_percent)).diagonal()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("damp_percent", [0.01, 0.0])
@pytest.mark.parametrize("sweeps", [0, 4])
def test_dead_features_are_left_out(
    act_order: str, sym: bool, damp_percent: float, sweeps: int
) -> None:
    dead = [3, 17, 39]
    inputs = correlated_inputs(200, 40)
    inputs[:, dead] = 0
    weight = seeded(4, 40, seed=7)
    weight[:, 17] = 1e6  # must not spoil its group's scale
    hessian = hessian_of(inputs)
    config = SolverConfig(act_order=act_order, damp_percent=damp_percent, descent_sweeps=sweeps)
    solution = solve_one(weight, hessian, config, group_size=16, sym=sym)
    found = restored(solution.quantized)
    assert solution.fallback is None
    assert not found[:, dead].any()
    lost = objective(weight - found, hessian).sum() / objective(weight, hessian).sum()
    assert lost < 0.02
    assert solution.relative_error == pytest.approx(float(lost), rel=1e-3)


def test_dead_features_do_not_change_the_others() -> None:
    alive = [k for k in range(40) if k not in (0, 21, 22)]
    inputs = correlated_inputs(200, 40)
    inputs[:, [0, 21, 22]] = 0
    weight = seeded(30, 40, seed=8)
    with_dead = restored(solve_one(weight, hessian_of(inputs), group_size=-1).quantized)
    without = restored(
        solve_one(weight[:, alive], hessian_of(inputs[:, alive]), group_size=-1).quantized
    )
    assert int((with_dead[:, alive] == without).all(dim=1).sum()) >= 28


@pytest.mark.parametrize("damp_percent", [0.01, 0.0])
def test_inputs_that_are_all_zero_give_zero_weights(damp_percent: float) -> None:
    config = SolverConfig(damp_percent=damp_percent)
    solution = solve_one(torch.ones(3, 20), torch.zeros(20, 20), config, group_size=-1)
    assert not restored(solution.quantized).any()
    assert solution.relative_error == 0.0
    assert torch.isfinite(solution.quantized.scales).all()


def test_a_singular_hessian_gets_more_damping() -> None:
    hessian = hessian_of(correlated_inputs(5, 60))  # rank 5 of 60
    factor = factorize(hessian, torch.arange(60), 0.0)
    assert 0 < factor.damp_percent <= 1
    weight = seeded(4, 60, seed=8)
    solution = solve_one(weight, hessian, SolverConfig(damp_percent=0.0), group_size=32)
    assert solution.fallback is None
    assert solution.damp_percent == factor.damp_percent
    found = restored(solution.quantized)
    assert objective(weight - found, hessian).sum() < 0.01 * objective(weight, hessian).sum()


def expected_nearest(weight: Tensor, diagonal: Tensor, search: GridSearch, size: int) -> Tensor:
    """[N, K] fp64, rounding to nearest on searched grids."""
    parts = []
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        grid = search.search(part.t().contiguous(), diagonal[start : start + size])
        scale, zero = grid.scale.double()[:, None], grid.zero.double()[:, None]
        code = ((part / grid.scale[:, None]).double().round() + zero).clamp(0, 2**search.bits - 1)
        parts.append((code - zero) * scale)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_an_indefinite_hessian_is_reported_and_rounded_to_nearest(act_order: str) -> None:
    hessian = indefinite(24)
    with pytest.raises(SolverError, match=r"not positive definite even with damp_percent 1$"):
        factorize(hessian, torch.arange(24), 0.01)
    weights = [seeded(3, 24, seed=9), seeded(5, 24, seed=10)]
    modules = [ModuleConfig(group_size=8), ModuleConfig(bits=3, group_size=16, sym=False)]
    config = SolverConfig(act_order=act_order)
    solutions = solve(weights, hessian.clone(), modules, config)
    for weight, module, solution in zip(weights, modules, solutions, strict=True):
        assert solution.fallback is not None
        assert "not positive definite even with damp_percent 1" in solution.fallback
        search = GridSearch(bits=module.bits, sym=module.sym)
        expected = expected_nearest(weight, torch.ones(24), search, module.group_size)
        assert torch.equal(restored(solution.quantized), expected)


@pytest.mark.parametrize("sym", [True, False])
def test_a_callers_reason_rounds_to_nearest(sym: bool) -> None:
    """With nothing else of the Hessian than its diagonal, and no drift."""
    weight = seeded(7, 72, seed=11)
    hessian = hessian_of(correlated_inputs(300, 72))
    solution = solve_one(
        weight,
        hessian,
        bits=3,
        group_size=32,
        sym=sym,
        drift=seeded(7, 72, seed=12) * 1e3,
        fallback="3 tokens reached it",
    )
    assert solution.fallback == "3 tokens reached it"
    search = GridSearch(bits=3, sym=sym)
    expected = expected_nearest(weight, hessian.diagonal(), search, 32)
    assert torch.equal(restored(solution.quantized), expected)
    lost = objective(weight - expected, hessian).sum() / objective(weight, hessian).sum()
    assert solution.relative_error == pytest.approx(float(lost), rel=1e-4)


@pytest.mark.parametrize("dead", [[4], list(range(16))])
def test_a_fallback_takes_no_feature_for_dead(dead: list[int]) -> None:
    """A Hessian that is not to be trusted does not say that an input is always zero either."""
    weight = seeded(5, 16, seed=13)
    inputs = correlated_inputs(3, 16)
    inputs[:, dead] = 0
    solution = solve_one(weight, hessian_of(inputs), group_size=8, bits=8, fallback="few tokens")
    off = (restored(solution.quantized) - weight)[:, dead]
    # Its error counts nothing in the search, so that it may be clipped, but only so far.
    assert float(off.norm()) < 0.65 * float(weight[:, dead].norm())


@pytest.mark.parametrize("drifting", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_reported_error_is_that_of_fp64(bits: int, drifting: bool) -> None:
    weight = seeded(9, 72, seed=14)
    inputs = correlated_inputs(400, 72)
    hessian = hessian_of(inputs)
    drift = 0.1 * seeded(9, 72, seed=15) @ hessian if drifting else None
    solution = solve_one(weight, hessian, bits=bits, group_size=32, drift=drift)
    target = weight.double()
    if drift is not None:
        target = target + drift.double() @ torch.linalg.inv(damped(hessian))
    found = restored(solution.quantized)
    x = inputs.double()
    lost = float(((target - found) @ x.t()).square().sum())
    energy = float((weight.double() @ x.t()).square().sum())
    assert solution.lost == pytest.approx(lost, rel=2e-3)
    assert solution.energy == pytest.approx(energy, rel=1e-5)
    assert solution.relative_error == pytest.approx(lost / energy, rel=2e-3)
    if drift is None:
        alone = relative_error(weight, solution.quantized.dequantize(), hessian)
        assert alone == pytest.approx(lost / energy, rel=2e-3)


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("features", [40, 150])
def test_a_drift_moves_the_target_to_the_least_squares_solution(
    act_order: str, features: int
) -> None:
    weight = seeded(8, features, seed=16)
    wanted_inputs = correlated_inputs(6 * features, features)
    inputs = wanted_inputs + 0.3 * correlated_inputs(6 * features, features, seed=17)
    inputs[:, 5] = 1.2 * wanted_inputs[:, 6] - wanted_inputs[:, 5]
    hessian = hessian_of(inputs)
    drift = weight @ (wanted_inputs - inputs).t() @ inputs
    exact = damped(hessian)
    target = weight.double() + drift.double() @ torch.linalg.inv(exact)
    config = SolverConfig(act_order=act_order)
    with_drift = solve_one(weight, hessian, config, bits=8, group_size=32, drift=drift)
    without = solve_one(weight, hessian, config, bits=8, group_size=32)
    off = objective(target - restored(with_drift.quantized), exact).sum()
    off_without = objective(target - restored(without.quantized), exact).sum()
    assert off < 1e-3 * off_without
    missing = [
        (restored(solution.quantized) @ inputs.double().t() - (weight @ wanted_inputs.t()).double())
        for solution in (with_drift, without)
    ]
    assert missing[0].norm() < 0.7 * missing[1].norm()


@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_a_drift_of_zero_changes_nothing(act_order: str) -> None:
    weight = seeded(8, 150, seed=18)
    hessian = hessian_of(correlated_inputs(300, 150))
    config = SolverConfig(act_order=act_order)
    none = solve_one(weight, hessian, config)
    zero = solve_one(weight, hessian, config, drift=torch.zeros(8, 150))
    assert torch.equal(none.quantized.codes, zero.quantized.codes)
    assert torch.equal(none.quantized.scales, zero.quantized.scales)
    assert none.lost == zero.lost


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_sweep_raises_the_damped_objective(bits: int, sym: bool, act_order: str) -> None:
    """Of any row, and the scales stay such as a checkpoint holds exactly."""
    weight = seeded(20, 72, seed=21)
    hessian = hessian_of(correlated_inputs(200, 72, seed=22))
    drift = 0.05 * seeded(20, 72, seed=23) @ hessian
    exact = damped(hessian, 0.02)
    target = weight.double() + drift.double() @ torch.linalg.inv(exact)
    history = []
    for sweeps in (0, 1, 2, 3, 8):
        config = SolverConfig(damp_percent=0.02, act_order=act_order, descent_sweeps=sweeps)
        solution = solve_one(
            weight, hessian, config, bits=bits, group_size=32, sym=sym, drift=drift
        )
        scales, zeros = solution.quantized.scales, solution.quantized.zeros
        assert scales.dtype == torch.float16
        assert torch.equal(scales.float().to(torch.bfloat16).float(), scales.float())
        assert scales.all()
        assert torch.isfinite(scales).all()
        if sym:
            assert (zeros == 2 ** (bits - 1)).all()
        history.append(objective(target - restored(solution.quantized), exact))
    for before, after in itertools.pairwise(history):
        assert (after <= before * (1 + 1e-4)).all()
    assert history[-1].sum() < (0.995 if bits == 8 else 0.95) * history[0].sum()


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True)])
@pytest.mark.parametrize("act_order", ACT_ORDERS)
def test_the_descent_ends_where_no_single_change_helps(
    bits: int, sym: bool, act_order: str
) -> None:
    features, size, rows = 22, 8, 6
    weight = seeded(rows, features, seed=24)
    hessian = hessian_of(correlated_inputs(60, features, seed=25))
    exact = damped(hessian)
    config = SolverConfig(descent_sweeps=100, act_order=act_order)
    solved = solve_one(weight, hessian, config, bits=bits, group_size=size, sym=sym).quantized
    reached = objective(weight - restored(solved), exact)
    tried = 0
    for k, n, step in itertools.product(range(features), range(rows), (-1, 1)):
        code = int(solved.codes[k, n]) + step
        if 0 <= code <= 2**bits - 1:
            codes = solved.codes.clone()
            codes[k, n] = code
            other = objective(weight - restored(replace(solved, codes=codes)), exact)
            assert float(other[n]) >= float(reached[n]) * (1 - 1e-4)
            tried += 1
    assert tried > features * rows
    for group, n, factor in itertools.product(range(3), range(rows), (1 - 2**-7, 1 + 2**-7)):
        scales = solved.scales.float()
        scales[group, n] *= factor
        rounded = scales.to(torch.bfloat16).to(torch.float16)
        assert rounded[group, n] != solved.scales[group, n]
        other = objective(weight - restored(replace(solved, scales=rounded)), exact)
        assert float(other[n]) >= float(reached[n]) * (1 - 1e-4)


def test_codes_are_close_to_the_best_of_all() -> None:
    """For the scale that was found, against all 4 ** 6 codes of a row."""
    features, rows = 6, 40
    weight = seeded(rows, features, seed=26)
    hessian = hessian_of(correlated_inputs(30, features, seed=27))
    exact = damped(hessian)
    all_codes = torch.tensor(list(itertools.product(range(4), repeat=features))).double()
    total, excess = [], []
    for config in (PLAIN, SolverConfig(descent_sweeps=10)):
        solved = solve_one(weight, hessian, config, bits=2, group_size=-1).quantized
        reached = objective(weight - restored(solved), exact)
        scale = solved.scales[0].double()
        errors = weight.double()[:, None] - (all_codes - 2) * scale[:, None, None]
        best = ((errors @ exact) * errors).sum(dim=2).amin(dim=1)
        assert (reached >= best * (1 - 1e-6)).all()
        total.append(float(reached.sum()))
        excess.append(float(reached.sum() / best.sum()))
    assert total[1] < total[0]
    assert max(excess) < 1.25


@settings(max_examples=60)
@given(
    features=st.integers(1, 20),
    group_size=st.sampled_from([-1, 1, 3, 8]),
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    act_order=st.sampled_from(ACT_ORDERS),
    scale_search=st.sampled_from(["hessian", "norm", "none"]),
    sweeps=st.integers(0, 3),
    tokens=st.integers(0, 40),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**20),
)
def test_any_layer_comes_out_as_a_checkpoint_can_hold_it(
    features: int,
    group_size: int,
    bits: int,
    sym: bool,
    act_order: str,
    scale_search: str,
    sweeps: int,
    tokens: int,
    size: float,
    seed: int,
) -> None:
    weight = size * seeded(5, features, seed=seed)
    weight[1] = 0
    weight[2] = weight[2, 0]
    weight[3] = weight[3].abs()
    inputs = correlated_inputs(tokens, features, seed=seed)
    inputs[:, seed % features] = 0
    hessian = hessian_of(inputs)
    config = SolverConfig(act_order=act_order, scale_search=scale_search, descent_sweeps=sweeps)
    solution = solve_one(weight, hessian, config, bits=bits, group_size=group_size, sym=sym)
    solved = solution.quantized
    assert solution.fallback is None
    for values in (solved.codes, solved.zeros):
        assert int(values.max()) <= 2**bits - 1
    assert torch.isfinite(solved.scales).all()
    assert solved.scales.all()
    assert torch.equal(solved.scales.float().bfloat16().float(), solved.scales.float())
    found = restored(solved)
    assert not found[1].any()
    assert not found[:, seed % features].any()
    lost = objective(weight - found, hessian).sum()
    energy = objective(weight, hessian).sum()
    allowed = 1e-5 * float(objective(weight.abs(), hessian.abs()).sum())
    assert solution.lost == pytest.approx(float(lost), rel=2e-3, abs=allowed)
    assert solution.energy == pytest.approx(float(energy), rel=1e-4, abs=allowed)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("damp_percent", [-0.01, 1.0, 7, float("nan")]),
        ("act_order", ["", "Static", "desc", None]),
        ("scale_search", ["mse", "", None]),
        ("scale_norm", [0.99, 8.01, float("inf"), float("nan")]),
        ("descent_sweeps", [-1, 101]),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        settings: dict[str, object] = {name: value}
        with pytest.raises(SolverError, match=f"^{name} is {value!r}; it must "):
            SolverConfig(**settings)  # type: ignore[arg-type]


def test_the_ends_of_the_ranges_are_allowed() -> None:
    weight, hessian = seeded(2, 9, seed=28), hessian_of(correlated_inputs(40, 9))
    for changes in (
        SolverConfig(damp_percent=0.0, descent_sweeps=100),
        SolverConfig(damp_percent=0.99, scale_search="norm", scale_norm=1.0),
        SolverConfig(scale_search="norm", scale_norm=8.0, descent_sweeps=0),
    ):
        assert 0 < solve_one(weight, hessian, changes, group_size=4).relative_error < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("fallback", [None, "few tokens"])
def test_values_that_are_not_finite_are_errors(bad: float, fallback: str | None) -> None:
    weights = [torch.ones(2, 8), torch.ones(3, 8)]
    modules = [ModuleConfig(group_size=4)] * 2
    weights[1][1, 3] = bad
    with pytest.raises(SolverError, match="weight holds values that are not finite"):
        solve(weights, torch.eye(8), modules, fallback=fallback)
    weights[1][1, 3] = 1.0
    hessian = torch.eye(8)
    hessian[2, 5] = bad
    with pytest.raises(SolverError, match="Hessian of its inputs holds values that are not finite"):
        solve(weights, hessian, modules, fallback=fallback)


def test_lists_of_different_lengths_are_errors() -> None:
    weight = torch.ones(2, 8)
    with pytest.raises(ValueError, match="zip"):
        solve([weight, weight], torch.eye(8), [ModuleConfig()])


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize("fallback", [None, "few tokens"])
def test_the_caller_keeps_its_tensors(act_order: str, fallback: str | None) -> None:
    """All but the Hessian that `solve` is given; `factorize` leaves that, too, as it is."""
    hessian = hessian_of(correlated_inputs(100, 24))
    weight, drift, order = seeded(3, 24, seed=29), seeded(3, 24, seed=30), torch.randperm(24)
    kept = [tensor.clone() for tensor in (hessian, weight, drift, order)]
    factor = factorize(hessian, order, 0.01)
    factor.conditional_curvature()
    solve_one(
        weight,
        hessian,
        SolverConfig(act_order=act_order),
        group_size=8,
        drift=drift,
        fallback=fallback,
    )
    for tensor, before in zip((hessian, weight, drift, order), kept, strict=True):
        assert torch.equal(tensor, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_may_be_of_16_bits(dtype: torch.dtype) -> None:
    weight = seeded(4, 40, seed=31).to(dtype)
    hessian = hessian_of(correlated_inputs(100, 40))
    narrow, wide = solve_one(weight, hessian), solve_one(weight.float(), hessian)
    assert torch.equal(narrow.quantized.codes, wide.quantized.codes)
    assert narrow.relative_error == wide.relative_error
