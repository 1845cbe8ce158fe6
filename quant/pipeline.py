"""The driver: a 16-bit model in, a packed checkpoint out, one decoder layer at a time.

Order inside a layer is the order of its computation (q/k/v, o, gate/up, down): every Hessian is
taken behind layers that are quantized already, so later codes make up for earlier errors. At any
time one Hessian and one layer's fp32 weights are in memory, next to the 16-bit model.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaForCausalLM

from . import calibration
from .checkpoint import check_output, gptq_tensors, write_checkpoint
from .config import QuantConfig
from .errors import QuantError, SolverError
from .gptq import accumulate_hessian, factorize, quantize_weight, relative_error
from .source import Source, build_model, load_source

DEFAULT_NUM_SEQUENCES = 16
DEFAULT_SEQUENCE_LENGTH = 512
STEPS_PER_LAYER = 4  # q/k/v, o, gate/up, down
BATCH_SIZE = 8  # sequences in one forward pass
MAX_FP32_PARAMETERS = 1 << 30  # 4 GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """How one linear layer came out."""

    name: str
    relative_error: float  # squared output error over squared output, on the calibration text
    damp_percent: float  # the damping that its Hessian took


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """What a run did."""

    seconds: float
    num_calibration_tokens: int
    num_bytes_16bit: int  # every weight of the source at two bytes
    num_bytes_packed: int  # every tensor of the checkpoint written
    modules: tuple[ModuleReport, ...]


def quantize(
    source: str,
    out: Path,
    config: QuantConfig,
    *,
    calibration_file: Path | None = None,
    num_sequences: int = DEFAULT_NUM_SEQUENCES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    seed: int = 0,
    progress: bool = True,
) -> QuantizeReport:
    """Quantize SOURCE and write a GPTQ checkpoint to the folder `out`.

    Raises a QuantError in one line: before work starts for an unsupported setting, an occupied
    `out`, an unusable source or calibration text, too little disk space; later for a layer that
    cannot be solved. Nothing is left in `out` then.
    """
    started = time.monotonic()
    _check_config(config)
    check_output(out)
    text = None if calibration_file is None else calibration.read_text(calibration_file)
    opened = load_source(source)
    _check_finite(opened.tensors)
    _check_disk(out, opened.tensors, config)
    length = min(sequence_length, opened.config.max_position_embeddings)
    batches = calibration_batches(opened, text, num_sequences, length, seed, progress)
    tensors, modules = _quantize_model(opened, batches, config, progress)
    write_checkpoint(
        out,
        tensors,
        {**opened.config_json, "dtype": "float16"},
        config,
        write_extras=opened.write_companions,
    )
    return QuantizeReport(
        seconds=time.monotonic() - started,
        num_calibration_tokens=batches.numel(),
        num_bytes_16bit=sum(2 * tensor.numel() for tensor in opened.tensors.values()),
        num_bytes_packed=sum(tensor.nbytes for tensor in tensors.values()),
        modules=tuple(modules),
    )


def calibration_batches(
    source: Source,
    text: str | None,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    progress: bool,
) -> Tensor:
    """[S, L] int64: windows of the user's text, or, without one, of the built-in mixture.

    The mixture is one half conversations that the model itself draws and one half Python's
    language reference. On the 135M chat model at 4 bits, group 64, 8192 calibration tokens, the KL
    divergence on held-out package descriptions, licences, code and conversations was 0.152, 0.501,
    0.122 and 0.159; with the reference alone 0.152, 0.537, 0.111 and 0.238, with conversations
    alone 0.191, 0.518, 0.196 and 0.158 (tests/benchmarks/calibration.py).
    """
    opening = calibration.conversation_opening(source.tokenizer) if text is None else []
    num_drawn = max(num_sequences, 0) // 2 if opening else 0
    windows = calibration.token_batches(
        source.tokenizer,
        calibration.reference_text(seed) if text is None else text,
        num_sequences=num_sequences - num_drawn,
        sequence_length=sequence_length,
        seed=seed,
    )
    _check_vocabulary(source, windows)
    if not num_drawn:
        return windows
    drawn = calibration.sample_batches(
        _sampling_model(source),
        opening,
        num_sequences=num_drawn,
        sequence_length=windows.shape[1],
        seed=seed,
        progress=progress,
    )
    return torch.cat([windows, drawn])


def _sampling_model(source: Source) -> LlamaForCausalLM:
    """In fp32, which every CPU is fast at, or as stored where that would take too much memory."""
    tensors = source.tensors
    if sum(tensor.numel() for tensor in tensors.values()) <= MAX_FP32_PARAMETERS:
        tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    return build_model(source.config, tensors)


def _check_vocabulary(source: Source, batches: Tensor) -> None:
    largest = int(batches.max())
    if largest >= source.config.vocab_size:
        raise QuantError(
            f"{source.name}: its tokenizer makes token {largest}; "
            f"the model's vocabulary ends at {source.config.vocab_size - 1}"
        )


@torch.inference_mode()
def _quantize_model(
    source: Source, batches: Tensor, config: QuantConfig, progress: bool
) -> tuple[dict[str, Tensor], list[ModuleReport]]:
    model = build_model(source.config, source.tensors)
    decoder: Any = model.model
    tensors = {
        name: _to_fp16(name, tensor)
        for name, tensor in source.tensors.items()
        if not name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq")
    }
    if source.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    hidden = [decoder.embed_tokens(ids).to(torch.float32) for ids in batches.split(BATCH_SIZE)]
    positions = torch.arange(batches.shape[1]).unsqueeze(0)
    rotary = decoder.rotary_emb(hidden[0], positions)
    modules: list[ModuleReport] = []
    total = STEPS_PER_LAYER * len(decoder.layers)
    with tqdm(total=total, desc="quantizing", unit="step", disable=not progress) as bar:
        for index, layer in enumerate(decoder.layers):
            step = _LayerQuantizer(f"model.layers.{index}", layer.to(torch.float32), config, bar)
            hidden = step.run(hidden, rotary)
            tensors.update(step.tensors)
            modules.extend(step.modules)
            layer.to("meta")  # its weights are in `tensors` now
    return tensors, modules


class _LayerQuantizer:
    """Quantizes one decoder layer while the calibration text passes through it."""

    def __init__(self, prefix: str, layer: Any, config: QuantConfig, bar: tqdm[Any]) -> None:
        self.prefix = prefix
        self.layer = layer
        self.config = config
        self.bar = bar
        self.modules: list[ModuleReport] = []
        self.tensors = {
            name: _to_fp16(name, parameter)
            for part in ("input_layernorm", "post_attention_layernorm")
            for name, parameter in getattr(layer, part).named_parameters(f"{prefix}.{part}")
        }

    def run(self, hidden: list[Tensor], rotary: tuple[Tensor, Tensor]) -> list[Tensor]:
        """The layer's outputs with its quantized weights. Each tensor [batch, T, hidden] fp32."""
        layer, attention, mlp = self.layer, self.layer.self_attn, self.layer.mlp
        normed = [layer.input_layernorm(x) for x in hidden]
        self._solve(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], normed)

        output, attention.o_proj = attention.o_proj, nn.Identity()
        contexts = [
            attention(x, position_embeddings=rotary, attention_mask=None)[0] for x in normed
        ]
        attention.o_proj = output
        self._solve(["self_attn.o_proj"], contexts)
        hidden = [x + output(context) for x, context in zip(hidden, contexts, strict=True)]
        del normed, contexts

        normed = [layer.post_attention_layernorm(x) for x in hidden]
        self._solve(["mlp.gate_proj", "mlp.up_proj"], normed)
        inner = [mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x) for x in normed]
        self._solve(["mlp.down_proj"], inner)
        return [x + mlp.down_proj(y) for x, y in zip(hidden, inner, strict=True)]

    def _solve(self, names: list[str], inputs: list[Tensor]) -> None:
        """Quantize the linear layers that read `inputs`, and leave the quantized weights in them.

        They are solved as one matrix: rows do not influence each other, and one Hessian, one
        factorization and one pass over the columns serve all.
        """
        prefixes = [f"{self.prefix}.{name}" for name in names]
        self.bar.set_postfix_str(prefixes[-1].removeprefix("model."), refresh=True)
        linears: list[nn.Linear] = [self.layer.get_submodule(name) for name in names]
        hessian = torch.zeros(2 * [inputs[0].shape[-1]])
        for x in inputs:
            accumulate_hessian(hessian, x)
        try:
            factor = factorize(
                hessian,
                group_size=self.config.group_size,
                damp_percent=self.config.damp_percent,
            )
            weight = torch.cat([linear.weight for linear in linears])
            solved = quantize_weight(weight, factor, bits=self.config.bits)
        except SolverError as error:
            raise SolverError(f"{prefixes[0]}: {error}") from None
        parts = solved.split([linear.out_features for linear in linears])
        for prefix, linear, part in zip(prefixes, linears, parts, strict=True):
            dequantized = part.dequantize()
            lost = relative_error(linear.weight, dequantized, hessian)
            self.modules.append(
                ModuleReport(name=prefix, relative_error=lost, damp_percent=factor.damp_percent)
            )
            self.tensors |= gptq_tensors(prefix, part.pack(linear.bias), self.config)
            linear.weight.data = dequantized
        self.bar.update()


def _check_config(config: QuantConfig) -> None:
    if not config.sym:
        raise QuantError("sym is false; only symmetric quantization is supported")
    if config.desc_act:
        raise QuantError("desc_act is true; only regular groups are supported")
    if config.lm_head:
        raise QuantError("lm_head is true; the output head stays at 16 bits")


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise QuantError(f"tensor {name} holds values that are not finite")


def _check_disk(out: Path, tensors: dict[str, Tensor], config: QuantConfig) -> None:
    """Raises QuantError when the checkpoint cannot fit; its size is known to a few percent."""
    layers = sum(t.numel() for name, t in tensors.items() if name.startswith("model.layers."))
    rest = sum(t.numel() for t in tensors.values()) - layers
    needed = 2 * rest + layers * config.bits // 8
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise QuantError(f"{out}: {needed >> 20} MiB are needed, {free >> 20} MiB are free")


def _to_fp16(name: str, tensor: Tensor) -> Tensor:
    converted = tensor.to(torch.float16)
    if not bool(torch.isfinite(converted).all()):
        raise QuantError(f"tensor {name} holds values beyond the fp16 range")
    return converted
