"""One packed checkpoint in, the same codes and scales out in another format.

Layer by layer, through the canonical form: nothing is quantized again, and what the other format
cannot hold is refused. Knows nothing of models or of how a layer lies in a file.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointReader, CheckpointWriter, check_output, digest, verify_checkpoint
from .config import QuantConfig, is_embedding
from .errors import CheckpointError
from .formats import check_format, linear_tensors
from .source import COMPANION_FILES

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """What `convert` did."""

    read_format: str
    written_format: str
    num_packed: int  # layers whose codes were repacked
    num_other: int  # tensors that were copied as they are
    num_bytes: int  # of all tensors written


def convert(folder: Path, out: Path, checkpoint_format: str) -> Conversion:
    """Write the checkpoint `folder` to `out` in another format and compare what stands there.

    Codes, zero points and scales stay what they are, bit for bit. Raises CheckpointError when the
    input is damaged or not quantized, when `out` is not free, or naming the first layer that the
    format cannot hold; then nothing is left of `out`.
    """
    check_output(out)
    reader = CheckpointReader(folder)
    config = _converted(reader, checkpoint_format)
    packed = reader.packed_prefixes()
    _check_layers(reader, config, packed)
    digests: dict[str, str] = {}
    with CheckpointWriter(out, _without_quantization(reader), config) as writer:
        for prefix in packed:
            weight = reader.take_packed(prefix)
            writer.add(linear_tensors(prefix, weight, config, scale_dtype=_model_dtype(reader)))
            digests[prefix] = digest(weight)
        others = reader.remaining()
        for name in others:
            tensor = reader.take_raw(name)
            writer.add({name: tensor})
            digests[name] = digest(tensor)
        writer.add_files(lambda partial: _copy_companions(folder, partial))
    verify_checkpoint(out, digests)
    assert reader.quant_config is not None  # _converted refused it
    return Conversion(
        read_format=reader.quant_config.checkpoint_format,
        written_format=checkpoint_format,
        num_packed=len(packed),
        num_other=len(others),
        num_bytes=writer.num_bytes,
    )


def _converted(reader: CheckpointReader, checkpoint_format: str) -> QuantConfig:
    if reader.quant_config is None:
        raise CheckpointError(f"{reader.folder}: is not quantized; there is nothing to convert")
    embeddings = any(is_embedding(prefix) for prefix in reader.packed_prefixes())
    return replace(reader.quant_config, checkpoint_format=checkpoint_format, embeddings=embeddings)


def _check_layers(reader: CheckpointReader, config: QuantConfig, packed: list[str]) -> None:
    """What can be known before anything is unpacked."""
    assert reader.quant_config is not None
    by_row = "compressed-tensors"
    turned = (reader.quant_config.checkpoint_format == by_row) != (
        config.checkpoint_format == by_row
    )
    for prefix in packed:
        if turned and is_embedding(prefix):
            raise CheckpointError(
                f"{prefix}: GPTQ groups the rows of an embedding and compressed-tensors a row's "
                f"features; its codes cannot be converted"
            )
        check_format(config, prefix, *reader.packed_features(prefix))


def _without_quantization(reader: CheckpointReader) -> dict[str, Any]:
    return {key: value for key, value in reader.config.items() if key != "quantization_config"}


def _model_dtype(reader: CheckpointReader) -> torch.dtype:
    # transformers 5 writes dtype, before it was torch_dtype.
    name = reader.config.get("dtype") or reader.config.get("torch_dtype")
    return _DTYPES.get(str(name), torch.float16)


def _copy_companions(folder: Path, out: Path) -> None:
    for name in COMPANION_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
