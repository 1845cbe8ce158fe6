"""How good quantized checkpoints are: their size, and their distance from the 16-bit model.

Paths in, `Evaluation`s out; one checkpoint at a time stands in memory beside the 16-bit model.
Where a checkpoint has a report of its making, the figures are added there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from .calibration import (
    HELD_OUT_TOPICS,
    check_vocabulary,
    read_documents,
    reference_text,
    render,
    token_batches,
)
from .checkpoint import CheckpointReader
from .errors import CheckpointError, QuantError
from .evaluate import compare, load_dequantized, load_reference
from .formats import packed_features
from .report import REPORT_FILE, Evaluation, Quality, read_report, write_report
from .source import Source, load_source

DEFAULT_NUM_SEQUENCES = 32
DEFAULT_SEQUENCE_LENGTH = 512
HELD_OUT = (
    "topics of Python's documentation that the default calibration leaves out "
    f"({', '.join(HELD_OUT_TOPICS)})"
)

# What a packed weight consists of; `g_idx`, the shape and the bias are no part of it.
_WEIGHT_PARTS = (
    "qweight",
    "qzeros",
    "scales",
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
)


def evaluate_checkpoint(
    source: str,
    folder: Path,
    *,
    text_file: Path | None = None,
    num_sequences: int = DEFAULT_NUM_SEQUENCES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    seed: int = 0,
) -> Quality:
    """Compare one checkpoint with its 16-bit model. Raises a QuantError in one line."""
    (evaluation,) = evaluate(
        source,
        [folder],
        text_file=text_file,
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        seed=seed,
    )
    return evaluation.quality


def evaluate(
    source: str,
    folders: Sequence[Path],
    *,
    text_file: Path | None = None,
    num_sequences: int = DEFAULT_NUM_SEQUENCES,
    sequence_length: int = DEFAULT_SEQUENCE_LENGTH,
    seed: int = 0,
) -> Iterator[Evaluation]:
    """Compare each checkpoint with the 16-bit model, on the same tokens, in the order given.

    The tokens are windows of `text_file` or, without one, of a text that the default calibration
    never sees. Raises a QuantError in one line: before anything is computed for a source, a text
    or a checkpoint that cannot be used.
    """
    documents = None if text_file is None else read_documents(text_file)
    opened = load_source(source)
    sizes = [_sizes(opened, folder) for folder in folders]
    text = (
        reference_text(seed, held_out=True)
        if documents is None
        else render(documents, opened.tokenizer)
    )
    batches = token_batches(
        opened.tokenizer,
        text,
        num_sequences=num_sequences,
        sequence_length=_length(opened, sequence_length),
        seed=seed,
    )
    check_vocabulary(opened, batches)
    described = HELD_OUT if text_file is None else str(text_file)
    reference = load_reference(opened)
    num_bytes_16bit = 2 * sum(math.prod(opened.shape(name)) for name in opened.names())
    for folder, (num_bytes, bits) in zip(folders, sizes, strict=True):
        quality = _compare(opened, reference, folder, batches, described)
        _update_report(folder, quality)
        yield Evaluation(
            checkpoint=str(folder),
            num_bytes=num_bytes,
            num_bytes_16bit=num_bytes_16bit,
            bits_per_weight=bits,
            quality=quality,
        )


def _compare(
    source: Source, reference: PreTrainedModel, folder: Path, batches: Tensor, text: str
) -> Quality:
    try:
        candidate = load_dequantized(folder)
    except CheckpointError:
        raise
    except QuantError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return Quality(
        reference=source.name,
        text=text,
        num_sequences=len(batches),
        sequence_length=batches.shape[1],
        comparison=compare(reference, candidate, batches),
    )


def _update_report(folder: Path, quality: Quality) -> None:
    if (folder / REPORT_FILE).is_file():
        report, _ = read_report(folder)
        write_report(folder, report, quality)


def _sizes(source: Source, folder: Path) -> tuple[int, float | None]:
    """(bytes of all tensors, bits per weight of the packed layers). No tensor is read."""
    reader = CheckpointReader(folder)
    for key in ("model_type", "vocab_size"):
        found, expected = reader.config.get(key), getattr(source.config, key)
        if found != expected:
            raise CheckpointError(f"{folder}: {key} is {found!r}; {source.name} has {expected!r}")
    sizes = {name: reader.take_raw(name).nbytes for name in reader.names()}
    weights = packed = 0
    for prefix in reader.packed_prefixes():
        weights += _num_weights(reader, prefix)
        packed += sum(sizes.get(f"{prefix}.{part}", 0) for part in _WEIGHT_PARTS)
    return sum(sizes.values()), 8 * packed / weights if weights else None


def _num_weights(reader: CheckpointReader, prefix: str) -> int:
    quant = reader.quant_config
    module = None if quant is None else quant.for_module(prefix)
    if quant is None or module is None:
        raise CheckpointError(f"{reader.folder}: {prefix} is packed, but not by its config")
    in_features, out_features = packed_features(reader, prefix, module, quant)
    return in_features * out_features


def _length(source: Source, sequence_length: int) -> int:
    return min(sequence_length, getattr(source.config, "max_position_embeddings", sequence_length))
