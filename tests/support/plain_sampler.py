"""Choosing tokens one row after the other, each step of it a few tensor operations on that row.

What the sampler does for all rows at once must come out the very same, to the last bit.
"""

from __future__ import annotations

import torch
from lowbit.server.engine.sampler import _invert, _uniform
from lowbit.server.engine.sequence import SampledToken, Sequence
from torch import Tensor

NEVER = float("-inf")


def choose(logits: Tensor, sequence: Sequence, allowed: bytes | None = None) -> SampledToken | None:
    """The next token after a sequence without drafts, of logits [V]; None if none is finite."""
    adjusted = logits.clone()
    penalize(adjusted, sequence)
    ban(adjusted, sequence, allowed)
    best, token = adjusted.max(dim=0)
    normalizer = logits[None].logsumexp(dim=-1)[0]
    if not bool(best.isfinite() & normalizer.isfinite()):
        return None
    if sequence.params.temperature > 0:
        token = draw(adjusted - best, sequence)
    candidates = logits.topk(min(sequence.params.top_logprobs, len(logits)))
    return SampledToken(
        int(token),
        float(logits[token] - normalizer),
        tuple(
            zip(
                candidates.indices.tolist(),
                (candidates.values - normalizer).tolist(),
                strict=True,
            )
        ),
        int((logits > logits[token]).sum()) + 1,
    )


def penalize(logits: Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sequence.token_ids).unique()
        values, penalty = logits[seen], params.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        completion = torch.tensor(sequence.token_ids[sequence.num_prompt_tokens :]).long()
        seen, counts = completion.unique(return_counts=True)
        logits[seen] -= params.frequency_penalty * counts + params.presence_penalty
    for token, bias in params.logit_bias.items():
        logits[token] += bias


def ban(logits: Tensor, sequence: Sequence, allowed: bytes | None) -> None:
    params = sequence.params
    for token in range(len(logits)):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            logits[token] = NEVER
        if allowed is not None:
            byte = allowed[token // 8] if token // 8 < len(allowed) else 0
            if not byte >> (token % 8) & 1:
                logits[token] = NEVER
    if sequence.num_completion_tokens < params.min_tokens:
        before = logits.clone()
        stops = [token for token in sequence.stop_token_ids if token < len(logits)]
        logits[stops] = NEVER
        if allowed is not None and bool((logits == NEVER).all()):
            logits.copy_(before)


def draw(shifted: Tensor, sequence: Sequence) -> Tensor:
    params = sequence.params
    probabilities = torch.softmax(shifted[None] / max(params.temperature, 1e-6), dim=-1)
    uniforms = torch.tensor(
        [_uniform(sequence.seed, sequence.num_completion_tokens)], dtype=torch.float64
    )
    if not (params.top_k or params.top_p < 1 or params.min_p):
        return _invert(probabilities, uniforms)[0]
    for width in (256, 4096, len(shifted)):  # ties are broken by how many are looked at
        order = probabilities[0].topk(min(width, len(shifted)))
        kept = cut(order.values.double(), len(shifted), sequence)
        few = 0 < params.top_k <= len(kept)
        no_top_k = params.top_k == 0 or params.top_k >= len(shifted)
        if few or (no_top_k and kept[-1] == 0) or len(kept) == len(shifted):
            break
    return order.indices[_invert(kept[None], uniforms)[0]]


def cut(kept: Tensor, vocab_size: int, sequence: Sequence) -> Tensor:
    """Of probabilities, likeliest first, those that top-k, top-p and min-p keep; others are 0."""
    params = sequence.params
    if params.top_k:
        kept[params.top_k :] = 0
    mass = float(kept.cumsum(0)[-1]) if 0 < params.top_k < vocab_size else 1.0
    before = kept.cumsum(0) - kept
    if params.top_p < 1:
        kept[before >= params.top_p * mass] = 0
    kept[kept < params.min_p * kept[0]] = 0
    return kept
