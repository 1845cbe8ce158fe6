"""Draws against the distribution that the parameters describe."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lowbit.server.engine.sampler import Sampler
from lowbit.server.engine.sequence import SampledToken, Sequence, SequenceResult
from lowbit.server.types import InvalidRequest, SamplingParams
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
PROMPT, COMPLETION = [5, 1, 1], [0, 2, 2, 1]
NUM_DRAWS = 8000


def sequence_of(
    params: SamplingParams,
    seed: int = 0,
    prompt: list[int] = PROMPT,
    completion: list[int] = COMPLETION,
    draft: list[int] | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
) -> Sequence:
    return Sequence(
        request_id="r",
        token_ids=prompt + completion,
        num_prompt_tokens=len(prompt),
        max_tokens=100,
        params=params,
        stop_token_ids=stop_token_ids,
        seed=seed,
        draft_token_ids=draft or [],
    )


def only_token(result: SequenceResult) -> SampledToken:
    assert not result.error
    (token,) = result.tokens
    return token


def frequencies(params: SamplingParams, logits: Tensor, num_draws: int = NUM_DRAWS) -> Tensor:
    """How often each token is drawn with the seeds 0, 1, 2, …: counts [V]."""
    sequences = [sequence_of(params, seed) for seed in range(num_draws)]
    results = Sampler().draw(logits.expand(num_draws, -1), sequences).wait()
    tokens = torch.tensor([only_token(result).token_id for result in results])
    return tokens.bincount(minlength=len(logits))


def assert_drawn_from(counts: Tensor, expected: Tensor) -> None:
    """Pearson's statistic within 5 standard deviations of its mean; nothing impossible drawn.

    Tokens that are expected less than 5 times are counted together. The seeds are fixed, so this
    never flickers.
    """
    num_draws = int(counts.sum())
    assert not counts[expected == 0].any()
    frequent = expected * num_draws >= 5
    observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]]).double()
    mean = torch.cat([expected[frequent], expected[~frequent].sum()[None]]) * num_draws
    possible = mean > 0
    statistic = ((observed - mean)[possible].square() / mean[possible]).sum()
    degrees = int(possible.sum()) - 1
    assert statistic <= degrees + 5 * math.sqrt(2 * max(degrees, 1)), (observed, mean)


def expected_distribution(params: SamplingParams, logits: Tensor) -> Tensor:
    """The definition in float64, one token at a time."""
    scores = logits.double().tolist()
    for token in set(PROMPT + COMPLETION):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(COMPLETION):
        scores[token] -= params.presence_penalty
        scores[token] -= params.frequency_penalty * COMPLETION.count(token)
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if params.allowed_token_ids:
        order = [token for token in order if token in params.allowed_token_ids]
    weights = [math.exp((x - scores[order[0]]) / params.temperature) for x in scores]
    order = order[: params.top_k] if params.top_k else order
    total = sum(weights[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < params.top_p:
            kept.append(i)
        mass += weights[i] / total
    kept = [i for i in kept if weights[i] >= params.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    probabilities = [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]
    return torch.tensor(probabilities, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_k": 6},
        {"top_k": 100},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.7},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.5},
        {"logit_bias": {5: 4.0, 0: -100.0}},
        {"allowed_token_ids": (4, 2, 5)},
        {
            "temperature": 0.8,
            "top_k": 3,
            "top_p": 0.95,
            "presence_penalty": 0.3,
            "frequency_penalty": 0.4,
            "repetition_penalty": 1.2,
            "logit_bias": {3: 1.5},
            "allowed_token_ids": (0, 1, 2, 3, 4),
        },
    ],
    ids=str,
)
def test_frequencies_follow_the_definition(settings: dict[str, Any]) -> None:
    params = SamplingParams(**settings)
    assert_drawn_from(frequencies(params, LOGITS), expected_distribution(params, LOGITS))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.3, "top_k": 700},
        {"temperature": 0.9, "top_p": 0.9},
        {"temperature": 3.0, "top_p": 0.97},
        {"temperature": 2.0, "min_p": 0.02},
        {"temperature": 1.5, "top_k": 400, "top_p": 0.8, "min_p": 0.01},
        {"repetition_penalty": 1.3, "top_k": 50},
    ],
    ids=str,
)
def test_frequencies_follow_transformers(settings: dict[str, Any]) -> None:
    """A vocabulary larger than what the sampler looks at first."""
    logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(3))
    params = SamplingParams(**settings)
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([PROMPT + COMPLETION]), logits[None].double())
    assert_drawn_from(frequencies(params, logits, 2000), scores[0].softmax(-1))


def test_temperature_zero_and_one_almost_zero_are_greedy() -> None:
    for temperature in (0, 1e-30, 1e-6):
        counts = frequencies(SamplingParams(temperature=temperature), LOGITS, 50)
        assert counts.tolist() == [50, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "token"),
    [
        ({"frequency_penalty": 2.0, "presence_penalty": 2.0}, 3),  # 0 and 1 were said, 2 twice
        ({"logit_bias": {5: 100.0}}, 5),
        ({"allowed_token_ids": (3, 4)}, 3),
    ],
)
def test_penalties_and_bans_bind_greedy_choices_too(settings: dict[str, Any], token: int) -> None:
    params = SamplingParams(temperature=0, **settings)
    (result,) = Sampler().draw(LOGITS[None], [sequence_of(params)]).wait()
    assert only_token(result).token_id == token


def test_a_stop_token_is_not_drawn_before_min_tokens() -> None:
    for num_tokens, token in ((4, 0), (5, 1)):
        params = SamplingParams(temperature=0, min_tokens=num_tokens)
        sequence = sequence_of(params, stop_token_ids=frozenset({0, 2}))
        (result,) = Sampler().draw(LOGITS[None], [sequence]).wait()
        assert only_token(result).token_id == token


def mixed_sequences(number: int) -> list[Sequence]:
    """Sequences of all kinds, each with a seed of its own."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0},
        {"temperature": 1.7},
        {"top_k": 7},
        {"top_k": 300},
        {"top_p": 0.7},
        {"temperature": 5.0, "top_p": 0.99},
        {"min_p": 0.1},
        {"presence_penalty": 1.0, "repetition_penalty": 1.1},
        {"allowed_token_ids": tuple(range(100, 900, 3)), "top_logprobs": 4},
    ]
    return [
        sequence_of(SamplingParams(**kinds[i % len(kinds)]), seed=1000 + i) for i in range(number)
    ]


