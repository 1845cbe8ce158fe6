"""Logits in, a result per sequence out. A draw depends on its own row alone, not on the batch.

R rows of a step want a token, V is the size of the vocabulary. The order of what happens to a row
stands in `SamplingParams`. All of it happens where the logits are; one small tensor of a few
numbers per row is copied to the host. Who has the draws there need not wait for the copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import SamplingParams, TokenLogprob
from .adjustments import Row, adjust
from .sequence import SampledToken, Sequence, SequenceResult
from .transfer import Download, upload

_NUM_CANDIDATES = (256, 4096)  # looked at first; few distributions reach further
_BLOCK = 512  # weights that a draw takes together at first
_MIN_TEMPERATURE = 1e-6  # below, float32 knows no quotient but zero and infinity


@dataclass(frozen=True, slots=True)
class _NotFinite:
    error: str


class Sampler:
    """A draw depends on (seed, number of the token, distribution) alone.

    Draft tokens are verified by drawing as if they were not there, each given the ones before it:
    as long as the draw is the draft token itself, it stands. The chance of that is the token's
    probability, and what is drawn instead is distributed as the model says given that it is
    another token. That is rejection sampling against a proposal without randomness (Leviathan et
    al. 2023, "Fast Inference from Transformers via Speculative Decoding", appendix A.1), and the
    tokens are the very ones that would have been drawn without drafts.
    """

    def __init__(self, *, looks: bool = True) -> None:
        """`looks`: see Draws. Set where the logits are on the host."""
        self._looks = looks

    def draw(
        self,
        logits: Tensor,
        sequences: SequenceOf[Sequence],
        allowed: SequenceOf[SequenceOf[bytes]] | None = None,
        pending: Tensor | None = None,
    ) -> Draws:
        """logits [R, V] float32, for each sequence its last token's row and those of its drafts.

        `allowed` holds, for each sequence, what its TokenConstraint allows at its rows; none
        at all for a sequence without one, fewer than rows where a draft token is not allowed.
        `pending` [R] int64 holds each row's last token where the host does not know it yet.
        """
        masks = allowed or [()] * len(sequences)
        rows = [
            Row(sequence, j, mask[j] if j < len(mask) else None)
            for sequence, mask in zip(sequences, masks, strict=True)
            for j in range(1 + len(sequence.draft_token_ids))
        ]
        return Draws(logits, sequences, rows, pending, looks=self._looks)


class Draws:
    """The tokens of a step, chosen but not known to the host until it waits for them.

    With top-p or min-p a token is first chosen among a few candidates; where those were too few, it
    is chosen again among more. Where that costs no wait, one `looks` and does so at once. Else who
    waits finds out, and meanwhile `tokens` holds a choice that may be revised.
    """

    def __init__(
        self,
        logits: Tensor,
        sequences: SequenceOf[Sequence],
        rows: SequenceOf[Row],
        pending: Tensor | None,
        *,
        looks: bool,
    ) -> None:
        self._drafts = [list(sequence.draft_token_ids) for sequence in sequences]
        self._rows = rows
        self._normalizers = logits.logsumexp(dim=-1)
        adjusted = adjust(logits, rows, pending)
        best = adjusted.max(dim=-1)
        self._finite = best.values.isfinite() & self._normalizers.isfinite()
        self._choice = _Choice(adjusted, best.values, best.indices, rows)
        self._rounds = iter((*_NUM_CANDIDATES, logits.shape[1]))
        reached = self._choice.draw(next(self._rounds))
        while looks and not self._choice.settle(reached.tolist()):
            reached = self._choice.draw(next(self._rounds))
        # Until it is known whether all are settled, the next step may write over the logits.
        self._logits = logits if looks or self._choice.is_settled else logits.clone()
        self._download = self._describe(reached)

    @property
    def tokens(self) -> Tensor:
        """[R] int64, where the logits are."""
        return self._choice.tokens

    @torch.inference_mode()
    def wait(self) -> list[SequenceResult]:
        """One result per sequence."""
        columns, is_finite, is_reached = self._received()
        first = columns[0]
        while not self._choice.settle(is_reached):
            self._download = self._describe(self._choice.draw(next(self._rounds)))
            columns, is_finite, is_reached = self._received()
        tokens = _sampled_tokens(columns, [row.params.top_logprobs for row in self._rows])
        rows = zip(self._rows, tokens, is_finite, first, strict=True)
        drawn = iter(
            (token, token.token_id != before) if finite else (_not_finite(row), False)
            for row, token, finite, before in rows
        )
        return [_verify(drafts, drawn) for drafts in self._drafts]

    def _describe(self, reached: Tensor) -> Download:
        most = max(row.params.top_logprobs for row in self._rows)
        described = _describe(self._logits, self._normalizers, self._choice.tokens, most)
        return Download(_joined(described, self._finite, reached))

    def _received(self) -> tuple[list[list[float]], list[float], list[float]]:
        """(columns that `_describe` makes, whether each row is finite, whether it is settled)."""
        *columns, is_finite, is_reached = _columns(self._download)
        return columns, is_finite, is_reached


def _verify(
    draft_token_ids: list[int], drawn: Iterator[tuple[SampledToken | _NotFinite, bool]]
) -> SequenceResult:
    tokens: list[SampledToken] = []
    is_revised = False
    own = [next(drawn) for _ in range(1 + len(draft_token_ids))]
    for (token, was_revised), draft in zip(own, [*draft_token_ids, None], strict=True):
        if isinstance(token, _NotFinite):
            # What came before it stands; the next step will meet it again at its first row.
            return SequenceResult(tuple(tokens)) if tokens else SequenceResult(error=token.error)
        tokens.append(token)
        is_revised |= was_revised
        if token.token_id != draft:
            break
    return SequenceResult(tuple(tokens), is_revised=is_revised)


def _describe(logits: Tensor, normalizers: Tensor, tokens: Tensor, most: int) -> Tensor:
    """Of each row its token, that token's logprob and rank (1 + the number of likelier tokens),
    then the `most` likeliest tokens and their logprobs: [R, 3 + 2 most] float64.

    logits [R, V], normalizers [R]: the logarithm of the sum of their exponentials, tokens [R].
    """
    chosen = logits.gather(1, tokens[:, None])
    ranks = (logits > chosen).sum(dim=-1, dtype=torch.int32) + 1
    columns = [tokens, chosen[:, 0] - normalizers, ranks]
    candidates = logits.topk(min(most, logits.shape[1])) if most else None
    if candidates is not None:
        columns += candidates.indices.unbind(1)
        columns += (candidates.values - normalizers[:, None]).unbind(1)
    return torch.stack([column.to(torch.float64) for column in columns], dim=1)


def _joined(*tensors: Tensor) -> Tensor:
    """[R] or [R, n] each, side by side: float64."""
    parts = [(each if each.dim() == 2 else each[:, None]).to(torch.float64) for each in tensors]
    return torch.cat(parts, dim=1)


def _columns(download: Download) -> list[list[float]]:
    columns: list[list[float]] = download.wait().t().tolist()
    return columns


def _sampled_tokens(columns: list[list[float]], numbers: SequenceOf[int]) -> list[SampledToken]:
    """What `_describe` tells of each row, with as many candidates as `numbers` says."""
    token_ids, logprobs, ranks, *candidates = columns
    most = len(candidates) // 2
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(numbers)
    if most:
        top_ids, top_logprobs = (
            list(zip(*part, strict=True)) for part in (candidates[:most], candidates[most:])
        )
        tops = [
            tuple(zip(map(int, ids[:n]), values[:n], strict=True))
            for ids, values, n in zip(top_ids, top_logprobs, numbers, strict=True)
        ]
    return [
        SampledToken(int(token_id), logprob, top, int(rank))
        for token_id, logprob, top, rank in zip(token_ids, logprobs, tops, ranks, strict=True)
    ]


def prompt_logprobs(logits: Tensor, token_ids: list[int], number: int) -> list[TokenLogprob]:
    """How likely each token was, with candidates: logits [R, V] are those before each of them."""
    tokens = upload(token_ids, torch.int64, logits.device)
    described = _describe(logits, logits.logsumexp(dim=-1), tokens, number)
    columns = _columns(Download(described))
    return [
        TokenLogprob(token_id=t.token_id, logprob=t.logprob, top=t.top_logprobs, rank=t.rank)
        for t in _sampled_tokens(columns, [number] * len(token_ids))
    ]


def _not_finite(row: Row) -> _NotFinite:
    if row.allowed is not None or row.params.allowed_token_ids:
        return _NotFinite("no token that is allowed has a finite logit")
    return _NotFinite("the model's logits are not finite numbers")


# Draws. All that follows computes each row by itself, in an order that the row alone decides, so
# that the last bit of a sum, and with it a draw, does not change with the batch.


class _Choice:
    """The tokens of a step: the best of rows without randomness, draws of the others."""

    def __init__(
        self, adjusted: Tensor, best_values: Tensor, best_tokens: Tensor, rows: SequenceOf[Row]
    ) -> None:
        """adjusted [R, V], the best of each row and its token [R]."""
        self.tokens = best_tokens
        self._device = adjusted.device
        random = [i for i, row in enumerate(rows) if row.params.temperature > 0]
        self._cut = [i for i in random if _cuts(rows[i].params)]  # not settled yet
        self._place = {row: place for place, row in enumerate(random)}
        self._rows = rows
        if not random:
            return
        self.tokens = best_tokens.clone()
        index = self._index(random)
        shifted = adjusted[index] - best_values[index, None]
        drawn = [rows[i] for i in random]
        temperatures = [max(row.params.temperature, _MIN_TEMPERATURE) for row in drawn]
        scaled = shifted / upload(temperatures, torch.float32, self._device)[:, None]
        self._probabilities = torch.softmax(scaled, dim=-1)
        uniforms = [_uniform(row.sequence.seed, row.position) for row in drawn]
        self._uniforms = upload(uniforms, torch.float64, self._device)
        whole = [i for i in random if not _cuts(rows[i].params)]
        if whole:
            self._put(whole, _invert(*self._weights(whole)))

    def draw(self, num_candidates: int) -> Tensor:
        """Choose among the likeliest tokens for rows with cuts that are not settled yet.

        Says of each row [R] bool whether it is settled: top-k, top-p and min-p keep no more.
        """
        reached = torch.ones(len(self.tokens), dtype=torch.bool, device=self._device)
        if self._cut:
            params = [self._rows[i].params for i in self._cut]
            chosen, settled = _draw_cut(*self._weights(self._cut), params, num_candidates)
            self._put(self._cut, chosen)
            reached.index_copy_(0, self._index(self._cut), settled)
        return reached

    def settle(self, reached: SequenceOf[float]) -> bool:
        """Note what `draw` has said; whether all rows are settled."""
        self._cut = [i for i in self._cut if not reached[i]]
        return self.is_settled

    @property
    def is_settled(self) -> bool:
        """As far as is known."""
        return not self._cut

    def _weights(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """(probabilities [r, V], uniforms [r]) of some random rows."""
        if len(rows) == len(self._place):
            return self._probabilities, self._uniforms
        index = self._index([self._place[i] for i in rows])
        return self._probabilities[index], self._uniforms[index]

    def _put(self, rows: list[int], tokens: Tensor) -> None:
        self.tokens.index_copy_(0, self._index(rows), tokens)

    def _index(self, rows: list[int]) -> Tensor:
        return upload(rows, torch.int64, self._device)


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw_cut(
    probabilities: Tensor, uniforms: Tensor, params: list[SamplingParams], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """(token ids [R], whether top-k, top-p and min-p keep no more than the candidates [R])."""
    vocab_size = probabilities.shape[1]
    candidates = probabilities.topk(min(num_candidates, vocab_size))
    kept = candidates.values.to(torch.float64)  # [R, candidates], likeliest first
    limits = [(each.top_k or vocab_size, each.top_p, each.min_p) for each in params]
    top_k, top_p, min_p = upload(limits, torch.float64, kept.device).split(1, dim=1)
    # Without top-k the mass is that of the whole vocabulary, which is 1.
    in_top_k = torch.arange(kept.shape[1], device=kept.device) < top_k
    kept = kept * in_top_k
    mass = torch.where(top_k < vocab_size, kept.cumsum(dim=-1)[:, -1:], 1.0)
    before = kept.cumsum(dim=-1) - kept  # mass of the likelier ones
    # A float32 sum may stay below 1, and must keep everything then.
    in_top_p = (before < top_p * mass) | (top_p == 1)
    kept = kept * (in_top_p & (kept >= min_p * kept[:, :1]))
    whole = kept.shape[1] == vocab_size
    no_top_k = top_k[:, 0] >= vocab_size
    reached = (top_k[:, 0] <= kept.shape[1]) | (no_top_k & (kept[:, -1] == 0)) | whole
    chosen = _invert(kept, uniforms)
    return candidates.indices.gather(1, chosen[:, None])[:, 0], reached


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw by inverting the cumulative distribution: weights [R, N], uniforms [R] float64 -> [R].

    In two steps, first a block of weights, then one of its weights: with cumulative sums of all of
    them in float64 a step of 64 x 49,152 takes 66 ms instead of 29 (one thread).
    """
    padded = F.pad(weights, (0, -weights.shape[1] % _BLOCK))
    blocks = padded.unflatten(1, (-1, _BLOCK))  # [R, blocks, _BLOCK]
    block, rest = _search(blocks.sum(dim=-1), uniforms)
    inner, _ = _search(blocks[torch.arange(len(blocks), device=blocks.device), block], rest)
    return (block * _BLOCK + inner).clamp_(max=weights.shape[1] - 1)  # beyond where one is NaN


def _search(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(the index [R] that each uniform [R] falls on, where in [0, 1) of it)."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    targets = (uniforms * cumulative[:, -1])[:, None]
    # The first whose cumulative weight exceeds the target; it has a weight itself.
    index = torch.searchsorted(cumulative, targets, right=True).clamp_(max=weights.shape[1] - 1)
    width = weights.gather(1, index).to(torch.float64)
    before = cumulative.gather(1, index) - width
    # Rounding may put the target a little outside.
    rest = ((targets - before) / width).clamp_(0, 1 - 2**-53)
    return index[:, 0], rest[:, 0]


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), by (seed, position) alone: neighbouring seeds and positions share nothing.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators", figure 17), its upper 53 bits.
    """
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53
