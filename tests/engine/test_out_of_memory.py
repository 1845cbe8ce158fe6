"""A device that runs out of memory in a step: the step shrinks, or one request fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import make_engine, prompt
from lowbit.kernels.cpu import CpuBackend, CpuPlan
from lowbit.kernels.interface import ForwardBatch
from lowbit.server.config import EngineConfig
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.profile import largest_step_bytes, warm_up
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import FinishReason, SamplingParams
from tiny import TinyModel

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


class SmallDevice(CpuBackend):
    """Has memory for so many tokens at a time, and for contexts of that length."""

    def __init__(self, max_tokens: int, max_context: int = 10**6) -> None:
        super().__init__("bfloat16")
        self.max_tokens = max_tokens
        self.max_context = max_context
        self.num_failures = 0

    def plan_attention(self, batch: ForwardBatch) -> CpuPlan:
        plan = super().plan_attention(batch)
        num_tokens = int(batch.query_start[-1])
        if num_tokens > self.max_tokens or int(batch.context_lens.max()) > self.max_context:
            self.num_failures += 1
            raise torch.OutOfMemoryError("injected")
        return plan


def completions(
    engine: LLMEngine, prompts: dict[str, list[int]], params: SamplingParams = GREEDY
) -> tuple[dict[str, list[int]], dict[str, str]]:
    """(tokens, errors) by request, with the engine's books checked after every step."""
    tokens: dict[str, list[int]] = {name: [] for name in prompts}
    errors = {}
    for name, token_ids in prompts.items():
        engine.add(engine.new_sequence(name, token_ids, params))
    while engine.has_work:
        for output in engine.step():
            if output.finish_reason is FinishReason.ERROR:
                errors[output.request_id] = output.error
            else:
                assert output.token_id is not None
                tokens[output.request_id].append(output.token_id)
        engine.scheduler.check_integrity()
    blocks = engine.scheduler.block_manager
    assert blocks.num_free_blocks == blocks.num_blocks
    return tokens, errors


PROMPTS = {f"r{i}": prompt(length, i) for i, length in enumerate((30, 7, 1, 45, 16, 2))}


@pytest.fixture(scope="module")
def expected(tiny_model: TinyModel) -> dict[str, list[int]]:
    tokens, errors = completions(make_engine(tiny_model), PROMPTS)
    assert not errors
    return tokens


@pytest.mark.parametrize("max_tokens", [1, 5, 40])
def test_a_step_that_does_not_fit_is_computed_in_parts(
    tiny_model: TinyModel, expected: dict[str, list[int]], max_tokens: int
) -> None:
    device = SmallDevice(max_tokens)
    tokens, errors = completions(make_engine(tiny_model, backend=device), PROMPTS)
    assert device.num_failures > 0
    assert not errors
    assert tokens == expected


def test_parts_of_prompts_report_all_their_logprobs(tiny_model: TinyModel) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=2)
    reports = []
    for backend in (None, SmallDevice(6)):
        engine = make_engine(tiny_model, backend=backend)
        engine.add(engine.new_sequence("r", prompt(40, 3), params))
        first, *_ = (output for _ in range(2) for output in engine.step())
        reports.append(first.prompt_logprobs)
    assert len(reports[0]) == 39
    for ours, theirs in zip(*reports, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_a_sequence_that_fits_in_no_way_fails_alone(
    tiny_model: TinyModel, expected: dict[str, list[int]]
) -> None:
    """r0 and r3 grow beyond 35 tokens; one while it decodes, the other with its prompt."""
    device = SmallDevice(10**6, max_context=35)
    engine = make_engine(tiny_model, backend=device)
    tokens, errors = completions(engine, PROMPTS)
    assert errors.keys() == {"r0", "r3"}
    assert all(
        error.startswith("out of memory: the device has no room") for error in errors.values()
    )
    assert tokens["r0"] == expected["r0"][:6]
    assert tokens["r3"] == []
    for name in PROMPTS.keys() - errors.keys():
        assert tokens[name] == expected[name]
    # The server goes on.
    assert completions(engine, {"again": PROMPTS["r1"]})[0]["again"] == expected["r1"]


def test_many_requests_that_fail_in_a_row_do_not_end_the_server(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, backend=SmallDevice(10**6, max_context=10))
    for i in range(5):
        _, errors = completions(engine, {f"r{i}": prompt(20, i)})
        assert errors.keys() == {f"r{i}"}


def test_a_chunk_that_is_spread_over_layers_is_not_computed_twice(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in sampling, after the chunk went through its layers."""

    def run(failing: bool) -> dict[str, list[int]]:
        engine = make_engine(tiny_model, max_itl_stretch=1.01)
        sampler = engine.runner.sampler
        plain = sampler.draw
        calls: Iterator[int] = iter(range(10**6))

        def draw(*arguments: object) -> object:
            if failing and next(calls) % 3 == 2:
                raise torch.OutOfMemoryError("injected")
            return plain(*arguments)

        monkeypatch.setattr(sampler, "draw", draw)
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        prompts = {name: PROMPTS[name] for name in ("r1", "r2", "r5")}
        for name, token_ids in prompts.items():
            engine.add(engine.new_sequence(name, token_ids, params))
        tokens: dict[str, list[int]] = {}
        spread = False
        for step in range(1000):
            if step == 20:
                engine.add(engine.new_sequence("long", prompt(100, 9), GREEDY))
            for output in engine.step():
                assert not output.error
                tokens.setdefault(output.request_id, []).append(output.token_id or 0)
            spread |= any(each.partial for each in engine.scheduler._prefilling)
            if not engine.has_work:
                break
        assert spread
        assert not failing or next(calls) > 30
        return tokens

    assert run(failing=True) == run(failing=False)


# Steps before there are requests


class Meter:
    def __init__(self) -> None:
        self.num_starts = 0

    def start(self) -> None:
        self.num_starts += 1

    def peak_bytes(self) -> int:
        return 12345


def test_the_profiled_step_is_the_largest_there_is(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[ForwardBatch] = []
    backend = CpuBackend("bfloat16")
    plain = backend.plan_attention
    monkeypatch.setattr(
        backend, "plan_attention", lambda batch: (batches.append(batch), plain(batch))[1]
    )
    decoder = load_decoder(tiny_model.folder, backend)
    config = EngineConfig(max_num_seqs=7, max_num_batched_tokens=100)
    meter = Meter()
    assert largest_step_bytes(decoder, config, 512, meter) == 12345
    assert meter.num_starts == 1
    for batch in batches:
        assert int(batch.query_start[-1]) == 100
        assert batch.block_tables.shape == (7, 512 // 16)


def test_warming_up_touches_no_block_of_a_sequence(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model, num_blocks=8)
    caches = engine.runner.kv_caches
    warm_up(engine.runner, EngineConfig(max_num_seqs=20, max_num_batched_tokens=64), 512)
    for cache in caches:
        assert not cache.keys[:8].any()
        assert cache.keys[8].any()
    assert completions(engine, {"r": PROMPTS["r1"]})[0]["r"]
