from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from lowbit.server.text.detokenizer import Detokenizer
from tokenizers import Tokenizer, decoders, models

SPECIAL = -1


@dataclass
class ByteVocabulary:
    """Tokens are any bytes; an id is a position in `tokens`."""

    tokens: list[bytes] = field(default_factory=list)
    longest_window: int = 0
    num_decodes: int = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        self.longest_window = max(self.longest_window, len(token_ids))
        self.num_decodes += 1
        return b"".join(self.tokens[token_id] for token_id in token_ids).decode("utf-8", "replace")


def detokenize(
    decode: object, token_ids: Sequence[int], stop: Sequence[str] = (), context: Sequence[int] = ()
) -> list[str]:
    """What each token brings, and what the end brings."""
    detokenizer = Detokenizer(
        decode,  # type: ignore[arg-type]
        special_token_ids=frozenset({SPECIAL}),
        stop=stop,
        context=context,
    )
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.stopped:
            return pieces
    return [*pieces, detokenizer.finish()]


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Generation ends as soon as any stop string is complete; the longest one of those counts."""
    matches = [(text.find(each) + len(each), text.find(each)) for each in stop if each in text]
    return text[: min(matches)[1]] if matches else text


def split(data: bytes, lengths: Sequence[int]) -> list[bytes]:
    """Pieces of these lengths, over and over."""
    pieces = []
    while data:
        length = lengths[len(pieces) % len(lengths)]
        pieces.append(data[:length])
        data = data[length:]
    return pieces


# Few letters, so that stop strings match, overlap and nearly match.
texts = st.text(alphabet="ab\n é€😀\N{REPLACEMENT CHARACTER}", max_size=80) | st.text(max_size=40)
stops = st.lists(st.text(alphabet="ab\n é€😀", min_size=1, max_size=5), max_size=4)
token_lengths = st.lists(st.integers(1, 6), min_size=1, max_size=7)


@given(text=texts, stop=stops, lengths=token_lengths, special=st.sets(st.integers(0, 60)))
def test_the_pieces_are_the_text_up_to_the_first_stop_string(
    text: str, stop: list[str], lengths: list[int], special: set[int]
) -> None:
    vocabulary = ByteVocabulary(split(text.encode(), lengths))
    token_ids = list(range(len(vocabulary.tokens)))
    for position in sorted(special):
        token_ids.insert(position, SPECIAL)
    pieces = detokenize(vocabulary.decode, token_ids, stop)
    assert "".join(pieces) == cut_at_stop(text, stop)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(data=st.binary(max_size=120), lengths=token_lengths)
def test_bytes_that_are_no_text_come_out_as_in_one_go(data: bytes, lengths: list[int]) -> None:
    vocabulary = ByteVocabulary(split(data, lengths))
    token_ids = range(len(vocabulary.tokens))
    assert "".join(detokenize(vocabulary.decode, token_ids)) == data.decode("utf-8", "replace")


@given(data=st.binary(max_size=120))
def test_a_real_byte_level_tokenizer(data: bytes) -> None:
    backend = byte_tokenizer().backend_tokenizer
    assert "".join(detokenize(backend.decode, data)) == backend.decode(list(data))


def sentencepiece_like(words: Sequence[str]) -> Tokenizer:
    """Ids 0 to 255 are bytes; words follow, with a leading space where they have one."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += [word.replace(" ", "▁") for word in words]
    backend = Tokenizer(
        models.BPE(
            vocab={name: token_id for token_id, name in enumerate(names)},
            merges=[],
            byte_fallback=True,
        )
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return backend


WORDS = (" a", "b", " ", "  ", " cd", ".", "\n")
PIECES = [[256 + i] for i in range(len(WORDS))] + [list(letter.encode()) for letter in "é€😀ÿ"]
pieces_of_tokens = st.lists(st.sampled_from(PIECES), max_size=60)


@given(prompt=pieces_of_tokens, completion=pieces_of_tokens)
def test_byte_fallback_and_leading_spaces(
    prompt: list[list[int]], completion: list[list[int]]
) -> None:
    backend = sentencepiece_like(WORDS)
    before, after = list(chain(*prompt)), list(chain(*completion))
    assert "".join(detokenize(backend.decode, after)) == backend.decode(after)
    whole = backend.decode(before + after)
    if backend.decode(before):
        text = "".join(detokenize(backend.decode, after, context=before))
        assert text == whole.removeprefix(backend.decode(before))


def test_a_character_comes_with_its_last_token() -> None:
    vocabulary = ByteVocabulary([b"a\xf0", b"\x9f", b"\x98\x80b"])
    assert detokenize(vocabulary.decode, [0, 1, 2]) == ["", "", "a😀b", ""]


def test_an_incomplete_character_comes_at_the_end() -> None:
    vocabulary = ByteVocabulary([b"a", b"\xf0\x9f"])
    assert detokenize(vocabulary.decode, [0, 1]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_what_may_begin_a_stop_string_is_held_until_it_is_decided() -> None:
    vocabulary = ByteVocabulary([b"x", b"E", b"N", b"E", b"N", b"D", b"y"])
    assert detokenize(vocabulary.decode, range(7), ["END"]) == ["x", "", "", "EN", "", ""]
    assert detokenize(vocabulary.decode, range(5), ["END"]) == ["x", "", "", "EN", "", "EN"]


@pytest.mark.parametrize("tokens", [[b"abcd"], [b"a", b"b", b"c", b"d"], [b"ab", b"cd"]])
def test_the_stop_string_that_ends_first_wins_however_the_text_is_cut(tokens: list[bytes]) -> None:
    vocabulary = ByteVocabulary(tokens)
    assert "".join(detokenize(vocabulary.decode, range(len(tokens)), ["abcd", "bc"])) == "a"


@pytest.mark.parametrize("token", [b"word ", b"\xff", "€".encode()[:2], "\ufffd".encode()])
def test_a_token_costs_the_same_at_any_length(token: bytes) -> None:
    vocabulary = ByteVocabulary([token])
    text = "".join(detokenize(vocabulary.decode, [0] * 2000))
    assert text == (token * 2000).decode("utf-8", "replace")
    assert vocabulary.longest_window <= 32
    assert vocabulary.num_decodes <= 2 * 2000 + 2


@given(
    st.lists(st.sampled_from([b"a", b" b", "é".encode()[:1], "é".encode()[1:], b"\xf0\x9f", b"!"])),
    st.lists(st.integers(1, 30), min_size=1),
    st.sampled_from([(), ("a b",), ("!",)]),
)
def test_many_at_once_say_the_same(
    tokens: list[bytes], sizes: list[int], stop: tuple[str, ...]
) -> None:
    vocabulary = ByteVocabulary(tokens)
    one_by_one = Detokenizer(vocabulary.decode, stop=stop)
    together = Detokenizer(vocabulary.decode, stop=stop)
    expected = "".join(map(one_by_one.push, range(len(tokens)))) + one_by_one.finish()
    text, start = "", 0
    for size in chain(sizes, [len(tokens)]):
        text += together.push_all(range(start, min(start + size, len(tokens))))
        start += size
    assert text + together.finish() == expected
    assert together.stop_string == one_by_one.stop_string
