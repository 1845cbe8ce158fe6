"""Sampling options over the wire, answered by a tiny random model that speaks bytes."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from byte_tokenizer import byte_tokenizer
from lowbit.kernels.cpu import CpuBackend
from lowbit.server.client import AsyncClient
from lowbit.server.engine.model_runner import ModelRunner
from lowbit.server.model.loader import load_decoder
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import FinishReason
from serving import make_rig, running
from tiny import TinyModel

pytestmark = pytest.mark.asyncio(loop_scope="module")


class TinyRunner(ModelRunner):
    def open(self) -> None:
        """It waits for nobody."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(tiny_model: TinyModel) -> AsyncIterator[AsyncClient]:
    decoder = load_decoder(tiny_model.folder, CpuBackend())
    rig = make_rig(TinyRunner(decoder, 64, 16), tokenizer=Tokenizer(byte_tokenizer()))
    async with running(rig), AsyncClient(rig.address) as client:
        yield client
        await rig.wait_blocks_free()


async def test_candidates_come_with_every_token(client: AsyncClient) -> None:
    whole = await client.generate("Hello", temperature=0, max_tokens=6, top_logprobs=3)
    assert len(whole.tokens) == 6
    for token in whole.tokens:
        assert token.top_logprobs[0] == (token.id, token.logprob)  # greedy takes the best
        assert token.rank == 1
        assert len(token.top_logprobs) == 3
        assert sum(math.exp(logprob) for _, logprob in token.top_logprobs) <= 1 + 1e-6
    assert whole.prompt_tokens == ()


async def test_prompt_logprobs_come_once(client: AsyncClient) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 4, "prompt_logprobs": 2}
    whole = await client.generate("Hello", **options)
    assert [token.id for token in whole.prompt_tokens] == list(b"Hello")
    first, *rest = whole.prompt_tokens  # nothing comes before the first
    assert first.top_logprobs == () and first.rank is None
    for token in rest:
        better = sum(logprob > token.logprob for _, logprob in token.top_logprobs)
        assert token.rank is not None
        assert (token.rank == 1 + better) if better < 2 else (token.rank >= 3)
    assert all(len(token.top_logprobs) == 2 and token.logprob < 0 for token in rest)
    parts = [part async for part in client.stream("Hello", **options)]
    assert parts[0].prompt_tokens == whole.prompt_tokens
    assert all(part.prompt_tokens == () for part in parts[1:])


async def test_biases_bans_and_penalties_reach_the_engine(client: AsyncClient) -> None:
    biased = await client.generate("Hello", temperature=0, max_tokens=5, logit_bias={65: 100.0})
    assert biased.text == "AAAAA"
    allowed = await client.generate("Hello", max_tokens=30, allowed_token_ids=[66, 67], seed=1)
    assert set(allowed.text) == {"B", "C"}
    penalized = await client.generate(
        "Hello", temperature=0, max_tokens=40, allowed_token_ids=[66, 67], frequency_penalty=2.0
    )
    assert set(penalized.text) == {"B", "C"}  # each is penalized until the other one is better


@pytest.mark.parametrize(
    "form",
    [
        {"choice": ["left", "right"]},
        {"regex": "[0-9]{4}"},
        {"grammar": 'root ::= "x" [0-3] "y"'},
        {"json_schema": '{"enum": ["yes", "no", 7]}'},
    ],
    ids=lambda form: next(iter(form)),
)
async def test_a_prescribed_form_is_followed(client: AsyncClient, form: dict[str, Any]) -> None:
    for seed in range(3):
        whole = await client.generate("Hello", seed=seed, max_tokens=20, **form)
        assert whole.finish_reason is FinishReason.STOP
        match form:
            case {"choice": choices}:
                assert whole.text in choices
            case {"regex": _}:
                assert len(whole.text) == 4 and whole.text.isdigit()
            case {"grammar": _}:
                assert whole.text in ("x0y", "x1y", "x2y", "x3y")
            case _:
                assert json.loads(whole.text) in ("yes", "no", 7)


async def test_a_stop_string_ends_a_form_and_min_tokens_holds_it_off(client: AsyncClient) -> None:
    options: dict[str, Any] = {"regex": "(ab){10}", "stop": ["ba"], "max_tokens": 40}
    assert (await client.generate("Hello", **options)).text == "a"
    later = await client.generate("Hello", min_tokens=8, **options)
    assert later.text == "abababa"  # the first "ba" that begins with the eighth token or after it
    assert len(later.tokens) == 9
    assert later.finish_reason is FinishReason.STOP


async def test_a_bad_form_harms_nobody_else(client: AsyncClient) -> None:
    hostile = '{"type": "integer", "multipleOf": 1000003}'

    async def refused() -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError, match="json_schema cannot be compiled") as error:
            await client.generate("Hello", json_schema=hostile)
        return error.value

    good = client.generate("Hello", temperature=0, max_tokens=30)
    whole, *errors = await asyncio.gather(good, *(refused() for _ in range(10)))
    assert {error.code() for error in errors} == {grpc.StatusCode.INVALID_ARGUMENT}
    assert len(whole.tokens) == 30
