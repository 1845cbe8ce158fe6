"""The decoder against transformers running the same dequantized weights in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KernelBackend, load_backend
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from lowbit.server.model.loader import load_decoder
from stepping import BLOCK_SIZE, Prompt, caches_for, run_step
from tiny import TinyModel, build_tiny_model

# With the largest difference, in standard deviations of the logits.
BACKENDS = {
    "reference": (ReferenceBackend(), 1e-4),
    "cpu-float32": (CpuBackend("float32"), 1e-4),
    "cpu-bfloat16": (CpuBackend("bfloat16"), 0.1),
    "triton": (load_backend("triton"), 0.02),  # on a GPU, or in Triton's interpreter
}


def random_prompt(length: int, first_block: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 320, (length,), generator=generator).tolist()
    return Prompt(ids, list(range(first_block, first_block + -(-length // BLOCK_SIZE))))


def oracle_logits(tiny: TinyModel, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return tiny.oracle(torch.tensor([token_ids])).logits[0]


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    BACKENDS.values(),
    ids=BACKENDS,
)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_agree_with_transformers(
    tmp_path: Path, backend: KernelBackend, tolerance: float, tied: bool
) -> None:
    tiny = build_tiny_model(tmp_path / "m", tie_word_embeddings=tied)
    decoder = load_decoder(tiny.folder, backend)
    prompt = random_prompt(75, 1, seed=3)
    caches = caches_for(decoder, 8)
    for num_tokens in (40, 1, 1, 33):
        run_step(decoder, caches, [(prompt, num_tokens)])
    expected = oracle_logits(tiny, prompt.token_ids)
    actual = torch.stack(prompt.logits)
    # The scale tells that the bound means something: logits differ by several units.
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < tolerance * expected.std()


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths_are_served_too(tmp_path: Path, bits: int) -> None:
    quant = QuantConfig(bits=bits, group_size=32)
    tiny = build_tiny_model(tmp_path / "m", quant=quant, intermediate_size=192)
    decoder = load_decoder(tiny.folder, CpuBackend("bfloat16"))
    prompt = random_prompt(30, 0, seed=1)
    run_step(decoder, caches_for(decoder, 2), [(prompt, 30)])
    difference = torch.stack(prompt.logits) - oracle_logits(tiny, prompt.token_ids)
    assert difference.abs().max() < 0.15


MIXED = {
    r"-:.*\.1\..*v_proj": {},
    r".*q_proj": {"bits": 8},
    r".*k_proj": {"bits": 3, "group_size": 48},
    r".*up_proj": {"bits": 2, "group_size": -1},
    r".*1\.mlp\.gate_proj": {"sym": False},
}


@pytest.mark.parametrize(
    ("backend", "tolerance"),
    BACKENDS.values(),
    ids=BACKENDS,
)
@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(group_size=32, sym=False, checkpoint_format="gptq_v2"),
        QuantConfig(group_size=32, dynamic=MIXED, checkpoint_format="gptq_v2"),
        QuantConfig(group_size=32, sym=False, checkpoint_format="compressed-tensors"),
        QuantConfig(group_size=32, dynamic=MIXED, checkpoint_format="compressed-tensors"),
        QuantConfig(group_size=32, lm_head=True, dynamic={"lm_head": {"bits": 8}}),
        QuantConfig(
            group_size=32, sym=False, lm_head=True, embeddings=True, checkpoint_format="gptq_v2"
        ),
        QuantConfig(
            bits=8,
            group_size=32,
            lm_head=True,
            embeddings=True,
            checkpoint_format="compressed-tensors",
        ),
    ],
    ids=["asym", "mixed", "compressed", "mixed-compressed", "head", "all", "all-compressed"],
)
def test_whatever_is_quantized_is_served(
    tmp_path: Path, backend: KernelBackend, tolerance: float, quant: QuantConfig
) -> None:
    tied = not quant.lm_head
    tiny = build_tiny_model(
        tmp_path / "m",
        quant=quant,
        tie_word_embeddings=tied,
        intermediate_size=192,
    )
    decoder = load_decoder(tiny.folder, backend)
    prompt = random_prompt(40, 0, seed=5)
    caches = caches_for(decoder, 3)
    run_step(decoder, caches, [(prompt, 39)])
    run_step(decoder, caches, [(prompt, 1)])
    expected = oracle_logits(tiny, prompt.token_ids)
    actual = torch.stack(prompt.logits)
    assert expected.std() > 0.5
    assert (actual - expected).abs().max() < tolerance * expected.std()


@pytest.mark.parametrize("kind", ["gptq_v2", "compressed-tensors"])
def test_a_packed_embedding_may_be_the_head_too(tmp_path: Path, kind: str) -> None:
    quant = QuantConfig(group_size=32, embeddings=True, checkpoint_format=kind)
    tiny = build_tiny_model(
        tmp_path / "m", quant=quant, tie_word_embeddings=True, intermediate_size=192
    )
    decoder = load_decoder(tiny.folder, ReferenceBackend())
    prompt = random_prompt(20, 0, seed=5)
    run_step(decoder, caches_for(decoder, 2), [(prompt, 20)])
    difference = torch.stack(prompt.logits) - oracle_logits(tiny, prompt.token_ids)
    assert difference.abs().max() < 1e-4


def test_hidden_states_do_not_depend_on_chunks_or_neighbours(tiny_model: TinyModel) -> None:
    """The fast path, bit for bit: the last norm's input decides the logits."""
    decoder = load_decoder(tiny_model.folder, CpuBackend("bfloat16"))
    lengths = [37, 5, 64, 18]

    def prompts() -> list[Prompt]:
        return [random_prompt(n, 8 * i, seed=i) for i, n in enumerate(lengths)]

    whole, crowd, chunked = prompts(), prompts(), prompts()
    caches = caches_for(decoder, 32)
    for prompt in whole:
        run_step(decoder, caches, [(prompt, len(prompt.token_ids))])
    alone_keys = [cache.keys.clone() for cache in caches]

    caches = caches_for(decoder, 32)
    run_step(decoder, caches, [(p, len(p.token_ids)) for p in crowd])
    assert all(torch.equal(c.keys, keys) for c, keys in zip(caches, alone_keys, strict=True))

    caches = caches_for(decoder, 32)
    while any(p.cached < len(p.token_ids) for p in chunked):
        left = [(p, len(p.token_ids) - p.cached) for p in chunked]
        run_step(decoder, caches, [(p, min(n, 1 + i * 3)) for i, (p, n) in enumerate(left) if n])
    assert all(torch.equal(c.keys, keys) for c, keys in zip(caches, alone_keys, strict=True))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures is ['MambaForCausalLM']"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 6"),
        ({"num_hidden_layers": 1}, "tensors have no place in this model: model.layers.1"),
        ({"intermediate_size": 192}, "expected"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    tiny = build_tiny_model(tmp_path / "m")
    edit_config(tiny.folder, **changes)
    with pytest.raises(CheckpointError) as refusal:
        load_decoder(tiny.folder, ReferenceBackend())
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_end_of_sequence_tokens_of_both_configs_count(tmp_path: Path) -> None:
    tiny = build_tiny_model(tmp_path / "m")
    (tiny.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    decoder = load_decoder(tiny.folder, ReferenceBackend())
    assert decoder.config.eos_token_ids == {257, 7, 9}
