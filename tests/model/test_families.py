"""Every family that is served, against transformers running the same weights in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_family, save_family
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KernelBackend
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant import calibration
from lowbit.quant.config import QuantConfig
from lowbit.quant.evaluate import load_dequantized
from lowbit.quant.pipeline import quantize
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams
from stepping import BLOCK_SIZE, Prompt, caches_for, run_step

SERVED = (
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "llama with biases",
    "mistral",
    "opt",
    "phi3",
    "qwen2",
    "qwen2 with windows",
    "qwen3",
)
# With the largest difference, in standard deviations of the logits.
BACKENDS = {"reference": (ReferenceBackend(), 1e-4), "cpu": (CpuBackend("float32"), 1e-4)}
LENGTH = 75  # several times the windows of the tiny models


def random_prompt(length: int, first_block: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (length,), generator=generator).tolist()
    return Prompt(ids, list(range(first_block, first_block + -(-length // BLOCK_SIZE))))


def oracle_logits(oracle: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = oracle(torch.tensor([token_ids])).logits[0]
    return logits


def largest_difference(folder: Path, backend: KernelBackend, oracle: Any) -> float:
    """Of the logits of a prompt in chunks and single steps, in the logits' standard deviations."""
    decoder = load_decoder(folder, backend)
    prompt = random_prompt(LENGTH, 1, seed=3)
    caches = caches_for(decoder, 8)
    for num_tokens in (40, 1, 1, LENGTH - 42):
        run_step(decoder, caches, [(prompt, num_tokens)])
    expected = oracle_logits(oracle, prompt.token_ids)
    difference = (torch.stack(prompt.logits) - expected).abs().max()
    assert expected.std() > 0.1
    return float(difference / expected.std())


def stored_in_16_bits(model: Any) -> Any:
    for parameter in model.parameters():  # buffers are computed, in float32
        parameter.data = parameter.data.half().float()
    return model


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(a folder with a 16-bit model, the same model in float32)"""
    folder = tmp_path_factory.mktemp("family") / "model"
    save_family(folder, request.param)
    return folder, stored_in_16_bits(build_family(request.param))


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_agree_with_transformers(served: tuple[Path, Any], backend: str) -> None:
    folder, oracle = served
    kernels, tolerance = BACKENDS[backend]
    assert largest_difference(folder, kernels, oracle) < tolerance


@pytest.fixture(scope="module")
def quantized(
    served: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """(the model at 4 bits, the same weights in transformers)"""
    folder = tmp_path_factory.mktemp("quantized")
    (folder / "text").write_text(calibration.reference_text()[:5_000], encoding="utf-8")
    quantize(
        str(served[0]),
        folder / "w4",
        QuantConfig(bits=4, group_size=32),
        calibration_file=folder / "text",
        num_sequences=8,
        sequence_length=64,
        progress=False,
    )
    return folder / "w4", load_dequantized(folder / "w4")


QUANTIZED_BACKENDS = {
    "cpu-float32": (CpuBackend("float32"), 1e-4),
    "cpu-bfloat16": (CpuBackend("bfloat16"), 0.15),
    "cpu-int8-cache": (CpuBackend("bfloat16", "int8"), 0.25),
}


@pytest.mark.parametrize("backend", QUANTIZED_BACKENDS)
def test_what_was_quantized_is_served(quantized: tuple[Path, Any], backend: str) -> None:
    folder, oracle = quantized
    kernels, tolerance = QUANTIZED_BACKENDS[backend]
    assert largest_difference(folder, kernels, oracle) < tolerance


def greedy(oracle: Any, token_ids: list[int], num_tokens: int) -> list[int]:
    tokens = list(token_ids)
    for _ in range(num_tokens):
        tokens.append(int(oracle_logits(oracle, tokens)[-1].argmax()))
    return tokens[len(token_ids) :]


def test_greedy_tokens_are_those_of_transformers(quantized: tuple[Path, Any]) -> None:
    """Through prefill in chunks, decoding in a batch, and prompts that begin alike."""
    folder, oracle = quantized
    settings = {"kv_cache_memory_bytes": 1 << 22, "max_num_seqs": 4, "max_num_batched_tokens": 20}
    engine = build_engine(
        load_decoder(folder, CpuBackend("float32")), EngineConfig(**settings, max_model_len=120)
    )
    stem = random_prompt(50, 0, seed=7).token_ids
    prompts = {f"{n}": stem[:48] + random_prompt(n, 0, seed=n).token_ids for n in (1, 9, 30)}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    received: dict[str, list[int]] = {name: [] for name in (*prompts, "stem")}
    engine.add(engine.new_sequence("stem", stem, params))
    num_hits = 0
    for waiting in ({}, prompts):  # the others begin with what the first one left
        for name, prompt in waiting.items():
            engine.add(engine.new_sequence(name, prompt, params))
        while engine.has_work:
            for output in engine.step():
                assert output.token_id is not None
                received[output.request_id].append(output.token_id)
            num_hits += engine.last_step.num_prefix_hit_tokens
    assert num_hits >= 3 * 48
    for name, prompt in {"stem": stem, **prompts}.items():
        assert received[name] == greedy(oracle, prompt, 20)


def test_hidden_states_do_not_depend_on_chunks_or_neighbours(quantized: tuple[Path, Any]) -> None:
    """The fast path, bit for bit."""
    decoder = load_decoder(quantized[0], CpuBackend("bfloat16"))
    prompts = [random_prompt(n, 8 * i, seed=i) for i, n in enumerate((37, 5, 64, 18))]
    alone = caches_for(decoder, 32)
    for prompt in prompts:
        run_step(decoder, alone, [(prompt, len(prompt.token_ids))])
    chunked = caches_for(decoder, 32)
    again = [Prompt(prompt.token_ids, prompt.blocks) for prompt in prompts]
    while any(p.cached < len(p.token_ids) for p in again):
        left = [(p, len(p.token_ids) - p.cached) for p in again]
        run_step(decoder, chunked, [(p, min(n, 1 + i * 3)) for i, (p, n) in enumerate(left) if n])
    for one, other in zip(alone, chunked, strict=True):
        for left_tensor, right_tensor in zip(one.tensors, other.tensors, strict=True):
            assert torch.equal(left_tensor, right_tensor)
