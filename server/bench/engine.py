"""`lowbit bench engine`: decoding and prefill of whole models, attention alone, on this machine.

Every figure is measured or absent: what does not fit or was not reached in time is listed as that.
A decode step is the engine's own (schedule, tensors, forward, sampling, update); the keys and
values it reads are random numbers, put in the cache instead of being computed from a prompt.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.interface import AttentionSpec, ForwardBatch, KernelBackend, KVCache
from ...kernels.packing import SUPPORTED_BITS
from ..config import EngineConfig
from ..engine.build import build_engine
from ..engine.engine import Launched, LLMEngine, Runner
from ..engine.memory import free_bytes
from ..engine.scheduler import SchedulerOutput
from ..engine.sequence import SampledToken, SequenceResult
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.families import read_config
from ..model.info import model_info, model_size
from ..model.loader import build_decoder, load_decoder
from ..model.random_weights import RandomCheckpoint
from ..types import SamplingParams
from .timing import Timer

BLOCK_SIZE = 16
_MAX_STEPS = 32
_MIN_STEPS = 5
_CASE_SECONDS = 4.0  # of measured steps
_WORKING_BYTES = 1 << 30  # that the rest of a process may need beside weights and cache
_PROFILED_STEPS = 4
_OTHER_STEPS = 3 + _PROFILED_STEPS  # of a case: the prompts', two that warm up, those profiled
_MIN_CONTEXT = 2 * (_OTHER_STEPS + _MIN_STEPS)


class Broken(RuntimeError):
    """The engine did not do what is being timed; its time would say nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure, not loaded yet."""

    name: str
    bits: int
    config: ModelConfig
    weight_bytes: int  # that a step reads
    held_bytes: int  # that loading takes, at least
    load: Callable[[], Decoder]


@dataclass(frozen=True, slots=True)
class Case:
    """decode: `num_seqs` sequences that end at `num_tokens` of context. prefill: one prompt.

    attention: one layer's attention of such a decode step.
    """

    kind: str
    num_seqs: int
    num_tokens: int

    @property
    def cost(self) -> int:
        """For an order, the cheapest first."""
        return self.num_seqs * (self.num_tokens + 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    model: str
    bits: int
    kind: str
    num_seqs: int
    num_tokens: int
    num_repeats: int
    median_seconds: float  # of a step, or of a layer's attention
    lowest_seconds: float
    highest_seconds: float
    tokens_per_second: float | None = None
    roofline_ratio: float | None = None  # of the bytes it must read at the measured bandwidth
    outside_seconds: float | None = None  # of a step, in which the device has nothing to do
    host_seconds: dict[str, float] = field(default_factory=dict)  # of a step, by part, medians
    sdpa_seconds: float | None = None  # the same attention over contiguous keys and values


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What was not measured, and why."""

    model: str
    bits: int
    kind: str
    num_seqs: int
    num_tokens: int
    reason: str


Result = Measured | Missing


# Subjects


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama-like model by its numbers."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied: bool = False
    group_size: int = 128

    def hf_config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": 1 << 17,  # how far it was trained costs nothing
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
        }

    def linear_weights(self) -> int:
        """Of all layers together, without the head."""
        head_dim = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size * (self.hidden_size + self.num_kv_heads * head_dim)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def bytes_at(self, bits: float) -> int:
        """Of linear layers with their scales, and the 16-bit head; what a step reads."""
        per_weight = bits / 8 + (2 / self.group_size if bits < 16 else 0)
        return int(self.linear_weights() * per_weight) + 2 * self.vocab_size * self.hidden_size


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="SmolLM2-135M", vocab_size=49152, hidden_size=576, intermediate_size=1536,
            num_layers=30, num_heads=9, num_kv_heads=3, tied=True, group_size=64,
        ),
        Shape(
            name="Llama-3-8B", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
            num_layers=32, num_heads=32, num_kv_heads=8,
        ),
        Shape(
            name="Llama-2-13B", vocab_size=32000, hidden_size=5120, intermediate_size=13824,
            num_layers=40, num_heads=40, num_kv_heads=40,
        ),
        Shape(
            name="LLaMA-65B", vocab_size=32000, hidden_size=8192, intermediate_size=22016,
            num_layers=80, num_heads=64, num_kv_heads=64,
        ),
    )
}  # fmt: skip
WIDTHS = (4, 3, 8, 16)
DEFAULT_SHAPES = {"cpu": ("SmolLM2-135M",), "cuda": ("Llama-3-8B", "Llama-2-13B", "LLaMA-65B")}
_WIDTHS_OF = {"LLaMA-65B": (4,)}  # at more bits it fits no single GPU