def test_a_row_is_sampled_alike_alone_and_in_a_crowd() -> None:
    sequences = mixed_sequences(60)
    logits = 2 * torch.randn(60, 3001, generator=torch.Generator().manual_seed(8))
    together = Sampler().draw(logits, sequences).wait()
    for i, sequence in enumerate(sequences):
        (alone,) = Sampler().draw(logits[i : i + 1], [sequence]).wait()
        assert alone.tokens[0].token_id == together[i].tokens[0].token_id
        assert alone.tokens[0].logprob == pytest.approx(together[i].tokens[0].logprob, abs=1e-5)


def test_logprobs_are_the_models_own_whatever_the_parameters() -> None:
    logits = torch.randn(20, 1000, generator=torch.Generator().manual_seed(5))
    expected = logits.double().log_softmax(-1)
    sequences = mixed_sequences(20)
    for row, (result, sequence) in enumerate(
        zip(Sampler().draw(logits, sequences).wait(), sequences, strict=True)
    ):
        token = only_token(result)
        assert token.logprob == pytest.approx(expected[row, token.token_id].item(), abs=1e-5)
        likeliest_first = expected[row].argsort(descending=True).tolist()
        assert token.rank == 1 + likeliest_first.index(token.token_id)
        assert len(token.top_logprobs) == sequence.params.top_logprobs
        best = expected[row].topk(sequence.params.top_logprobs)
        assert [token_id for token_id, _ in token.top_logprobs] == best.indices.tolist()
        assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=1e-5
        )


def test_tokens_that_are_equally_likely_share_a_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0]])
    ranks = {}
    for token_id in range(5):
        sequence = sequence_of(SamplingParams(allowed_token_ids=(token_id,)))
        (result,) = Sampler().draw(logits, [sequence]).wait()
        ranks[only_token(result).token_id] = only_token(result).rank
    assert ranks == {0: 3, 1: 1, 2: 3, 3: 1, 4: 5}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_p": 0.9}, {"top_k": 3}])
def test_logits_that_are_not_finite_fail_their_row_alone(
    value: float, settings: dict[str, Any]
) -> None:
    sequences = mixed_sequences(7)
    logits = torch.randn(7, 3001, generator=torch.Generator().manual_seed(2))
    expected = Sampler().draw(logits, sequences).wait()
    sequences[3] = sequence_of(SamplingParams(**settings))
    logits[3, 17] = value
    results = Sampler().draw(logits, sequences).wait()
    assert results[3].error == "the model's logits are not finite numbers"
    assert results[3].tokens == ()
    assert results[:3] + results[4:] == expected[:3] + expected[4:]


