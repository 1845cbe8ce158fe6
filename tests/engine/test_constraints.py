"""Sequences that follow a prescribed form, in the real engine on the tiny random model."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from byte_tokenizer import EOS, byte_tokenizer
from engines import make_engine, prompt
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.sequence import Sequence
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import ConstraintFailed, FinishReason, SamplingParams, TokenOutput
from tiny import TinyModel

TOKENIZER = Tokenizer(byte_tokenizer())
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"k": {"enum": ["one", "two"]}, "n": {"type": "integer", "maximum": 99}},
        "required": ["k", "n"],
        "additionalProperties": False,
    }
)
FORMS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"regex": r"(ab|cd){1,20}!"},
    {"choice": ("north", "south", "somewhere else")},
    {"grammar": 'start: "(" start ")" | DIGIT\nDIGIT: /[0-9]/'},
]
# A number may have any number of digits and a nest any depth: what ends them is pressed for.
CLOSING = {ord(character): 6.0 for character in "})!0"}
PARAMS = [
    SamplingParams(temperature=temperature, seed=seed, max_tokens=64, logit_bias=CLOSING, **form)
    for seed, form in enumerate(FORMS)
    for temperature in (0.0, 1.0)
]


def outputs_of(engine: LLMEngine, params: list[SamplingParams]) -> list[list[TokenOutput]]:
    """What each of them gets, all running together."""
    for i, each in enumerate(params):
        constraint = None
        if each.structured_output is not None:
            constraint = TOKENIZER.constraint(each, engine.vocab_size, engine.eos_token_ids)
        sequence = engine.new_sequence(str(i), prompt(20 + i, i), each, constraint=constraint)
        engine.add(sequence)
    outputs: list[list[TokenOutput]] = [[] for _ in params]
    while engine.has_work:
        for output in engine.step():
            outputs[int(output.request_id)].append(output)
    engine.scheduler.check_integrity()
    return outputs


def text_of(outputs: list[TokenOutput]) -> str:
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].token_id == EOS
    return bytes(output.token_id for output in outputs[:-1]).decode()


def assert_follows(params: SamplingParams, text: str) -> None:
    if params.json_schema is not None:
        found = json.loads(text)
        assert found["k"] in ("one", "two") and found["n"] <= 99
    elif params.regex is not None:
        assert re.fullmatch(params.regex, text)
    elif params.choice:
        assert text in params.choice
    else:
        assert re.fullmatch(r"\(*[0-9]\)*", text) and text.count("(") == text.count(")")


def tokens(outputs: list[list[TokenOutput]]) -> list[list[int | None]]:
    return [[output.token_id for output in each] for each in outputs]


@pytest.fixture(scope="module")
def crowd(tiny_model: TinyModel) -> list[list[TokenOutput]]:
    return outputs_of(make_engine(tiny_model), PARAMS)


def test_every_completion_follows_its_form(crowd: list[list[TokenOutput]]) -> None:
    for params, outputs in zip(PARAMS, crowd, strict=True):
        assert_follows(params, text_of(outputs))


@pytest.mark.parametrize(
    "settings",
    [{"max_num_seqs": 8, "max_num_batched_tokens": 13}, {"num_blocks": 9}],
    ids=["in chunks", "preempted"],
)
def test_neither_chunks_nor_preemption_change_them(
    tiny_model: TinyModel, crowd: list[list[TokenOutput]], settings: dict[str, int]
) -> None:
    assert tokens(outputs_of(make_engine(tiny_model, **settings), PARAMS)) == tokens(crowd)


@pytest.mark.parametrize("wrong_every", [1, 3, 1000])
def test_drafts_change_no_token(
    tiny_model: TinyModel, crowd: list[list[TokenOutput]], wrong_every: int
) -> None:
    engine = make_engine(tiny_model)
    engine.scheduler.drafter = Foreteller(tokens(crowd), wrong_every)
    assert tokens(outputs_of(engine, PARAMS)) == tokens(crowd)
    assert (engine.scheduler.drafter.num_accepted > 0) == (wrong_every > 1)


class Foreteller:
    """Proposes what it was told will come, with every so manieth token wrong."""

    def __init__(self, tokens: list[list[int | None]], wrong_every: int) -> None:
        self.tokens = tokens
        self.wrong_every = wrong_every
        self.num_accepted = 0

    def propose(self, sequence: Sequence, num_running: int, max_draft_tokens: int) -> list[int]:
        start = sequence.num_completion_tokens
        coming = self.tokens[int(sequence.request_id)][start : start + min(4, max_draft_tokens)]
        return [
            (token + 1) % 256 if (start + i) % self.wrong_every == 0 else token
            for i, token in enumerate(coming)
            if token is not None
        ]

    def observe(self, sequence: Sequence, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.num_accepted += num_accepted_tokens


def test_min_tokens_holds_as_long_as_the_form_can_go_on(tiny_model: TinyModel) -> None:
    optional, fixed = outputs_of(
        make_engine(tiny_model),
        [
            SamplingParams(regex="a{2,30}", min_tokens=12, max_tokens=40, temperature=0),
            SamplingParams(regex="a{5}", min_tokens=12, max_tokens=40, temperature=0),
        ],
    )
    assert len(text_of(optional)) >= 12
    assert text_of(fixed) == "aaaaa"


def test_a_stop_token_ends_a_form_early(tiny_model: TinyModel) -> None:
    params = SamplingParams(regex="a*b{30}", stop_token_ids=(ord("b"),), logit_bias={98: 50.0})
    (outputs,) = outputs_of(make_engine(tiny_model), [params])
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].token_id == ord("b")


class Exhausted:
    """A constraint that gives up after some tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_left = num_tokens

    def allowed_tokens(self) -> bytes:
        if self.num_left == 0:
            raise ConstraintFailed("it is too costly to follow")
        return b"\xff" * 40

    def advance(self, token_id: int) -> bool:
        self.num_left -= 1
        return True

    def rollback(self, num_tokens: int) -> None:
        self.num_left += num_tokens

    def fork(self) -> Exhausted:
        return Exhausted(self.num_left)


