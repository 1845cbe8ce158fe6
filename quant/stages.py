"""One decoder layer, or the output head, quantized while the calibration text passes through it.

Passes, Hessians, solving, and the result put in place; the processes of a run share every step.
Knows nothing of files: what is finished is an `Entry`. Shapes: K input and N output features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..kernels.packing import PackedWeight, concatenate, dequantize, move, select_outputs
from .activations import ActivationStore
from .config import ModuleConfig, QuantConfig
from .devices import CPU
from .distributed import Ranks
from .drift import DriftSum
from .errors import QuantError, SolverError
from .formats import check_format
from .gptq import QuantizedWeight, Solution, SolverConfig, solve
from .hessian import HessianSum
from .journal import Entry
from .layers import LayeredModel
from .passes import LayerPasses, Taken, paused_bytes
from .products import product_dtype
from .report import ModuleReport
from .workers import Workers

ROWS_AT_ONCE = 2048  # of a matrix that are packed or put in place together, to save memory
CODES_AT_ONCE = 1 << 22  # of a matrix that are packed together, where its rows are long
HEAD_ROWS = 16384  # of the output head that are solved together
# A routed expert that saw a smaller share of the tokens has a Hessian that says too little; the
# share is GPTQModel's.
MIN_TOKEN_SHARE = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A linear layer to quantize."""

    name: str  # relative to its decoder layer
    full_name: str  # on disk
    config: ModuleConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetGroup:
    """Linear layers to quantize that read the same input."""

    targets: tuple[Target, ...]
    stream: str | None  # see LinearGroup


