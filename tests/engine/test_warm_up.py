"""Nothing is compiled for a request: what serving launches was launched while warming up.

Kernels are not run here, only asked for; what Triton would compile for a launch is worked out by
its rules (a number that is 1, or a multiple of 16, has a kernel of its own).
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from lowbit.kernels import triton_linear
from lowbit.kernels.triton_backend import TritonBackend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.profile import warm_up
from lowbit.server.engine.sequence import SampledToken, Sequence, SequenceResult
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams
from recorders import EagerRecorder
from tiny import TinyModel
from torch import Tensor
from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(
    not triton_linear.interpreted, reason="there is a GPU, where kernels are not interpreted"
)
LAUNCH_OPTIONS = ("num_warps", "num_stages")


def variant(value: object, specialized: bool) -> object:
    """What a kernel is compiled for, of one argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        width = 32 if -(1 << 31) <= value < 1 << 31 else 64
        return (width, value == 1, value % 16 == 0) if specialized else width
    return type(value)


def kernel_of(function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> object:
    signature = inspect.signature(function.fn)
    kwargs = {name: value for name, value in options.items() if name in signature.parameters}
    bound = signature.bind(*arguments, **kwargs).arguments
    unspecialized = set(function.kwargs.get("do_not_specialize") or ())
    parts = []
    for index, (name, value) in enumerate(bound.items()):
        if signature.parameters[name].annotation in (tl.constexpr, "tl.constexpr"):
            parts.append((name, str(value)))
        else:
            parts.append((name, variant(value, not unspecialized & {name, index})))
    launch = tuple(options.get(name) for name in LAUNCH_OPTIONS)
    return function.fn.__name__, launch, tuple(parts)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[object]:
    kernels: set[object] = set()

    def run(self: Any, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        kernels.add(kernel_of(self, arguments, options))

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    return kernels


def answer_anything(engine: LLMEngine) -> None:
    """Logits are whatever memory held."""

    def sample(
        logits: Tensor, sequences: list[Sequence], masks: object = None
    ) -> list[SequenceResult]:
        return [SequenceResult((SampledToken(7, 0.0),)) for _ in sequences]

    sampler: Any = engine.runner.sampler
    sampler.sample = sample


def serve(engine: LLMEngine, rng: random.Random) -> None:
    for i in range(60):
        length = rng.choice((1, 2, 15, 16, 17, rng.randint(1, 400)))
        params = SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=True)
        token_ids = [rng.randrange(256) for _ in range(length)]
        engine.add(engine.new_sequence(str(i), token_ids, params))
        for _ in range(rng.randint(0, 4)):
            engine.step()
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_serving_launches_no_kernel_that_warming_up_has_not(
    tiny_model: TinyModel, launched: set[object], graphs: bool
) -> None:
    config = EngineConfig(max_num_seqs=20, max_num_batched_tokens=300)
    decoder = load_decoder(tiny_model.folder, TritonBackend(torch.device("cpu")))
    engine = build_engine(decoder, config)
    answer_anything(engine)
    if graphs:
        engine.runner.record_graphs(
            EagerRecorder(), max_num_seqs=20, max_model_len=512, max_bytes=1 << 30
        )
    warm_up(engine.runner, config, 512)
    known = set(launched)
    assert len({name for name, *_ in known}) >= 6  # of linear layers, attention, norms, the rest
    serve(engine, random.Random(3))
    assert not launched - known, describe(launched - known, known)


def describe(news: set[Any], known: set[Any]) -> str:
    """Each new kernel beside the known one that is most like it."""
    lines = []
    for new in news:
        alike: Callable[[Any], int] = lambda old: len(set(old[2]) & set(new[2]))  # noqa: E731, B023
        nearest = max((old for old in known if old[0] == new[0]), key=alike, default=None)
        differences = set(new[2]) - set(nearest[2]) if nearest else "nothing like it"
        lines.append(f"{new[0]}: {differences}")
    return "\n".join(lines)
