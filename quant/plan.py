"""What a quantization run costs and what comes out, before it: sizes, memory, time, a GPU's fit.

From a configuration alone, through a model without weights; no weight is read. Sizes are exact,
memory is a sum of stated terms, time is an estimate from rates measured here and now.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from .checkpoint import MAX_SHARD_BYTES
from .config import ModuleConfig, QuantConfig
from .devices import CPU, resolve_device
from .embedding import check_embedding
from .errors import QuantError, SourceError
from .formats import check_format, embedding_matrix, weight_bytes
from .gptq import ROWS_AT_ONCE as SOLVER_ROWS
from .gptq import SolverConfig, rows_at_once, solve
from .layers import find_layers, is_router
from .pipeline import (
    DEFAULT_ACTIVATION_MEMORY_BYTES,
    DEFAULT_NUM_SEQUENCES,
    DEFAULT_SEQUENCE_LENGTH,
    MAPPED_BYTES,
    batch_size,
)
from .products import MAX_ROUNDED_BITS, product_dtype, resolve_precision
from .skeleton import Skeleton
from .stages import CODES_AT_ONCE, ROWS_AT_ONCE
from .units import format_bytes, format_seconds
from .workers import num_workers

# Memory that `nvidia-smi` reports, in MiB: what is left of the size on the box.
GPU_MEMORY_MIB = {
    "A10": 23_028,
    "A100-40": 40_960,
    "A100-80": 81_920,
    "A6000": 49_140,
    "B200": 183_359,
    "H100-80": 81_559,
    "H200-141": 143_771,
    "L4": 23_034,
    "L40S": 46_068,
    "RTX3090": 24_576,
    "RTX4090": 24_564,
    "RTX5090": 32_607,
    "T4": 15_360,
}
# Of that memory, for weights and KV cache; the rest is the CUDA context, activations, workspaces.
USABLE_GPU_FRACTION = 0.9

# Where the memory of a run goes, beside what follows from shapes alone.
PROCESS_BYTES = 460 << 20  # measured after the imports and a first product
TOKENIZER_BYTES = 1400  # of an entry of the vocabulary, measured on one of 49,152
SUM_BYTES = 4  # of K * K: a triangle in fp64
DRIFT_BYTES = 8  # of a number in the drift's sum
FACTOR_BYTES = 4 + 4  # of K * K: the Hessian in fp32 and its factor, a triangle in fp64
SOLVER_BYTES = 36  # of K * N for the rows that are solved together: targets, codes, slopes
ROW_BYTES = 24  # of K * N for the rows that are packed together: wide codes and their periods
CODE_BYTES = 1  # of K * N for the layers of a group, before they are packed
HOST_TERMS = ("its packed weights", "activations between layers")  # not on the GPU
PAUSED_STATES = 6  # hidden states that attention holds: residual, normed, q, k, v, output
# Of activations in blocks that glibc does not map one by one, what is free between them at the end
# of a run: 0.28 to 0.36 of SmolLM2's with 64 sequences of 512 tokens.
FREE_SHARE = 0.3
PASS_WIDTH = 4  # times the widest activation: what a forward pass holds inside the layer

# How often the solver goes over a matrix.
HESSIAN_OPERATIONS = 1.25  # of K * K for a token; symmetric, so little more than half of 2
DRIFT_OPERATIONS = 4  # of a number in the drift's sum for a token: outputs, then their products
FACTOR_OPERATIONS = 1  # of K ** 3: a Cholesky factor and a triangular inverse
SOLVER_OPERATIONS = 1 + 2 + 4  # of N * K * K: spreading errors, descent's start, output errors
SWEEP_OPERATIONS = 2  # of N * K * K for each sweep of coordinate descent
PROBE_COLUMNS = 64  # of the layers whose solving is timed: matrix products hardly count there

# Linear layers of one parent that read the same input, and so share one Hessian.
SHARED_INPUTS = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear layer, quantized or not."""

    name: str  # on disk
    in_features: int
    out_features: int
    bias: bool
    layer: int | None  # None: it stands outside the decoder layers
    share: float  # of all tokens that reach it; below 1 for a routed expert
    tied: bool  # its weight is the input embedding's, too
    config: ModuleConfig | None  # None: it stays at 16 bits

    @property
    def num_weights(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of a sum."""

    label: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the run, and what is in memory at once in it."""

    name: str
    terms: tuple[Term, ...]

    @property
    def num_bytes(self) -> int:
        return sum(term.num_bytes for term in self.terms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast this machine is."""

    matmul: float  # fp32 operations in a second
    product: float  # of linear layers in a forward pass: bfloat16 where that is faster
    matmul64: float  # fp64 operations in a second
    copy: float  # bytes read in a second
    solver_column: float  # seconds of the solver for an input feature of a layer
    solver_weight: float  # seconds of the solver for a weight, matrix products aside


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFit:
    """Whether the checkpoint and a KV cache of so many tokens fit a GPU's memory."""

    name: str
    memory_bytes: int
    usable_bytes: int
    kv_tokens: int
    kv_bytes: int
    needed_bytes: int  # the packed checkpoint and the KV cache
    max_kv_tokens: int | None  # beside the checkpoint; None: it has no KV cache

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run that was not made."""

    source: str
    model_type: str
    num_parameters: int
    num_quantized: int  # linear layers
    quantizes_embedding: bool  # beside them
    num_bytes_16bit: int  # every weight at two bytes
    num_bytes_packed: int  # every tensor of the checkpoint, exactly
    bits_per_weight: float  # of the quantized layers, scales and zero points included
    num_calibration_tokens: int
    device: str  # "cpu" or "cuda"
    memory: Phase  # of the run's phases the one that needs most
    gpu_memory: Phase | None  # the same of the GPU's memory, if the run computes there
    time: tuple[tuple[str, float], ...]  # (part of the run, seconds)
    gpu: GpuFit | None

    @property
    def peak_memory_bytes(self) -> int:
        return self.memory.num_bytes

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.time)


def plan_run(
    source: str,
    config: QuantConfig,
    *,
    num_sequences: int = DEFAULT_NUM_SEQUENCES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    activation_memory_bytes: int = DEFAULT_ACTIVATION_MEMORY_BYTES,
    device: str = "auto",
    solver: SolverConfig | None = None,
    gpu: str | None = None,
    kv_tokens: int = 0,
    rates: Rates | None = None,
) -> Plan:
    """The plan of `lowbit quantize SOURCE` with these settings. `rates`: measured if absent.

    Raises a QuantError in one line for what the run itself would refuse of a configuration.
    """
    return plan_model(
        source,
        load_config(source),
        config,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        activation_memory_bytes=activation_memory_bytes,
        device=resolve_device(device),
        solver=solver,
        gpu=gpu,
        kv_tokens=kv_tokens,
        rates=rates,
    )


def plan_model(
    name: str,
    model_config: PretrainedConfig,
    config: QuantConfig,
    *,
    num_sequences: int = DEFAULT_NUM_SEQUENCES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    activation_memory_bytes: int = DEFAULT_ACTIVATION_MEMORY_BYTES,
    device: torch.device = CPU,
    solver: SolverConfig | None = None,
    gpu: str | None = None,
    kv_tokens: int = 0,
    rates: Rates | None = None,
) -> Plan:
    """`plan_run` for a configuration that is at hand."""
    _check_positive(num_sequences=num_sequences, sequence_length=sequence_length)
    if kv_tokens < 0:
        raise QuantError(f"kv_tokens is {kv_tokens}; it must be at least 0")
    gpu_name = None if gpu is None else _gpu_name(gpu)
    solver = solver or SolverConfig()
    precision = resolve_precision(solver.precision, config.bits, device)
    solver = replace(solver, precision=precision)
    model = _Model(name, model_config, config, corrects_drift=solver.drift != "none")
    length = min(sequence_length, getattr(model_config, "max_position_embeddings", sequence_length))
    quantized = model.quantized()
    num_bytes = model.checkpoint_bytes()
    memory, gpu_memory = _memory(
        model, num_sequences, length, activation_memory_bytes, solver, device
    )
    return Plan(
        source=name,
        model_type=model_config.model_type,
        num_parameters=model.num_parameters,
        num_quantized=sum(linear is not model.embedding for linear in quantized),
        quantizes_embedding=model.embedding is not None,
        num_bytes_16bit=2 * model.num_parameters,
        num_bytes_packed=num_bytes,
        bits_per_weight=bits_per_weight(quantized, config.checkpoint_format),
        num_calibration_tokens=num_sequences * length,
        device=device.type,
        memory=memory,
        gpu_memory=gpu_memory,
        time=_time(model, num_sequences, length, rates or measure_rates(device), solver, device),
        gpu=None if gpu_name is None else _gpu_fit(gpu_name, model, num_bytes, kv_tokens),
    )


def describe(plan: Plan) -> str:
    """The plan in words, a few lines."""
    lines = [
        f"{plan.source} ({plan.model_type}): {plan.num_parameters:,} parameters, "
        f"{plan.num_quantized} linear layers"
        f"{' and the embedding' if plan.quantizes_embedding else ''} to quantize",
        f"size         {format_bytes(plan.num_bytes_16bit)} at 16 bits, "
        f"{format_bytes(plan.num_bytes_packed)} packed ({plan.num_bytes_packed:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight",
        f"peak memory  {format_bytes(plan.peak_memory_bytes)}, while {plan.memory.name}:",
        *_describe_terms(plan.memory),
        *([] if plan.gpu_memory is None else _describe_gpu_memory(plan.gpu_memory)),
        f"time         about {format_seconds(plan.seconds)} on this machine, an estimate for "
        f"{plan.num_calibration_tokens:,} calibration tokens:",
        *(f"             {format_seconds(seconds):>11}  {part}" for part, seconds in plan.time),
    ]
    return "\n".join([*lines, *([] if plan.gpu is None else [_describe_fit(plan.gpu)])])


def _describe_gpu_memory(phase: Phase) -> list[str]:
    heading = f"GPU memory   {format_bytes(phase.num_bytes)}, while {phase.name}; CUDA's own aside:"
    return [heading, *_describe_terms(phase)]


def _describe_terms(phase: Phase) -> list[str]:
    return [
        f"             {format_bytes(term.num_bytes):>11}  {term.label}" for term in phase.terms
    ]


def _describe_fit(gpu: GpuFit) -> str:
    cache = f" + {format_bytes(gpu.kv_bytes)} KV cache of {gpu.kv_tokens:,} tokens"
    room = "" if gpu.max_kv_tokens is None else f"; room for {gpu.max_kv_tokens:,} tokens"
    return (
        f"GPU          {'fits' if gpu.fits else 'does not fit'} {gpu.name}: "
        f"{format_bytes(gpu.needed_bytes - gpu.kv_bytes)} checkpoint"
        f"{cache if gpu.kv_bytes else ''} of {format_bytes(gpu.usable_bytes)} usable "
        f"({USABLE_GPU_FRACTION:.0%} of {format_bytes(gpu.memory_bytes)}){room}"
    )


def load_config(source: str) -> PretrainedConfig:
    """The configuration of a folder, a config.json, a .gguf file or a hub id; reads no weights."""
    path = Path(source).expanduser()
    where, options = str(path), {}
    if path.suffix == ".gguf":
        where, options = str(path.parent), {"gguf_file": path.name}
    elif not path.exists():
        where = source
    if (path.is_absolute() or path.suffix in (".gguf", ".json")) and not path.exists():
        raise SourceError(f"{source}: there is no such file or folder")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            where, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError) as error:
        line = str(error).strip().partition("\n")[0]
        raise SourceError(f"{source}: its configuration cannot be read ({line})") from None
    if getattr(config, "quantization_config", None):
        raise SourceError(f"{source}: is quantized already; start from the 16-bit model")
    return config


class _Model:
    """What a configuration says about a model's tensors."""

    def __init__(
        self,
        name: str,
        model_config: PretrainedConfig,
        config: QuantConfig,
        *,
        corrects_drift: bool,
    ) -> None:
        self.corrects_drift = corrects_drift
        try:
            self.skeleton = Skeleton(model_config)
            self.layers_name, layers = find_layers(self.skeleton.model)
        except SourceError as error:
            raise SourceError(f"{name}: {error}") from None
        if config.lm_head and not self.skeleton.is_causal:
            raise QuantError("lm_head is true; this model has no output head")
        self.num_layers = len(layers)
        self.config = model_config
        self.quant_config = config
        self.sizes = {
            key: math.prod(shape)
            for key, shape in self.skeleton.shapes.items()
            if key not in self.skeleton.tied
        }
        self.num_parameters = sum(self.sizes.values())
        self.linears = [
            self._linear(path, module)
            for path, module in self.skeleton.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        self.embedding = self._embedding()

    def quantized(self) -> list[Linear]:
        """What is packed, the embedding too."""
        found = [linear for linear in self.linears if linear.config is not None]
        return found if self.embedding is None else [self.embedding, *found]

    def checkpoint_bytes(self) -> int:
        """Of every tensor: packed layers, and all else at two bytes a number."""
        packed, dense = 0, self.num_parameters
        for linear in self.quantized():
            packed += packed_bytes(linear, self.quant_config.checkpoint_format)
            if not linear.tied:
                dense -= linear.num_weights + linear.bias * linear.out_features
        return packed + 2 * dense

    def largest_layer(self) -> int:
        """Parameters of the largest decoder layer."""
        totals = dict.fromkeys(range(self.num_layers), 0)
        for name, size in self.sizes.items():
            layer = self._layer_of(name)
            if layer is not None:
                totals[layer] += size
        return max(totals.values())

    def largest_packed_layer(self) -> int:
        """Bytes of the quantized weights of one decoder layer, packed."""
        totals = dict.fromkeys(range(self.num_layers), 0)
        for linear in self.linears:
            if linear.config is not None and linear.layer is not None:
                totals[linear.layer] += packed_bytes(linear, self.quant_config.checkpoint_format)
        return max(totals.values())

    def groups(self) -> list[list[Linear]]:
        """The quantized layers; those that share an input together."""
        groups: dict[tuple[str, str], list[Linear]] = {}
        for linear in self.linears:
            if linear.config is not None:
                parent, _, leaf = linear.name.rpartition(".")
                shared = next((names for names in SHARED_INPUTS if leaf in names), {leaf})
                groups.setdefault((parent, min(shared)), []).append(linear)
        return list(groups.values())

    def _linear(self, path: str, module: nn.Linear) -> Linear:
        name = self.skeleton.checkpoint_name(path)
        size = (module.in_features, module.out_features)
        layer = self._layer_of(path)
        head = self.skeleton.is_causal and module is self.skeleton.model.get_output_embeddings()
        quantized = (layer is not None and not is_router(path)) or head
        if quantized:
            check_format(self.quant_config, name, *size)
        return Linear(
            name=name,
            in_features=size[0],
            out_features=size[1],
            bias=module.bias is not None,
            layer=layer,
            share=self._share(path),
            tied=f"{path}.weight" in self.skeleton.tied,
            config=self.quant_config.for_module(name) if quantized else None,
        )

    def _embedding(self) -> Linear | None:
        """The input embedding as the matrix that is packed; None: it stays at 16 bits."""
        model, config = self.skeleton.model, self.quant_config
        table = model.get_input_embeddings()
        path = next(path for path, module in model.named_modules() if module is table)
        name = self.skeleton.checkpoint_name(path)
        module = config.for_embedding(name)
        if module is None:
            return None
        check_embedding(config, name, *table.weight.shape)
        out_features, in_features = embedding_matrix(table.weight, config).shape
        return Linear(
            name=name,
            in_features=in_features,
            out_features=out_features,
            bias=False,
            layer=None,
            share=1.0,
            tied=False,
            config=module,
        )

    def _layer_of(self, path: str) -> int | None:
        if not path.startswith(f"{self.layers_name}."):
            return None
        return int(path.removeprefix(f"{self.layers_name}.").partition(".")[0])

    def _share(self, path: str) -> float:
        """Of the tokens that reach a module: those of its expert, if the router spreads evenly."""
        experts, found, _ = path.rpartition(".experts.")
        if not found:
            return 1.0
        count = len(self.skeleton.model.get_submodule(f"{experts}.experts"))
        return min(1.0, int(self.config.num_experts_per_tok) / count)


# Sizes


def packed_bytes(linear: Linear, checkpoint_format: str) -> int:
    """Bytes of a packed layer's tensors in that format."""
    # The shape as two int64, or g_idx.
    extra = 16 if checkpoint_format == "compressed-tensors" else 4 * linear.in_features
    return _weight_bytes(linear, checkpoint_format) + extra + 2 * linear.bias * linear.out_features


def _weight_bytes(linear: Linear, checkpoint_format: str) -> int:
    assert linear.config is not None
    sizes = linear.in_features, linear.out_features
    return weight_bytes(linear.config, *sizes, checkpoint_format)


def bits_per_weight(linears: Sequence[Linear], checkpoint_format: str) -> float:
    """Of codes, scales and zero points together; 16 where nothing is quantized."""
    num_bytes = sum(_weight_bytes(linear, checkpoint_format) for linear in linears)
    return 8 * num_bytes / sum(linear.num_weights for linear in linears) if linears else 16.0


# Memory


def _memory(
    model: _Model,
    num_sequences: int,
    length: int,
    activation_memory_bytes: int,
    solver: SolverConfig,
    device: torch.device,
) -> tuple[Phase, Phase | None]:
    """The phase of the run that needs most; its terms are in use at once. And that of a GPU's."""
    drawing = 4 * model.num_parameters  # only done where it fits the activations' limit
    drawn = {
        "drawing calibration text": {
            "the whole model, fp32": drawing if drawing <= activation_memory_bytes else 0
        }
    }
    layers = _layer_phases(model, num_sequences, length, activation_memory_bytes, solver, device)
    on_gpu: dict[str, dict[str, int]] = {}
    if device.type != "cpu":
        on_gpu = drawn | {name: _without(terms, HOST_TERMS) for name, terms in layers.items()}
        layers = {name: _without(terms, on_gpu[name]) for name, terms in layers.items()}
    phases = {
        **_embedding_phases(model),
        **layers,
        **drawn,
        "writing the checkpoint": {
            "one shard": min(model.checkpoint_bytes(), MAX_SHARD_BYTES),
            "one finished layer": model.largest_packed_layer(),
        },
    }
    vocabulary = int(getattr(model.config, "vocab_size", 0))
    always = {
        "Python, torch and transformers": PROCESS_BYTES,
        "the tokenizer": TOKENIZER_BYTES * vocabulary,
    }
    return _largest(phases, always), _largest(on_gpu, {}) if on_gpu else None


def _largest(phases: Mapping[str, Mapping[str, int]], always: Mapping[str, int]) -> Phase:
    """The phase that needs most, with what is always in use."""
    name = max(phases, key=lambda phase: sum(phases[phase].values()))
    terms = {**always, **phases[name]}
    return Phase(
        name=name, terms=tuple(Term(label=label, num_bytes=size) for label, size in terms.items())
    )


def _without(terms: Mapping[str, int], labels: Collection[str]) -> dict[str, int]:
    return {label: size for label, size in terms.items() if label not in labels}


def _embedding_phases(model: _Model) -> dict[str, dict[str, int]]:
    table = model.embedding
    if table is None:
        return {}
    at_once = min(CODES_AT_ONCE, table.in_features * ROWS_AT_ONCE, table.num_weights)
    packed = packed_bytes(table, model.quant_config.checkpoint_format)
    return {
        "rounding the embedding": {
            "its codes": CODE_BYTES * table.num_weights,
            "a part being packed": ROW_BYTES * at_once,
            "its packed parts, put together": 2 * packed,
        }
    }


def _layer_phases(
    model: _Model,
    num_sequences: int,
    length: int,
    limit_bytes: int,
    solver: SolverConfig,
    device: torch.device,
) -> dict[str, dict[str, int]]:
    """Of all groups of layers the one that needs most, while its sums grow and while it is solved.

    Where drift is corrected, the 16-bit model passes through the layer as well.
    """
    hidden, state = int(model.config.hidden_size), 4 * length
    num_passes = num_sequences + _num_drift_sequences(num_sequences, length, solver)
    in_order = list(_in_order(model.groups()))
    widths = [_paused_width(group, hidden, before) for group, before, _ in in_order]
    most = max([PAUSED_STATES * hidden, *widths])
    keeps_paused = num_passes * state * most <= limit_bytes
    in_heap = keeps_paused and device.type == "cpu"
    needs: dict[str, dict[str, int]] = {}
    for (group, before, last), width in zip(in_order, widths, strict=True):
        columns = group[0].in_features
        block = batch_size(length) * state * max(hidden, columns)
        weights = sum(linear.num_weights for linear in group)
        rows = max(linear.out_features for linear in group)
        common = {
            "its packed weights": model.largest_packed_layer(),
            "activations between layers": min(num_passes * state * hidden, limit_bytes),
            "activations in the layer": num_passes * state * width * keeps_paused,
            "free memory between them": int(
                FREE_SHARE * num_passes * state * width * (in_heap and block < MAPPED_BYTES)
            ),
        }
        early = num_passes < 2 * num_sequences  # the drift's Hessian is not that of all tokens
        drift = _drift_weights(group) if model.corrects_drift else 0
        passing = min(num_sequences, num_workers(hidden, device) * batch_size(length))
        batch = passing * state * PASS_WIDTH * max(hidden, columns)
        codes = max(
            SOLVER_BYTES * min(columns * rows_at_once(columns, device), weights),
            ROW_BYTES * min(CODES_AT_ONCE, columns * min(rows, ROWS_AT_ONCE)),
        )
        found = {
            "adding up a Hessian": {
                **_layer_terms(model, solver, before, last if keeps_paused else before),
                **common,
                "the Hessian": SUM_BYTES * columns**2 * (2 if early and drift else 1),
                "the drift": DRIFT_BYTES * drift,
                "the batches that pass": batch,
            },
            "solving": {
                **_layer_terms(model, solver, before, 0 if keeps_paused else before),
                **common,
                "the Hessian and its factor": FACTOR_BYTES * columns**2
                + SUM_BYTES * columns**2 * (1 if early and drift else 0),
                "what the outputs lack": 4 * weights * (1 if drift else 0),
                "codes being found and packed": codes + CODE_BYTES * weights,
            },
        }
        needs = {
            phase: max(terms, needs.get(phase, {}), key=lambda terms: sum(terms.values()))
            for phase, terms in found.items()
        }
    return needs


def _in_order(groups: Sequence[Sequence[Linear]]) -> Iterator[tuple[Sequence[Linear], int, int]]:
    """Each group, the weights of all groups before it in its layer, and those of the last one."""
    layer, before, last = None, 0, 0
    for group in groups:
        if group[0].layer != layer:
            layer, before, last = group[0].layer, 0, 0
        yield group, before, last
        last = sum(linear.num_weights for linear in group)
        before += last


def _layer_terms(model: _Model, solver: SolverConfig, finished: int, held: int) -> dict[str, int]:
    """The decoder layer when so many of its weights are quantized, and of these so many still held.

    Finished weights are held as they are multiplied; of the 16-bit model the same ones are.
    """
    narrow = product_dtype(solver.precision).itemsize
    open_ = model.largest_layer() - finished
    return {
        "the decoder layer, fp32": 4 * open_ + narrow * held,
        "the same at 16 bits": 2 * (open_ + held) * model.corrects_drift,
    }


def _num_drift_sequences(num_sequences: int, length: int, solver: SolverConfig) -> int:
    """Those that the 16-bit model sees: whole batches."""
    if solver.drift == "none":
        return 0
    if solver.drift_tokens is None:
        return num_sequences
    size = batch_size(length)
    return min(num_sequences, size * -(-solver.drift_tokens // (size * length)))


def _paused_width(group: Sequence[Linear], hidden: int, before: int) -> int:
    """Features of a token that a pass holds when it is paused before the group, which has `before`
    weights before it in its layer: few at the layer's beginning, most inside attention.
    """
    columns = group[0].in_features
    if columns > hidden:
        return 2 * hidden + columns
    return (PAUSED_STATES if before else 2) * hidden


def _drift_weights(group: Sequence[Linear]) -> int:
    """Numbers in the drift's sum: for every weight, or for every pair of inputs if these are fewer;
    none for routed experts, which see other tokens than at 16 bits.
    """
    rows, columns = sum(linear.out_features for linear in group), group[0].in_features
    return min(rows, columns) * columns if group[0].share == 1.0 else 0


# Time


def measure_rates(device: torch.device = CPU) -> Rates:
    """How fast this machine is on that device, in about a second."""
    few, many = 256, SOLVER_ROWS
    small, large = _solver_seconds(few, device), _solver_seconds(many, device)
    precision = resolve_precision("auto", MAX_ROUNDED_BITS, device)
    per_weight = max(large - small, 0.0) / (PROBE_COLUMNS * (many - few))
    return Rates(
        matmul=_matmul_rate(torch.float32, device),
        product=_matmul_rate(product_dtype(precision), device),
        matmul64=_matmul_rate(torch.float64, device),
        copy=_copy_rate(),
        solver_column=max(small / PROBE_COLUMNS - few * per_weight, 0.0),
        solver_weight=per_weight,
    )


def _time(
    model: _Model,
    num_sequences: int,
    length: int,
    rates: Rates,
    solver: SolverConfig,
    device: torch.device,
) -> tuple[tuple[str, float], ...]:
    drift_tokens = length * _num_drift_sequences(num_sequences, length, solver)
    models = 2 if model.corrects_drift else 1
    tokens = num_sequences * length
    seen = (tokens + drift_tokens) / tokens  # by both models
    product = rates.product if solver.precision == "bfloat16" else rates.matmul
    groups = model.groups()
    attention = 2 * tokens * length * int(model.config.hidden_size) * model.num_layers
    inside = [linear for linear in model.linears if linear.layer is not None]
    passes = sum(2 * tokens * linear.share * linear.num_weights for linear in inside)
    squares = sum(group[0].share * group[0].in_features ** 2 for group in groups)
    factors = sum(FACTOR_OPERATIONS * group[0].in_features ** 3 for group in groups)
    solving = sum(_solving_seconds(group, rates, solver, device) for group in groups)
    drift = DRIFT_OPERATIONS * drift_tokens * sum(map(_drift_weights, groups))
    table = 0 if model.embedding is None else model.embedding.num_weights
    return (
        ("reading weights", 2 * models * model.num_parameters / rates.copy),
        ("forward passes", seen * (passes / product + attention / rates.matmul)),
        ("Hessians", HESSIAN_OPERATIONS * tokens * squares / rates.matmul),
        *([("drift", drift / rates.matmul)] if drift else []),
        ("factors", factors / rates.matmul64),
        ("solving", solving + table * rates.solver_weight),
    )


def _solving_seconds(
    group: Sequence[Linear], rates: Rates, solver: SolverConfig, device: torch.device
) -> float:
    columns = group[0].in_features
    weights = sum(linear.num_weights for linear in group)
    slices = -(-sum(linear.out_features for linear in group) // rows_at_once(columns, device))
    operations = SOLVER_OPERATIONS + SWEEP_OPERATIONS * solver.descent_sweeps
    products = operations * weights * columns / rates.matmul
    return slices * columns * rates.solver_column + weights * rates.solver_weight + products


def _solver_seconds(rows: int, device: torch.device) -> float:
    """Of a layer with PROBE_COLUMNS inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, PROBE_COLUMNS, generator=generator)
    inputs = torch.randn(4 * PROBE_COLUMNS, PROBE_COLUMNS, generator=generator)
    hessian, weight = (inputs.t() @ inputs).to(device), weight.to(device)
    return _seconds(lambda: solve([weight], hessian.clone(), [ModuleConfig()]), device)


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    matrix = torch.ones(768, 768, dtype=dtype, device=device)
    return 2 * 768**3 / _seconds(lambda: matrix @ matrix, device)


def _copy_rate() -> float:
    block = torch.ones(1 << 23)
    return block.nbytes / _seconds(block.clone)


def _seconds(work: Callable[[], Any], device: torch.device = CPU, enough: float = 0.05) -> float:
    """Of one call: the fastest of as many as take `enough` seconds, after one to warm up."""

    def run() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    fastest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < enough:
        begun = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - begun)
    return fastest


# A GPU


def _gpu_name(name: str) -> str:
    """The table's name for a GPU; the size may be left out where there is only one."""
    wanted = re.sub(r"[\s_-]|GB$", "", name.upper())
    plain = {known.replace("-", ""): known for known in GPU_MEMORY_MIB}
    found = [known for key, known in plain.items() if wanted and key.startswith(wanted)]
    if wanted in plain:
        return plain[wanted]
    if len(found) != 1:
        raise QuantError(f"gpu is {name!r}; known are {', '.join(found or GPU_MEMORY_MIB)}")
    return found[0]


def _gpu_fit(name: str, model: _Model, num_bytes: int, kv_tokens: int) -> GpuFit:
    memory = GPU_MEMORY_MIB[name] << 20
    usable = int(USABLE_GPU_FRACTION * memory)
    per_token = _kv_bytes_per_token(model)
    room = max(usable - num_bytes, 0)
    return GpuFit(
        name=name,
        memory_bytes=memory,
        usable_bytes=usable,
        kv_tokens=kv_tokens,
        kv_bytes=kv_tokens * per_token,
        needed_bytes=num_bytes + kv_tokens * per_token,
        max_kv_tokens=room // per_token if per_token else None,
    )


def _kv_bytes_per_token(model: _Model) -> int:
    """Keys and values of every layer at two bytes a number; nothing for an encoder."""
    if not model.skeleton.is_causal:
        return 0
    config = model.config
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 2 * 2 * model.num_layers * kv_heads * head_dim


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise QuantError(f"{name} is {value}; it must be at least 1")