# What a batch brings to a group, and what the 16-bit model's would be, where that passes beside.
Pair = tuple[Taken | None, Taken | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What the outputs of layers that read the same inputs lack."""

    sums: list[Tensor]  # [N_i, K] fp32 each, see `DriftSum`
    hessian: Tensor | None  # [K, K] fp32 of the same tokens, where these are not all


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The calibration text as this process sees it."""

    batches: Sequence[int]  # this process's
    drift_batches: Sequence[int]  # of those, where the 16-bit model passes beside
    all_drift: bool  # it does in every batch of the run
    num_passes: int  # sequences of this process, of both models
    own_tokens: int  # in `batches`
    num_tokens: int  # of the whole run


class LayerQuantizer:
    """Quantizes the layers of a model in order, each behind the quantized ones before it."""

    def __init__(
        self,
        model: LayeredModel,
        config: QuantConfig,
        solver: SolverConfig,
        calibration: Calibration,
        store: ActivationStore,
        wanted: ActivationStore | None,
        ranks: Ranks,
        workers: Workers,
        *,
        activation_memory_bytes: int,
        on_group: Callable[[Sequence[ModuleReport]], None],
    ) -> None:
        self._model = model
        self._config = config
        self._solver = solver
        self._products = product_dtype(solver.precision)
        self._calibration = calibration
        self._store = store
        self._wanted = wanted  # the 16-bit model's hidden states, where drift is corrected
        self._ranks = ranks
        self._workers = workers
        self._activation_memory_bytes = activation_memory_bytes
        self._on_group = on_group

    def quantize_layer(self, index: int) -> Entry:
        """Quantize layer `index` and leave its outputs in the store, where the next one reads."""
        with self._ranks.together():
            layer = load_layer(self._model, index)
            groups = find_targets(self._model, layer, index, self._config)
        layers = [layer]
        packed: dict[str, PackedWeight] = {}
        reports: list[ModuleReport] = []
        with ExitStack() as stack:
            passes = stack.enter_context(self._passes(layer, index, groups))
            wanted = None
            if self._wanted is not None:
                original = self._model.load_layer(index, products=self._products)
                layers.append(original)
                wanted = stack.enter_context(self._passes(original, index, groups, wanted=True))
            for i, group in enumerate(groups):
                passed = groups[i - 1].targets if passes.keeps_paused and i else ()
                take = partial(_take, i, passes, wanted)
                weights, found = self._quantize_group(group, layers, take, passed)
                for target, weight in zip(group.targets, weights, strict=True):
                    install(_linear(layer, target.name), weight, self._products)
                    packed[target.full_name] = move(weight, CPU)
                reports += found
                self._on_group(found)
            with self._ranks.together():
                self._keep_outputs(index, passes, self._calibration.batches, self._store)
                if wanted is not None and self._wanted is not None:
                    drifting = self._calibration.drift_batches
                    self._keep_outputs(index, wanted, drifting, self._wanted)
        quantized = {target.name for group in groups for target in group.targets}
        tensors = self._model.layer_tensors(layer, index, quantized)
        return Entry(packed=packed, tensors=to_fp16(tensors), modules=tuple(reports))

    def replay_layer(self, index: int, entry: Entry) -> None:
        """Leave a finished layer's outputs in the store; the same numbers as when it was made."""
        if self._wanted is not None:
            original = self._model.load_layer(index, products=self._products)
            with self._passes(original, index, [], wanted=True) as passes:
                drifting = self._calibration.drift_batches
                self._keep_outputs(index, passes, drifting, self._wanted)
            del original
        layer = load_layer(self._model, index)
        groups = find_targets(self._model, layer, index, self._config)
        for target in (target for group in groups for target in group.targets):
            weight = entry.packed[target.full_name]
            install(_linear(layer, target.name), weight, self._products)
        with self._passes(layer, index, []) as passes:
            self._keep_outputs(index, passes, self._calibration.batches, self._store)

    def quantize_head(self, weight: Tensor, bias: Tensor | None) -> Entry:
        """Quantize the output head, [N, K] as stored; it reads what the last layer left."""
        name, started = self._model.head_name, time.monotonic()
        assert name is not None
        config = self._config.for_module(name)
        assert config is not None
        target = Target(name=name, full_name=name, config=config)
        last = self._model.num_layers
        inputs = (
            self._model.head_input(self._store.get(last, batch)).to(self._model.device)
            for batch in self._calibration.batches
        )
        summed = self._sum_hessian(weight.shape[1], inputs)
        with self._ranks.together():
            hessian, _ = self._choose_hessian(target, summed)
        parts = [
            solve_together(
                [target],
                [rows.to(hessian.device, torch.float32)],
                hessian.clone(),
                self._solver,
                self._ranks,
            )
            for rows in weight.split(HEAD_ROWS)
        ]
        packed = move(concatenate([pack(part.quantized, None) for (part,) in parts]), CPU)
        packed = replace(packed, bias=None if bias is None else to_fp16({name: bias})[name])
        whole = replace(
            parts[0][0],
            lost=sum(part.lost for (part,) in parts),
            energy=sum(part.energy for (part,) in parts),
        )
        reports = make_reports([target], [whole], summed, time.monotonic() - started)
        self._on_group(reports)
        return Entry(packed={name: packed}, modules=tuple(reports))

    def _quantize_group(
        self,
        group: TargetGroup,
        layers: Sequence[nn.Module],
        take: Callable[[int], Pair],
        passed: Sequence[Target],
    ) -> tuple[list[PackedWeight], list[ModuleReport]]:
        """`layers`: the layer, and the 16-bit model's where that passes beside it. Those of the
        linear layers called `passed` are not needed any more once all batches have come here.
        """
        started, targets = time.monotonic(), group.targets
        linears, originals = (
            [_linear(layer, target.name) for target in targets] for layer in (layers[0], layers[-1])
        )
        summed, drift = self._sum(group, originals, take)
        _forget([target.name for target in passed], layers)
        weights = [linear.weight for linear in linears]
        with self._ranks.together():
            hessian, fallback = self._choose_hessian(targets[0], summed)
        solutions = solve_together(
            targets,
            weights,
            hessian,
            self._solver,
            self._ranks,
            drift=drift,
            fallback=fallback,
        )
        del hessian, drift
        packed = [
            pack(solution.quantized, linear.bias)
            for solution, linear in zip(solutions, linears, strict=True)
        ]
        return packed, make_reports(targets, solutions, summed, time.monotonic() - started)

    def _sum(
        self, group: TargetGroup, originals: Sequence[nn.Linear], take: Callable[[int], Pair]
    ) -> tuple[HessianSum, Drift | None]:
        """The Hessian and the drift over the batches of all ranks.

        There is no drift without the 16-bit model's hidden states, nor where a router sent other
        tokens to the layer than it would have at 16 bits.
        """
        weights, own = [linear.weight for linear in originals], self._calibration
        new = partial(
            HessianSum,
            weights[0].shape[1],
            products=self._products,
            device=self._model.device,
        )
        beside, alone, drift = new(), None, None
        if self._wanted is not None:
            has_residual = group.stream is not None
            drift = DriftSum(weights, has_residual=has_residual, products=self._products)
            alone = None if own.all_drift else new()
        drifting, strayed = set(own.drift_batches), []

        def add(batch: int) -> None:
            taken, goal = take(batch)
            if taken is not None:
                summed = beside if alone is None or batch in drifting else alone
                summed.add(taken.inputs)
            if drift is None or batch not in drifting:
                return
            if taken is not None and goal is not None and taken.inputs.shape == goal.inputs.shape:
                drift.add(taken.inputs, goal.inputs, _lacking(taken, goal))
            elif taken is not goal:
                strayed.append(batch)

        with self._ranks.together():
            self._workers.map(add, own.batches)
        num_tokens = beside.num_tokens + (0 if alone is None else alone.num_tokens)
        num_strayed = torch.tensor(len(strayed) + (num_tokens != own.own_tokens))
        self._add_over_ranks(beside)
        whole = beside
        if alone is not None:
            self._add_over_ranks(alone)
            alone.include(beside)
            whole = alone
        if drift is None:
            return whole, None
        self._ranks.add(num_strayed)
        for part in drift.sums:
            self._ranks.add(part)
        if int(num_strayed):
            return whole, None
        hessian = None if alone is None else beside.finish()
        return whole, Drift(sums=drift.finish(), hessian=hessian)

    def _sum_hessian(self, num_features: int, inputs: Iterable[Tensor]) -> HessianSum:
        """Over the batches of all ranks."""
        summed = HessianSum(num_features, device=self._model.device)
        with self._ranks.together():
            for batch in inputs:
                summed.add(batch)
        self._add_over_ranks(summed)
        return summed

    def _add_over_ranks(self, summed: HessianSum) -> None:
        for panel in summed.panels:
            self._ranks.add(panel)
        count = torch.tensor(summed.num_tokens)
        self._ranks.add(count)
        summed.num_tokens = int(count)

    def _choose_hessian(self, target: Target, summed: HessianSum) -> tuple[Tensor, str | None]:
        """The Hessian to solve with, [K, K] fp32, and why it is not that of the inputs, if so."""
        needed = MIN_TOKEN_SHARE * self._calibration.num_tokens
        if summed.num_tokens < max(needed, 1):
            reason = f"{summed.num_tokens} tokens reached it, {needed:.0f} are needed"
            return torch.eye(summed.num_features, device=self._model.device), reason
        if not summed.is_finite():
            raise QuantError(f"{target.full_name}: its inputs hold values that are not finite")
        return summed.finish(), None

    def _passes(
        self,
        layer: nn.Module,
        index: int,
        groups: Sequence[TargetGroup],
        *,
        wanted: bool = False,
    ) -> LayerPasses:
        """Through the quantized model's layer, or, with `wanted`, the 16-bit one's."""
        store = self._wanted if wanted else self._store
        assert store is not None
        names = [[target.name for target in group.targets] for group in groups]
        streams = (
            {i: group.stream for i, group in enumerate(groups) if group.stream is not None}
            if self._solver.drift == "stream"
            else {}
        )

        def forward(hidden: Tensor) -> Tensor:
            return self._model.call_layer(layer, index, hidden)

        calibration = self._calibration
        batches = calibration.drift_batches if wanted else calibration.batches
        held = 0
        with self._ranks.together():
            if batches:
                probe = store.get(index, batches[0])[:1]
                held = calibration.num_passes * paused_bytes(layer, names, forward, probe)
        return LayerPasses(
            layer,
            names,
            forward,
            partial(store.get, index),
            batches,
            self._workers,
            keep_paused=held <= self._activation_memory_bytes,
            streams=streams,
        )

    def _keep_outputs(
        self, index: int, passes: LayerPasses, batches: Sequence[int], store: ActivationStore
    ) -> None:
        def keep(batch: int) -> None:
            output = passes.output(batch)
            if not bool(torch.isfinite(output).all()):
                name = self._model.layer_name(index)
                raise QuantError(f"{name}: its outputs hold values that are not finite")
            store.put(index + 1, batch, output.cpu())

        self._workers.map(keep, batches)


def _take(group: int, passes: LayerPasses, wanted: LayerPasses | None, batch: int) -> Pair:
    beside = wanted if wanted is not None and batch in wanted.batches else None
    return passes.take(group, batch), None if beside is None else beside.take(group, batch)


def _lacking(taken: Taken, goal: Taken) -> Tensor | None:
    """What the residual stream has lost, if that is asked."""
    return None if taken.stream is None or goal.stream is None else goal.stream - taken.stream


def _forget(names: Sequence[str], layers: Sequence[nn.Module]) -> None:
    """The linear layers of these names, which no pass needs any more, give their weights' memory
    back.
    """
    for layer in layers:
        for name in names:
            _linear(layer, name).weight = nn.Parameter(torch.empty(0), requires_grad=False)


def load_layer(model: LayeredModel, index: int) -> nn.Module:
    """The layer in fp32. Raises QuantError that names a tensor which is not finite."""
    layer = model.load_layer(index)
    for name, parameter in layer.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            full_name = f"{model.layer_name(index)}.{name}"
            raise QuantError(f"tensor {full_name} holds values that are not finite")
    return layer


def find_targets(
    model: LayeredModel, layer: nn.Module, index: int, config: QuantConfig, *, check: bool = True
) -> list[TargetGroup]:
    """The layer's linear layers to quantize, in groups that read the same input.

    With `check`, raises CheckpointError that names a layer which the format cannot hold.
    """
    groups = []
    for group in model.linear_groups(layer, index):
        targets = []
        for name in group.names:
            full_name = model.checkpoint_name(index, name)
            module = config.for_module(full_name)
            if module is not None:
                linear = _linear(layer, name)
                if check:
                    check_format(config, full_name, linear.in_features, linear.out_features)
                targets.append(Target(name=name, full_name=full_name, config=module))
        if targets:
            groups.append(TargetGroup(targets=tuple(targets), stream=group.stream))
    return groups


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def solve_together(
    targets: Sequence[Target],
    weights: Sequence[Tensor],
    hessian: Tensor,
    solver: SolverConfig,
    ranks: Ranks,
    *,
    drift: Drift | None = None,
    fallback: str | None = None,
) -> list[Solution]:
    """Solve layers that read the same inputs; each rank a part of every layer's rows.

    weights [N_i, K] fp32, hessian [K, K] fp32, which, like `drift`, may be overwritten;
    `fallback` as in `solve`. Rows do not influence each other, so the codes are those that one
    process finds. Raises SolverError that names the layer.
    """
    own = [ranks.slices(len(weight))[ranks.rank] for weight in weights]
    rows = [weight[part] for weight, part in zip(weights, own, strict=True)]
    parts = [] if drift is None else zip(drift.sums, own, strict=True)
    drifts = None if drift is None else [sums[part] for sums, part in parts]
    configs = [target.config for target in targets]
    with ranks.together():
        try:
            solutions = solve(
                rows,
                hessian,
                configs,
                solver,
                drifts=drifts,
                drift_hessian=None if drift is None else drift.hessian,
                fallback=fallback,
            )
        except SolverError as error:
            raise SolverError(f"{targets[0].full_name}: {error}") from None
    if ranks.world_size == 1:
        return solutions
    return [
        _gather(solution, len(weight), ranks)
        for solution, weight in zip(solutions, weights, strict=True)
    ]


def _gather(own: Solution, num_rows: int, ranks: Ranks) -> Solution:
    """The solution of all rows, given this rank's part."""
    sizes = [part.stop - part.start for part in ranks.slices(num_rows)]
    part = own.quantized
    sums = torch.tensor([own.lost, own.energy], dtype=torch.float64)
    ranks.add(sums)
    return replace(
        own,
        lost=float(sums[0]),
        energy=float(sums[1]),
        quantized=replace(
            part,
            codes=ranks.gather_columns(part.codes, sizes),
            scales=ranks.gather_columns(part.scales, sizes),
            zeros=ranks.gather_columns(part.zeros, sizes),
        ),
    )


def pack(quantized: QuantizedWeight, bias: Tensor | None) -> PackedWeight:
    """Packing widens codes to 64 bits: a part of the rows at a time."""
    in_features, count = quantized.codes.shape
    step = max(1, min(ROWS_AT_ONCE, CODES_AT_ONCE // in_features))
    sizes = [min(step, count - start) for start in range(0, count, step)]
    packed = concatenate([part.pack() for part in quantized.split(sizes)])
    return replace(packed, bias=None if bias is None else to_fp16({"bias": bias})["bias"])


def install(linear: nn.Linear, weight: PackedWeight, products: torch.dtype) -> None:
    """Put the weight that other programs will read from the checkpoint into the layer, as exactly
    as `products` holds it.
    """
    device = linear.weight.device
    weight = move(weight, device)
    dense = torch.empty(linear.weight.shape, dtype=products, device=device)
    for outputs in torch.arange(weight.out_features, device=device).split(ROWS_AT_ONCE):
        dense[outputs[0] : outputs[-1] + 1] = dequantize(select_outputs(weight, outputs))
    linear.weight = nn.Parameter(dense, requires_grad=False)


def make_reports(
    targets: Sequence[Target], solutions: Sequence[Solution], summed: HessianSum, seconds: float
) -> list[ModuleReport]:
    """One per layer; each takes its share of the group's time by its size."""
    counts = [solution.quantized.codes.numel() for solution in solutions]
    return [
        ModuleReport(
            name=target.full_name,
            bits=target.config.bits,
            group_size=target.config.group_size,
            sym=target.config.sym,
            num_parameters=count,
            num_tokens=summed.num_tokens,
            relative_error=solution.relative_error,
            damp_percent=solution.damp_percent,
            fallback=solution.fallback,
            seconds=seconds * count / sum(counts),
        )
        for target, solution, count in zip(targets, solutions, counts, strict=True)
    ]


def to_fp16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is not quantized, as it is stored. Raises QuantError beyond the fp16 range."""
    converted = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    for name, tensor in converted.items():
        if not bool(torch.isfinite(tensor).all()):
            raise QuantError(f"tensor {name} holds values beyond the fp16 range")
    return converted
