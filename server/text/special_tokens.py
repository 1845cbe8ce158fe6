"""Keeps what people write from becoming special tokens. Knows text and a tokenizers.Tokenizer."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from typing import Final

from tokenizers import Tokenizer

# Models write these themselves, as marks in their text, and templates look for them in it.
_TAG: Final = re.compile(r"</?\w+>")


class SpecialTokenGuard:
    """Encodes text in which special tokens go by secret names.

    A copy of the tokenizer knows each special token under a random name that nobody can write.
    `admit` puts the names in, where the text is the template's; what people wrote keeps its
    spelling, which means nothing to the copy. All else of the tokenizer (normalization, splitting,
    the spaces that it adds or strips around special tokens) works as ever.

    Special are the tokens that say so, and those added to the vocabulary that the chat template
    writes: some models' role markers are not declared special.
    """

    def __init__(self, backend: Tokenizer, chat_template: object) -> None:
        template = str(chat_template or "")
        added = [
            token
            for token in backend.get_added_tokens_decoder().values()
            if token.special or (token.content.strip() and token.content in template)
        ]
        self._names = {token.content: _secret() for token in added}
        self._spellings = {_secret(): token.content for token in added} | {_secret(): ""}
        *hidden, self._gap = self._spellings
        self._hidden = {self._spellings[name]: name for name in hidden}
        self._longest = max(map(len, self._names), default=0)
        self._special = _any_of(self._names)
        self._lenient = _any_of(
            token.content for token in added if token.special or not _TAG.fullmatch(token.content)
        )
        self._renamed = _rename(backend, self._names)

    def admit(self, text: str) -> str:
        """The text with every special token in it under its secret name."""
        return self._special.sub(lambda found: self._names[found[0]], text)

    def mark(self, text: str, *, by_model: bool = False) -> str:
        """What somebody wrote, safe from `admit`, in whatever text it becomes a part of.

        In what the model wrote tags such as `</think>` stay what they are, unless they are declared
        special.
        """
        pattern = self._lenient if by_model else self._special
        gap = self._gap
        before = gap if self._could_complete(text) else ""
        after = gap if self._could_begin(text) else ""
        return before + pattern.sub(lambda found: self._hidden[found[0]], text) + after

    def unmark(self, text: str) -> str:
        """Undo `mark`."""
        for name, spelling in self._spellings.items():
            text = text.replace(name, spelling)
        return text

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of a text whose special tokens have their secret names."""
        (encoding,) = self._renamed.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding.ids

    def _could_complete(self, text: str) -> bool:
        """Whether a special token can end in the text's beginning, or hold all of it."""
        start = text[: self._longest]
        return any(
            any(start.startswith(name[cut:]) for cut in range(1, len(name))) or start in name[1:-1]
            for name in self._names
        )

    def _could_begin(self, text: str) -> bool:
        """Whether a special token can begin in the text's end."""
        end = text[-self._longest :]
        return any(
            any(end.endswith(name[:cut]) for cut in range(1, len(name))) for name in self._names
        )


def _secret() -> str:
    # Noncharacters: valid in a text, without a meaning in any, and in nobody's vocabulary.
    return f"\ufdd0{secrets.token_hex(8)}\ufdd1"


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _rename(backend: Tokenizer, names: dict[str, str]) -> Tokenizer:
    """A copy that knows these tokens under other names, by the same ids."""
    tokenizer = json.loads(backend.to_str())
    for token in tokenizer["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = tokenizer["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): each for text, each in model["vocab"].items()}
    else:  # Unigram: pairs of a piece and its score
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return Tokenizer.from_str(json.dumps(tokenizer))
