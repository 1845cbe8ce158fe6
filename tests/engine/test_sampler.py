"""Draws against the distribution that the parameters describe."""

from __future__ import annotations

import math

import pytest
import torch
from lowbit.server.engine.sampler import Sampler
from lowbit.server.engine.sequence import Sequence
from lowbit.server.types import InvalidRequest, SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
NUM_DRAWS = 4000


def draw(params: SamplingParams, seed: int) -> int:
    sequence = Sequence("r", [0], 1, 1, params, frozenset(), seed)
    return Sampler().sample(LOGITS[None], [sequence])[0].tokens[0].token_id


def expected_distribution(params: SamplingParams) -> list[float]:
    """The definition, one token at a time: temperature, top-k, top-p, min-p, renormalise."""
    scaled = [math.exp(x / params.temperature) for x in LOGITS.tolist()]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    order = order[: params.top_k] if params.top_k else order
    total = sum(scaled[i] for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass < params.top_p:
            kept.append(i)
        mass += scaled[i] / total
    kept = [i for i in kept if scaled[i] >= params.min_p * scaled[order[0]]]
    total = sum(scaled[i] for i in kept)
    return [scaled[i] / total if i in kept else 0.0 for i in range(len(scaled))]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 2},
        {"top_p": 0.8},
        {"top_p": 1e-9},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_frequencies_follow_the_definition(settings: dict) -> None:
    params = SamplingParams(**settings)
    expected = expected_distribution(params)
    counts = [0] * len(expected)
    for seed in range(NUM_DRAWS):
        counts[draw(params, seed)] += 1
    for count, probability in zip(counts, expected, strict=True):
        if probability == 0:
            assert count == 0
        # Five standard deviations: the seeds are fixed, so this never flickers.
        deviation = math.sqrt(probability * (1 - probability) / NUM_DRAWS)
        assert abs(count / NUM_DRAWS - probability) <= 5 * deviation


def test_temperature_zero_is_greedy() -> None:
    assert {draw(SamplingParams(temperature=0), seed) for seed in range(20)} == {0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"seed": -1}, "seed is -1"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"stop": ("",)}, "stop is a string of 0 characters"),
        ({"stop": tuple("x" * 17)}, "stop is 17 strings"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids is 65 ids"),
    ],
)
def test_out_of_range_parameters_name_field_value_and_limit(settings: dict, message: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**settings)
    assert message in str(refusal.value)
