"""Every family that is served, against transformers running the same weights in float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_family, save_family
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KernelBackend, load_backend
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant import calibration
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from lowbit.quant.evaluate import load_dequantized
from lowbit.quant.pipeline import quantize
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams
from safetensors.torch import load_file, save_file
from stepping import BLOCK_SIZE, Prompt, caches_for, run_step

SERVED = (
    "gemma2",
    "gemma3",
    "gpt2",
    "llama",
    "llama 3",
    "llama with biases",
    "llama with yarn",
    "mistral",
    "opt",
    "phi3",
    "phi3 with longrope",
    "qwen2",
    "qwen2 with windows",
    "qwen3",
)
# With the largest difference, in standard deviations of the logits.
BACKENDS = {
    "reference": (ReferenceBackend(), 1e-4),
    "cpu": (CpuBackend("float32"), 1e-4),
    "triton": (load_backend("triton"), 0.03),  # on a GPU, or in Triton's interpreter
}
MAX_MODEL_LEN = 120
LENGTH = 75  # several times the windows of the tiny models


def random_prompt(length: int, first_block: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (length,), generator=generator).tolist()
    return Prompt(ids, list(range(first_block, first_block + -(-length // BLOCK_SIZE))))


def oracle_logits(oracle: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = oracle(torch.tensor([token_ids])).logits[0]
    return logits


def largest_difference(
    folder: Path, backend: KernelBackend, oracle: Any, length: int = LENGTH
) -> float:
    """Of the logits of a prompt in chunks and single steps, in the logits' standard deviations."""
    decoder = load_decoder(folder, backend, MAX_MODEL_LEN)
    prompt = random_prompt(length, 1, seed=3)
    caches = caches_for(decoder, 8)
    first = length // 2
    for num_tokens in (first, 1, 1, length - first - 2):
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
    length = 25 if backend == "triton" else LENGTH  # its interpreter is slow
    assert largest_difference(folder, kernels, oracle, length) < tolerance


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
        load_decoder(folder, CpuBackend("float32"), MAX_MODEL_LEN),
        EngineConfig(**settings, max_model_len=MAX_MODEL_LEN),
    )
    stem = random_prompt(66, 0, seed=7).token_ids
    prompts = {f"{n}": stem[:64] + random_prompt(n, 0, seed=n).token_ids for n in (1, 9, 30)}
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
    assert num_hits >= 3 * 64
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


def test_longrope_is_another_model_within_its_original_context(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "phi3 with longrope")
    oracle = stored_in_16_bits(build_family("phi3 with longrope"))
    decoder = load_decoder(folder, ReferenceBackend())
    assert decoder.config.max_position_embeddings == 20
    prompt = random_prompt(20, 0, seed=3)
    run_step(decoder, caches_for(decoder, 2), [(prompt, 20)])
    difference = torch.stack(prompt.logits) - oracle_logits(oracle, prompt.token_ids)
    assert difference.abs().max() < 1e-4


def test_a_checkpoint_of_the_bare_model_with_its_masks(tmp_path: Path) -> None:
    """As the first GPT-2 lies on the hub: its names lack `transformer.`, its masks are there."""
    folder = save_family(tmp_path / "m", "gpt2")
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    tensors |= {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    save_file(tensors, folder / "model.safetensors")
    oracle = stored_in_16_bits(build_family("gpt2"))
    assert largest_difference(folder, ReferenceBackend(), oracle) < 1e-4


@pytest.mark.parametrize(
    ("family", "tensor"),
    [
        ("qwen2", "model.layers.1.self_attn.k_proj.bias"),
        ("gpt2", "transformer.h.0.mlp.c_fc.bias"),
        ("gpt2", "transformer.h.1.ln_2.bias"),
        ("gpt2", "transformer.wpe.weight"),
        ("opt", "model.decoder.final_layer_norm.bias"),
        ("qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight"),
        ("phi3", "model.layers.1.self_attn.qkv_proj.weight"),
        ("llama with biases", "model.layers.0.mlp.down_proj.bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, family: str, tensor: str) -> None:
    folder = save_family(tmp_path / "m", family)
    tensors = load_file(folder / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(tensor)} is missing"):
        load_decoder(folder, ReferenceBackend())


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "m", "qwen2")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place in this model: .*q_norm\.weight"):
        load_decoder(folder, ReferenceBackend())


@pytest.mark.parametrize("family", ["mixtral", "qwen3 moe", "bert", "opt 350m"])
def test_what_can_only_be_quantized_is_refused_by_name(tmp_path: Path, family: str) -> None:
    folder = save_family(tmp_path / "m", family)
    with pytest.raises(CheckpointError, match=r"^config\.json: .*; supported (is|are) "):
        load_decoder(folder, ReferenceBackend())
