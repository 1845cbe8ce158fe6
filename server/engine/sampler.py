"""Logits in, a result per sequence out. A draw depends on its own row alone, not on the batch.

R rows of a step want a token, V is the size of the vocabulary. The order of what happens to a row
stands in `SamplingParams`.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import SamplingParams, TokenLogprob
from .sequence import SampledToken, Sequence, SequenceResult

_NUM_CANDIDATES = (256, 4096)  # looked at first; few distributions reach further
_BLOCK = 512  # weights that a draw takes together at first
_MIN_TEMPERATURE = 1e-6  # below, float32 knows no quotient but zero and infinity
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of logits: what follows a sequence and the first of its draft tokens."""

    sequence: Sequence
    num_drafts: int
    allowed: bytes | None  # see TokenConstraint; None: all tokens

    @property
    def position(self) -> int:
        """How many tokens of the completion come before the one to be chosen."""
        return self.sequence.num_completion_tokens + self.num_drafts

    @property
    def may_stop(self) -> bool:
        return self.position >= self.sequence.params.min_tokens

    @property
    def token_ids(self) -> list[int]:
        return self.sequence.token_ids + self.sequence.draft_token_ids[: self.num_drafts]


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

    def sample(
        self,
        logits: Tensor,
        sequences: SequenceOf[Sequence],
        allowed: SequenceOf[SequenceOf[bytes]] | None = None,
    ) -> list[SequenceResult]:
        """logits [R, V] float32, for each sequence its last token's row and those of its drafts.

        `allowed` holds, for each sequence, what its TokenConstraint allows at its rows; none
        at all for a sequence without one, fewer than rows where a draft token is not allowed.
        """
        masks = allowed or [()] * len(sequences)
        rows = [
            _Row(sequence, j, mask[j] if j < len(mask) else None)
            for sequence, mask in zip(sequences, masks, strict=True)
            for j in range(1 + len(sequence.draft_token_ids))
        ]
        drawn = iter(_sample(logits, rows))
        return [_verify(sequence.draft_token_ids, drawn) for sequence in sequences]


def _verify(
    draft_token_ids: list[int], drawn: Iterator[SampledToken | _NotFinite]
) -> SequenceResult:
    tokens: list[SampledToken] = []
    own = [next(drawn) for _ in range(1 + len(draft_token_ids))]
    for token, draft in zip(own, [*draft_token_ids, None], strict=True):
        if isinstance(token, _NotFinite):
            # What came before it stands; the next step will meet it again at its first row.
            return SequenceResult(tuple(tokens)) if tokens else SequenceResult(error=token.error)
        tokens.append(token)
        if token.token_id != draft:
            break
    return SequenceResult(tuple(tokens))


def _sample(logits: Tensor, rows: SequenceOf[_Row]) -> list[SampledToken | _NotFinite]:
    adjusted = _adjust(logits, rows)
    best = adjusted.max(dim=-1)
    normalizers = logits.logsumexp(dim=-1)
    tokens = best.indices.clone()
    finite = best.values.isfinite() & normalizers.isfinite()
    random = [i for i, row in enumerate(rows) if row.sequence.params.temperature > 0]
    if random:
        index = torch.tensor(random, device=logits.device)
        shifted = adjusted[index] - best.values[index, None]
        tokens[index] = _draw(shifted, [rows[i] for i in random])
    chosen = logits.gather(1, tokens[:, None])
    logprobs = chosen[:, 0] - normalizers
    top = top_logprobs(logits, normalizers, [row.sequence.params.top_logprobs for row in rows])
    columns = (tokens.tolist(), logprobs.tolist(), top, _ranks(logits, chosen))
    return [
        SampledToken(*values) if is_finite else _not_finite(row)
        for *values, is_finite, row in zip(*columns, finite.tolist(), rows, strict=True)
    ]


def _ranks(logits: Tensor, chosen: Tensor) -> list[int]:
    """1 + how many logits [R, V] are larger than the chosen one [R, 1], for each row."""
    ranks: list[int] = ((logits > chosen).sum(dim=-1, dtype=torch.int32) + 1).tolist()
    return ranks


