"""Packed layers and checkpoint folders as some tool may have left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lowbit.kernels.packing import PackedWeight, num_groups, pack_codes
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


def random_weight(
    in_features: int, out_features: int, bits: int, group_size: int, *, sym: bool = True
) -> PackedWeight:
    """Random codes, scales of either sign, a bias; asymmetric zero points cover every code."""
    groups = num_groups(in_features, group_size)
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(0, 1 << bits, zeros.shape, dtype=torch.uint8)
    return PackedWeight(
        bits=bits,
        group_size=in_features if group_size == -1 else group_size,
        in_features=in_features,
        out_features=out_features,
        qweight=pack_codes(torch.randint(0, 1 << bits, (in_features, out_features)), bits),
        scales=torch.randn(groups, out_features).to(torch.float16),
        zeros=zeros,
        bias=torch.randn(out_features).to(torch.float16),
    )


def write_raw(folder: Path, tensors: dict[str, Tensor], quant: dict[str, Any] | None) -> Path:
    """A checkpoint with those tensors and that quantization_config, whatever they are."""
    folder.mkdir()
    config = CONFIG if quant is None else {**CONFIG, "quantization_config": quant}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def awq_word(codes: list[int]) -> int:
    """Eight neighbouring codes in one word: those of even columns first (AutoAWQ's gemm)."""
    word = 0
    for nibble, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
        word |= codes[column] << (4 * nibble)
    return word - (1 << 32) if word >= 1 << 31 else word


def awq_words(codes: Tensor) -> Tensor:
    rows = codes.tolist()
    packed = [[awq_word(row[i : i + 8]) for i in range(0, len(row), 8)] for row in rows]
    return torch.tensor(packed, dtype=torch.int32)


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def awq_layer(sym: bool = False) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, the dequantized weight [40, 96])"""
    codes = torch.randint(0, 16, (96, 40))
    zeros = torch.full((3, 40), 8) if sym else torch.randint(0, 16, (3, 40))
    scales = torch.rand(3, 40).half() + 0.5
    groups = torch.arange(96) // 32
    tensors = {"x.qweight": awq_words(codes), "x.scales": scales, "x.qzeros": awq_words(zeros)}
    return tensors, ((codes - zeros[groups]).float() * scales[groups].float()).t()