def shape_subjects(
    names: Sequence[str] | None, widths: Sequence[int] | None, backend: KernelBackend
) -> list[Subject]:
    """Random weights of each shape at each width; by default those that suit the device.

    Raises ValueError for an unknown one.
    """
    chosen = names if names is not None else DEFAULT_SHAPES[backend.device.type]
    for name in chosen:
        if name not in SHAPES:
            raise ValueError(f"shape is {name!r}; it must be one of {', '.join(SHAPES)}")
    for bits in widths or ():
        if bits not in (*SUPPORTED_BITS, 16):
            raise ValueError(f"bits is {bits}; it must be 2, 3, 4, 8 or 16")
    return [
        _shape_subject(SHAPES[name], bits, backend)
        for name in chosen
        for bits in (_WIDTHS_OF.get(name, WIDTHS) if widths is None else widths)
    ]


def _shape_subject(shape: Shape, bits: int, backend: KernelBackend) -> Subject:
    config = shape.hf_config()

    def load() -> Decoder:
        reader = RandomCheckpoint(config, bits, group_size=shape.group_size, device=backend.device)
        return build_decoder(reader, backend)

    # The cpu backend holds 3 bits in 4, and what is dense in float32.
    held_bits = {2: 4, 3: 4, 16: 32}.get(bits, bits) if backend.device.type == "cpu" else bits
    return Subject(
        name=shape.name,
        bits=bits,
        config=read_config(config, {}),
        weight_bytes=shape.bytes_at(bits),
        held_bytes=shape.bytes_at(held_bits) + 2 * shape.vocab_size * shape.hidden_size,
        load=load,
    )


def checkpoint_subject(folder: Path, backend: KernelBackend) -> Subject:
    """A checkpoint as it stands. Raises CheckpointError."""
    config, num_bytes = model_size(folder)
    quantization = model_info(folder).quantization
    lookup_bytes = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    return Subject(
        name=folder.resolve().name,
        bits=quantization.bits if quantization else 16,
        config=config,
        weight_bytes=num_bytes - lookup_bytes,
        held_bytes=num_bytes,
        load=lambda: load_decoder(folder, backend),
    )


