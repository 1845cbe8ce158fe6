"""Text in, batches of token ids out, the same ones for the same seed. Knows nothing of models."""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import CalibrationError

MIN_TOKENS = 2048  # fewer leave the Hessians of even a small model without full rank
MAX_TEXT_BYTES = 8 << 20  # of a longer file the first 8 MiB are used: ten times what is needed


def read_text(path: Path) -> str:
    """A user's calibration text. Raises CalibrationError when it is missing, empty or binary."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 4)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None
    cut = content[:MAX_TEXT_BYTES]
    try:
        text = cut.decode("utf-8", errors="strict" if cut == content else "ignore")
    except UnicodeDecodeError:
        raise CalibrationError(f"{path}: not UTF-8 text") from None
    if not text.strip():
        raise CalibrationError(f"{path}: holds no text")
    return text


def builtin_text(seed: int = 0) -> str:
    """The language reference inside every CPython, its topics in a seeded order."""
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    return "\n\n".join(topics[name] for name in names)


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
) -> Tensor:
    """Random windows of the text that do not overlap. [S, L] int64, S <= num_sequences.

    Every window starts with what the tokenizer puts before a text (a BOS token, say): models that
    were trained with it park very large activations there. Raises CalibrationError when the text
    has fewer than MIN_TOKENS tokens.
    """
    if num_sequences < 1:
        raise CalibrationError(f"num_sequences is {num_sequences}; it must be at least 1")
    prefix = tokenizer("")["input_ids"]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < MIN_TOKENS:
        raise CalibrationError(
            f"the calibration text has {len(ids)} tokens; at least {MIN_TOKENS} are needed"
        )
    length = sequence_length - len(prefix)
    if length < 1:
        raise CalibrationError(
            f"sequence_length is {sequence_length}; it must be at least {len(prefix) + 1}"
        )
    length = min(length, len(ids))
    windows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    generator = torch.Generator().manual_seed(seed)
    chosen = windows[torch.randperm(len(windows), generator=generator)[:num_sequences]]
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(chosen), -1), chosen], 1)
