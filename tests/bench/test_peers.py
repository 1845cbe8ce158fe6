"""Peers' kernels in the benchmark, by doubles of them: no GPU, and none of them installed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from lowbit.kernels.packing import PackedWeight, dequantize
from lowbit.server.bench import peers
from lowbit.server.bench.kernels import NotMeasured, Rates, Result, Shape, format_result
from lowbit.server.bench.peers import Peer, PeerTiming
from lowbit.server.bench.timing import Budget, Timing
from peer_doubles import exact, hang, leave, send_two

CPU = torch.device("cpu")
SMALL, OTHER = Shape("small", 256, 128), Shape("other", 128, 128)
RATES = Rates(bytes_per_second=1e12, operations_per_second=1e14)


def timer(calls: object) -> Timing:
    return Timing(1e-5, 1e-5, 2e-5)


def found_of(
    prepare: Callable[..., object], cases: list[tuple[Shape, int]]
) -> list[PeerTiming | NotMeasured]:
    return list(peers.time_peer(Peer("double", "json", prepare), cases, CPU, timer, lambda _: 2))


def test_a_peer_is_timed_at_every_case() -> None:
    found = found_of(exact, [(SMALL, 1), (SMALL, 4), (OTHER, 1)])
    assert [(each.shape, each.num_rows) for each in found] == [(SMALL, 1), (SMALL, 4), (OTHER, 1)]


def test_a_peer_that_is_wrong_gets_no_figure() -> None:
    def wrong(weight: PackedWeight, device: torch.device) -> Callable[..., torch.Tensor]:
        return lambda x: exact(weight, device)(x) * 1.02

    (found,) = found_of(wrong, [(SMALL, 1), (SMALL, 4)])
    assert isinstance(found, NotMeasured)
    assert "mean error 2.0e-02 at small, M = 1" in format_result(found)


def test_a_peer_that_raises_gives_its_reason() -> None:
    def refuse(weight: PackedWeight, device: torch.device) -> Callable[..., torch.Tensor]:
        raise RuntimeError("needs nvcc")

    (found,) = found_of(refuse, [(SMALL, 1)])
    assert found == NotMeasured(what="double", reason="RuntimeError: needs nvcc")


def test_a_peers_process_may_crash_hang_or_answer() -> None:
    assert list(peers.in_a_process(send_two, "double", 60)) == ["one", "two"]
    (crashed,) = peers.in_a_process(leave, "double", 60)
    assert crashed == NotMeasured(what="double", reason="its process ended without a word")
    started = time.monotonic()
    (hung,) = peers.in_a_process(hang, "double", 1)
    assert hung == NotMeasured(what="double", reason="did not come to an end in 1 seconds")
    assert time.monotonic() - started < 30


def test_what_is_not_installed_is_named_and_what_fails_leaves_the_rest_alone() -> None:
    dense = Result(
        shape="small",
        bits=16,
        kernel="cublas",
        num_rows=1,
        median_seconds=2e-5,
        lowest_seconds=2e-5,
        highest_seconds=2e-5,
        speedup=1.0,
        roofline_ratio=0.5,
    )
    absent = Peer("absent", "no_such_package_of_anyone", exact)
    # No GPU in the process either: it says so, like any other failure.
    here = Peer("here", "json", exact)
    found = list(peers.measure_peers([dense], RATES, [SMALL], Budget(60), [absent, here]))
    assert found[0] == NotMeasured(
        what="absent", reason="no_such_package_of_anyone is not installed"
    )
    if not torch.cuda.is_available():
        assert found[1].reason == "device must be a CUDA GPU; PyTorch finds none"


def double_of_vllm(weight: PackedWeight) -> dict[str, object]:
    """What the adapter calls, by the names and keywords of vLLM 0.11 and later."""
    matrix = dequantize(weight).double()

    def repack(
        b_q_weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int
    ) -> torch.Tensor:
        assert torch.equal(b_q_weight, weight.qweight)
        assert (perm.numel(), size_k, size_n, num_bits) == (0, 256, 128, 4)
        return b_q_weight

    def permute(s: torch.Tensor, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
        assert (s.shape, group_size) == ((2, 128), 128)
        return s

    def apply(
        input: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        weight_zp: torch.Tensor,
        g_idx: torch.Tensor,
        g_idx_sort_indices: torch.Tensor,
        workspace: torch.Tensor,
        wtype: str,
        output_size_per_partition: int,
        input_size_per_partition: int,
        is_k_full: bool,
    ) -> torch.Tensor:
        assert wtype == "uint4b8"
        return (input.double() @ matrix.t()).to(input.dtype)

    utils = SimpleNamespace(
        marlin_make_empty_g_idx=lambda device: torch.empty(0, dtype=torch.int32),
        marlin_permute_scales=permute,
        marlin_make_workspace_new=lambda device: torch.zeros(4, dtype=torch.int32),
        apply_gptq_marlin_linear=apply,
    )
    return {
        "vllm._custom_ops": SimpleNamespace(gptq_marlin_repack=repack),
        "vllm.model_executor.layers.quantization.utils.marlin_utils": utils,
        "vllm.scalar_type": SimpleNamespace(scalar_types=SimpleNamespace(uint4b8="uint4b8")),
    }


def test_vllms_marlin_gets_what_its_functions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = peers.random_weight(SMALL, 4, CPU)
    for name, module in double_of_vllm(weight).items():
        monkeypatch.setitem(sys.modules, name, module)
    (peer,) = (peer for peer in peers.PEERS if peer.name == "marlin-vllm")
    found = list(peers.time_peer(peer, [(SMALL, 4)], CPU, timer, lambda _: 1))
    assert [type(each) for each in found] == [PeerTiming]
