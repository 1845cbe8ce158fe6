"""Checkpoints that we wrote, run by the real peers: they decode the tokens that we decode.

    LOWBIT_GPTQMODEL_PYTHON=.../bin/python LOWBIT_VLLM_PYTHON=.../bin/python pytest tests/interop

name interpreters that have the peers; without them these tests are skipped. How to install the
peers: README.md.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from decoding import decode
from lowbit.kernels.packing import PackedWeight, dequantize
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import QuantConfig
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from torch import Tensor

HERE = Path(__file__).parent
NUM_TOKENS = 32
PEER_SECONDS = 280
FP16_NOISE = 0.02  # of the logits' deviation; what vLLM's arithmetic may blur

# vLLM's CPU attention wants heads of 32 at least, its int4 kernel K and N in multiples of 32.
SHAPE = {
    "vocab_size": 264,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": False,  # tied ones repeat the last token for ever
}
VLLM_CASES = {f"w4-g{g}-sym": QuantConfig(bits=4, group_size=g) for g in (32, 64, 128)}
VLLM_CASES |= {f"{name}-signed": config for name, config in VLLM_CASES.items()}
GPTQMODEL_CASES = VLLM_CASES | {
    "w2-g32-sym-signed": QuantConfig(bits=2, group_size=32),
    "w3-g32-sym-signed": QuantConfig(bits=3, group_size=32),
    "w8-g64-sym-signed": QuantConfig(bits=8, group_size=64),
    "w4-whole-rows": QuantConfig(bits=4, group_size=-1),
    **{
        f"w{bits}-g32-asym": QuantConfig(
            bits=bits, group_size=32, sym=False, checkpoint_format="gptq_v2"
        )
        for bits in (2, 3, 4, 8)
    },
}


def write_checkpoints(folder: Path, cases: dict[str, QuantConfig]) -> None:
    """A tiny model for each case, of random codes; "signed" ones have scales of both signs."""
    for seed, (name, quant) in enumerate(cases.items()):
        build_tiny_model(folder / name, seed=seed, quant=quant, **SHAPE)
        if name.endswith("signed"):
            flip_signs(folder / name / "model.safetensors")


def flip_signs(file: Path) -> None:
    """Negate half of the scales, as the full range of symmetric codes asks for."""
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith(".scales"):
            tensors[name] = torch.where(torch.rand(tensor.shape) < 0.5, -tensor, tensor)
    save_file(tensors, file, metadata={"format": "pt"})


def run_peer(script: str, variable: str, folder: Path, cases: dict[str, QuantConfig]) -> Path:
    """Write the cases' checkpoints, let the peer decode them all in one process."""
    peer = os.environ.get(variable)
    if not peer:
        pytest.skip(f"{variable} names no interpreter that has this peer")
    write_checkpoints(folder, cases)
    save_file(prompts(), folder / "prompts")
    command = [peer, str(HERE / script), str(folder / "prompts"), str(NUM_TOKENS)]
    run = subprocess.run(
        [*command, *(str(folder / name) for name in cases)],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PEER_SECONDS,
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return folder


def prompts() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {f"of{n}": torch.randint(0, 256, (n,), generator=generator) for n in (3, 40)}


def check_equal_tokens(checkpoint: Path) -> None:
    peer = load_file(checkpoint / "peer.safetensors")
    seen: set[int] = set()
    for name, prompt in prompts().items():
        _, tokens = decode(checkpoint, ReferenceBackend(), prompt, NUM_TOKENS)
        assert peer[f"greedy.{name}"].tolist() == tokens
        seen.update(tokens)
    assert len(seen) > 10  # not one token over and over


def check_preferred_tokens(checkpoint: Path) -> None:
    """After what the peer decoded so far, each token it chose is one that we like best too."""
    peer = load_file(checkpoint / "peer.safetensors")
    for name, prompt in prompts().items():
        chosen = peer[f"greedy.{name}"]
        logits, _ = decode(checkpoint, ReferenceBackend(), torch.cat([prompt, chosen]), 1)
        before = logits[len(prompt) - 1 : -1]  # [NUM_TOKENS, V]
        gaps = before.max(dim=-1).values - before.gather(1, chosen[:, None])[:, 0]
        assert gaps.max() < FP16_NOISE * before.std()
        assert (gaps == 0).float().mean() > 0.9


@pytest.fixture(scope="module")
def run_by_gptqmodel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptqmodel")
    script, variable = "peer_gptqmodel.py", "LOWBIT_GPTQMODEL_PYTHON"
    return run_peer(script, variable, folder, GPTQMODEL_CASES)


@pytest.fixture(scope="module")
def run_by_vllm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_peer(
        "peer_vllm.py", "LOWBIT_VLLM_PYTHON", tmp_path_factory.mktemp("vllm"), VLLM_CASES
    )


@pytest.mark.parametrize("case", GPTQMODEL_CASES)
def test_gptqmodel_reads_our_weights(run_by_gptqmodel: Path, case: str) -> None:
    peer = load_file(run_by_gptqmodel / case / "peer.safetensors")
    reader = CheckpointReader(run_by_gptqmodel / case)
    weights = {k.removeprefix("weight."): w for k, w in peer.items() if k.startswith("weight.")}
    assert len(weights) == 14
    for name, found in weights.items():
        linear = reader.take_linear(name, *reversed(found.shape))
        assert isinstance(linear, PackedWeight)
        assert torch.equal(found, dequantize(linear)), name


@pytest.mark.parametrize("case", GPTQMODEL_CASES)
def test_gptqmodel_decodes_our_tokens(run_by_gptqmodel: Path, case: str) -> None:
    check_equal_tokens(run_by_gptqmodel / case)


@pytest.mark.parametrize("case", VLLM_CASES)
def test_vllm_decodes_our_tokens(run_by_vllm: Path, case: str) -> None:
    check_preferred_tokens(run_by_vllm / case)
