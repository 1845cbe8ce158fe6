"""Calibration tokens: cut from a text, or drawn from the model itself; the same for the same seed.

Ends at windows of token ids, all of one length: no padding exists that a Hessian could count.
Knows nothing of layers, Hessians or checkpoints.
"""

from __future__ import annotations

import json
import math
import random
from codecs import getincrementaldecoder
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import trange
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from .devices import CPU
from .errors import CalibrationError
from .skeleton import is_causal
from .source import Source, build_model

# Topics of the reference text that are kept for evaluation. Others repeat one another; of these no
# paragraph stands anywhere else. Together they are a seventh of the text.
HELD_OUT_TOPICS = ("debugger", "formatstrings", "string-methods")
MIN_TOKENS = 2048  # fewer leave the Hessians of even a small model without full rank
MAX_TEXT_BYTES = 8 << 20  # of a longer file the first 8 MiB are used: ten times what is needed
SAMPLED_AT_ONCE = 16  # texts drawn in parallel at least: a step costs little more than for one
JSON_LINES = ".jsonl"

Messages = list[dict[str, str]]


def read_documents(path: Path) -> list[str | Messages]:
    """A user's calibration file: UTF-8 text, or `.jsonl` with {"text": ...} or {"messages": [...]}.

    Raises CalibrationError when it is missing, empty or binary, or names the line that is neither.
    """
    text = _read_text(path)
    if path.suffix != JSON_LINES:
        return [text]
    # Not splitlines: JSON may hold other line breaks of Unicode as they are.
    lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_read_line(f"{path}: line {i}", line) for i, line in lines]


def render(documents: list[str | Messages], tokenizer: PreTrainedTokenizerBase) -> str:
    """The documents as one text; conversations as the tokenizer's chat template writes them."""
    return "\n\n".join(
        document if isinstance(document, str) else _render_messages(document, tokenizer)
        for document in documents
    )


def reference_text(seed: int = 0, *, held_out: bool = False) -> str:
    """The language reference inside every CPython, its topics in a seeded order: English and code
    that need no network.

    HELD_OUT_TOPICS are left out, and are all that `held_out` gives: what is measured on them was
    never calibrated on.
    """
    names = sorted(name for name in topics if (name in HELD_OUT_TOPICS) == held_out)
    random.Random(seed).shuffle(names)
    return "\n\n".join(topics[name] for name in names)


def calibration_batches(
    source: Source,
    text: str | None,
    *,
    num_sequences: int,
    sequence_length: int,
    seed: int,
    max_model_bytes: int,
    progress: bool = False,
    device: torch.device = CPU,
) -> Tensor:
    """[S, L] int64: windows of the user's text, or, without one, of the built-in mixture.

    The mixture is one half conversations that the model itself draws and one half Python's
    language reference. On the 135M chat model at 4 bits, group 64, 8192 calibration tokens, the KL
    divergence on held-out package descriptions, licences, code and conversations was 0.178, 0.490,
    0.112 and 0.132; with the reference alone 0.199, 0.559, 0.107 and 0.282, with conversations
    alone 0.267, 0.513, 0.241 and 0.123 (tests/benchmarks/calibration.py). Drawing needs the whole
    model in memory: one that takes more than `max_model_bytes` in fp32, and an encoder, which
    draws nothing, get the reference alone. It is drawn on `device`.
    """
    opening = conversation_opening(source.tokenizer) if text is None else []
    draws = bool(opening) and _can_draw(source, max_model_bytes)
    num_drawn = max(num_sequences, 0) // 2 if draws else 0
    windows = token_batches(
        source.tokenizer,
        reference_text(seed) if text is None else text,
        num_sequences=num_sequences - num_drawn,
        sequence_length=sequence_length,
        seed=seed,
    )
    check_vocabulary(source, windows)
    if not num_drawn:
        return windows
    check_vocabulary(source, torch.tensor(opening))
    model: Any = build_model(source, torch.float32)
    drawn = sample_batches(
        model.to(device),
        opening,
        num_sequences=num_drawn,
        sequence_length=windows.shape[1],
        seed=seed,
        progress=progress,
    )
    return torch.cat([windows, drawn])


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
    model: PreTrainedModel,
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
    texts = torch.tensor(opening).to(model.device).expand(num_texts, -1)
    step, cache = texts, DynamicCache(config=model.config)
    for _ in trange(len(opening), length, desc="sampling", unit="token", disable=not progress):
        output = model(step, cache=cache, use_cache=True, logits_to_keep=1)
        probabilities = torch.softmax(output.logits[:, -1].float(), dim=-1)
        step = torch.multinomial(probabilities.cpu(), 1, generator=generator).to(texts.device)
        texts = torch.cat([texts, step], dim=1)
    return texts[:, :length].flatten()[:num_tokens].view(num_sequences, sequence_length).cpu()


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_TEXT_BYTES + 4)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from None
    cut = content[:MAX_TEXT_BYTES]
    decoder = getincrementaldecoder("utf-8")()  # forgives a last character that was cut
    try:
        text = decoder.decode(cut, final=cut == content)
    except UnicodeDecodeError:
        raise CalibrationError(f"{path}: not UTF-8 text") from None
    if cut != content and path.suffix == JSON_LINES:
        text = text[: text.rfind("\n") + 1]
    if not text.strip():
        raise CalibrationError(f"{path}: holds no text")
    return text


def _read_line(place: str, line: str) -> str | Messages:
    try:
        content = json.loads(line)
    except ValueError:
        raise CalibrationError(f"{place} is not JSON") from None
    found = content if isinstance(content, dict) else {}
    text, messages = found.get("text"), found.get("messages")
    if isinstance(text, str):
        return text
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise CalibrationError(f'{place} has neither a "text" nor "messages" with role and content')


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _render_messages(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (ValueError, TemplateError) as error:
        reason = " ".join(str(error).split())
        raise CalibrationError(
            f"the chat template does not take the calibration messages ({reason})"
        ) from None


def _can_draw(source: Source, max_model_bytes: int) -> bool:
    num_parameters = sum(math.prod(source.shape(name)) for name in source.names())
    return is_causal(source.config) and 4 * num_parameters <= max_model_bytes


def check_vocabulary(source: Source, ids: Tensor) -> None:
    largest, size = int(ids.max()), source.config.vocab_size
    if largest >= size:
        raise CalibrationError(
            f"{source.name}: its tokenizer makes token {largest}; "
            f"the model's vocabulary ends at {size - 1}"
        )
