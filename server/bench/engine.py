"""`lowbit bench engine`: decoding and prefill of whole models, attention alone, on this machine.

Every figure is measured or absent: what does not fit or was not reached in time is listed as that.
A decode step is the engine's own (schedule, tensors, forward, sampling, update; on a GPU the next
one is launched meanwhile); the keys and values it reads are random numbers, put in the cache
instead of being computed from a prompt.

Why it should fit 8 minutes on an H100, where it has not run yet (420 seconds are kept in any case):
nine models, 47 seconds each. Nothing read in a step takes long: 5 GB of weights (Llama-3-8B at 4
bits) 1.5 ms at 3.35 TB/s, 33 GB (65B) 10 ms, the largest cache that fits (54 GB) 16 ms, and a case
has at most 28 steps: 0.5 s. A prompt of 2,048 tokens is 33e12 operations for 8B, 0.1 s at a third
of the peak, six times. What remains is making weights and caches (their bytes a few times:
seconds), compiling (taken for a second each, 2 to 5 kernels a model) and Python.
"""

from __future__ import annotations

import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.interface import AttentionSpec, ForwardBatch, KernelBackend, KVCache
from ..config import EngineConfig
from ..engine.build import build_engine
from ..engine.engine import Done, Launched, LLMEngine, Runner
from ..engine.graph_runner import DecodeGraphs
from ..engine.memory import free_bytes
from ..engine.model_runner import ModelRunner
from ..engine.scheduler import SchedulerOutput
from ..engine.sequence import SampledToken, SequenceResult
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..types import SamplingParams
from .stopwatch import Broken, Marks, Stopwatch
from .subjects import Subject
from .timing import Timer, num_copies

logger = logging.getLogger(__name__)

