"""Tiny random models, built in milliseconds: no download, no quantization run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from byte_tokenizer import byte_tokenizer
from lowbit.kernels.packing import PackedWeight, dequantize, num_groups, pack_codes
from lowbit.quant.checkpoint import write_checkpoint
from lowbit.quant.config import QuantConfig
from lowbit.quant.formats import embedding_matrix, linear_tensors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class TinyModel:
    folder: Path  # a packed checkpoint
    oracle: LlamaForCausalLM  # transformers, float32, with the same dequantized weights


def random_packed_weight(
    in_features: int,
    out_features: int,
    *,
    bits: int = 4,
    group_size: int = 64,
    sym: bool = True,
    magnitude: float = 1.0,
) -> PackedWeight:
    """Random codes and scales, of about the variance that a linear layer is initialised with."""
    groups = num_groups(in_features, group_size)
    codes = torch.randint(0, 1 << bits, (in_features, out_features))
    spread = (1 << bits) / 12**0.5
    step = magnitude / (spread * in_features**0.5)
    # Exact in fp16 and in bf16, like the scales our own quantizer chooses.
    scales = (step * (0.5 + torch.rand(groups, out_features))).to(torch.bfloat16).half()
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(0, 1 << bits, (groups, out_features), dtype=torch.uint8)
    return PackedWeight(
        bits=bits,
        group_size=in_features if group_size == -1 else group_size,
        in_features=in_features,
        out_features=out_features,
        qweight=pack_codes(codes, bits),
        scales=scales,
        zeros=zeros,
    )


def build_tiny_model(
    folder: Path, *, seed: int = 0, quant: QuantConfig | None = None, **overrides: object
) -> TinyModel:
    """A 2-layer Llama with grouped-query attention whose K is no multiple of the group size."""
    torch.manual_seed(seed)
    quant = quant or QuantConfig(bits=4, group_size=64)
    settings: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        **overrides,
    }
    oracle = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float32).eval()
    # Default initialisation leaves logits so flat that greedy decoding would test nothing.
    torch.nn.init.normal_(oracle.get_output_embeddings().weight, std=0.3)
    for parameter in oracle.parameters():
        parameter.data = parameter.data.half().float()  # what fp16 storage keeps
    tensors: dict[str, Tensor] = {}
    for name, module in oracle.named_modules():
        packed = _pack(name, module, quant)
        if packed is not None:
            by_row = isinstance(module, torch.nn.Linear) or _groups_features(quant)
            matrix = dequantize(packed)
            module.weight.data = matrix if by_row else matrix.t().contiguous()
            tensors |= linear_tensors(name, packed, quant)
    for name, parameter in oracle.named_parameters():
        if not any(key.startswith(f"{name.removesuffix('.weight')}.") for key in tensors):
            tensors[name] = parameter.data.to(torch.float16).clone()
    config = {**oracle.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    write_checkpoint(folder, tensors, config, quant, write_extras=_write_tokenizer)
    return TinyModel(folder, oracle)


def _pack(name: str, module: torch.nn.Module, quant: QuantConfig) -> PackedWeight | None:
    """Random codes for what the config quantizes; a head's logits differ by several units."""
    if isinstance(module, torch.nn.Embedding):
        form, magnitude = quant.for_embedding(name), 1.0
    elif isinstance(module, torch.nn.Linear):
        form, magnitude = quant.for_module(name), 3.0 if name == "lm_head" else 1.0
    else:
        return None
    if form is None:
        return None
    table = isinstance(module, torch.nn.Embedding)
    out_features, in_features = (
        embedding_matrix(module.weight, quant).shape if table else module.weight.shape
    )
    return random_packed_weight(
        in_features,
        out_features,
        bits=form.bits,
        group_size=form.group_size,
        sym=form.sym,
        magnitude=magnitude,
    )


def _groups_features(quant: QuantConfig) -> bool:
    return quant.checkpoint_format == "compressed-tensors"


def _write_tokenizer(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)
