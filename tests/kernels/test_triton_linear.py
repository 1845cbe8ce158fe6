"""The Triton linear kernels against float64; in Triton's interpreter where there is no GPU.

The interpreter has no bfloat16, no inline assembly and one way to add: what only a GPU can show
is marked `gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from lowbit.kernels import triton_linear as kernels
from lowbit.kernels.packing import FragmentWeight, PackedWeight, dequantize
from lowbit.kernels.triton_backend import TritonBackend
from tiny import random_packed_weight

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
# (dtype, largest mean error): bfloat16 only where it can be computed.
DTYPES = [pytest.param(torch.float16, 1e-3, id="fp16")]
DTYPES += [pytest.param(torch.bfloat16, 8e-3, id="bf16", marks=pytest.mark.gpu)]
TIERS = ("gemv", "gemm", "dequantize")


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not HAS_GPU:
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    """Whatever the number of rows, served by one tier."""
    limits = {
        "gemv": {"gemv_max_rows": 1 << 20},
        "gemm": {"gemv_max_rows": 0, "gemm_max_rows": 1 << 20},
        "dequantize": {"gemv_max_rows": 0, "gemm_max_rows": 0},
    }[request.param]
    with kernels.use_tuning(DEVICE, replace(kernels.tuning_of(DEVICE), **limits)):
        yield request.param


def prepared(weight: PackedWeight, dtype: torch.dtype, k_width: int | None = None):
    return kernels.prepare(weight, DEVICE, dtype, k_width)


def rows_of(num_rows: int, layer: FragmentWeight, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, layer.in_features).to(DEVICE, dtype)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.cpu().double() - expected).abs().mean() / expected.abs().mean()).item()


def oracle(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return x.cpu().double() @ dequantize(weight).double().T


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("in_features", "out_features", "group_size", "sym", "k_width"),
    [
        (256, 128, 128, True, 2),
        (256, 70, 128, False, 4),
        (200, 70, 16, False, 2),
        (201, 33, 32, True, 4),
        (192, 136, 96, False, 4),
        (130, 64, 64, False, 2),
        (1100, 40, -1, True, 4),
        (512, 24, 256, False, 2),
    ],
)
def test_agrees_with_float64(
    tier: str,
    dtype: torch.dtype,
    limit: float,
    bits: int,
    in_features: int,
    out_features: int,
    group_size: int,
    sym: bool,
    k_width: int,
) -> None:
    torch.manual_seed(bits)
    weight = random_packed_weight(
        in_features, out_features, bits=bits, group_size=group_size, sym=sym
    )
    weight = replace(weight, scales=weight.scales * (1 - 2 * torch.rand_like(weight.scales)).sign())
    layer = prepared(weight, dtype, k_width)
    x = rows_of(2 if tier == "gemv" else 19, layer, dtype)
    assert relative_error(kernels.linear(x, layer), oracle(x, weight)) < limit


@pytest.mark.parametrize(("dtype", "limit"), DTYPES)
@pytest.mark.parametrize("in_features", [96, 1664])  # one part of K and several
def test_bias_and_residual_are_added(
    tier: str, dtype: torch.dtype, limit: float, in_features: int
) -> None:
    weight = random_packed_weight(in_features, 80, group_size=32)
    weight = replace(weight, bias=torch.randn(80))
    layer = prepared(weight, dtype)
    x, residual = rows_of(2, layer, dtype), torch.randn(2, 80).to(DEVICE, dtype)
    plain = oracle(x, weight) + weight.bias.double()
    assert relative_error(kernels.linear(x, layer), plain) < limit
    expected = plain + residual.cpu().double()
    assert relative_error(kernels.linear(x, layer, residual), expected) < limit


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 128])
def test_a_one_hot_row_returns_the_dequantized_column(
    tier: str, bits: int, group_size: int
) -> None:
    weight = random_packed_weight(256, 64, bits=bits, group_size=group_size, sym=False)
    layer = prepared(weight, torch.float16)
    chosen = torch.tensor([0, 1, 17, 130, 255])
    x = torch.eye(256)[chosen].to(DEVICE, torch.float16)
    expected = dequantize(weight, torch.float16).T[chosen]
    assert torch.equal(kernels.linear(x, layer).cpu(), expected)


@pytest.mark.parametrize("zero", [0, 15])
def test_extreme_zero_points(tier: str, zero: int) -> None:
    weight = random_packed_weight(128, 64)
    weight = replace(weight, zeros=torch.full_like(weight.zeros, zero))
    layer = prepared(weight, torch.float16)
    x = rows_of(3, layer, torch.float16)
    assert relative_error(kernels.linear(x, layer), oracle(x, weight)) < 1e-3


@pytest.mark.parametrize("bits", [3, 4])
def test_every_number_of_rows(bits: int) -> None:
    weight = random_packed_weight(129, 47, bits=bits, group_size=32)
    layer = prepared(weight, torch.float16)
    x = rows_of(8192, layer, torch.float16)
    expected = oracle(x, weight)
    for num_rows in (*range(71), 192, 193, 8192):
        y = kernels.linear(x[:num_rows], layer)
        assert y.shape == (num_rows, 47)
        assert num_rows == 0 or relative_error(y, expected[:num_rows]) < 1e-3


@pytest.mark.parametrize("num_rows", [2, 70, 200])
def test_rows_may_lie_more_than_2_to_the_31_numbers_apart(num_rows: int) -> None:
    weight = random_packed_weight(130, 40, group_size=32)
    layer = prepared(weight, torch.float16)
    stride = (1 << 31) // (num_rows - 1) + 2
    wide = torch.empty((num_rows - 1) * stride + 130, dtype=torch.float16, device=DEVICE)
    x = wide.as_strided((num_rows, 130), (stride, 1))
    x.copy_(torch.randn(num_rows, 130))
    assert relative_error(kernels.linear(x, layer), oracle(x.contiguous(), weight)) < 1e-3


def test_nothing_is_read_beyond_the_inputs_and_rows(tier: str) -> None:
    weight = random_packed_weight(200, 70, group_size=32)
    layer = prepared(weight, torch.float16)
    poisoned = torch.full((40, 256), torch.nan, dtype=torch.float16, device=DEVICE)
    x = poisoned[:3, :200]
    x.copy_(torch.randn(3, 200))
    assert x.stride(0) == 256
    assert relative_error(kernels.linear(x, layer), oracle(x, weight)) < 1e-3


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that is made without values holds NaN."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = new_empty(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("in_features", [200, 1664])
def test_no_result_comes_from_unwritten_memory(tier: str, in_features: int) -> None:
    weight = random_packed_weight(in_features, 70, group_size=32)
    layer = prepared(weight, torch.float16)
    x = rows_of(2, layer, torch.float16)
    assert relative_error(kernels.linear(x, layer), oracle(x, weight)) < 1e-3


@pytest.mark.parametrize("in_features", [256, 1664])
def test_equal_inputs_give_equal_bits(tier: str, in_features: int) -> None:
    layer = prepared(random_packed_weight(in_features, 64), torch.float16)
    x = rows_of(1, layer, torch.float16)
    first = kernels.linear(x, layer)
    for _ in range(19):
        assert torch.equal(kernels.linear(x, layer), first)


@pytest.mark.parametrize("in_features", [256, 1664])
def test_a_row_alone_equals_the_row_in_a_batch(in_features: int) -> None:
    layer = prepared(random_packed_weight(in_features, 64), torch.float16)
    x = rows_of(70, layer, torch.float16)
    together = kernels.linear(x, layer)
    for row in (0, 17, 69):
        assert torch.equal(kernels.linear(x[row : row + 1], layer)[0], together[row])


def test_parts_of_k_depend_on_the_layer_and_the_gpu_alone() -> None:
    tuning = replace(kernels.tuning_of(DEVICE), num_sms=132, ctas_per_sm=4)
    assert tuning.num_parts(8192, 8192) == 8
    assert tuning.num_parts(4096, 28672) == 2
    assert tuning.num_parts(256, 256) == 1
    assert tuning.num_parts(1 << 14, 64) == 32  # at least four steps of 128 inputs each


def test_wrong_arguments_are_refused_by_name() -> None:
    weight = random_packed_weight(128, 64)
    layer = prepared(weight, torch.float16)
    x = rows_of(2, layer, torch.float16)
    with pytest.raises(ValueError, match=r"x is \(2, 64\); it must be \[M, 128\]"):
        kernels.linear(x[:, :64], layer)
    with pytest.raises(ValueError, match=r"x.dtype is torch.float32"):
        kernels.linear(x.float(), layer)
    with pytest.raises(ValueError, match=r"residual is \(2, 63\)"):
        kernels.linear(x, layer, torch.zeros(2, 63, dtype=x.dtype, device=DEVICE))
    with pytest.raises(ValueError, match=r"dtype is torch.float32"):
        kernels.prepare(weight, DEVICE, torch.float32)
    with pytest.raises(ValueError, match="device is meta"):
        kernels.prepare(weight, torch.device("meta"), torch.float16)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_operator_is_what_torch_expects_of_one(bits: int) -> None:
    """Its schema, its fake implementation, and that it mutates nothing."""
    weight = replace(random_packed_weight(128, 64, bits=bits, sym=False), bias=torch.randn(64))
    layer = prepared(weight, torch.float16)
    arguments = (
        rows_of(2, layer, torch.float16),
        list(layer.planes),
        layer.scales,
        layer.zeros,
        layer.bias,
        None,
        layer.bits,
        layer.group_size,
        layer.out_features,
        layer.k_width,
        False,
    )
    torch.library.opcheck(
        torch.ops.lowbit.linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_torch_compile_takes_it_in_one_graph() -> None:
    weight = replace(random_packed_weight(128, 64, sym=False), bias=torch.randn(64))
    layer = prepared(weight, torch.float16)
    x = rows_of(3, layer, torch.float16)
    compiled = torch.compile(
        lambda x: kernels.linear(x, layer, 2 * x[:, :64]) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), kernels.linear(x, layer, 2 * x[:, :64]) + 1)


@pytest.mark.gpu
def test_calls_can_be_captured_in_a_graph() -> None:
    weight = random_packed_weight(2048, 512)
    layer = prepared(weight, torch.float16)
    x = rows_of(4, layer, torch.float16)
    eager = kernels.linear(x, layer)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.linear(x, layer)
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_on_the_device_of_its_arguments() -> None:
    weight = random_packed_weight(256, 64)
    layer = kernels.prepare(weight, torch.device("cuda", 1), torch.float16)
    x = torch.randn(3, 256).to("cuda:1", torch.float16)
    assert relative_error(kernels.linear(x, layer), oracle(x, weight)) < 1e-3


@pytest.mark.parametrize("rows", [1, 5, 70])
@pytest.mark.parametrize("act_order", [False, True])
def test_an_mlp_adds_parts_of_k_up_where_it_activates(
    monkeypatch: pytest.MonkeyPatch, rows: int, act_order: bool
) -> None:
    """Against float64; and its first product has no kernel of its own that adds up."""
    torch.manual_seed(rows)
    backend = TritonBackend(DEVICE)
    weights = []
    for size in ((1024, 1200), (600, 1024)):
        order = torch.randperm(size[0]) if act_order else None
        weight = random_packed_weight(*size, group_size=128)
        weights.append(replace(weight, input_permutation=order))
    gate_up, down = map(backend.prepare_linear, weights)
    x, norm = torch.randn(rows, 1024).to(DEVICE, torch.float16), torch.rand(1024).to(DEVICE) + 0.5
    widths: list[int] = []
    plain = kernels._Launch._reduce

    def counting(launch: Any, planes: torch.Tensor, *rest: Any) -> None:
        widths.append(planes.shape[2])
        plain(launch, planes, *rest)

    monkeypatch.setattr(kernels._Launch, "_reduce", counting)
    with kernels.use_tuning(DEVICE, replace(kernels.tuning_of(DEVICE), num_sms=132)):
        y = backend.mlp(x, norm, 1e-5, gate_up, down).cpu().double()
        assert not widths
        backend.linear(x, gate_up)
        assert widths == [1200]
    wide = x.cpu().double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.cpu().double()
    gate, up = (normed @ dequantize(weights[0]).double().T).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    expected = wide + inner @ dequantize(weights[1]).double().T
    assert (y - expected).abs().mean() < 2e-3 * expected.abs().mean()
