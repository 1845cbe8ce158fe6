"""Prompt lookup: what is proposed, how it adapts, and that no token changes."""

from __future__ import annotations

from typing import Any

import pytest
from engines import make_engine, prompt
from lowbit.server.config import EngineConfig, InvalidConfig
from lowbit.server.engine.drafter import PromptLookupDrafter
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.sequence import Sequence
from lowbit.server.types import SamplingParams
from tiny import TinyModel

ROOM = 100


def sequence_of(token_ids: list[int]) -> Sequence:
    return Sequence("r", list(token_ids), 1, 10_000, SamplingParams(), frozenset(), 0)


def test_what_followed_before_is_proposed() -> None:
    text = list(range(100, 130))
    drafter = PromptLookupDrafter(8)
    assert drafter.propose(sequence_of([*text, 7, *text[:10]]), 1, ROOM) == text[10:18]
    assert drafter.propose(sequence_of([*text, 7, *text[:10]]), 1, 3) == text[10:13]


def test_a_period_is_continued_beyond_what_is_known() -> None:
    drafter = PromptLookupDrafter(12)
    assert drafter.propose(sequence_of([1, 2, 3] * 5), 1, ROOM) == [1, 2, 3] * 4


def test_the_last_of_several_places_counts_and_the_longer_match_before_it() -> None:
    drafter = PromptLookupDrafter(1)
    assert drafter.propose(sequence_of([5, 6, 1, 9, 5, 6, 2, 8, 5, 6]), 1, ROOM) == [2]
    long = [1, 2, 3, 4, 77, 9, 3, 4, 88, 9, 1, 2, 3, 4]
    assert drafter.propose(sequence_of(long), 1, ROOM) == [77]


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    drafter = PromptLookupDrafter(8)
    for length in (1, 2, 9, 300):
        assert drafter.propose(sequence_of(list(range(length))), 1, ROOM) == []


def test_nothing_is_proposed_in_a_large_batch() -> None:
    drafter = PromptLookupDrafter(8)
    sequence = sequence_of([1, 2, 3] * 9)
    lengths = [len(drafter.propose(sequence, num_running, ROOM)) for num_running in (1, 4, 16, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 8 and lengths[-1] == 0


def lengths_when(right: bool, num_steps: int, max_draft_tokens: int = 16) -> list[int]:
    """Lengths of proposals for a text whose pairs recur, when all are right, or none."""
    drafter = PromptLookupDrafter(max_draft_tokens)
    sequence = sequence_of([1, 2])
    lengths = []
    for i in range(num_steps):
        sequence.token_ids += [1000 + i, 1, 2]  # a pair that stood before, and nothing longer
        drafts = drafter.propose(sequence, 1, ROOM)
        lengths.append(len(drafts))
        if drafts:
            drafter.observe(sequence, len(drafts), len(drafts) if right else 0)
    return lengths


def test_lengths_grow_with_success() -> None:
    lengths = lengths_when(True, 20)
    assert 1 <= lengths[0] < 4
    assert lengths == sorted(lengths)
    assert lengths[-1] == 16


def test_drafting_stops_when_nothing_stands_and_is_tried_again_rarely() -> None:
    lengths = lengths_when(False, 2000)
    assert sum(lengths[:20]) <= 8
    assert sum(lengths[20:]) < 2000 / 100
    assert max(lengths[20:]) == 1
    assert sum(lengths[1000:]) >= 1


def test_it_starts_again_when_proposals_stand_again() -> None:
    drafter = PromptLookupDrafter(8)
    sequence = sequence_of([1, 2])
    lengths = []
    for i in range(400):
        sequence.token_ids += [1000 + i, 1, 2]
        drafts = drafter.propose(sequence, 1, ROOM)
        lengths.append(len(drafts))
        if drafts:
            drafter.observe(sequence, len(drafts), len(drafts) if i >= 50 else 0)
    assert sum(lengths[40:50]) <= 1
    assert lengths[-1] == 8


# In the engine


PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0.6, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "seed": 4, "top_logprobs": 2},
]


def requests(max_tokens: int = 60) -> list[tuple[list[int], SamplingParams]]:
    """Prompts that repeat themselves."""
    return [
        (prompt(12, seed=i) * 3, SamplingParams(**settings, max_tokens=max_tokens, ignore_eos=True))
        for i, settings in enumerate(PARAMS)
    ]


def run(
    engine: LLMEngine, wanted: list[tuple[list[int], SamplingParams]]
) -> tuple[dict[str, list[Any]], int]:
    """(the tokens of each with their logprobs, steps)."""
    for i, (token_ids, params) in enumerate(wanted):
        engine.add(engine.new_sequence(str(i), token_ids, params))
    received: dict[str, list[Any]] = {str(i): [] for i in range(len(wanted))}
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        for output in engine.step():
            received[output.request_id].append(output.token)
    engine.scheduler.check_integrity()
    return received, num_steps


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_seqs": 4, "max_num_batched_tokens": 19}, {"num_blocks": 9}],
    ids=["roomy", "narrow", "preempted"],
)
def test_drafts_change_no_token_and_no_logprob(
    tiny_model: TinyModel, kv_cache_dtype: str, settings: dict[str, int]
) -> None:
    expected, num_steps = run(make_engine(tiny_model, "bfloat16", kv_cache_dtype), requests())
    engine = make_engine(tiny_model, "bfloat16", kv_cache_dtype, max_draft_tokens=8, **settings)
    received, num_steps_with = run(engine, requests())
    assert received == expected
    if not settings:
        assert num_steps_with < num_steps


def test_a_model_that_repeats_itself_needs_fewer_steps(tiny_model: TinyModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=100, logit_bias={65: 100.0}, ignore_eos=True)
    expected, num_steps = run(make_engine(tiny_model), [(prompt(20, 1), params)])
    received, num_steps_with = run(
        make_engine(tiny_model, max_draft_tokens=8), [(prompt(20, 1), params)]
    )
    assert received == expected
    assert num_steps_with < num_steps / 3


def test_drafts_are_counted(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, max_draft_tokens=8)
    params = SamplingParams(temperature=0, max_tokens=50, logit_bias={65: 100.0}, ignore_eos=True)
    engine.add(engine.new_sequence("r", prompt(20, 1), params))
    num_steps = num_drafts = num_accepted = 0
    while engine.has_work:
        engine.step()
        num_steps += 1
        num_drafts += engine.last_step.num_draft_tokens
        num_accepted += engine.last_step.num_accepted_draft_tokens
    assert num_accepted == 50 - num_steps
    assert num_drafts >= num_accepted > 20


def test_a_limit_out_of_range_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"max_draft_tokens is 33; it must lie in \[0, 32\]"):
        EngineConfig(max_draft_tokens=33)
