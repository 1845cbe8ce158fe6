"""Calibration tokens: cut from a text, or drawn from the model itself; the same for the same seed.

Ends at batches of token ids; knows nothing of layers, Hessians or checkpoints.
"""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import trange
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from .errors import CalibrationError

MIN_TOKENS = 2048  # fewer leave the Hessians of even a small model without full rank
MAX_TEXT_BYTES = 8 << 20  # of a longer file the first 8 MiB are used: ten times what is needed
SAMPLED_AT_ONCE = 16  # texts drawn in parallel at least: a step costs little more than for one


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


def reference_text(seed: int = 0) -> str:
    """The language reference inside every CPython, its topics in a seeded order: English and code
    that need no network."""
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


def conversation_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before a user's first words: the chat template's beginning, else BOS, else []."""
    words = "LOWBIT"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
    except (ValueError, TemplateError):  # without a template, or one that wants something else
        text = ""
    opening, found, _ = str(text).partition(words)
    if found and opening:
        return list(tokenizer(opening, add_special_tokens=False)["input_ids"])
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


@torch.inference_mode()
def sample_batches(
    model: LlamaForCausalLM,
    opening: list[int],
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    progress: bool = False,
) -> Tensor:
    """Windows of texts that the model draws at temperature 1 after `opening`. [S, L] int64.

    An end-of-sequence token does not end a text: after a user's turn the model goes on with its
    answer, as in the conversations it was trained on.
    """
    generator = torch.Generator().manual_seed(seed)
    num_tokens = num_sequences * sequence_length
    num_texts = max(num_sequences, SAMPLED_AT_ONCE)  # none longer than a window
    length = -(-num_tokens // num_texts)
    texts = torch.tensor(opening).expand(num_texts, -1)
    step, cache = texts, None
    for _ in trange(len(opening), length, desc="sampling", unit="token", disable=not progress):
        output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
        step, cache = (
            torch.multinomial(probabilities, 1, generator=generator),
            output.past_key_values,
        )
        texts = torch.cat([texts, step], dim=1)
    return texts[:, :length].flatten()[:num_tokens].view(num_sequences, sequence_length)
