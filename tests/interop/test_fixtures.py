"""Checkpoints that GPTQModel made and ran: we read its weights and decode its tokens.

The fixtures are committed, so no peer is needed here; `make_fixtures.py` makes them again.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoding import decode
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KernelBackend, load_backend
from lowbit.kernels.packing import PackedWeight, dequantize
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant.checkpoint import CheckpointReader
from safetensors.torch import load_file

FIXTURES = sorted(path for path in (Path(__file__).parent / "fixtures").iterdir() if path.is_dir())
of_every_fixture = pytest.mark.parametrize("folder", FIXTURES, ids=lambda folder: folder.name)


def test_the_fixtures_are_there() -> None:
    assert len(FIXTURES) == 7


@of_every_fixture
def test_weights_are_what_the_peer_dequantizes(folder: Path) -> None:
    reader = CheckpointReader(folder)
    peer = load_file(folder / "peer.safetensors")
    weights = {k.removeprefix("weight."): w for k, w in peer.items() if k.startswith("weight.")}
    assert len(weights) == 2
    for name, expected in weights.items():
        linear = reader.take_linear(name, *reversed(expected.shape))
        assert isinstance(linear, PackedWeight)
        assert torch.equal(dequantize(linear), expected), name


def test_activation_order_comes_with_irregular_groups() -> None:
    folder = next(path for path in FIXTURES if path.name.endswith("desc-act"))
    linear = CheckpointReader(folder).take_linear("model.layers.1.mlp.down_proj", 96, 64)
    assert isinstance(linear, PackedWeight)
    assert linear.input_permutation is not None


@of_every_fixture
@pytest.mark.parametrize("prompt", ["short", "long"])
@pytest.mark.parametrize(
    "backend", [ReferenceBackend(), CpuBackend("float32")], ids=["reference", "cpu-float32"]
)
def test_tokens_are_those_of_the_peer(folder: Path, prompt: str, backend: KernelBackend) -> None:
    peer = load_file(folder / "peer.safetensors")
    greedy = peer[f"greedy.{prompt}"].tolist()
    assert len(set(greedy)) > 10
    _, tokens = decode(folder, backend, peer[f"prompt.{prompt}"], len(greedy))
    assert tokens == greedy


@of_every_fixture
@pytest.mark.parametrize(
    ("backend", "tolerance"),
    [(ReferenceBackend(), 1e-4), (load_backend("triton"), 0.05)],
    ids=["reference", "triton"],
)
def test_logits_are_those_of_the_peer(
    folder: Path, backend: KernelBackend, tolerance: float
) -> None:
    peer = load_file(folder / "peer.safetensors")
    logits, _ = decode(folder, backend, peer["prompt.short"], num_tokens=1)
    expected = peer["logits.short"]
    assert expected.std() > 1
    assert (logits - expected).abs().max() < tolerance
