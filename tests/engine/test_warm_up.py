"""Nothing is compiled for a request: what serving launches was launched while warming up."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from launches import describe, recorded
from lowbit.kernels import triton_linear
from lowbit.kernels.triton_backend import TritonBackend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import Done, LLMEngine
from lowbit.server.engine.profile import warm_up
from lowbit.server.engine.sequence import SampledToken, Sequence, SequenceResult
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams
from recorders import EagerRecorder
from tiny import TinyModel
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not triton_linear.interpreted, reason="there is a GPU, where kernels are not interpreted"
)


def answer_anything(engine: LLMEngine) -> None:
    """Logits are whatever memory held."""

    def draw(logits: Tensor, sequences: list[Sequence], *_: object) -> Done:
        return Done([SequenceResult((SampledToken(7, 0.0),)) for _ in sequences])

    sampler: Any = engine.runner.sampler
    sampler.draw = draw


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
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    launches = recorded(monkeypatch)
    config = EngineConfig(max_num_seqs=20, max_num_batched_tokens=300)
    decoder = load_decoder(tiny_model.folder, TritonBackend(torch.device("cpu")))
    engine = build_engine(decoder, config)
    answer_anything(engine)
    if graphs:
        engine.runner.record_graphs(
            EagerRecorder(), max_num_seqs=20, max_model_len=512, max_bytes=1 << 30
        )
    warm_up(engine.runner, config, 512)
    known = {launch.kernel for launch in launches}
    assert len({name for name, *_ in known}) >= 6  # of linear layers, attention, norms, the rest
    serve(engine, random.Random(3))
    news = {launch.kernel for launch in launches} - known
    assert not news, describe(news, known)
