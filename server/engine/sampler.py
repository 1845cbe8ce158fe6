"""Logits in, a result per sequence out. Each sequence draws from its own generator."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import SamplingParams
from .sequence import SampledToken, Sequence, SequenceResult


class Sampler:
    """A draw depends on (seed, number of the token) alone: not on the batch, not on preemption."""

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SequenceResult]:
        """logits [S, vocabulary] float32, one row per sequence."""
        normalizers = logits.logsumexp(dim=-1)  # [S]; finite where no logit is NaN or infinite
        finite = torch.isfinite(normalizers).tolist()
        logits = logits if all(finite) else torch.nan_to_num(logits)
        greedy = logits.argmax(dim=-1).tolist()
        tokens = [
            greedy[row] if sequence.params.temperature == 0 else _draw(logits[row], sequence)
            for row, sequence in enumerate(sequences)
        ]
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0]
        logprobs = (chosen - normalizers).tolist()
        return [
            SequenceResult((SampledToken(token, logprob),))
            if is_finite
            else SequenceResult(error="the model's logits are not finite numbers")
            for token, logprob, is_finite in zip(tokens, logprobs, finite, strict=True)
        ]


def _draw(logits: Tensor, sequence: Sequence) -> int:
    generator = torch.Generator().manual_seed(_mix(sequence.seed, sequence.num_completion_tokens))
    values, token_ids = _candidates(logits, sequence.params)
    # The exponential race: argmax of p / E with E ~ Exp(1) is a draw from p.
    race = torch.empty(values.shape).exponential_(generator=generator).to(values.device)
    return int(token_ids[torch.argmax(torch.softmax(values, dim=-1) / race)])


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Scaled logits and token ids that survive top-k, then top-p, then min-p, likeliest first."""
    scaled = logits / params.temperature
    limit = scaled.shape[0] if params.top_k == 0 else min(params.top_k, scaled.shape[0])
    values, token_ids = scaled.topk(limit)
    if params.top_p < 1:
        probabilities = torch.softmax(values, dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier ones
        kept = int((before < params.top_p).sum())
        values, token_ids = values[:kept], token_ids[:kept]
    if params.min_p > 0:
        kept = int((values >= values[0] + torch.tensor(params.min_p).log()).sum())
        values, token_ids = values[:kept], token_ids[:kept]
    return values, token_ids


def _mix(seed: int, position: int) -> int:
    """A 64-bit seed per token, so that neighbouring seeds and positions share nothing.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
    generators", figure 17).
    """
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)
