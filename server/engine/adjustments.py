"""Logits to choose by: penalties, biases and bans, of all rows at once.

Nothing here waits for the device. What befalls a row stands in `SamplingParams`, and depends on
the row alone. R rows of a step want a token, V is the size of the vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from ..types import SamplingParams
from .sequence import Sequence
from .transfer import upload

_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of logits: what follows a sequence and the first of its draft tokens."""

    sequence: Sequence
    num_drafts: int
    allowed: bytes | None  # see TokenConstraint; None: all tokens

    @property
    def params(self) -> SamplingParams:
        return self.sequence.params

    @property
    def position(self) -> int:
        """How many tokens of the completion come before the one to be chosen."""
        sequence = self.sequence
        return sequence.num_completion_tokens + sequence.num_pending_tokens + self.num_drafts

    @property
    def may_stop(self) -> bool:
        return self.position >= self.params.min_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids + self.sequence.draft_token_ids[: self.num_drafts]

    @property
    def completion(self) -> list[int]:
        return self.token_ids[self.sequence.num_prompt_tokens :]


def adjust(logits: Tensor, rows: SequenceOf[Row], pending: Tensor | None = None) -> Tensor:
    """logits [R, V] float32: themselves where no row asks for a change, else a changed copy.

    `pending` [R] int64 holds each row's last token where the host does not know it yet.
    """
    if not any(map(_changes, rows)):
        return logits
    adjusted = logits.clone()
    _penalize_repetition(adjusted, rows, pending)
    _penalize_completion(adjusted, rows, pending)
    _add_biases(adjusted, rows)
    _keep_allowed(adjusted, rows)
    _mask(adjusted, rows)
    _ban_stops(adjusted, rows)
    return adjusted


def _changes(row: Row) -> bool:
    params = row.params
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_token_ids
        or row.allowed is not None
        or not row.may_stop
    )


@dataclass(frozen=True, slots=True)
class _Entries:
    """Logits of some rows, told by their place in the flattened logits."""

    places: Tensor  # [n] int64: those the host knows, of all rows in turn, then those pending
    rows: list[int]
    counts: list[int]  # of entries that the host knows, for each of the rows
    num_pending: int  # of entries for each of the rows: 1 or 0

    def spread(self, values: list[float]) -> Tensor:
        """A value for each of the rows -> one for each entry: [n] float32."""
        of_rows = torch.tensor(values, dtype=torch.float32)
        of_entries = of_rows.repeat_interleave(torch.tensor(self.counts))
        if self.num_pending:
            of_entries = torch.cat([of_entries, of_rows])
        return upload(of_entries, torch.float32, self.places.device)


def _entries(
    logits: Tensor,
    rows: SequenceOf[Row],
    token_ids: Callable[[Row], SequenceOf[int] | None],
    pending: Tensor | None = None,
) -> _Entries | None:
    """Entries of the tokens that each row names, and of its pending one unless it names None.

    None where there are none at all.
    """
    tokens = array("q")
    indices: list[int] = []
    counts: list[int] = []
    for i, row in enumerate(rows):
        named = token_ids(row)
        if named or (named is not None and pending is not None):
            tokens.extend(named)
            indices.append(i)
            counts.append(len(named))
    if not indices:
        return None
    starts = torch.tensor(indices) * logits.shape[1]
    known = torch.frombuffer(tokens, dtype=torch.int64) if tokens else starts[:0]
    flat = known + starts.repeat_interleave(torch.tensor(counts))
    places = upload(flat, torch.int64, logits.device)
    if pending is not None:
        of_rows = upload(indices, torch.int64, logits.device)
        places = torch.cat([places, pending[of_rows] + of_rows * logits.shape[1]])
    return _Entries(places, indices, counts, int(pending is not None))


def _penalize_repetition(logits: Tensor, rows: SequenceOf[Row], pending: Tensor | None) -> None:
    entries = _entries(
        logits,
        rows,
        lambda row: row.token_ids if row.params.repetition_penalty != 1 else None,
        pending,
    )
    if entries is None:
        return
    penalties = entries.spread([rows[i].params.repetition_penalty for i in entries.rows])
    values = logits.view(-1)[entries.places]
    # A token that is known several times is written several times, the same each time.
    penalized = torch.where(values > 0, values / penalties, values * penalties)
    logits.view(-1).scatter_(0, entries.places, penalized)


