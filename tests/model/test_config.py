"""config.json of the models that people have, as their makers wrote them: what is made of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from lowbit.kernels.interface import Activation
from lowbit.quant.errors import CheckpointError
from lowbit.server.model.config import ModelConfig
from lowbit.server.model.families import read_config
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN_2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PHI_3_MINI_128K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1.0 + i for i in range(48)],
        "short_factor": [1.0 + i / 100 for i in range(48)],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
GEMMA_2_2B = {  # of what its class takes for granted it says nothing: the head is tied
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 224,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA_3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "vocab_size": 50257,
}
OPT_125M = {
    "_remove_final_layer_norm": False,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.attention.window for layer in config.layers]


def test_llama_3_1() -> None:
    config = read_config(LLAMA_3_1_8B, {})
    assert (config.head_dim, config.num_kv_heads, config.num_layers) == (128, 8, 32)
    assert config.max_position_embeddings == 131072
    assert config.eos_token_ids == {128001, 128008, 128009}
    assert not (config.qkv_bias or config.output_bias or config.mlp_bias)
    assert config.layers[0].attention.scale == 128**-0.5
    assert config.layers[0].rope.theta == 500000
    assert config.layers[0].rope.scaling.factor == 8


def test_mistral() -> None:
    assert windows(read_config(MISTRAL_7B, {})) == [4096] * 32
    assert windows(read_config({**MISTRAL_7B, "sliding_window": None}, {})) == [None] * 32


def test_qwen2() -> None:
    config = read_config(QWEN_2_5_7B, {"eos_token_id": [151645, 151643]})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert windows(config) == [None] * 28
    assert config.eos_token_ids == {151645, 151643}
    some = {**QWEN_2_5_7B, "use_sliding_window": True, "max_window_layers": 20}
    assert windows(read_config(some, {})) == [None] * 20 + [131072] * 8


def test_qwen2_with_yarn_as_its_page_tells_to_write_it() -> None:
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    config = read_config({**QWEN_2_5_7B, "rope_scaling": yarn}, {})
    assert config.max_position_embeddings == 131072
    assert config.layers[0].rope.scaling.magnitude == pytest.approx(0.1 * math.log(4) + 1)


def test_qwen3() -> None:
    config = read_config(QWEN_3_0_6B, {})
    assert (config.head_dim, config.num_heads, config.qkv_bias) == (128, 16, False)
    assert config.tie_word_embeddings


def test_phi3() -> None:
    config = read_config(PHI_3_MINI_128K, {})
    assert windows(config) == [262144] * 32
    rope = config.layers[0].rope
    assert rope.size == 96
    # of its model card: 131072 / 4096 = 32
    assert rope.scaling.magnitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope.frequencies()[10].item() == pytest.approx(1 / 1.1 / 10000 ** (20 / 96))
    assert config.max_position_embeddings == 4096
    stretched = read_config(PHI_3_MINI_128K, {}, max_model_len=5000)
    assert stretched.layers[0].rope.frequencies()[10] == pytest.approx(1 / 11 / 10000 ** (20 / 96))
    assert stretched.max_position_embeddings == 131072
    assert read_config(PHI_3_MINI_128K, {}, max_model_len=4096) == config


def test_gemma2() -> None:
    config = read_config(GEMMA_2_2B, {"eos_token_id": [1, 107]})
    assert windows(config) == [4096, None] * 13
    assert {layer.attention.soft_cap for layer in config.layers} == {50.0}
    assert {layer.attention.scale for layer in config.layers} == {224**-0.5}
    assert config.logit_soft_cap == 30.0
    assert config.embedding_scale == 48.0
    assert config.activation is Activation.GELU_TANH
    assert config.tie_word_embeddings
    assert config.eos_token_ids == {1, 107}


def test_gemma3() -> None:
    config = read_config(GEMMA_3_1B, {})
    assert windows(config) == ([512] * 5 + [None]) * 4 + [512] * 2
    thetas = [layer.rope.theta for layer in config.layers]
    assert thetas == ([1e4] * 5 + [1e6]) * 4 + [1e4] * 2
    assert config.logit_soft_cap is None
    assert config.eos_token_ids == {1, 106}


def test_gemma3_stretches_only_layers_that_see_everything() -> None:
    scaling = {"factor": 8.0, "rope_type": "linear"}
    config = read_config({**GEMMA_3_1B, "rope_scaling": scaling}, {})
    first, last = config.layers[0].rope, config.layers[5].rope
    assert first.frequencies()[0] == 1
    assert last.frequencies()[0] == 1 / 8


def test_gpt2() -> None:
    config = read_config(GPT2, {})
    assert (config.intermediate_size, config.num_kv_heads, config.head_dim) == (3072, 12, 64)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, True)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 1024


def test_opt() -> None:
    config = read_config(OPT_125M, {})
    assert (config.activation, config.intermediate_size) == (Activation.RELU, 3072)
    assert config.norm_eps == 1e-5


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA_3_1_8B, {"architectures": ["MixtralForCausalLM"]}, "['MixtralForCausalLM']"),
        (LLAMA_3_1_8B, {"architectures": ["BertForMaskedLM"]}, "['BertForMaskedLM']"),
        (
            GEMMA_3_1B,
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            "architectures is ['Gemma3ForConditionalGeneration']; supported are LlamaForCausalLM",
        ),
        (LLAMA_3_1_8B, {"sliding_window": 512}, "sliding_window is 512; supported is None"),
        (LLAMA_3_1_8B, {"hidden_act": "xielu"}, "hidden_act is 'xielu'; supported are silu"),
        (LLAMA_3_1_8B, {"num_hidden_layers": "32"}, "num_hidden_layers is '32'"),
        (LLAMA_3_1_8B, {"num_key_value_heads": 5}, "num_attention_heads is 32"),
        (LLAMA_3_1_8B, {"num_key_value_heads": -8}, "num_key_value_heads (-8)"),
        (LLAMA_3_1_8B, {"rms_norm_eps": "small"}, "rms_norm_eps"),
        (LLAMA_3_1_8B, {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0; it must be positive"),
        (LLAMA_3_1_8B, {"intermediate_size": 0}, "intermediate_size is 0; it must be positive"),
        (MISTRAL_7B, {"sliding_window": 0}, "sliding_window is 0; it must be positive"),
        (GEMMA_2_2B, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        (GEMMA_2_2B, {"attn_logit_softcapping": -1.0}, "attn_logit_softcapping is -1.0"),
        (GEMMA_2_2B, {"final_logit_softcapping": 0.0}, "final_logit_softcapping is 0.0"),
        (QWEN_2_5_7B, {"layer_types": ["chunked_attention"] * 28}, "'chunked_attention'"),
        (QWEN_2_5_7B, {"layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA_2_2B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GPT2, {"n_embd": 770}, "n_embd is 770; it must be a multiple of n_head (12)"),
        (GPT2, {"n_embd": 0}, "n_embd is 0; it must be a positive integer"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights is False; supported is True"),
        (OPT_125M, {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
        (OPT_125M, {"word_embed_proj_dim": 512}, "word_embed_proj_dim is 512"),
    ],
)
def test_what_is_not_served_is_refused_by_name(
    config: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read_config({**config, **changes}, {})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Training, other tasks, how transformers computes: nothing that a logit depends on.
WITHOUT_EFFECT = {
    "add_cross_attention",
    "attention_dropout",
    "attn_pdrop",
    "bos_token_id",
    "dropout",
    "embd_pdrop",
    "init_std",
    "initializer_range",
    "layerdrop",
    "pad_token_id",
    "pretraining_tp",
    "reorder_and_upcast_attn",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "use_cache",
}
CLASSES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "LlamaForCausalLM": (LlamaConfig, LLAMA_3_1_8B),
    "MistralForCausalLM": (MistralConfig, MISTRAL_7B),
    "Qwen2ForCausalLM": (
        Qwen2Config,
        {**QWEN_2_5_7B, "use_sliding_window": True, "max_window_layers": 9},
    ),
    "Qwen3ForCausalLM": (
        Qwen3Config,
        {**QWEN_3_0_6B, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
    ),
    "Phi3ForCausalLM": (Phi3Config, PHI_3_MINI_128K),
    "Gemma2ForCausalLM": (Gemma2Config, GEMMA_2_2B),
    "Gemma3ForCausalLM": (Gemma3TextConfig, GEMMA_3_1B),
    "GPT2LMHeadModel": (GPT2Config, GPT2),
    "OPTForCausalLM": (OPTConfig, OPT_125M),
}


def another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int() | float():
            return value * 2
        case str():
            return "relu" if value != "relu" else "silu"
        case None:
            return 2
    return value


@pytest.mark.parametrize("architecture", CLASSES)
def test_no_key_is_ignored(architecture: str) -> None:
    """A family's every key, set to something else, changes the model or is refused."""
    config_class, config = CLASSES[architecture]
    full = config_class.from_dict(dict(config)).to_dict()
    before = read_config(config, {})
    for key in config_class.__annotations__.keys() - WITHOUT_EFFECT:
        changed = another(full[key])
        if isinstance(changed, dict | list):
            continue  # of layers and rotary positions, tested above
        try:
            after = read_config({**config, key: changed}, {})
        except CheckpointError:
            continue
        assert after != before, key
