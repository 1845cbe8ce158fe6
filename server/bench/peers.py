"""Other projects' 4-bit products, timed beside ours where they are installed; never dependencies.

A peer runs in a process of its own, which is ended when its seconds are spent: whatever it does,
compiling or tuning for minutes, crashing, taking the device down with it, leaves our figures alone.
Its results are checked against float64 like ours. No adapter has met its package on a GPU yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from ...kernels.packing import PackedWeight, dequantize, unpack_codes
from .kernels import (
    FEW_ROWS,
    GROUP_SIZE,
    MAX_ERROR,
    ROWS,
    NotMeasured,
    Rates,
    Result,
    Shape,
    Wrong,
    floor_seconds,
    mean_error,
    random_weight,
    result_of,
)
from .timing import Budget, NoDevice, Timer, Timing, cuda_device, num_copies, time_in_graph

_BITS = 4
_ERROR_FACTOR = 10  # peers may add up in fp16

Product = Callable[[Tensor], Tensor]  # x [M, K] -> [M, N]


@dataclass(frozen=True, slots=True)
class Peer:
    name: str
    package: str
    prepare: Callable[[PackedWeight, torch.device], Product]
    shapes: tuple[str, ...] | None = None  # None: all
    rows: tuple[int, ...] = ROWS


@dataclass(frozen=True, slots=True)
class PeerTiming:
    shape: Shape
    num_rows: int
    timing: Timing


def _gemlite(weight: PackedWeight, device: torch.device) -> Product:
    """gemlite 0.6: GemLiteLinear.pack takes codes [N, K], scales and zero points [N, G]."""
    gemlite = importlib.import_module("gemlite")
    half = gemlite.DType.FP16
    layer = gemlite.GemLiteLinear(
        _BITS, GROUP_SIZE, weight.in_features, weight.out_features, half, half
    )
    codes = unpack_codes(weight.qweight, _BITS, weight.in_features).t().contiguous()
    zeros = weight.zeros.t().to(weight.scales.dtype).contiguous()
    layer.pack(codes, weight.scales.t().contiguous(), zeros)
    product: Product = layer
    return product


def _marlin_of_vllm(weight: PackedWeight, device: torch.device) -> Product:
    """vLLM's kernel through the functions that its GPTQ layer calls."""
    ops = importlib.import_module("vllm._custom_ops")
    marlin = importlib.import_module("vllm.model_executor.layers.quantization.utils.marlin_utils")
    types = importlib.import_module("vllm.scalar_type").scalar_types
    none = marlin.marlin_make_empty_g_idx(device)
    size = {"size_k": weight.in_features, "size_n": weight.out_features}
    packed = ops.gptq_marlin_repack(b_q_weight=weight.qweight, perm=none, num_bits=_BITS, **size)
    scales = marlin.marlin_permute_scales(weight.scales, group_size=GROUP_SIZE, **size)
    product: Product = partial(
        _call_with_input,
        marlin.apply_gptq_marlin_linear,
        weight=packed,
        weight_scale=scales,
        weight_zp=marlin.marlin_make_empty_g_idx(device),
        g_idx=none,
        g_idx_sort_indices=none,
        workspace=marlin.marlin_make_workspace_new(device),
        wtype=types.uint4b8,
        output_size_per_partition=weight.out_features,
        input_size_per_partition=weight.in_features,
        is_k_full=True,
    )
    return product


def _call_with_input(function: Callable[..., Tensor], x: Tensor, **arguments: Any) -> Tensor:
    return function(input=x, **arguments)


def _marlin_of_gptqmodel(weight: PackedWeight, device: torch.device) -> Product:
    """GPTQModel 7's layer, filled like one of a checkpoint; compiles its kernel with nvcc."""
    module = importlib.import_module("gptqmodel.nn_modules.qlinear.marlin")
    layer = module.MarlinLinear(
        bits=_BITS,
        group_size=GROUP_SIZE,
        desc_act=False,
        sym=True,
        in_features=weight.in_features,
        out_features=weight.out_features,
    ).to(device)
    layer.qweight.data = weight.qweight
    layer.scales.data = weight.scales
    layer.post_init()
    product: Product = layer
    return product