def _penalize_completion(logits: Tensor, rows: SequenceOf[Row], pending: Tensor | None) -> None:
    entries = _entries(
        logits,
        rows,
        lambda row: (
            row.completion if row.params.presence_penalty or row.params.frequency_penalty else None
        ),
        pending,
    )
    if entries is None:
        return
    presence = entries.spread([rows[i].params.presence_penalty for i in entries.rows])
    frequency = entries.spread([rows[i].params.frequency_penalty for i in entries.rows])
    times = torch.zeros(logits.numel(), dtype=torch.float32, device=logits.device)
    times.scatter_add_(0, entries.places, torch.ones_like(presence))
    penalties = frequency * times[entries.places] + presence
    penalized = logits.view(-1)[entries.places] - penalties
    logits.view(-1).scatter_(0, entries.places, penalized)


def _add_biases(logits: Tensor, rows: SequenceOf[Row]) -> None:
    entries = _entries(logits, rows, lambda row: list(row.params.logit_bias))
    if entries is None:
        return
    biases = [bias for i in entries.rows for bias in rows[i].params.logit_bias.values()]
    logits.view(-1).scatter_add_(0, entries.places, upload(biases, torch.float32, logits.device))


def _keep_allowed(logits: Tensor, rows: SequenceOf[Row]) -> None:
    entries = _entries(logits, rows, lambda row: row.params.allowed_token_ids)
    if entries is None:
        return
    values = logits.view(-1)[entries.places]
    logits.index_fill_(0, upload(entries.rows, torch.int64, logits.device), _NEVER)
    logits.view(-1).scatter_(0, entries.places, values)


def _mask(logits: Tensor, rows: SequenceOf[Row]) -> None:
    """What TokenConstraints do not allow."""
    masked = [i for i, row in enumerate(rows) if row.allowed is not None]
    if not masked:
        return
    index = upload(masked, torch.int64, logits.device)
    allowed = unpack_bits([rows[i].allowed or b"" for i in masked], logits.shape[1], logits.device)
    logits.index_copy_(0, index, logits[index].masked_fill_(~allowed, _NEVER))


def _ban_stops(logits: Tensor, rows: SequenceOf[Row]) -> None:
    """Of rows that may not stop yet, unless nothing else is left: a prescribed form that is
    complete cannot go on."""
    vocab_size = logits.shape[1]
    entries = _entries(
        logits,
        rows,
        lambda row: (
            () if row.may_stop else [t for t in row.sequence.stop_token_ids if t < vocab_size]
        ),
    )
    if entries is None:
        return
    values = logits.view(-1)[entries.places]
    logits.view(-1).index_fill_(0, entries.places, _NEVER)
    constrained = entries.spread([float(rows[i].allowed is not None) for i in entries.rows])
    index = upload(entries.rows, torch.int64, logits.device)
    left = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    left.index_copy_(0, index, (logits[index] > _NEVER).any(dim=-1))
    is_left = left[entries.places // vocab_size] | (constrained == 0)
    logits.view(-1).scatter_(0, entries.places, values.masked_fill_(is_left, _NEVER))


def unpack_bits(rows: SequenceOf[bytes], number: int, device: torch.device) -> Tensor:
    """The first bits of each as a mask [R, number] bool, the lowest of a byte first; missing ones
    are 0."""
    num_bytes = -(-number // 8)
    packed = b"".join(row[:num_bytes].ljust(num_bytes, b"\0") for row in rows)
    host = torch.frombuffer(bytearray(packed), dtype=torch.uint8).view(len(rows), num_bytes)
    bits = torch.arange(8, dtype=torch.uint8, device=device)
    mask = (upload(host, torch.uint8, device)[:, :, None] >> bits) & 1
    return mask.flatten(1)[:, :number].to(torch.bool)