# The bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which cases, and how long all of it may take. Raises ValueError for what cannot be."""

    batches: Sequence[int] = (1, 8, 32, 128)
    contexts: Sequence[int] = (512, 8192)
    prefill_tokens: int = 2048
    budget_seconds: float = 420.0

    def __post_init__(self) -> None:
        for name, values, least in (
            ("batches", self.batches, 1),
            ("contexts", self.contexts, _MIN_CONTEXT),
            ("prefill_tokens", (self.prefill_tokens,), 2),
            ("budget_seconds", (self.budget_seconds,), 0),
        ):
            for value in values:
                if not value >= least:
                    raise ValueError(f"{name} is {value}; it must be at least {least}")

    def cases(self, *, with_attention: bool) -> list[Case]:
        """The cheapest first, so that a short budget leaves out the fewest."""
        kinds = ("decode", "attention") if with_attention else ("decode",)
        cases = [Case(kind, b, c) for kind in kinds for b in self.batches for c in self.contexts]
        cases.append(Case("prefill", 1, self.prefill_tokens))
        return sorted(cases, key=lambda case: case.cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Measures on one device."""

    backend: KernelBackend
    timer: Timer
    bytes_per_second: float  # of the device's memory
    settings: Settings
    clock: Callable[[], float] = time.perf_counter

    def run(self, subjects: Sequence[Subject]) -> Iterator[Result]:
        """Each subject has an equal share of the time that is left when its turn comes."""
        end = self.clock() + self.settings.budget_seconds
        measured_attention: set[str] = set()
        for i, subject in enumerate(subjects):
            share = max(0.0, end - self.clock()) / (len(subjects) - i)
            cases = self.settings.cases(with_attention=subject.name not in measured_attention)
            measured_attention.add(subject.name)
            yield from self._measure(subject, cases, self.clock() + share)
            _release()

    def _measure(self, subject: Subject, cases: list[Case], end: float) -> Iterator[Result]:
        free = free_bytes(self.backend.device)
        if subject.held_bytes + _WORKING_BYTES > free:
            reason = _does_not_fit(subject.held_bytes + _WORKING_BYTES, free)
            yield from (_missing(subject, case, reason) for case in cases)
            return
        decoder = subject.load()
        for case in cases:
            yield self._try(subject, decoder, case, end)

    def _try(self, subject: Subject, decoder: Decoder, case: Case, end: float) -> Result:
        if self.clock() >= end:
            return _missing(subject, case, self._out_of_time())
        longest = subject.config.max_position_embeddings
        if case.num_tokens > longest:
            return _missing(subject, case, f"the model was trained for {longest} tokens")
        _release()
        needed, free = self._needed_bytes(subject, case), free_bytes(self.backend.device)
        if needed > free:
            return _missing(subject, case, _does_not_fit(needed, free))
        match case.kind:
            case "decode":
                return self._decode(subject, decoder, case, end)
            case "prefill":
                return self._prefill(subject, decoder, case, end)
            case _:
                return self._attention(subject, case)

    def _out_of_time(self, found: str = "") -> str:
        return f"out of time (budget_seconds is {self.settings.budget_seconds:g}){found}"

    def _kv_token_bytes(self, subject: Subject) -> int:
        """Keys and values of one token in all layers."""
        config = subject.config
        heads = 2 * config.num_layers * config.num_kv_heads
        return heads * self.backend.kv_head_bytes(config.head_dim)

    def _kv_bytes(self, subject: Subject, case: Case) -> int:
        """Of the cache. Without a block to spare for each sequence none is admitted."""
        num_blocks = case.num_seqs * (-(-case.num_tokens // BLOCK_SIZE) + 1) + 1
        return num_blocks * BLOCK_SIZE * self._kv_token_bytes(subject)

    def _needed_bytes(self, subject: Subject, case: Case) -> int:
        """The cache, the logits of a step, and what one layer's attention takes for a moment."""
        kv_bytes = self._kv_bytes(subject, case)
        layer_bytes = kv_bytes // subject.config.num_layers
        logits_bytes = 4 * case.num_seqs * subject.config.vocab_size
        if case.kind == "attention":
            kv_bytes = 2 * layer_bytes  # paged and contiguous
        # The cpu backend widens a layer's bfloat16 to float64.
        return kv_bytes + 8 * layer_bytes + 8 * logits_bytes + _WORKING_BYTES

    # Decode

    def _decode(self, subject: Subject, decoder: Decoder, case: Case, end: float) -> Result:
        num_tokens = min(_MAX_STEPS, case.num_tokens // 2)
        engine, runner = self._start(decoder, case, self._kv_bytes(subject, case), num_tokens)
        with Stopwatch() as watch:
            watch.follow(engine.scheduler, "schedule")
            watch.follow(engine.scheduler, "schedule_after", "schedule")
            watch.follow(runner.inner, "launch")
            watch.follow(decoder, "forward")
            if runner.inner.graphs is not None:
                watch.follow(runner.inner.graphs, "run", "forward")
            watch.follow(runner.inner.sampler, "draw", "sample")
            watch.follow(engine.scheduler, "update")
            _step(engine, case.num_seqs)  # warms up
            first = self._timed_step(engine, case.num_seqs)
            if first > 1.0 and self.clock() + _MIN_STEPS * first > end:
                return _missing(subject, case, self._out_of_time(f": one step took {first:.1f} s"))
            watch.clear()
            seconds = self._steps(engine, case.num_seqs, num_tokens - _OTHER_STEPS)
            parts = watch.medians()
        step = statistics.median(seconds)
        device = parts["forward"]
        if self.backend.device.type == "cuda":
            device = _busy_seconds(lambda: _step(engine, case.num_seqs))
        parts["tensors"] = parts.pop("launch") - parts["forward"] - parts["sample"]
        read_bytes = subject.weight_bytes + case.num_tokens * self._kv_token_bytes(subject)
        return Measured(
            **_identity(subject, case),
            **_spread(seconds),
            tokens_per_second=case.num_seqs / step,
            roofline_ratio=(
                read_bytes / self.bytes_per_second / step if case.num_seqs == 1 else None
            ),
            outside_seconds=step - device,
            host_seconds=parts,
        )

    def _steps(self, engine: LLMEngine, num_seqs: int, most: int) -> list[float]:
        seconds: list[float] = []
        while len(seconds) < most:
            seconds.append(self._timed_step(engine, num_seqs))
            if len(seconds) >= _MIN_STEPS and sum(seconds) >= _CASE_SECONDS:
                break
        return seconds

    def _timed_step(self, engine: LLMEngine, num_seqs: int) -> float:
        start = self.clock()
        _step(engine, num_seqs)
        return self.clock() - start

    def _start(
        self, decoder: Decoder, case: Case, kv_bytes: int, num_tokens: int
    ) -> tuple[LLMEngine, PromptSkipper]:
        """All sequences running, their contexts `num_tokens` short of the case's."""
        engine = build_engine(
            decoder,
            EngineConfig(
                block_size=BLOCK_SIZE,
                kv_cache_memory_bytes=kv_bytes,
                max_model_len=min(
                    case.num_tokens + BLOCK_SIZE, decoder.config.max_position_embeddings
                ),
                max_num_seqs=case.num_seqs,
                max_num_batched_tokens=case.num_seqs * (case.num_tokens + 1),
                max_queued_requests=case.num_seqs,
                max_queued_tokens=case.num_seqs * case.num_tokens,
                prefix_cache=False,
                max_itl_stretch=0.0,
            ),
        )
        runner = PromptSkipper(engine.runner)
        engine.runner = runner
        for cache in runner.inner.kv_caches:
            _fill(cache)
        prompt = [i % decoder.config.vocab_size for i in range(case.num_tokens - num_tokens)]
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        for i in range(case.num_seqs):
            engine.add(engine.new_sequence(str(i), prompt, params))
        engine.step()
        runner.skips = False
        return engine, runner

    # Prefill and attention

    def _prefill(self, subject: Subject, decoder: Decoder, case: Case, end: float) -> Result:
        engine = build_engine(
            decoder,
            EngineConfig(
                block_size=BLOCK_SIZE,
                kv_cache_memory_bytes=self._kv_bytes(subject, case),
                max_num_seqs=1,
                max_num_batched_tokens=case.num_tokens,
                prefix_cache=False,
                cuda_graph_memory_bytes=0,
            ),
        )
        generator = torch.Generator().manual_seed(0)
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        seconds: list[float] = []
        for i in range(_MIN_STEPS + 1):
            if i > 1 and self.clock() + seconds[-1] > end:
                break
            length = (case.num_tokens - 1,)  # with the token that follows it is the case's
            prompt = torch.randint(decoder.config.vocab_size, length, generator=generator).tolist()
            engine.add(engine.new_sequence(str(i), prompt, params))
            seconds.append(self._timed_step(engine, 1))
            if i > 1 and sum(seconds[1:]) >= _CASE_SECONDS:
                break
        seconds = seconds[1:] or seconds  # the first one warms up
        return Measured(
            **_identity(subject, case),
            **_spread(seconds),
            tokens_per_second=(case.num_tokens - 1) / statistics.median(seconds),
        )

    def _attention(self, subject: Subject, case: Case) -> Result:
        paged, contiguous = attention_calls(self.backend, subject.config, case)
        ours, theirs = self.timer([paged]), self.timer([contiguous])
        return Measured(
            **_identity(subject, case),
            **asdict(ours),
            num_repeats=1,
            sdpa_seconds=theirs.median_seconds,
        )


def attention_calls(
    backend: KernelBackend, config: ModelConfig, case: Case
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(the backend's over a paged cache in shuffled blocks, PyTorch's over contiguous keys)."""
    device, head_dim = backend.device, config.head_dim
    per_sequence = -(-case.num_tokens // BLOCK_SIZE)
    num_blocks = case.num_seqs * per_sequence
    cache = backend.allocate_kv_cache(1, num_blocks, BLOCK_SIZE, config.num_kv_heads, head_dim)[0]
    _fill(cache)
    generator = torch.Generator().manual_seed(0)
    tables = torch.randperm(num_blocks, generator=generator).view(case.num_seqs, per_sequence)
    contexts = torch.full((case.num_seqs,), case.num_tokens, dtype=torch.int32, device=device)
    starts = torch.arange(case.num_seqs + 1, dtype=torch.int32, device=device)
    batch = ForwardBatch(
        query_start=starts,
        context_lens=contexts,
        block_tables=tables.to(device, torch.int32),
        slot_mapping=(tables[:, -1] * BLOCK_SIZE).to(device),
        block_size=BLOCK_SIZE,
    )
    plan = backend.plan_attention(batch)
    q = torch.randn(case.num_seqs, config.num_heads, head_dim, device=device)
    q = q.to(backend.hidden_dtype)
    spec = AttentionSpec(scale=head_dim**-0.5)
    dtype = backend.kv_dtype if backend.kv_dtype.is_floating_point else backend.hidden_dtype
    keys, values = (
        tensor[tables.to(device)].flatten(1, 2)[:, : case.num_tokens].transpose(1, 2).to(dtype)
        for tensor in (cache.keys, cache.values)
    )
    keys, values = keys.contiguous(), values.contiguous()
    queries = q.to(dtype)[:, :, None]

    def paged() -> Tensor:
        return backend.attention(q, cache, plan, spec)

    def contiguous() -> Tensor:
        return F.scaled_dot_product_attention(
            queries, keys, values, scale=spec.scale, enable_gqa=True
        )

    return paged, contiguous


class PromptSkipper:
    """Runs decode steps; prompts it answers with a token at once while `skips` is set."""

    def __init__(self, inner: Runner) -> None:
        self.inner: Any = inner
        self.skips = True

    def launch(self, output: SchedulerOutput, previous: Any = None) -> Launched:
        if not self.skips:
            launched: Launched = self.inner.launch(output, previous)
            return launched
        token = SequenceResult((SampledToken(0, 0.0),))
        return _Skipped([token for sequence in output.sequences if sequence.yields_token])


@dataclass(frozen=True, slots=True)
class _Skipped:
    results: list[SequenceResult]

    def wait(self) -> list[SequenceResult]:
        return self.results


class Stopwatch:
    """Seconds spent in methods, by name, each time from the outermost call to its return."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}
        self._followed: list[tuple[object, str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for owner, method in self._followed:
            delattr(owner, method)  # the class's own is seen again

    def follow(self, owner: object, method: str, name: str = "") -> None:
        """Time a method of one object until the watch is left, under its own name or another."""
        inner = getattr(owner, method)
        seconds = self._seconds.setdefault(name or method, [])

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments)
            seconds.append(time.perf_counter() - start)
            return result

        setattr(owner, method, timed)
        self._followed.append((owner, method))

    def clear(self) -> None:
        """Forget what was measured so far."""
        for seconds in self._seconds.values():
            seconds.clear()

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(each) for name, each in self._seconds.items()}


def _step(engine: LLMEngine, num_tokens: int) -> None:
    """Raises Broken where a step gives anything but so many tokens."""
    news = engine.step()
    if len(news) != num_tokens or any(each.token_id is None for each in news):
        errors = {each.error for each in news if each.error}
        raise Broken(f"a step gave {len(news)} tokens of {num_tokens} {' '.join(errors)}")


def _fill(cache: KVCache) -> None:
    """Random keys and values, the same in every block: unwritten memory would be read from caches
    that no real context fits."""
    for tensor in (cache.keys, cache.values):
        block = torch.randn(tensor.shape[1:], device=tensor.device)
        tensor.copy_((block if tensor.is_floating_point() else 30 * block).to(tensor.dtype))
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.fill_(1 / 32)


def _busy_seconds(step: Callable[[], None]) -> float:
    """How long the GPU computes for one step, without the gaps between its kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(_PROFILED_STEPS):
            step()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type.name == "CUDA"]
    microseconds: float = sum(event.time_range.elapsed_us() for event in on_device)
    return microseconds / 1e6 / _PROFILED_STEPS


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _does_not_fit(needed: int, free: int) -> str:
    return f"does not fit: needs {needed / 1e9:.1f} GB, has {free / 1e9:.1f} GB"


def _identity(subject: Subject, case: Case) -> dict[str, Any]:
    return {
        "model": subject.name,
        "bits": subject.bits,
        "kind": case.kind,
        "num_seqs": case.num_seqs,
        "num_tokens": case.num_tokens,
    }


def _missing(subject: Subject, case: Case, reason: str) -> Missing:
    return Missing(**_identity(subject, case), reason=reason)


def _spread(seconds: list[float]) -> dict[str, Any]:
    return {
        "num_repeats": len(seconds),
        "median_seconds": statistics.median(seconds),
        "lowest_seconds": min(seconds),
        "highest_seconds": max(seconds),
    }


HEADING = (
    f"{'model':<14}{'bits':>5}  {'what':<10}{'batch':>6}{'context':>9}{'tokens/s':>11}{'ms':>10}"
    f"{'lowest':>9}{'highest':>9}{'% roof':>8}{'outside ms':>12}{'x sdpa':>8}"
)


def format_result(result: Result) -> str:
    """A row below HEADING."""
    row = (
        f"{result.model[:13]:<14}{result.bits:>5}  {result.kind:<10}{result.num_seqs:>6}"
        f"{result.num_tokens:>9}"
    )
    if isinstance(result, Missing):
        return f"{row}  {result.reason}"
    spread = (result.median_seconds, result.lowest_seconds, result.highest_seconds)
    milliseconds = "".join(
        f"{1e3 * value:>{width}.3f}" for value, width in zip(spread, (10, 9, 9), strict=True)
    )
    roof = None if result.roofline_ratio is None else 100 * result.roofline_ratio
    outside = None if result.outside_seconds is None else 1e3 * result.outside_seconds
    slower = None
    if result.sdpa_seconds is not None:
        slower = result.median_seconds / result.sdpa_seconds
    return (
        f"{row}{_cell(result.tokens_per_second, 11, 1)}{milliseconds}"
        f"{_cell(roof, 8, 0)}{_cell(outside, 12, 3)}{_cell(slower, 8, 2)}"
    )


def _cell(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:>{width}.{digits}f}"