def test_a_model_that_gives_allowed_tokens_no_chance_fails() -> None:
    logits = torch.tensor([[1.0, -math.inf, -math.inf]])
    sequence = sequence_of(SamplingParams(allowed_token_ids=(1, 2)), prompt=[0], completion=[])
    (result,) = Sampler().draw(logits, [sequence]).wait()
    assert "no token that is allowed" in result.error


# Draft tokens


def step_by_step(logits: Tensor, params: SamplingParams, seed: int) -> list[int]:
    """What is drawn without drafts when the model's logits depend on the position alone."""
    tokens: list[int] = []
    for row in logits:
        sequence = sequence_of(params, seed, completion=COMPLETION + tokens)
        (result,) = Sampler().draw(row[None], [sequence]).wait()
        tokens.append(only_token(result).token_id)
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"repetition_penalty": 1.5, "frequency_penalty": 1.0},
    ],
    ids=str,
)
def test_drafts_change_no_token(settings: dict[str, Any]) -> None:
    """As many tokens as are right, then one more, and all of them those that come without."""
    params = SamplingParams(**settings)
    generator = torch.Generator().manual_seed(4)
    num_accepted = []
    for seed in range(200):
        logits = 2 * torch.randn(5, 6, generator=generator)
        expected = step_by_step(logits, params, seed)
        draft = [  # right in about half of the places
            right if torch.rand((), generator=generator) < 0.7 else (right + 1) % 6
            for right in expected[:4]
        ]
        (result,) = Sampler().draw(logits, [sequence_of(params, seed, draft=draft)]).wait()
        tokens = [token.token_id for token in result.tokens]
        num_right = next((i for i in range(4) if draft[i] != expected[i]), 4)
        assert tokens == expected[: num_right + 1]
        num_accepted.append(num_right)
    assert set(num_accepted) == {0, 1, 2, 3, 4}


def test_verification_preserves_the_distribution() -> None:
    """First tokens, and second ones after the draft was right, are drawn from the model's own."""
    params = SamplingParams(temperature=1.2)
    second = LOGITS.flip(0)
    sequences = [sequence_of(params, seed, draft=[1]) for seed in range(NUM_DRAWS)]
    results = Sampler().draw(torch.stack([LOGITS, second]).repeat(NUM_DRAWS, 1), sequences).wait()
    first_tokens = torch.tensor([result.tokens[0].token_id for result in results])
    second_tokens = torch.tensor([r.tokens[1].token_id for r in results if len(r.tokens) == 2])
    assert len(second_tokens) == (first_tokens == 1).sum()
    assert_drawn_from(first_tokens.bincount(minlength=6), (LOGITS.double() / 1.2).softmax(-1))
    assert_drawn_from(second_tokens.bincount(minlength=6), (second.double() / 1.2).softmax(-1))


def test_logits_that_are_not_finite_after_a_draft_leave_the_tokens_before() -> None:
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = math.nan
    sequence = sequence_of(SamplingParams(temperature=0), draft=[0, 0])
    (result,) = Sampler().draw(logits, [sequence]).wait()
    assert [token.token_id for token in result.tokens] == [0]
    assert not result.error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2.1; it must lie in [-2, 2]"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must lie in [0.1, 10]"),
        ({"logit_bias": {3: 101.0}}, "logit_bias[3] is 101.0; it must lie in [-100, 100]"),
        ({"logit_bias": {3: math.nan}}, "logit_bias[3] is nan"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias is 1025 tokens"),
        ({"allowed_token_ids": (1,) * 16385}, "allowed_token_ids is 16385 ids"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; it must be at most max_tokens (8)"),
        ({"stop": ("",)}, "stop is a string of 0 characters"),
        ({"stop": tuple("x" * 17)}, "stop is 17 strings"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids is 65 ids"),
        ({"top_logprobs": 21}, "top_logprobs is 21; it must lie in [0, 20]"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1; it must lie in [0, 20]"),
        ({"regex": "x" * 65_537}, "regex is 65537 characters long; it may have at most 65536"),
        ({"choice": ("x",) * 1025}, "choice is 1025 strings; it may hold at most 1024"),
        ({"regex": "a", "json_schema": "{}"}, "json_schema and regex are set; at most one of"),
        ({"regex": "a", "allowed_token_ids": (1,)}, "allowed_token_ids is set beside regex"),
        ({"grammar": "a", "ignore_eos": True}, "ignore_eos is set beside grammar"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_out_of_range_parameters_name_field_value_and_limit(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**settings)
    assert message in str(refusal.value)