def top_logprobs(
    logits: Tensor, normalizers: Tensor, numbers: SequenceOf[int]
) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest candidates of each row, as many as `numbers` says: (token id, logprob).

    logits [R, V], normalizers [R]: the logarithm of the sum of their exponentials.
    """
    most = min(max(numbers, default=0), logits.shape[1])
    if most == 0:
        return [()] * len(numbers)
    values, token_ids = logits.topk(most)
    values = values - normalizers[:, None]
    pairs = zip(token_ids.tolist(), values.tolist(), numbers, strict=True)
    return [tuple(zip(ids[:n], logprobs[:n], strict=True)) for ids, logprobs, n in pairs]


def prompt_logprobs(logits: Tensor, token_ids: list[int], number: int) -> list[TokenLogprob]:
    """How likely each token was, with candidates: logits [R, V] are those before each of them."""
    normalizers = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    logprobs = (chosen[:, 0] - normalizers).tolist()
    top = top_logprobs(logits, normalizers, [number] * len(token_ids))
    rows = zip(token_ids, logprobs, top, _ranks(logits, chosen), strict=True)
    return [
        TokenLogprob(token_id=token_id, logprob=logprob, top=best, rank=rank)
        for token_id, logprob, best, rank in rows
    ]


def _not_finite(row: _Row) -> _NotFinite:
    if row.allowed is not None or row.sequence.params.allowed_token_ids:
        return _NotFinite("no token that is allowed has a finite logit")
    return _NotFinite("the model's logits are not finite numbers")


# Penalties, biases and bans


def _adjust(logits: Tensor, rows: SequenceOf[_Row]) -> Tensor:
    """The logits to choose by: `logits` itself where no row asks for a change, else a copy."""
    changed = [(i, row) for i, row in enumerate(rows) if _changes(row)]
    if not changed:
        return logits
    adjusted = logits.clone()
    for i, row in changed:
        _penalize(adjusted[i], row)
        _ban(adjusted[i], row)
    return adjusted


def _changes(row: _Row) -> bool:
    params = row.sequence.params
    return bool(
        params.repetition_penalty != 1
        or params.presence_penalty
        or params.frequency_penalty
        or params.logit_bias
        or params.allowed_token_ids
        or row.allowed is not None
        or not row.may_stop
    )


def _penalize(logits: Tensor, row: _Row) -> None:
    """logits [V], changed in place."""
    sequence, params = row.sequence, row.sequence.params
    known = row.token_ids
    if params.repetition_penalty != 1:
        seen = torch.tensor(known, device=logits.device).unique()
        values = logits[seen]
        penalty = params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        completion = torch.tensor(
            known[sequence.num_prompt_tokens :], dtype=torch.int64, device=logits.device
        )
        seen, counts = completion.unique(return_counts=True)
        logits[seen] -= params.frequency_penalty * counts + params.presence_penalty
    if params.logit_bias:
        token_ids = torch.tensor(list(params.logit_bias), device=logits.device)
        logits[token_ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)


def _ban(logits: Tensor, row: _Row) -> None:
    """logits [V], changed in place."""
    params = row.sequence.params
    if params.allowed_token_ids:
        kept = torch.tensor(params.allowed_token_ids, device=logits.device)
        values = logits[kept]
        logits.fill_(_NEVER)
        logits[kept] = values
    if row.allowed is not None:
        logits.masked_fill_(~unpack_bits(row.allowed, len(logits)).to(logits.device), _NEVER)
    if not row.may_stop:
        stops = torch.tensor(sorted(row.sequence.stop_token_ids), dtype=torch.int64)
        stops = stops[stops < len(logits)].to(logits.device)
        values = logits[stops]
        logits[stops] = _NEVER
        if row.allowed is not None and not bool((logits > _NEVER).any()):
            logits[stops] = values  # the prescribed form is complete: it cannot go on


def unpack_bits(bits: bytes, number: int) -> Tensor:
    """The first bits as a mask [number] bool, the lowest of a byte first; missing ones are 0."""
    packed = torch.frombuffer(bytearray(bits), dtype=torch.uint8)
    mask = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    mask = mask.flatten()[:number].to(torch.bool)
    return F.pad(mask, (0, number - len(mask)))


# Draws. All that follows computes each row by itself, in an order that the row alone decides, so
# that the last bit of a sum, and with it a draw, does not change with the batch.


def _draw(shifted: Tensor, rows: list[_Row]) -> Tensor:
    """Token ids [R] drawn from logits [R, V] whose best is 0."""
    params = [row.sequence.params for row in rows]
    temperatures = _column([max(each.temperature, _MIN_TEMPERATURE) for each in params], shifted)
    probabilities = torch.softmax(shifted / temperatures, dim=-1)
    uniforms = torch.tensor(
        [_uniform(row.sequence.seed, row.position) for row in rows],
        dtype=torch.float64,
        device=shifted.device,
    )
    tokens = torch.empty(len(rows), dtype=torch.int64, device=shifted.device)
    whole = [i for i, each in enumerate(params) if not _cuts(each)]
    cut = [i for i, each in enumerate(params) if _cuts(each)]
    if whole:
        tokens[whole] = _invert(probabilities[whole], uniforms[whole])
    for num_candidates in (*_NUM_CANDIDATES, shifted.shape[1]):
        if cut:
            chosen, reached = _draw_cut(
                probabilities[cut], [params[i] for i in cut], uniforms[cut], num_candidates
            )
            tokens[cut] = chosen
            cut = [i for i, far_enough in zip(cut, reached, strict=True) if not far_enough]
    return tokens


def _cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw_cut(
    probabilities: Tensor, params: list[SamplingParams], uniforms: Tensor, num_candidates: int
) -> tuple[Tensor, list[bool]]:
    """(token ids [R], whether top-k, top-p and min-p keep no more than the candidates)."""
    vocab_size = probabilities.shape[1]
    candidates = probabilities.topk(min(num_candidates, vocab_size))
    kept = candidates.values.to(torch.float64)  # [R, candidates], likeliest first
    top_k = _column([float(each.top_k or vocab_size) for each in params], kept)
    top_p = _column([each.top_p for each in params], kept)
    min_p = _column([each.min_p for each in params], kept)
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
    return candidates.indices.gather(1, chosen[:, None])[:, 0], reached.tolist()


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


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), by (seed, position) alone: neighbouring seeds and positions share nothing.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators", figure 17), its upper 53 bits.
    """
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53