BLOCK_SIZE = 16
_MAX_STEPS = 32
_MIN_STEPS = 5
_CASE_SECONDS = 4.0  # of measured steps
_WORKING_BYTES = 1 << 30  # that the rest of a process may need beside weights and cache
_OTHER_STEPS = 4  # of a case: the prompts', two that warm up, the last, which none follows
_GRAPH_BYTES = 1 << 30
SDPA = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)
_MIN_CONTEXT = 2 * (_OTHER_STEPS + _MIN_STEPS)


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
    device_seconds: float | None = None  # of a step's forward pass, by a GPU's own clock
    # Of a step: on a GPU from the last thing it does for one to the next one's forward pass, by its
    # own clock (it waits, or receives inputs); on a CPU all but the forward pass.
    outside_seconds: float | None = None
    host_seconds: dict[str, float] = field(default_factory=dict)  # of a step, by part, medians
    sdpa_seconds: float | None = None  # the same attention over contiguous keys and values
    sdpa: str = ""  # by which of PyTorch's implementations, the fastest


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What was not measured, and why."""

    model: str
    bits: int
    kind: str
    num_seqs: int
    num_tokens: int
    reason: str
    failed: bool = False  # neither memory nor time was short


Result = Measured | Missing


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
    marks: Callable[[], Marks] | None = None  # where decode steps are recorded
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
        try:
            decoder = subject.load()
        except Exception as error:
            logger.exception("loading %s at %d bits failed", subject.name, subject.bits)
            yield from (_failed(subject, case, error) for case in cases)
            return
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
        measures = {"decode": self._decode, "prefill": self._prefill, "attention": self._attention}
        try:
            return measures[case.kind](subject, decoder, case, end)
        except Exception as error:  # a reason why this one is missing, not the end of the others
            logger.exception("%s of %s at %d bits failed", case, subject.name, subject.bits)
            return _failed(subject, case, error)

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
        """The cache, the logits of a step, and what one layer takes for a moment."""
        kv_bytes = self._kv_bytes(subject, case)
        layer_bytes = kv_bytes // subject.config.num_layers
        logits_bytes = 4 * case.num_seqs * subject.config.vocab_size
        moment_bytes = layer_bytes
        if self.backend.device.type == "cpu":  # it widens a layer's bfloat16 to float64
            moment_bytes = 8 * layer_bytes
        if case.kind == "attention":  # paged and contiguous, each twice
            kv_bytes = 4 * layer_bytes
        return kv_bytes + moment_bytes + 8 * logits_bytes + _WORKING_BYTES

    # Decode

    def _decode(self, subject: Subject, decoder: Decoder, case: Case, end: float) -> Result:
        num_tokens = min(_MAX_STEPS, case.num_tokens // 2)
        engine, runner = self._start(decoder, case, self._kv_bytes(subject, case), num_tokens)
        marks = self.marks() if self.marks else None
        if marks is not None:
            _record(runner.inner, case.num_seqs, engine.max_model_len, marks)
        with Stopwatch() as watch:
            _follow(watch, engine, runner.inner, marks)
            _step(engine, case.num_seqs)  # warms up
            first = self._timed_step(engine, case.num_seqs)
            if first > 1.0 and self.clock() + _MIN_STEPS * first > end:
                return _missing(subject, case, self._out_of_time(f": one step took {first:.1f} s"))
            watch.clear()
            if marks is not None:
                marks.clear()
            seconds = self._steps(engine, case.num_seqs, num_tokens - _OTHER_STEPS)
            step = statistics.median(seconds)
            parts = _parts(watch.seconds(), seconds)
        outside, device = step - parts["forward"], None
        if marks is not None:
            outside, device = map(statistics.median, marks.gaps_and_passes())
        read_bytes = subject.weight_bytes + case.num_tokens * self._kv_token_bytes(subject)
        return Measured(
            **_identity(subject, case),
            **_spread(seconds),
            tokens_per_second=case.num_seqs / step,
            roofline_ratio=(
                read_bytes / self.bytes_per_second / step if case.num_seqs == 1 else None
            ),
            device_seconds=device,
            outside_seconds=outside,
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
        # A server's tables are as wide as its longest context.
        longest = max(case.num_tokens, *self.settings.contexts) + BLOCK_SIZE
        engine = build_engine(
            decoder,
            EngineConfig(
                block_size=BLOCK_SIZE,
                kv_cache_memory_bytes=kv_bytes,
                cuda_graph_memory_bytes=0,  # only the one batch is recorded, see `_record`
                max_model_len=min(longest, decoder.config.max_position_embeddings),
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

    def _attention(self, subject: Subject, decoder: Decoder, case: Case, end: float) -> Result:
        count, device = 1, self.backend.device
        if device.type == "cuda":  # a step's weights leave none of a layer's keys in a cache
            layer_bytes = self._kv_bytes(subject, case) // subject.config.num_layers
            count = num_copies(layer_bytes, device)
        calls = [attention_calls(self.backend, subject.config, case) for _ in range(count)]
        ours = self.timer([paged for paged, _ in calls])
        theirs = {
            name: self.timer([contiguous[name] for _, contiguous in calls]) for name in calls[0][1]
        }
        fastest = min(theirs, key=lambda name: theirs[name].median_seconds)
        return Measured(
            **_identity(subject, case),
            **asdict(ours),
            num_repeats=1,
            sdpa_seconds=theirs[fastest].median_seconds,
            sdpa=fastest,
        )


def attention_calls(
    backend: KernelBackend, config: ModelConfig, case: Case
) -> tuple[Callable[[], Tensor], dict[str, Callable[[], Tensor]]]:
    """(the backend's over a paged cache in shuffled blocks, PyTorch's over contiguous keys, by
    name: each implementation that takes them)."""
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
    dtype = backend.kv_dtype if backend.kv_dtype.itemsize > 1 else backend.hidden_dtype
    keys, values = (
        tensor[tables.to(device)].flatten(1, 2)[:, : case.num_tokens].transpose(1, 2).to(dtype)
        for tensor in (cache.keys, cache.values)
    )
    keys, values = keys.contiguous(), values.contiguous()
    queries = q.to(dtype)[:, :, None]

    def paged() -> Tensor:
        return backend.attention(q, cache, plan, spec)

    def contiguous(implementation: SDPBackend) -> Tensor:
        with sdpa_kernel(implementation):
            return F.scaled_dot_product_attention(
                queries, keys, values, scale=spec.scale, enable_gqa=True
            )

    calls: dict[str, Callable[[], Tensor]] = {
        each.name: partial(contiguous, each) for each in SDPA if _works(contiguous, each)
    }
    # It repeats keys for each of the heads that share them, and writes scores out.
    return paged, calls or {SDPBackend.MATH.name: partial(contiguous, SDPBackend.MATH)}


def _works(attend: Callable[[SDPBackend], Tensor], implementation: SDPBackend) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # which say why not
            attend(implementation)
    except RuntimeError:
        return False
    return True


def _record(runner: ModelRunner, num_seqs: int, max_model_len: int, marks: Marks) -> None:
    """Decode steps of so many sequences, as a server records them.

    Raises Broken where they cannot be; a warning has said why.
    """
    runner.graphs = DecodeGraphs(
        runner.model,
        runner.kv_caches,
        marks,
        block_size=BLOCK_SIZE,
        max_num_seqs=num_seqs,
        max_blocks=-(-max_model_len // BLOCK_SIZE),
        spare_block=runner.spare_block,
    )
    runner.graphs.record([num_seqs], _GRAPH_BYTES)
    if not runner.graphs.buckets:
        raise Broken(f"a decode step of {num_seqs} sequences cannot be recorded")


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
        return Done([token for sequence in output.sequences if sequence.yields_token])


def _follow(watch: Stopwatch, engine: LLMEngine, runner: ModelRunner, marks: Marks | None) -> None:
    watch.follow(engine.scheduler, "schedule")
    watch.follow(engine.scheduler, "schedule_after", "schedule")
    watch.follow(runner, "launch")
    watch.follow(runner.model, "forward")
    if runner.graphs is not None:
        watch.follow(runner.graphs, "run", "forward")
    watch.follow(runner.sampler, "draw", "sample", then=marks.drawn if marks else None)
    watch.follow(engine.scheduler, "update")


def _parts(calls: dict[str, list[float]], steps: list[float]) -> dict[str, float]:
    """What the host spends a step on, medians: calls by name, and steps, in seconds. It waits for
    the device and its tokens while it does nothing else."""
    launches = calls.pop("launch")
    calls["tensors"] = _rest(launches, calls["forward"], calls["sample"])
    calls["wait"] = _rest(steps, calls["schedule"], launches, calls["update"])
    return {name: statistics.median(seconds) for name, seconds in calls.items()}


def _rest(whole: list[float], *parts: list[float]) -> list[float]:
    return [each - sum(rest) for each, *rest in zip(whole, *parts, strict=False)]


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
        if tensor.dtype is torch.uint8:  # bits of float8; some of them are no number
            block = block.to(torch.float8_e4m3fn).view(torch.uint8)
        elif tensor.dtype is torch.int8:
            block = 30 * block
        tensor.copy_(block)
    for scales in (cache.key_scales, cache.value_scales):
        if scales is not None:
            scales.fill_(1 / 32)


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


def _failed(subject: Subject, case: Case, error: Exception) -> Missing:
    reason = " ".join(f"failed: {type(error).__name__}: {error}".split())
    return Missing(**_identity(subject, case), reason=reason[:300], failed=True)


def _spread(seconds: list[float]) -> dict[str, Any]:
    return {
        "num_repeats": len(seconds),
        "median_seconds": statistics.median(seconds),
        "lowest_seconds": min(seconds),
        "highest_seconds": max(seconds),
    }


HEADING = (
    f"{'model':<14}{'bits':>5}  {'what':<10}{'batch':>6}{'context':>9}{'tokens/s':>11}{'ms':>10}"
    f"{'lowest':>9}{'highest':>9}{'% roof':>8}{'outside ms':>12}{'% step':>8}{'x sdpa':>8}"
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
    share = None if outside is None else outside / 10 / result.median_seconds
    slower = None
    if result.sdpa_seconds is not None:
        slower = result.median_seconds / result.sdpa_seconds
    return (
        f"{row}{_cell(result.tokens_per_second, 11, 1)}{milliseconds}"
        f"{_cell(roof, 8, 0)}{_cell(outside, 12, 3)}{_cell(share, 8, 1)}{_cell(slower, 8, 2)}"
        f"{'  ' if result.sdpa else ''}{result.sdpa}"
    )


def _cell(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:>{width}.{digits}f}"
