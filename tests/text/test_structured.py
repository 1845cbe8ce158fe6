"""Forms are followed to the letter, and what cannot be compiled within bounds is refused."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
from byte_tokenizer import EOS, byte_tokenizer
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import InvalidRequest, SamplingParams, TokenConstraint

VOCAB_SIZE = 320  # more than the tokenizer's
EOS_IDS = frozenset({EOS})
TOKENIZER = Tokenizer(byte_tokenizer())


def constraint_of(**form: Any) -> TokenConstraint:
    return TOKENIZER.constraint(SamplingParams(**form), VOCAB_SIZE, EOS_IDS)


def allowed_ids(constraint: TokenConstraint) -> list[int]:
    bits = constraint.allowed_tokens()
    return [i for i in range(VOCAB_SIZE) if i < 8 * len(bits) and bits[i // 8] >> (i % 8) & 1]


def accepts(constraint: TokenConstraint, text: str) -> bool:
    """Whether the text may be written and the sequence may end after it."""
    walk = constraint.fork()
    return all(walk.advance(byte) for byte in text.encode()) and EOS in allowed_ids(walk)


def wander(constraint: TokenConstraint, seed: int, max_tokens: int = 400) -> str:
    """A random text that the constraint allows, ended where it may end."""
    source = random.Random(seed)
    token_ids: list[int] = []
    while len(token_ids) < max_tokens:
        allowed = allowed_ids(constraint)
        assert allowed
        token = EOS if EOS in allowed else source.choice(allowed)
        assert constraint.advance(token)
        if token == EOS:
            return bytes(token_ids).decode()
        token_ids.append(token)
    raise AssertionError("it never ended")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "alive"],
    "additionalProperties": False,
}


def test_json_is_what_the_schema_describes() -> None:
    constraint = constraint_of(json_schema=json.dumps(SCHEMA))
    for seed in range(30):
        found = json.loads(wander(constraint.fork(), seed))
        assert list(found) == ["name", "age", "tags", "alive"]
        assert isinstance(found["name"], str) and len(found["name"]) <= 5
        assert type(found["age"]) is int and 0 <= found["age"] <= 120
        assert set(found["tags"]) <= {"a", "b"} and len(found["tags"]) <= 3
        assert type(found["alive"]) is bool


def test_any_json_object_can_be_asked_for() -> None:
    constraint = constraint_of(json_schema='{"type": "object"}')
    assert accepts(constraint, '{"a": [1, {"b": null}], "c": "é"}')
    assert not accepts(constraint, "[1]")
    assert not accepts(constraint, '{"a": 1')


@pytest.mark.parametrize(
    "expression", ["(ab|c){2,4}", "[a-f0-9]{8}", "é+x?", r"\d{3}-\d{2}", "a|bc"]
)
def test_a_regex_is_matched_as_a_whole(expression: str) -> None:
    constraint = constraint_of(regex=expression)
    for seed in range(20):
        assert re.fullmatch(expression, wander(constraint.fork(), seed))
    assert not accepts(constraint, "no such text")


@pytest.mark.parametrize(
    "grammar",
    [
        'start: sum\nsum: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/\n',
        'root ::= number ("+" number)*\nnumber ::= [1-9] [0-9]?\n',
    ],
    ids=["Lark", "GBNF"],
)
def test_a_grammar_is_followed(grammar: str) -> None:
    constraint = constraint_of(grammar=grammar)
    assert accepts(constraint, "12+3+45")
    assert not accepts(constraint, "12+")
    assert not accepts(constraint, "012")


def test_a_grammar_is_not_a_regular_expression() -> None:
    constraint = constraint_of(grammar='start: "(" start ")" | "x"')
    assert accepts(constraint, "((((x))))")
    assert not accepts(constraint, "((x)))")


def test_one_of_the_choices_is_taken() -> None:
    choices = ("yes", "no", "yes, but (maybe)", "a|b", "naïve")
    constraint = constraint_of(choice=choices)
    assert {wander(constraint.fork(), seed) for seed in range(60)} <= set(choices)
    assert all(accepts(constraint, text) for text in choices)
    assert not accepts(constraint, "a")


def test_special_tokens_are_never_part_of_a_text() -> None:
    constraint = constraint_of(regex="(.|\n)*")
    assert set(allowed_ids(constraint)) & set(range(256, VOCAB_SIZE)) == {EOS}


def test_rollback_and_fork() -> None:
    constraint = constraint_of(regex="abc")
    start = constraint.allowed_tokens()
    assert constraint.advance(ord("a")) and constraint.advance(ord("b"))
    fork = constraint.fork()
    assert not constraint.advance(ord("x"))
    assert allowed_ids(constraint) == [ord("c")]
    assert constraint.advance(ord("c")) and constraint.advance(EOS)
    constraint.rollback(4)
    assert constraint.allowed_tokens() == start
    assert allowed_ids(fork) == [ord("c")]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"json_schema": "{"}, "Expecting property name"),
        ({"json_schema": "[]"}, "it must be a JSON object or boolean"),
        ({"json_schema": '{"type": "nonsense"}'}, "Invalid type: nonsense"),
        ({"json_schema": '{"not": {"type": "string"}}'}, "Unimplemented keys"),
        ({"json_schema": '{"$ref": "file:///etc/passwd"}'}, "not present in a registry"),
        ({"json_schema": '{"$ref": "http://127.0.0.1:9/x"}'}, "not present in a registry"),
        ({"regex": "((("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": ""}, "Failed to convert"),
        ({"grammar": "start: nothing"}, "unknown name"),
        ({"grammar": "start: start"}, ""),
        ({"grammar": 'start: %json {"multipleOf": 1000003}'}, "%json is not supported"),
        ({"choice": ("a", "")}, "a choice is empty"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_form_that_means_nothing_is_refused_by_name(form: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        InvalidRequest, match=rf"^{next(iter(form))} cannot be compiled: "
    ) as refusal:
        constraint_of(**form)
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)


def nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


HOSTILE: dict[str, dict[str, Any]] = {
    "multiples": {"json_schema": '{"type": "integer", "multipleOf": 1000003}'},
    "multiples that meet": {
        "json_schema": '{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967, "type": "number"}]}'
    },
    "many multiples": {
        "json_schema": json.dumps(
            {"anyOf": [{"properties": {f"k{i}": {"multipleOf": 10_000}}} for i in range(600)]}
        )
    },
    "small multiples": {"json_schema": '{"type": "number", "multipleOf": 0.01234567}'},
    "deep schema": {"json_schema": nested(3000)},
    "product of alternatives": {
        "json_schema": json.dumps(
            {
                "allOf": [
                    {"oneOf": [{"required": [f"k{i}_{j}"]} for j in range(6)]} for i in range(12)
                ]
            }
        )
    },
    "intersection": {
        "json_schema": json.dumps(
            {
                "type": "string",
                "allOf": [{"pattern": f"^(a|b)*{'ab'[i % 2]}(a|b){{{9 + i}}}$"} for i in range(12)],
            }
        )
    },
    "deep regex": {"regex": "(" * 30_000 + "a" + ")" * 30_000},
    "deep grammar": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "deep GBNF": {"grammar": "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000},
}


@pytest.mark.parametrize("form", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_form_is_refused_soon(form: dict[str, Any]) -> None:
    started = time.monotonic()
    with pytest.raises(InvalidRequest, match=" cannot be compiled: "):
        constraint_of(**form)
    assert time.monotonic() - started < 2


def test_multiples_of_common_size_are_served() -> None:
    schema = {
        "type": "object",
        "properties": {
            "price": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 99},
            "dozen": {"type": "integer", "multipleOf": 12, "minimum": 0, "maximum": 999},
        },
        "required": ["price", "dozen"],
        "additionalProperties": False,
    }
    constraint = constraint_of(json_schema=json.dumps(schema))
    for seed in range(20):
        found = json.loads(wander(constraint.fork(), seed))
        assert found["dozen"] % 12 == 0
        assert found["price"] * 100 == pytest.approx(round(found["price"] * 100), abs=1e-9)


def test_a_form_is_compiled_once() -> None:
    schema = json.dumps(
        {"anyOf": [{"properties": {f"k{i}": {"type": "integer"}}} for i in range(400)]}
    )
    times = []
    for _ in range(5):
        started = time.perf_counter()
        constraint_of(json_schema=schema)
        times.append(time.perf_counter() - started)
    assert min(times[1:]) < times[0] / 3


def test_a_model_without_an_end_cannot_end_a_form() -> None:
    with pytest.raises(InvalidRequest, match="no end-of-sequence token"):
        Tokenizer(byte_tokenizer()).constraint(SamplingParams(regex="a"), VOCAB_SIZE, frozenset())
