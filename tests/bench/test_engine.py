"""The engine benchmark, small: what it prints was measured, and what it leaves out it says."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import load_backend
from lowbit.kernels.packing import DenseWeight, PackedWeight, dequantize
from lowbit.server.bench import engine as bench
from lowbit.server.bench.engine import Bench, Case, Measured, Missing, Settings
from lowbit.server.bench.stopwatch import Marks
from lowbit.server.bench.subjects import SHAPES, Shape, shape_subjects
from lowbit.server.bench.timing import time_on_host
from lowbit.server.cli import main
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.model.decoder import Decoder
from lowbit.server.model.families import read_config
from lowbit.server.model.random_weights import RandomCheckpoint
from recorders import EagerRecorder
from tiny import TinyModel, build_tiny_model

SMALL = Shape(
    name="small",
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    group_size=32,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("bench") / "tiny")


@pytest.fixture
def small_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)


def small_bench(clock: Callable[[], float] = time.perf_counter, **changes: Any) -> Bench:
    options = {"batches": (1, 3), "contexts": (32, 64), "prefill_tokens": 48, **changes}
    return Bench(
        backend=CpuBackend(),
        timer=time_on_host,
        bytes_per_second=1e10,
        settings=Settings(**options),
        clock=clock,
    )


def test_a_checkpoint_is_measured_in_every_case(
    tiny: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = ["--batches", "1", "3", "--contexts", "32", "64", "--prefill-tokens", "48"]
    command = ["bench", "engine", "--checkpoint", str(tiny.folder), *arguments, "--json", str(out)]
    assert main(command) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == json.loads(out.read_text())
    figures = json.loads(last)
    assert {"torch", "threads", "processor", "backend", "bytes_per_second"} <= figures.keys()
    results = figures["results"]
    assert bench.HEADING in lines
    assert len(lines) - lines.index(bench.HEADING) - 1 == len(results)
    found = {(r["kind"], r["num_seqs"], r["num_tokens"]) for r in results}
    pairs = [(b, c) for b in (1, 3) for c in (32, 64)]
    assert found == {(k, *pair) for k in ("decode", "attention") for pair in pairs} | {
        ("prefill", 1, 48)
    }
    for result in results:
        assert 0 < result["lowest_seconds"] <= result["median_seconds"] <= result["highest_seconds"]
        assert (result["roofline_ratio"] is not None) == (
            result["kind"] == "decode" and result["num_seqs"] == 1
        )
        if result["kind"] == "decode":
            assert result["tokens_per_second"] == pytest.approx(
                result["num_seqs"] / result["median_seconds"]
            )
            parts = result["host_seconds"]
            assert parts.keys() == {
                "schedule",
                "tensors",
                "forward",
                "sample",
                "wait",
                "update",
            }
            assert 0 < result["outside_seconds"] < result["median_seconds"]
        if result["kind"] == "attention":
            assert result["sdpa_seconds"] > 0
            assert result["sdpa"] == "FLASH_ATTENTION"


def test_random_weights_stand_for_every_width(small_shape: None) -> None:
    subjects = shape_subjects(["small"], None, CpuBackend())
    results = list(small_bench(batches=(2,), contexts=(32,)).run(subjects))
    assert all(isinstance(result, Measured) for result in results)
    assert [r.bits for r in results if r.kind == "decode"] == [4, 3, 8, 16]
    assert [r.bits for r in results if r.kind == "attention"] == [4]  # it knows no weights


def test_a_decode_step_reads_contexts_up_to_the_cases(
    small_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[list[int]] = []
    plain = Decoder.forward

    def recording(
        self: Decoder, ids: torch.Tensor, positions: torch.Tensor, *rest: object
    ) -> object:
        contexts.append((positions + 1).tolist())
        return plain(self, ids, positions, *rest)

    monkeypatch.setattr(Decoder, "forward", recording)
    (subject,) = shape_subjects(["small"], [4], CpuBackend())
    cases = small_bench(batches=(3,), contexts=(256,), prefill_tokens=2)
    decode = next(r for r in cases.run([subject]) if r.kind == "decode")
    assert isinstance(decode, Measured)
    steps = [step for step in contexts if len(step) == 3]
    assert len(steps) >= decode.num_repeats >= 5
    assert all(256 - 32 < context <= 256 for step in steps for context in step)


def test_attention_is_compared_with_the_same_attention() -> None:
    config = read_config(SMALL.hf_config(), {})
    paged, contiguous = bench.attention_calls(CpuBackend(), config, Case("attention", 3, 50))
    assert contiguous
    for attend in contiguous.values():
        expected = attend()[:, :, 0].flatten(1).float()
        assert (paged() - expected).abs().max() < 0.02  # they are computed in bfloat16


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_attention_over_any_cache_of_the_gpu_backend_is_made_of_numbers(
    kv_cache_dtype: str,
) -> None:
    backend = load_backend("triton", kv_cache_dtype=kv_cache_dtype)
    config = read_config(SMALL.hf_config(), {})
    paged, contiguous = bench.attention_calls(backend, config, Case("attention", 2, 40))
    for attend in (paged, *contiguous.values()):
        result = attend()
        assert result.isfinite().all()
        assert result.abs().max() > 0.01


class ScriptedEvent:
    """Happens a millisecond after the last one, on a clock of its own."""

    num_events = 0

    def record(self) -> None:
        ScriptedEvent.num_events += 1
        self.milliseconds = ScriptedEvent.num_events

    def synchronize(self) -> None:
        assert self.milliseconds

    def elapsed_time(self, end_event: ScriptedEvent) -> float:
        return end_event.milliseconds - self.milliseconds


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_device_with_a_clock_tells_how_long_it_waits(
    small_shape: None, monkeypatch: pytest.MonkeyPatch, runs_ahead: bool
) -> None:
    def build(decoder: Decoder, config: EngineConfig) -> LLMEngine:
        engine = build_engine(decoder, config)
        engine.runs_ahead = runs_ahead
        return engine

    monkeypatch.setattr(bench, "build_engine", build)
    recorders: list[EagerRecorder] = []

    def marks() -> Marks:
        recorders.append(EagerRecorder())
        return Marks(recorders[-1], ScriptedEvent)

    (subject,) = shape_subjects(["small"], [4], CpuBackend())
    cases = small_bench(batches=(3,), contexts=(64,), prefill_tokens=2)
    results = list(replace(cases, marks=marks).run([subject]))
    (decode,) = (r for r in results if r.kind == "decode")
    assert isinstance(decode, Measured)
    # A start, an end and a draw in each step, and so a millisecond between any two of them.
    assert decode.outside_seconds == pytest.approx(1e-3)
    assert decode.device_seconds == pytest.approx(1e-3)
    for part in ("schedule", "tensors", "forward", "sample", "update"):
        assert decode.host_seconds[part] > 0
    (recorder,) = recorders
    assert recorder.num_replays == 2 + decode.num_repeats + runs_ahead


def test_what_does_not_fit_is_said_with_what_it_needs(
    small_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1 << 30)
    subjects = shape_subjects(["small"], [4], CpuBackend())
    results = list(small_bench().run(subjects))
    assert len(results) == 9
    for result in results:
        assert isinstance(result, Missing)
        assert result.reason == "does not fit: needs 1.1 GB, has 1.1 GB"
        assert bench.format_result(result).endswith(result.reason)


def test_cases_that_alone_do_not_fit_leave_the_others(
    small_shape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    subjects = shape_subjects(["small"], [4], CpuBackend())
    monkeypatch.setattr(bench, "free_bytes", lambda device: (1 << 30) + 4_000_000)
    results = list(small_bench(batches=(1,), contexts=(32, 4096)).run(subjects))
    missing = {(r.kind, r.num_tokens) for r in results if isinstance(r, Missing)}
    assert missing == {("decode", 4096), ("attention", 4096)}


def test_a_case_that_fails_leaves_the_others(
    small_shape: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Decoder.forward

    def failing(self: Decoder, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(ids) == 3:
            raise RuntimeError("an illegal\nmemory access")
        return plain(self, ids, *rest)

    monkeypatch.setattr(Decoder, "forward", failing)
    sizes = ["--batches", "1", "3", "--contexts", "32", "--prefill-tokens", "16"]
    assert main(["bench", "engine", "--shape", "small", "--bits", "4", *sizes]) == 1
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    missing = [each for each in results if "reason" in each]
    assert [(each["kind"], each["num_seqs"]) for each in missing] == [("decode", 3)]
    assert missing[0]["failed"]
    assert missing[0]["reason"].startswith("failed: ")
    assert "tokens" in missing[0]["reason"]
    assert len(results) == 5


def test_the_budget_ends_it(small_shape: None) -> None:
    subjects = shape_subjects(["small"], [4, 8], CpuBackend())
    results = list(small_bench(budget_seconds=0.0).run(subjects))
    assert len(results) == 14
    assert all(isinstance(r, Missing) and r.reason.startswith("out of time") for r in results)


def test_a_step_that_takes_too_long_is_not_repeated(small_shape: None) -> None:
    subjects = shape_subjects(["small"], [4], CpuBackend())
    ticks: Iterator[int] = count(0, 30)
    slow = small_bench(
        batches=(1,), contexts=(32,), budget_seconds=150.0, clock=lambda: float(next(ticks))
    )
    decode = next(r for r in slow.run(subjects) if r.kind == "decode")
    assert isinstance(decode, Missing)
    assert "one step took 30.0 s" in decode.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contexts", "8"], "contexts is 8; it must be at least 18"),
        (["--batches", "0"], "batches is 0; it must be at least 1"),
        (["--prefill-tokens", "1"], "prefill_tokens is 1; it must be at least 2"),
        (["--budget-seconds", "-1"], "budget_seconds is -1.0; it must be at least 0"),
        (["--shape", "GPT-5"], "shape is 'GPT-5'; it must be one of SmolLM2-135M, Llama-3-8B"),
        (["--bits", "5"], "bits is 5; it must be 2, 3, 4, 8 or 16"),
        (["--dtype", "bfloat16"], "dtype is 'bfloat16'; the cpu backend has no such choice"),
        (["--checkpoint", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_random_weights_have_the_variance_of_a_layers(bits: int) -> None:
    reader = RandomCheckpoint({}, bits, group_size=64, device=torch.device("cpu"))
    weight = reader.take_linear("layer", 1152, 512)
    if isinstance(weight, PackedWeight):
        assert weight.bits == bits
        matrix = dequantize(weight)
    else:
        assert bits == 16
        matrix = weight.weight.float()
    assert matrix.shape == (512, 1152)
    assert 0.8 < float(matrix.std()) * 1152**0.5 < 1.4
    assert isinstance(reader.take_linear("lm_head", 1152, 512), DenseWeight)


def test_bytes_of_a_shape_are_those_of_its_tensors() -> None:
    reader = RandomCheckpoint(SMALL.hf_config(), 4, group_size=32, device=torch.device("cpu"))
    sizes = {"qkv": (64, 128), "o": (64, 64), "gate_up": (64, 256), "down": (128, 64)}
    num_bytes = 0
    for k, n in sizes.values():
        weight = reader.take_linear("layer", k, n)
        assert isinstance(weight, PackedWeight)
        num_bytes += weight.qweight.numel() * 4 + weight.scales.numel() * 2
    assert SMALL.bytes_at(4) == 2 * num_bytes + 2 * 256 * 64
    assert SMALL.bytes_at(16) == 2 * (2 * sum(k * n for k, n in sizes.values()) + 256 * 64)
