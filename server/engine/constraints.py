"""What TokenConstraints allow, computed on threads of their own while the model runs."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..types import ConstraintFailed, TokenConstraint
from .sequence import Sequence, SequenceResult

_NUM_THREADS = 2


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may follow a sequence and each of its draft tokens, or why that cannot be told."""

    masks: tuple[bytes, ...] = ()  # see TokenConstraint; none for a sequence without one
    error: str = ""


class ConstraintThreads:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="lowbit-constraints")

    def begin(self, sequences: SequenceOf[Sequence]) -> list[Future[Allowed] | None]:
        """Start computing what may follow each of them; None where all may."""
        return [
            None
            if sequence.constraint is None
            else self._threads.submit(_allowed, sequence.constraint, sequence.draft_token_ids)
            for sequence in sequences
        ]


def wait(begun: SequenceOf[Future[Allowed] | None]) -> list[Allowed]:
    return [Allowed() if future is None else future.result() for future in begun]


def advance(
    sequences: SequenceOf[Sequence],
    results: SequenceOf[SequenceResult],
    allowed: SequenceOf[Allowed],
) -> list[SequenceResult]:
    """The results, with the tokens taken in by the constraints, and errors where one failed."""
    return [
        result if sequence.constraint is None else _advance(sequence.constraint, result, each)
        for sequence, result, each in zip(sequences, results, allowed, strict=True)
    ]


def _allowed(constraint: TokenConstraint, draft: SequenceOf[int]) -> Allowed:
    """Masks up to the first draft token that is not allowed: nothing follows it."""
    try:
        masks = [constraint.allowed_tokens()]
        for token_id in draft:
            if not constraint.advance(token_id):
                break
            masks.append(constraint.allowed_tokens())
        constraint.rollback(len(masks) - 1)
    except ConstraintFailed as error:
        return Allowed(error=str(error))
    return Allowed(tuple(masks))


def _advance(
    constraint: TokenConstraint, result: SequenceResult, allowed: Allowed
) -> SequenceResult:
    if allowed.error or result.error:
        return SequenceResult(error=allowed.error or result.error)
    for token in result.tokens:
        if not constraint.advance(token.token_id):
            return SequenceResult(error=f"token {token.token_id} does not fit the prescribed form")
    return result
