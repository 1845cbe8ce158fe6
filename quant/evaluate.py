"""How far a quantized model is from its 16-bit original: perplexity, KL divergence, agreement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaForCausalLM

from ..kernels.packing import DenseWeight, dequantize
from .checkpoint import CheckpointReader
from .source import Source, build_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Means over every predicted position of the evaluation text."""

    num_tokens: int
    reference_perplexity: float
    perplexity: float
    kl_divergence: float  # nats, KL(reference || candidate)
    top1_agreement: float  # 0 to 1, positions where both prefer the same token


def load_reference(source: Source) -> LlamaForCausalLM:
    """The 16-bit model, computing in fp32."""
    return build_model(source.config, {n: t.float() for n, t in source.tensors.items()})


def load_dequantized(folder: Path) -> LlamaForCausalLM:
    """A packed checkpoint as a transformers model in fp32, every weight dequantized exactly.

    Raises CheckpointError for a damaged checkpoint or one with tensors left over.
    """
    reader = CheckpointReader(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    tensors: dict[str, Tensor] = {}
    for prefix, module in skeleton.named_modules():
        if isinstance(module, torch.nn.Linear):
            if prefix == "lm_head" and config.tie_word_embeddings:
                continue
            linear = reader.take_linear(prefix, module.in_features, module.out_features)
            tensors[f"{prefix}.weight"] = (
                linear.weight if isinstance(linear, DenseWeight) else dequantize(linear)
            )
            if linear.bias is not None:
                tensors[f"{prefix}.bias"] = linear.bias
            continue
        for name, parameter in module.named_parameters(prefix=prefix, recurse=False):
            tensors[name] = reader.take(name, shape=tuple(parameter.shape))
    reader.check_all_consumed()
    return build_model(config, {name: tensor.float() for name, tensor in tensors.items()})


@torch.inference_mode()
def compare(
    reference: LlamaForCausalLM, candidate: LlamaForCausalLM, batches: Tensor
) -> Comparison:
    """Run both models over `batches` [S, L] int64, one sequence at a time."""
    loss_reference = loss_candidate = divergence = 0.0
    agreed = predicted = 0
    for ids in batches:
        targets = ids[1:, None]
        expected = torch.log_softmax(reference(ids[None]).logits[0, :-1].float(), dim=-1)
        found = torch.log_softmax(candidate(ids[None]).logits[0, :-1].float(), dim=-1)
        loss_reference -= float(expected.gather(1, targets).sum())
        loss_candidate -= float(found.gather(1, targets).sum())
        divergence += float((expected.exp() * (expected - found)).sum())
        agreed += int((expected.argmax(dim=-1) == found.argmax(dim=-1)).sum())
        predicted += len(targets)
    return Comparison(
        num_tokens=predicted,
        reference_perplexity=math.exp(loss_reference / predicted),
        perplexity=math.exp(loss_candidate / predicted),
        kl_divergence=divergence / predicted,
        top1_agreement=agreed / predicted,
    )


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, batches: Tensor) -> float:
    """exp of the mean negative log likelihood over `batches` [S, L] int64."""
    loss, predicted = 0.0, 0
    for ids in batches:
        logits = model(ids[None]).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        predicted += len(ids) - 1
    return math.exp(loss / predicted)
