"""A prescribed form (JSON schema, regex, grammar, choices) to a TokenConstraint, by llguidance.

Nothing of a request is compiled without bounds: its text is bounded by SamplingParams, what is
built from it by llguidance's own counters, and what those do not count is refused here.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Self

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from ..types import ConstraintFailed, InvalidRequest, SamplingParams, TokenConstraint

_MAX_CACHED = 16  # compiled forms; each may hold 20,000 lexer states of 1 to 2 kB
_MAX_ERROR_CHARACTERS = 300
# A multipleOf becomes an automaton with a state for every remainder, which no counter stops:
# 1,000,003 takes 9 s and 360 MB. Those that come together at one number multiply.
_MAX_COMMON_MULTIPLE = 10_000
_MAX_REMAINDERS = 50_000
# These embed other languages in a grammar, past the checks of this module.
_FOREIGN_DIRECTIVE = re.compile(r"%\s*(json|regex|lark|llguidance|declare|override|extend)\b")


class ConstraintCompiler:
    """Compiles for one tokenizer, one form at a time. Threads may share it.

    `tokenizer_json` is that of the tokenizers library; `vocab_size` the model's, which may be
    larger than the tokenizer's. Compiling lets other Python threads run.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        if not eos_token_ids:
            raise InvalidRequest(
                "structured output is asked for; this model has no end-of-sequence token to end it"
            )
        try:
            self._tokenizer = LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos_token_ids)
            )
        except ValueError as error:
            raise InvalidRequest(
                f"structured output is asked for; this model's tokenizer has none: {error}"
            ) from error
        self._limits = LLParserLimits(
            initial_lexer_fuel=1_000_000,
            step_lexer_fuel=200_000,
            step_max_items=50_000,
            max_lexer_states=20_000,
            max_grammar_size=100_000,
            verbose_errors=False,
        )
        self._eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._compiled: OrderedDict[tuple[str, str | tuple[str, ...]], LLMatcher] = OrderedDict()

    def compile(self, params: SamplingParams) -> GrammarConstraint:
        """For one completion. Raises InvalidRequest that names the field and says why."""
        form = params.structured_output
        assert form is not None
        with self._lock:
            if form not in self._compiled:
                self._compiled[form] = self._compile(*form)
            self._compiled.move_to_end(form)
            if len(self._compiled) > _MAX_CACHED:
                self._compiled.popitem(last=False)
            return GrammarConstraint(self._compiled[form].deep_copy(), self._eos_token_ids)

    def _compile(self, name: str, value: str | tuple[str, ...]) -> LLMatcher:
        try:
            grammar = _GRAMMARS[name](value)
        except (ValueError, RecursionError) as error:
            raise _refusal(name, str(error)) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        first = matcher.deep_copy()
        first.compute_bitmask()  # here it shows if nothing matches
        if first.is_error():
            raise _refusal(name, first.get_error())
        return matcher


class GrammarConstraint(TokenConstraint):
    """See TokenConstraint."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = eos_token_ids
        # A matcher that can take nothing more allows the end, but does not count it.
        self._num_ends = 0

    def allowed_tokens(self) -> bytes:
        allowed = self._matcher.compute_bitmask()
        self._check()
        return allowed

    def advance(self, token_id: int) -> bool:
        if self._matcher.is_stopped():
            is_end = token_id in self._eos_token_ids
            self._num_ends += is_end
            return is_end
        taken = self._matcher.try_consume_tokens([token_id])
        self._check()
        return taken == 1

    def rollback(self, num_tokens: int) -> None:
        num_ends = min(num_tokens, self._num_ends)
        self._num_ends -= num_ends
        self._matcher.rollback(num_tokens - num_ends)
        self._check()

    def fork(self) -> Self:
        copy = type(self)(self._matcher.deep_copy(), self._eos_token_ids)
        copy._num_ends = self._num_ends
        return copy

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise ConstraintFailed(f"the completion's form is too costly to follow: {reason}")


def _json_grammar(schema: str) -> str:
    parsed = json.loads(schema)
    if not isinstance(parsed, dict | bool):
        raise ValueError("it must be a JSON object or boolean")
    _check_multiples(parsed)
    # Any amount of white space would let a model write nothing else for ever.
    return LLMatcher.grammar_from_json_schema(
        json.dumps(parsed), overrides={"whitespace_pattern": " ?"}
    )


def _check_multiples(schema: Any) -> None:
    multiples = [_num_remainders(value) for value in _multiples(schema)]
    common, total = math.lcm(*multiples), sum(multiples)
    if common > _MAX_COMMON_MULTIPLE or total > _MAX_REMAINDERS:
        raise ValueError(
            f"the least common multiple of all multipleOf is {common} and their sum {total}; "
            f"at most {_MAX_COMMON_MULTIPLE} and {_MAX_REMAINDERS} are allowed"
        )


def _num_remainders(value: float) -> int:
    """An upper bound: 0.25 has the remainders of 25."""
    if not 0 < value < 1e15:
        raise ValueError(f"multipleOf is {value}; it must be positive and below 1e15")
    number = Decimal(repr(value))
    _, digits, _ = number.normalize().as_tuple()
    return max(math.ceil(number), int("".join(map(str, digits))))


def _multiples(schema: Any) -> Iterator[float]:
    if isinstance(schema, dict):
        value = schema.get("multipleOf")
        if isinstance(value, int | float):
            yield value
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _multiples(part)


def _grammar(text: str) -> str:
    found = _FOREIGN_DIRECTIVE.search(text)
    if found is not None:
        raise ValueError(f"%{found[1]} is not supported; %import and %ignore are")
    return grammar_from("grammar", text)


def _choice_grammar(choices: tuple[str, ...]) -> str:
    if "" in choices:
        raise ValueError("a choice is empty; each must have at least 1 character")
    return grammar_from("choice", json.dumps(choices))


_GRAMMARS: dict[str, Any] = {
    "json_schema": _json_grammar,
    "regex": LLMatcher.grammar_from_regex,
    "grammar": _grammar,
    "choice": _choice_grammar,
}


def _refusal(name: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"{name} cannot be compiled: {_one_line(reason)}")


def _one_line(text: str) -> str:
    return " ".join(text.replace("<non-verbose/>", "").split())[:_MAX_ERROR_CHARACTERS]
