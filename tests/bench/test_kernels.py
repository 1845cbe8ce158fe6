"""The kernel benchmark and the tuner, with a clock of our own where there is no GPU to time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from lowbit.kernels import triton_linear
from lowbit.kernels.tuning import GpuTuning
from lowbit.server.bench import kernels, tune
from lowbit.server.bench.kernels import Rates, Shape
from lowbit.server.bench.timing import Budget, Timing
from lowbit.server.cli import main

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
RATES = Rates(bytes_per_second=1e12, operations_per_second=1e14)
SMALL = Shape("small", 256, 128)


def scripted(seconds: Callable[[], float]) -> Callable[[Sequence[Callable[[], object]]], Timing]:
    """Runs every call once and reports what the script says."""

    def timer(calls: Sequence[Callable[[], object]]) -> Timing:
        for call in calls:
            call()
        return Timing(seconds(), 0.0, 1.0)

    return timer


def test_the_floor_is_bytes_at_few_rows_and_operations_at_many() -> None:
    shape = Shape("square", 8192, 8192)
    few = (8192 * 8192 * (4 + 16 / 128) / 8 + 2 * 2 * 8192) / 1e12
    assert kernels.floor_seconds(shape, 4, 1, RATES) == pytest.approx(few)
    many = 2 * 8192 * 8192 * 1024 / 1e14
    assert kernels.floor_seconds(shape, 4, 1024, RATES) == pytest.approx(many)


def test_results_are_checked_against_float64_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = list(kernels.check(DEVICE, SMALL, rows=(1, 17)))
    assert [line[:2] for line in lines] == ["W2", "W3", "W4", "W8"]
    exact = triton_linear.linear
    monkeypatch.setattr(triton_linear, "linear", lambda x, layer: exact(x, layer) * 1.01)
    with pytest.raises(kernels.Wrong, match="W2 small at M = 1"):
        list(kernels.check(DEVICE, SMALL, rows=(1,)))


def test_every_width_is_timed_beside_a_dense_product() -> None:
    found = list(
        kernels.measure(
            DEVICE, scripted(lambda: 2e-5), lambda _: 2, RATES, shapes=(SMALL,), rows=(1, 2)
        )
    )
    assert [(r.bits, r.num_rows) for r in found] == [
        *((16, 1), (16, 2)),
        *((4, 1), (4, 2)),
        *((3, 1), (2, 1), (8, 1)),
    ]
    assert all(result.speedup == 1.0 for result in found)
    floor = kernels.floor_seconds(SMALL, 4, 2, RATES)
    assert found[3].roofline_ratio == pytest.approx(floor / 2e-5)
    assert len(kernels.format_result(found[3])) == len(kernels.HEADING)


def test_what_does_not_fit_the_seconds_is_named_and_has_no_figure() -> None:
    now = [0.0]
    budget = Budget(10.0, clock=lambda: now[0])

    def seconds() -> float:
        now[0] += 3.0
        return 2e-5

    shapes = (SMALL, Shape("next", 256, 64))
    found = list(
        kernels.measure(DEVICE, scripted(seconds), lambda _: 1, RATES, shapes, (1, 2), budget)
    )
    assert [(r.bits, r.num_rows) for r in found[:4]] == [(16, 1), (16, 2), (4, 1), (4, 2)]
    assert [each.what for each in found[4:]] == [
        "small at 3 bits",
        "small at 2 bits",
        "small at 8 bits",
        "next",
    ]
    assert "10 seconds were spent" in kernels.format_result(found[-1])
    lists = kernels.as_lists(found)
    assert (len(lists["results"]), len(lists["not_measured"])) == (4, 4)


def test_the_tuner_keeps_what_was_fastest() -> None:
    """A clock by which one tile, one way to cut K and one limit of each tier are the best."""

    def seconds() -> float:
        now = triton_linear.tuning_of(DEVICE)
        cost = 1.0 + abs(now.ctas_per_sm - 3)
        cost += sum(abs(t.block_n - 64) + abs(t.num_stages - 4) for t in now.tiles.values())
        return cost + (0.5 if now.gemv_max_rows else 0.0) + (0.25 if now.gemm_max_rows else 0.0)

    tuner = tune.Tuner(DEVICE, scripted(seconds), lambda _: 1, shapes=(SMALL,))
    before = triton_linear.tuning_of(DEVICE)
    *_, (_, found) = tuner.run(replace(before, tiles={}), bits=(4,))
    assert found.ctas_per_sm == 3
    assert {(t.block_n, t.num_stages) for t in found.tiles.values()} == {(64, 4)}
    assert set(found.tiles) == {(4, rows) for rows in (1, 16, 32, 64)}
    assert (found.gemv_max_rows, found.gemm_max_rows) == (0, 0)
    assert triton_linear.tuning_of(DEVICE) is before


def test_candidates_are_few_and_hold_the_default() -> None:
    for rows in (1, 16, 32, 64):
        candidates = tune.tile_candidates(rows)
        assert len(candidates) <= 15
        assert GpuTuning(gpu="any", num_sms=1, k_width=2).tile(4, rows) in candidates


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["bench", "kernels"], ["tune"]])
def test_without_a_gpu_there_is_nothing_to_measure(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    assert "device must be a CUDA GPU; PyTorch finds none" in capsys.readouterr().err
