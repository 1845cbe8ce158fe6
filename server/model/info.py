"""What may be said of a checkpoint to whoever asks the server. Reads no weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ...quant.checkpoint import CheckpointReader
from ..types import ModelInfo, QuantizationInfo
from .config import ModelConfig
from .families import family_of, read_config


def model_info(folder: Path, name: str = "") -> ModelInfo:
    """By the folder's name unless there is another. Raises CheckpointError."""
    reader = CheckpointReader(folder)
    config = read_config(reader.config, reader.generation_config)
    quant = reader.quant_config
    return ModelInfo(
        name=name or folder.resolve().name,
        folder=str(folder.resolve()),
        architecture=family_of(reader.config).architecture,
        eos_token_ids=tuple(sorted(config.eos_token_ids)),
        quantization=None
        if quant is None
        else QuantizationInfo(
            format=quant.checkpoint_format, bits=quant.bits, group_size=quant.group_size
        ),
    )


def model_size(folder: Path, max_model_len: int | None = None) -> tuple[ModelConfig, int]:
    """(The decoder's numbers, bytes of all weights as they are stored). Raises CheckpointError."""
    reader = CheckpointReader(folder)
    config = read_config(reader.config, reader.generation_config, max_model_len)
    return config, reader.num_bytes


def model_dtype(folder: Path) -> torch.dtype | None:
    """What config.json says the model was made in. Raises CheckpointError."""
    config = CheckpointReader(folder).config
    name = config.get("dtype") or config.get("torch_dtype")
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) else None
