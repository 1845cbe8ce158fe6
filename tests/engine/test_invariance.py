"""A request's tokens are its own: whatever is shared, cached, preempted or broken around it."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
import torch
from engines import make_engine, prompt
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.model_runner import LaunchedStep
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.types import FinishReason, SamplingParams, SchedulingParams
from tiny import TinyModel

Tokens = dict[tuple[str, int], list[int]]
STEM = prompt(50, seed=100)  # three blocks and a bit
PROMPTS = {f"r{i}": STEM + prompt(5 + 9 * i, seed=i) for i in range(5)}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, seed=11, n=4, max_tokens=24, ignore_eos=True)
PARAMS = {"greedy": GREEDY, "n=4, seeded": SAMPLED}


def run(engine: LLMEngine, prompts: dict[str, list[int]], params: SamplingParams) -> Tokens:
    for request_id, tokens in prompts.items():
        engine.add(engine.new_sequence(request_id, tokens, params))
    return finish(engine)


def finish(engine: LLMEngine) -> Tokens:
    received: Tokens = defaultdict(list)
    while engine.has_work:
        for output in engine.step():
            assert output.token_id is not None
            received[output.request_id, output.index].append(output.token_id)
        engine.scheduler.check_integrity()
    return dict(received)


def alone(tiny: TinyModel, params: SamplingParams) -> Tokens:
    received: Tokens = {}
    for request_id, tokens in PROMPTS.items():
        engine = make_engine(tiny, "float32", prefix_cache=False)
        received |= run(engine, {request_id: tokens}, params)
    return received


@pytest.fixture(scope="module")
def expected(tiny_model: TinyModel) -> dict[str, Tokens]:
    return {name: alone(tiny_model, params) for name, params in PARAMS.items()}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_cache": False},
        {"max_num_seqs": 8, "max_num_batched_tokens": 13},
        {"num_blocks": 14},
        {"num_blocks": 14, "prefix_cache": False, "max_num_batched_tokens": 70},
        {"max_num_seqs": 2},
    ],
    ids=["crowd", "no cache", "chunked", "starved", "starved, no cache", "two places"],
)
def test_tokens_are_the_same_as_alone(
    tiny_model: TinyModel, expected: dict[str, Tokens], name: str, settings: dict[str, int]
) -> None:
    engine = make_engine(tiny_model, "float32", **settings)
    assert run(engine, PROMPTS, PARAMS[name]) == expected[name]


class RandomPacer:
    """Anything from nothing over one layer of a small chunk to a whole prompt."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def max_prefill_tokens(self, num_decodes: int) -> float:
        return self.rng.choice((0, 0.5, 10.0, 16.0, 20.0, 40.0))

    def observe(self, num_decodes: int, num_prefill_tokens: float, seconds: float) -> None:
        pass


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("seed", range(4))
def test_chunks_of_layers_change_no_token(
    tiny_model: TinyModel, expected: dict[str, Tokens], name: str, seed: int
) -> None:
    engine = make_engine(tiny_model, "float32", max_num_seqs=8)
    engine.scheduler.pacer = RandomPacer(seed)
    stream = SamplingParams(temperature=0, max_tokens=90, ignore_eos=True)
    engine.add(engine.new_sequence("stream", prompt(4, seed=50), stream))
    engine.step()
    num_partial = 0
    launch = engine.runner.launch

    def counting(output: SchedulerOutput, previous: object) -> LaunchedStep:
        nonlocal num_partial
        num_partial += sum(not each.completes_chunk for each in output.sequences)
        return launch(output)

    engine.runner.launch = counting
    received = run(engine, PROMPTS, PARAMS[name])
    del received["stream", 0]
    assert received == expected[name]
    assert num_partial > 0


def test_prompt_logprobs_of_a_chunk_of_layers(tiny_model: TinyModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2)
    tokens = PROMPTS["r4"]
    whole = make_engine(tiny_model, "float32")
    whole.add(whole.new_sequence("r", tokens, params))
    (expected,) = whole.step()
    engine = make_engine(tiny_model, "float32", max_num_seqs=8)
    engine.scheduler.pacer = RandomPacer(1)
    engine.add(engine.new_sequence("stream", prompt(4, seed=50), GREEDY))
    engine.step()
    engine.add(engine.new_sequence("r", tokens, params))
    news = []
    while not news:
        news = [output for output in engine.step() if output.request_id == "r"]
    assert [each.token_id for each in news[0].prompt_logprobs] == tokens[1:]
    for found, wanted in zip(news[0].prompt_logprobs, expected.prompt_logprobs, strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-5)


def test_a_second_run_finds_its_prompts_in_the_cache(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, "float32", num_blocks=200)
    first = run(engine, PROMPTS, GREEDY)
    for request_id, tokens in PROMPTS.items():
        engine.add(engine.new_sequence(request_id, tokens, GREEDY))
        outputs = engine.step()
        assert outputs[0].num_cached_tokens == (len(tokens) - 1) // 16 * 16
        assert engine.last_step.num_prefix_hit_tokens == outputs[0].num_cached_tokens
        rest = finish(engine)[request_id, 0]
        assert [outputs[0].token_id, *rest] == first[request_id, 0]


def test_the_next_turn_finds_the_answer_in_the_cache(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, "float32", num_blocks=200)
    answer = run(engine, {"a": STEM}, GREEDY)["a", 0]
    conversation = STEM + answer + prompt(7, seed=3)
    engine.add(engine.new_sequence("b", conversation, GREEDY))
    # The answer's last token was never fed back, so the cache lacks it.
    assert engine.step()[0].num_cached_tokens == (len(STEM) + len(answer) - 1) // 16 * 16


def test_tenants_share_nothing(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, "float32", num_blocks=200)
    for tenant, hit in (("a", 0), ("b", 0), ("a", 48)):
        scheduling = SchedulingParams(tenant=tenant)
        engine.add(engine.new_sequence("r", STEM, GREEDY, scheduling))
        assert engine.step()[0].num_cached_tokens == hit
        finish(engine)


def test_samples_share_the_prompts_blocks(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, "float32", prefix_cache=False)
    engine.add(engine.new_sequence("r", STEM, SAMPLED))
    engine.step()
    blocks = engine.scheduler.block_manager
    assert blocks.num_blocks - blocks.num_free_blocks == 4  # of one prompt, not of four
    assert engine.last_step.num_prompt_tokens == len(STEM)
    engine.step()
    assert blocks.num_blocks - blocks.num_free_blocks == 3 + 4  # a last block for each sample
    samples = finish(engine)
    assert len({tuple(tokens) for tokens in samples.values()}) == 4


def test_numbers_that_are_none_stay_with_their_request(
    tiny_model: TinyModel, expected: dict[str, Tokens]
) -> None:
    """One request's values become NaN in the cache; its blocks then go to others."""
    engine = make_engine(tiny_model, "float32", num_blocks=40)
    bad = prompt(60, seed=9)
    engine.add(engine.new_sequence("bad", bad, GREEDY))
    engine.step()
    for cache in engine.runner.kv_caches:
        written = cache.values.flatten(1).any(dim=1)
        assert int(written.sum()) == 4
        cache.values[written] = torch.nan
    outputs = engine.step()
    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert "not finite" in outputs[0].error
    assert run(engine, PROMPTS, GREEDY) == expected["greedy"]
