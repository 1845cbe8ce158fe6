"""Tiny random models of every family that the offline half is tested with, built in milliseconds.

Every K is a multiple of 32: hidden size 64, intermediate size 96 or 128, two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import BOS, EOS, byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 300
TOKENS = {
    "vocab_size": VOCAB_SIZE,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "initializer_range": 0.1,  # activations that differ enough for a mistake to show
}
LLAMA_LIKE = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MOE = {"num_experts_per_tok": 2, "tie_word_embeddings": False}


def _bert() -> PretrainedConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 128}
    return BertConfig(**TOKENS, **sizes, num_hidden_layers=2, num_attention_heads=4)


def _bloom() -> PretrainedConfig:
    return BloomConfig(**TOKENS, hidden_size=64, n_layer=2, n_head=4)


def _gemma2() -> PretrainedConfig:
    window = {"sliding_window": 8, "query_pre_attn_scalar": 16}
    return Gemma2Config(**LLAMA_LIKE, head_dim=16, **window)


def _gemma3() -> PretrainedConfig:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    return Gemma3TextConfig(**LLAMA_LIKE, head_dim=16, query_pre_attn_scalar=16, **kinds)


def _gpt2() -> PretrainedConfig:
    return GPT2Config(**TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=128)


def _llama() -> PretrainedConfig:
    return LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True)


def _llama_with_biases() -> PretrainedConfig:
    return LlamaConfig(**LLAMA_LIKE, attention_bias=True, mlp_bias=True)


def _mistral() -> PretrainedConfig:
    return MistralConfig(**LLAMA_LIKE, sliding_window=8)


def _mixtral() -> PretrainedConfig:
    return MixtralConfig(**LLAMA_LIKE, **MOE, num_local_experts=4)


def _opt(**overrides: Any) -> PretrainedConfig:
    sizes = {"hidden_size": 64, "ffn_dim": 128, "max_position_embeddings": 128}
    tokens = {key: value for key, value in TOKENS.items() if key != "initializer_range"}
    settings = {"init_std": 0.1, "word_embed_proj_dim": 64, **overrides}
    return OPTConfig(**tokens, **sizes, **settings, num_hidden_layers=2, num_attention_heads=4)


def _opt_350m() -> PretrainedConfig:
    """Norms behind the blocks, and projections between the embedding's size and the layers'."""
    return _opt(word_embed_proj_dim=32, do_layer_norm_before=False)


def _phi3() -> PretrainedConfig:
    return Phi3Config(**LLAMA_LIKE, sliding_window=None)


def _llama3() -> PretrainedConfig:
    frequencies = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, **frequencies}
    return LlamaConfig(
        **LLAMA_LIKE, rope_parameters={**rope, "original_max_position_embeddings": 64}
    )


def _llama_with_yarn() -> PretrainedConfig:
    rope = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
    return LlamaConfig(
        **LLAMA_LIKE, rope_parameters={**rope, "original_max_position_embeddings": 64}
    )


def _phi3_with_longrope() -> PretrainedConfig:
    """Half of the features of a head rotate."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 4.0, 7.0, 20.0]}
    rope = {"rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.5, **factors}
    return Phi3Config(
        **LLAMA_LIKE, original_max_position_embeddings=20, rope_parameters=rope, sliding_window=None
    )


def _qwen2() -> PretrainedConfig:
    return Qwen2Config(**LLAMA_LIKE)


def _qwen2_with_windows() -> PretrainedConfig:
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    return Qwen2Config(**LLAMA_LIKE, **windows)


def _qwen2_moe() -> PretrainedConfig:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 96}
    return Qwen2MoeConfig(**LLAMA_LIKE, **MOE, **sizes, num_experts=4)


def _qwen3() -> PretrainedConfig:
    return Qwen3Config(**LLAMA_LIKE, head_dim=32)


def _qwen3_moe() -> PretrainedConfig:
    return Qwen3MoeConfig(**LLAMA_LIKE, **MOE, head_dim=16, moe_intermediate_size=32, num_experts=4)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "bert": _bert,
    "bloom": _bloom,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "llama with biases": _llama_with_biases,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "opt": _opt,
    "opt 350m": _opt_350m,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2 moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3 moe": _qwen3_moe,
}


VARIANTS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama 3": _llama3,
    "llama with yarn": _llama_with_yarn,
    "phi3 with longrope": _phi3_with_longrope,
    "qwen2 with windows": _qwen2_with_windows,
}


def build_family(name: str, seed: int = 0) -> Any:
    """A random transformers model in fp32; its biases and norms are random too."""
    torch.manual_seed(seed)
    factory: Any = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model = factory.from_config({**FAMILIES, **VARIANTS}[name](), dtype=torch.float32).eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # or the value a model starts with would hide a tensor mixed up
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_family(folder: Path, name: str, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """A folder with that model in `dtype` and a byte-level tokenizer."""
    build_family(name, seed).to(dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
