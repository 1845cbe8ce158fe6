"""All rows at once give what each would alone, and nothing of it waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.server.engine import sampler
from lowbit.server.engine.adjustments import Row, adjust
from lowbit.server.engine.sampler import Sampler
from lowbit.server.engine.sequence import Sequence
from lowbit.server.engine.transfer import Download
from lowbit.server.types import SamplingParams
from plain_sampler import choose

VOCAB = 700


def rarely(strategy: st.SearchStrategy[Any], default: Any) -> st.SearchStrategy[Any]:
    return st.one_of(st.just(default), st.just(default), strategy)


TOKENS = st.integers(0, VOCAB - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5, 10.0]),
    top_k=rarely(st.integers(1, VOCAB + 50), 0),
    top_p=rarely(st.floats(0.01, 0.999), 1.0),
    min_p=rarely(st.floats(0.001, 1.0), 0.0),
    presence_penalty=rarely(st.floats(-2, 2), 0.0),
    frequency_penalty=rarely(st.floats(-2, 2), 0.0),
    repetition_penalty=rarely(st.floats(0.1, 10), 1.0),
    logit_bias=rarely(st.dictionaries(TOKENS, st.floats(-100, 100), max_size=9), {}),
    allowed_token_ids=rarely(st.lists(TOKENS, max_size=40, unique=True).map(tuple), ()),
    min_tokens=rarely(st.integers(0, 12), 0),
    top_logprobs=rarely(st.integers(0, 20), 0),
    max_tokens=st.just(100),
)
MASKS = rarely(st.binary(max_size=VOCAB // 8 + 1), None)


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=20))
    return Sequence(
        request_id="r",
        token_ids=prompt + draw(st.lists(TOKENS, max_size=20)),
        num_prompt_tokens=len(prompt),
        max_tokens=100,
        params=draw(PARAMS),
        stop_token_ids=frozenset(draw(st.lists(st.integers(0, VOCAB + 9), max_size=3))),
        seed=draw(st.integers(0, 2**63 - 1)),
    )


BATCHES = st.lists(st.tuples(sequences(), MASKS), min_size=1, max_size=9)
SEEDS = st.integers(0, 2**32)
SPREADS = st.sampled_from([0.1, 3.0, 20.0])  # of the logits: flat to steep


@settings(max_examples=150, deadline=None)
@given(batch=BATCHES, seed=SEEDS, spread=SPREADS)
def test_rows_together_are_the_very_same_as_one_by_one(
    batch: list[tuple[Sequence, bytes | None]], seed: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(VOCAB, generator=generator) for _ in batch]
    logits = spread * torch.stack([torch.linspace(-1, 1, VOCAB)[order] for order in orders])
    members = [sequence for sequence, _ in batch]
    masks = [() if mask is None else (mask,) for _, mask in batch]
    results = Sampler().draw(logits, members, masks).wait()
    for row, (sequence, mask), result in zip(logits, batch, results, strict=True):
        expected = choose(row, sequence, mask)
        if expected is None:
            assert "no token that is allowed" in result.error
        else:
            assert result.tokens == (expected,)


# Where there is a GPU, a step must not wait for it before its tokens are known.

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 7, "top_p": 0.9, "min_p": 0.01},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"logit_bias": {5: 2.0, 9: -100.0}, "min_tokens": 50},
    {"allowed_token_ids": (1, 2, 3), "top_logprobs": 5},
]


def crowd(kinds: list[dict[str, Any]]) -> list[Sequence]:
    return [
        Sequence(
            request_id=str(i),
            token_ids=[3, 1, 4, 1, 5, 9, 2, 6],
            num_prompt_tokens=3,
            max_tokens=100,
            params=SamplingParams(**kind),
            stop_token_ids=frozenset({2}),
            seed=i,
        )
        for i, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("kinds", [KINDS, *([kind] for kind in KINDS)], ids=str)
def test_one_copy_to_the_host_per_step(
    kinds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that have a device and no numbers refuse every question for a number."""
    copies = []

    def columns(download: Download) -> list[list[float]]:
        copy = download.wait()
        assert copy.device.type == "meta" and copy.numel() <= 20 * len(kinds)
        copies.append(copy)
        return torch.ones(copy.shape).t().tolist()

    monkeypatch.setattr(sampler, "_columns", columns)
    logits = torch.empty(len(kinds), VOCAB, device="meta")
    masks = [(b"\xff" * 40,)] + [()] * (len(kinds) - 1)
    draws = Sampler(looks=False).draw(logits, crowd(kinds), masks)
    assert draws.tokens.device.type == "meta" and not copies
    assert [result.tokens[0].token_id for result in draws.wait()] == [1] * len(kinds)
    assert len(copies) == 1


def test_unsettled_rows_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that a distribution reaches beyond the candidates is known only with the tokens."""
    answers = iter([0.0, 1.0])

    def columns(download: Download) -> list[list[float]]:
        found = torch.ones(download.wait().shape).t().tolist()
        found[-1] = [1.0, next(answers)]
        return found

    monkeypatch.setattr(sampler, "_columns", columns)
    logits = torch.empty(2, 5000, device="meta")
    Sampler(looks=False).draw(logits, crowd([{}, {"top_p": 0.99}])).wait()
    assert next(answers, None) is None


@settings(max_examples=60, deadline=None)
@given(batch=BATCHES, seed=SEEDS, spread=SPREADS)
def test_who_looks_later_sees_the_same(
    batch: list[tuple[Sequence, bytes | None]], seed: int, spread: float
) -> None:
    """Also where the logits are gone by then; and `is_revised` tells which tokens have changed."""
    logits = spread * torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed))
    members = [sequence for sequence, _ in batch]
    masks = [() if mask is None else (mask,) for _, mask in batch]
    expected = Sampler().draw(logits, members, masks).wait()
    draws = Sampler(looks=False).draw(logits, members, masks)
    first = draws.tokens.tolist()
    logits.fill_(torch.nan)
    results = draws.wait()
    assert [(r.tokens, r.error) for r in results] == [(e.tokens, e.error) for e in expected]
    assert not any(each.is_revised for each in expected)
    for token, result in zip(first, results, strict=True):
        if result.tokens:
            assert result.is_revised == (result.tokens[0].token_id != token)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(sequences(), min_size=1, max_size=9),
    last=st.lists(TOKENS, min_size=9, max_size=9),
    seed=st.integers(0, 2**32),
)
def test_a_pending_token_counts_like_a_known_one(
    batch: list[Sequence], last: list[int], seed: int
) -> None:
    """The host need not have the last token to penalize it, or to count it."""
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed))
    pending = torch.tensor(last[: len(batch)])
    for sequence in batch:
        sequence.num_pending_tokens = 1
    ahead = Sampler().draw(logits, batch, pending=pending).wait()
    for sequence, token in zip(batch, last, strict=False):
        sequence.num_pending_tokens = 0
        sequence.token_ids.append(token)
    assert ahead == Sampler().draw(logits, batch).wait()


def test_what_asks_for_no_change_is_not_copied() -> None:
    logits = torch.randn(2, VOCAB)
    rows = [Row(sequence, 0, None) for sequence in crowd([{}, {"top_k": 3}])]
    assert adjust(logits, rows) is logits