def test_a_form_that_becomes_too_costly_fails_its_request_alone(tiny_model: TinyModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=30)
    (expected,) = outputs_of(make_engine(tiny_model), [params])
    engine = make_engine(tiny_model)
    costly = replace(params, regex="x")
    engine.add(engine.new_sequence("1", prompt(9, 9), costly, constraint=Exhausted(7)))
    engine.add(engine.new_sequence("0", prompt(20, 0), params))
    outputs: dict[str, list[TokenOutput]] = {"0": [], "1": []}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert tokens([outputs["0"]]) == tokens([expected])
    assert outputs["1"][-1].finish_reason is FinishReason.ERROR
    assert outputs["1"][-1].error == "it is too costly to follow"
    assert len(outputs["1"]) <= 8


def test_every_sample_follows_the_form_and_the_prompt_is_reported_once(
    tiny_model: TinyModel,
) -> None:
    params = SamplingParams(regex="[a-z]{3,9}", n=4, seed=1, max_tokens=20, prompt_logprobs=0)
    engine = make_engine(tiny_model, num_blocks=9)
    constraint = TOKENIZER.constraint(params, engine.vocab_size, engine.eos_token_ids)
    engine.add(engine.new_sequence("r", prompt(40, 3), params, constraint=constraint))
    samples: list[list[TokenOutput]] = [[] for _ in range(4)]
    while engine.has_work:
        for output in engine.step():
            samples[output.index].append(output)
    texts = [text_of(outputs) for outputs in samples]
    assert all(re.fullmatch("[a-z]{3,9}", text) for text in texts)
    assert len(set(texts)) > 1
    reported = [sum(len(output.prompt_logprobs) for output in outputs) for outputs in samples]
    assert reported == [39, 0, 0, 0]