PEERS = (
    Peer("marlin-vllm", "vllm", _marlin_of_vllm),
    Peer("marlin-gptq", "gptqmodel", _marlin_of_gptqmodel),
    # It tunes every number of rows for up to minutes.
    Peer("gemlite", "gemlite", _gemlite, shapes=("square 8192",), rows=FEW_ROWS),
)


def measure_peers(
    dense: Sequence[Result],
    rates: Rates,
    shapes: Sequence[Shape],
    budget: Budget,
    peers: Sequence[Peer] = PEERS,
) -> Iterator[Result | NotMeasured]:
    """All peers, sharing the seconds left, beside what cuBLAS took for the shape and rows."""
    seconds = {(result.shape, result.num_rows): result.median_seconds for result in dense}
    torch.cuda.empty_cache()  # what this process holds another cannot have
    for number, peer in enumerate(peers):
        if importlib.util.find_spec(peer.package) is None:
            yield NotMeasured(what=peer.name, reason=f"{peer.package} is not installed")
            continue
        chosen = [shape for shape in shapes if peer.shapes is None or shape.name in peer.shapes]
        cases = [(s, m) for s in chosen for m in peer.rows if (s.name, m) in seconds]
        share = budget.left() / (len(peers) - number)
        for found in in_a_process(partial(_serve, peer, cases), peer.name, share):
            if isinstance(found, NotMeasured):
                yield found
                continue
            yield result_of(
                found.shape,
                _BITS,
                peer.name,
                found.num_rows,
                found.timing,
                seconds[found.shape.name, found.num_rows],
                floor_seconds(found.shape, _BITS, found.num_rows, rates),
            )


def in_a_process(
    serve: Callable[[Connection], None], name: str, seconds: float
) -> Iterator[PeerTiming | NotMeasured]:
    """What `serve` sends, until it sends None; ends the process when the seconds are spent."""
    end = time.monotonic() + seconds
    with _process(serve) as connection:
        while True:
            if not connection.poll(max(0.0, end - time.monotonic())):
                reason = f"did not come to an end in {seconds:.0f} seconds"
                yield NotMeasured(what=name, reason=reason)
                return
            try:
                found = connection.recv()
            except EOFError:
                yield NotMeasured(what=name, reason="its process ended without a word")
                return
            if found is None:
                return
            yield found


@contextmanager
def _process(serve: Callable[[Connection], None]) -> Iterator[Connection]:
    """Its end of a pipe; a process that CUDA lets be: spawned, not forked."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.kill()
        process.join()


def _serve(peer: Peer, cases: Sequence[tuple[Shape, int]], connection: Connection) -> None:
    """In the peer's process: timings, or why there are none."""
    try:
        device = cuda_device()
        copies_of = partial(num_copies, device=device)
        for found in time_peer(peer, cases, device, time_in_graph, copies_of):
            connection.send(found)
    except NoDevice as error:
        connection.send(NotMeasured(what=peer.name, reason=str(error)))
    connection.send(None)


def time_peer(
    peer: Peer,
    cases: Sequence[tuple[Shape, int]],
    device: torch.device,
    timer: Timer,
    copies_of: Callable[[int], int],
) -> Iterator[PeerTiming | NotMeasured]:
    """Checked, then timed, case by case; the first that fails is the last."""
    products: list[Product] = []
    prepared: Shape | None = None
    for shape, num_rows in cases:
        try:
            if shape != prepared:
                weight = random_weight(shape, _BITS, device)
                count = copies_of(shape.in_features * shape.out_features * _BITS // 8)
                products = [peer.prepare(weight, device) for _ in range(count)]
                exact, prepared = dequantize(weight).double(), shape
            x = torch.randn(num_rows, shape.in_features, device=device).to(weight.scales.dtype)
            off = mean_error(products[0](x), x.double() @ exact.t())
            if not off < _ERROR_FACTOR * MAX_ERROR:
                raise Wrong(f"mean error {off:.1e} at {shape.name}, M = {num_rows}")
            calls = [partial(product, x) for product in products]
            yield PeerTiming(shape, num_rows, timer(calls))
        except Exception as error:  # whatever a peer raises is a reason, not our failure
            yield NotMeasured(what=peer.name, reason=f"{type(error).__name__}: {error}"[:300])
            return
