"""Rotary positions against transformers' own, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowbit.quant.errors import CheckpointError
from lowbit.server.model.families import read_config
from lowbit.server.model.rope import RopeConfig
from transformers import LlamaConfig, Phi3Config, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {**LLAMA3, "rope_theta": 500000.0},
    "llama3.2": {**LLAMA3, "factor": 32.0, "rope_theta": 500000.0},
    "yarn": {**YARN, "rope_theta": 1000000.0},
    "yarn, no truncation": {**YARN, "truncate": False},
    "yarn with betas": {**YARN, "beta_fast": 64, "beta_slow": 2},
    "yarn with mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn with a factor of attention": {**YARN, "attention_factor": 1.5},
    "yarn with both ends beyond": {**YARN, "original_max_position_embeddings": 40},
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 10 for i in range(24)],
    "long_factor": [2.0 + i for i in range(24)],
}


def read(config: PretrainedConfig, architecture: str = "LlamaForCausalLM") -> Any:
    return read_config({**config.to_dict(), "architectures": [architecture]}, {})


def check(ours: RopeConfig, config: PretrainedConfig) -> None:
    expected, magnitude = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    torch.testing.assert_close(ours.frequencies(), expected, atol=0, rtol=1e-6)
    assert ours.scaling.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **SCALINGS[name]})
    check(read(config).layers[0].rope, config)


def test_what_older_releases_wrote_counts_too() -> None:
    old = {**SIZES, "rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = read_config({**old, "architectures": ["LlamaForCausalLM"]}, {}).layers[0].rope
    expected = 1 / 5000.0 ** (torch.arange(0, 64, 2) / 64) / 2
    torch.testing.assert_close(rope.frequencies(), expected)


def phi3(**changes: Any) -> Phi3Config:
    # 3/4 of a head's 64 features rotate, as Phi-4-mini's do.
    sizes = {**SIZES, "max_position_embeddings": 8192}
    rope = {"partial_rotary_factor": 0.75, "rope_theta": 10000.0, **LONGROPE, **changes}
    return Phi3Config(**sizes, original_max_position_embeddings=1024, rope_parameters=rope)


@pytest.mark.parametrize("changes", [{}, {"attention_factor": 1.19}, {"factor": 16.0}])
def test_longrope_is_that_of_transformers_within_the_original_context(
    changes: dict[str, float],
) -> None:
    config = phi3(**changes)
    model = read(config, "Phi3ForCausalLM")
    check(model.layers[0].rope, config)
    assert model.layers[0].rope.size == 48


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (LlamaConfig(**SIZES), 4096),
        (LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **LLAMA3}), 4096),
        (LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **YARN}), 8192),
        (LlamaConfig(**SIZES, rope_parameters={"rope_theta": 1e4, **YARN, "factor": 1.5}), 4096),
        (phi3(), 1024),
    ],
    ids=["default", "llama3", "yarn", "a short yarn", "longrope"],
)
def test_how_far_a_model_goes(config: PretrainedConfig, longest: int) -> None:
    architecture = "Phi3ForCausalLM" if isinstance(config, Phi3Config) else "LlamaForCausalLM"
    assert read(config, architecture).max_position_embeddings == longest


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'; supported are default"),
        ({"rope_type": "linear", "factor": -2.0}, "factor is -2.0; it must be a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "factor is '2'; it must be a positive number"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast is 3.0"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section is [1, 2]"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta is 0"),
        ({"rope_type": "yarn"}, "factor"),
    ],
)
def test_what_is_not_served_is_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], "rope_parameters": parameters}
    with pytest.raises(CheckpointError) as refusal:
        read_config(config, {})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
