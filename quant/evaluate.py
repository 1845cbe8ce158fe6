"""How far a quantized model is from its 16-bit original: perplexity, KL divergence, agreement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from ..kernels.packing import DenseWeight, PackedEmbedding, dequantize
from .checkpoint import CheckpointReader
from .skeleton import Skeleton, is_causal
from .source import Source, build_model

TABLE_ROWS = 4096  # of a packed embedding that are unpacked together


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Means over every predicted position of the evaluation text: all but the first of a sequence
    for a causal model, every single one for a masked one."""

    num_tokens: int
    reference_perplexity: float | None  # None for a masked language model: it has none
    perplexity: float | None
    kl_divergence: float  # nats, KL(reference || candidate)
    kl_divergence_p99: float  # its 99 % quantile: how far the worst positions are off
    top1_agreement: float  # 0 to 1, positions where both prefer the same token


def load_reference(source: Source) -> PreTrainedModel:
    """The 16-bit model, computing in fp32."""
    return build_model(source, torch.float32)


def load_dequantized(folder: Path) -> PreTrainedModel:
    """A packed checkpoint as a transformers model in fp32, every weight dequantized exactly.

    Raises CheckpointError for a damaged checkpoint or one with tensors left over, SourceError for
    a family that is not supported.
    """
    reader = CheckpointReader(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    skeleton = Skeleton(config)
    stored = _stored_names(skeleton, reader.names())
    for name in skeleton.shapes:
        if name not in skeleton.tied:
            _fill(skeleton, name, stored.get(name) or skeleton.checkpoint_name(name), reader)
        elif (copy := stored.get(name)) is not None and copy in reader:
            reader.take(copy)  # written next to the tensor it is tied to
    reader.check_all_consumed()
    model: PreTrainedModel = skeleton.model
    return model


def _stored_names(skeleton: Skeleton, names: list[str]) -> dict[str, str]:
    """Tensor of the model -> its name in this checkpoint; `X.weight` where X is packed."""
    found: dict[str, str] = {}
    for name in names:
        weight = f"{name.rpartition('.')[0]}.weight"
        for stored in (name, weight):
            place = skeleton.locate(stored)
            if place is not None:
                found.setdefault(place, stored)
                break
    return found


def _fill(skeleton: Skeleton, name: str, stored: str, reader: CheckpointReader) -> None:
    path, _, leaf = name.rpartition(".")
    module = skeleton.model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        skeleton.fill(name, _take_table(reader, stored, skeleton.shapes[name]))
    elif not isinstance(module, nn.Linear) or (skeleton.is_transposed(name) and stored in reader):
        skeleton.fill(name, reader.take(stored, shape=skeleton.shapes[name]).float())
    elif leaf == "bias":
        if module.bias.is_meta:  # or it came with the weight
            skeleton.fill(name, reader.take(stored, shape=skeleton.shapes[name]).float())
    else:
        prefix = stored.removesuffix(".weight")
        linear = reader.take_linear(prefix, module.in_features, module.out_features)
        dense = linear.weight if isinstance(linear, DenseWeight) else dequantize(linear)
        skeleton.fill(name, (dense.t() if skeleton.is_transposed(name) else dense).float())
        if linear.bias is not None:  # some write one of zeros where the model has none
            skeleton.fill(f"{path}.bias", linear.bias.float())


def _take_table(reader: CheckpointReader, stored: str, shape: tuple[int, ...]) -> Tensor:
    """An embedding's table in fp32, packed or not; unpacked some rows at a time."""
    table = reader.take_embedding(stored.removesuffix(".weight"), *shape)
    if not isinstance(table, PackedEmbedding):
        return table.float()
    return torch.cat([table.rows(ids) for ids in torch.arange(shape[0]).split(TABLE_ROWS)])


@torch.inference_mode()
def compare(reference: PreTrainedModel, candidate: PreTrainedModel, batches: Tensor) -> Comparison:
    """Run both models over `batches` [S, L] int64, one sequence at a time."""
    causal = is_causal(reference.config)
    reference_loss = loss = 0.0
    divergences: list[Tensor] = []
    agreed = 0
    for ids in batches:
        expected, found = _log_probabilities(reference, ids), _log_probabilities(candidate, ids)
        if causal:
            expected, found = expected[:-1], found[:-1]
            reference_loss += _loss(expected, ids[1:])
            loss += _loss(found, ids[1:])
        divergences.append((expected.exp() * (expected - found)).sum(dim=-1, dtype=torch.float64))
        agreed += int((expected.argmax(dim=-1) == found.argmax(dim=-1)).sum())
    divergence = torch.cat(divergences)
    count = len(divergence)
    return Comparison(
        num_tokens=count,
        reference_perplexity=math.exp(reference_loss / count) if causal else None,
        perplexity=math.exp(loss / count) if causal else None,
        kl_divergence=float(divergence.mean()),
        kl_divergence_p99=float(divergence.quantile(0.99)),
        top1_agreement=agreed / count,
    )


def _log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """[L] int64 -> [L, vocabulary]."""
    return torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)


def _loss(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(1, targets[:, None]).sum())


@torch.inference_mode()
def perplexity(model: PreTrainedModel, batches: Tensor) -> float:
    """exp of the mean negative log likelihood over `batches` [S, L] int64."""
    loss, predicted = 0.0, 0
    for ids in batches:
        logits = model(ids[None]).logits[0, :-1].float()
        loss += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        predicted += len(ids) - 1
    return math.exp(loss / predicted)
