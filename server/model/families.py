"""The decoder families that are served: which parts they have and where checkpoints keep them.

A family is a row of a table. transformers' configuration class fills in what a config.json leaves
out and translates what older ones call otherwise; a value that is not served is refused by name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from huggingface_hub.errors import StrictDataclassError
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

from ...kernels.interface import Activation, AttentionSpec
from ...quant.errors import CheckpointError
from .config import LayerConfig, ModelConfig
from .rope import RopeConfig, read_rope


class NormKind(StrEnum):
    RMS = "RMS norm"
    RMS_PLUS_ONE = "RMS norm whose stored weight is 1 less than what it multiplies by"
    LAYER = "layer norm with a bias"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartNames:
    """Where a checkpoint keeps a decoder's parts: names from its root, then names in a layer.

    Parts that read the same input are either one tensor, q before k before v, gate before up, or
    each its own. What is None the family does not have.
    """

    embedding: str = "model.embed_tokens"
    position_embedding: str | None = None
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"

    input_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str | None = None
    k_norm: str | None = None
    output: str = "self_attn.o_proj"
    attention_output_norm: str | None = None
    mlp_norm: str = "post_attention_layernorm"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    mlp_output_norm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKeys:
    """What a family's configuration calls its numbers; what is None it does not have."""

    intermediate_size: str = "intermediate_size"
    activation: str = "hidden_act"
    norm_eps: str | None = "rms_norm_eps"
    qkv_bias: str | bool = False  # a key, or what always holds
    output_bias: str | bool = False
    mlp_bias: str | bool = False
    query_scalar: str | None = None  # attention is scaled by its -1/2 power; None: by head_dim's
    attention_soft_cap: str | None = None
    logit_soft_cap: str | None = None
    window: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    architecture: str  # as config.json names it
    config_class: type[PretrainedConfig]
    names: PartNames = field(default_factory=PartNames)
    keys: ConfigKeys = field(default_factory=ConfigKeys)
    required: Mapping[str, Any] = field(default_factory=dict)  # keys with the only value served
    equal_to_hidden_size: str | None = None  # a key with another size, served where it is none
    norm: NormKind = NormKind.RMS
    gated: bool = True  # the MLP multiplies activation(gate) by up
    rotates: bool = True  # else positions are learned
    rotates_partly: bool = False  # partial_rotary_factor counts
    scales_embedding: bool = False  # by the root of the hidden size
    position_offset: int = 0  # row of the position embedding that position 0 has
    transposed: bool = False  # dense layers lie on disk as [in_features, out_features]


_WITH_HEAD_NORMS = PartNames(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm")
_WITH_OUTPUT_NORMS = PartNames(
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)
_GEMMA_KEYS = ConfigKeys(
    activation="hidden_activation",
    qkv_bias="attention_bias",
    output_bias="attention_bias",
    query_scalar="query_pre_attn_scalar",
    logit_soft_cap="final_logit_softcapping",
    window="sliding_window",
)

_LLAMA = Family(
    architecture="LlamaForCausalLM",
    config_class=LlamaConfig,
    keys=ConfigKeys(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    required={"sliding_window": None},
)
_MISTRAL = Family(
    architecture="MistralForCausalLM",
    config_class=MistralConfig,
    keys=ConfigKeys(window="sliding_window"),
    required={"layer_types": None},
)
_QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    config_class=Qwen2Config,
    keys=ConfigKeys(qkv_bias=True, window="sliding_window"),
)
_QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    config_class=Qwen3Config,
    names=_WITH_HEAD_NORMS,
    keys=ConfigKeys(
        qkv_bias="attention_bias", output_bias="attention_bias", window="sliding_window"
    ),
)
_PHI3 = Family(
    architecture="Phi3ForCausalLM",
    config_class=Phi3Config,
    names=PartNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    keys=ConfigKeys(window="sliding_window"),
    rotates_partly=True,
)
_GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    config_class=Gemma2Config,
    names=_WITH_OUTPUT_NORMS,
    keys=replace(_GEMMA_KEYS, attention_soft_cap="attn_logit_softcapping"),
    required={"use_bidirectional_attention": None},
    norm=NormKind.RMS_PLUS_ONE,
    scales_embedding=True,
)
_GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    config_class=Gemma3TextConfig,
    names=replace(_WITH_OUTPUT_NORMS, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    keys=_GEMMA_KEYS,
    required={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    norm=NormKind.RMS_PLUS_ONE,
    scales_embedding=True,
)
_GPT2 = Family(
    architecture="GPT2LMHeadModel",
    config_class=GPT2Config,
    names=PartNames(
        embedding="transformer.wte",
        position_embedding="transformer.wpe",
        layers="transformer.h",
        norm="transformer.ln_f",
        input_norm="ln_1",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        mlp_norm="ln_2",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
    ),
    keys=ConfigKeys(
        intermediate_size="n_inner",
        activation="activation_function",
        norm_eps="layer_norm_epsilon",
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    ),
    required={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    norm=NormKind.LAYER,
    gated=False,
    rotates=False,
    transposed=True,
)
_OPT = Family(
    architecture="OPTForCausalLM",
    config_class=OPTConfig,
    names=PartNames(
        embedding="model.decoder.embed_tokens",
        position_embedding="model.decoder.embed_positions",
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        input_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up=("fc1",),
        down="fc2",
    ),
    keys=ConfigKeys(
        intermediate_size="ffn_dim",
        activation="activation_function",
        norm_eps=None,
        qkv_bias="enable_bias",
        output_bias="enable_bias",
        mlp_bias="enable_bias",
    ),
    required={
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "_remove_final_layer_norm": False,
    },
    equal_to_hidden_size="word_embed_proj_dim",
    norm=NormKind.LAYER,
    gated=False,
    rotates=False,
    position_offset=2,
)
_FAMILIES = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3, _PHI3, _GEMMA2, _GEMMA3, _GPT2, _OPT)

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
_LAYER_NORM_EPS = 1e-5  # PyTorch's, for families that set none
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def family_of(config: Mapping[str, Any]) -> Family:
    """By config.json's architectures. Raises CheckpointError that lists what is served."""
    named = config.get("architectures") or []
    for family in _FAMILIES:
        if family.architecture in named:
            return family
    raise CheckpointError(
        f"config.json: architectures is {named}; "
        f"supported are {', '.join(family.architecture for family in _FAMILIES)}"
    )


def read_config(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    max_model_len: int | None = None,
) -> ModelConfig:
    """The keys that transformers writes to config.json and generation_config.json.

    Some models change where `max_model_len` goes beyond their original context. Raises
    CheckpointError naming the key and its value.
    """
    family = family_of(config)
    found = _complete(config, family)
    _check_required(found, family)
    keys = family.keys
    num_heads, num_kv_heads, head_dim = _heads(found)
    layers = tuple(
        _layer(found, family, head_dim, index, max_model_len)
        for index in range(found.num_hidden_layers)
    )
    return ModelConfig(
        vocab_size=found.vocab_size,
        hidden_size=found.hidden_size,
        intermediate_size=_optional(found, keys.intermediate_size) or 4 * found.hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=_longest(found.max_position_embeddings, layers),
        norm_eps=_optional(found, keys.norm_eps) or _LAYER_NORM_EPS,
        activation=_activation(found, keys.activation),
        qkv_bias=_flag(found, keys.qkv_bias),
        output_bias=_flag(found, keys.output_bias),
        mlp_bias=_flag(found, keys.mlp_bias),
        embedding_scale=math.sqrt(found.hidden_size) if family.scales_embedding else 1.0,
        logit_soft_cap=_optional(found, keys.logit_soft_cap),
        tie_word_embeddings=bool(found.tie_word_embeddings),
        # An instruct model's end of turn often stands in generation_config.json alone.
        eos_token_ids=_eos_token_ids(config) | _eos_token_ids(generation_config),
        layers=layers,
    )


def _heads(config: Any) -> tuple[int, int, int]:
    """(H, Hkv, D)"""
    num_heads, hidden_size = config.num_attention_heads, config.hidden_size
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise CheckpointError(
            f"config.json: num_attention_heads is {num_heads}; "
            f"it must be a multiple of num_key_value_heads ({num_kv_heads})"
        )
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and hidden_size % num_heads:
        raise CheckpointError(
            f"config.json: {_key(config, 'hidden_size')} is {hidden_size}; "
            f"it must be a multiple of {_key(config, 'num_attention_heads')} ({num_heads})"
        )
    return num_heads, num_kv_heads, head_dim or hidden_size // num_heads


def _key(config: Any, name: str) -> str:
    """What the family's config.json calls it."""
    key: str = config.attribute_map.get(name, name)
    return key


def _complete(config: Mapping[str, Any], family: Family) -> Any:
    """The configuration as transformers understands it; what the file must say is checked first."""
    for name in _SIZES:
        key = _key(family.config_class, name)
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a positive integer")
    try:
        return family.config_class.from_dict(copy.deepcopy(dict(config)))
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"config.json: {reason}") from None


def _check_required(config: Any, family: Family) -> None:
    for key, only in family.required.items():
        value = getattr(config, key, only)
        if value != only and (value or only):  # None and False are one
            raise CheckpointError(f"config.json: {key} is {value!r}; supported is {only!r}")
    size = _optional(config, family.equal_to_hidden_size)
    if size not in (None, config.hidden_size):
        raise CheckpointError(
            f"config.json: {family.equal_to_hidden_size} is {size}; "
            f"supported is hidden_size ({config.hidden_size})"
        )


def _layer(
    config: Any, family: Family, head_dim: int, index: int, max_model_len: int | None
) -> LayerConfig:
    kinds = getattr(config, "layer_types", None)
    kind = kinds[index] if kinds else None
    rope = RopeConfig(size=0)
    if family.rotates:
        rope = _rope(config, family, head_dim, kind, max_model_len)
    scalar = _optional(config, family.keys.query_scalar) or head_dim
    return LayerConfig(
        attention=AttentionSpec(
            scale=scalar**-0.5,
            window=_window(config, family, kind),
            soft_cap=_optional(config, family.keys.attention_soft_cap),
        ),
        rope=rope,
    )


def _window(config: Any, family: Family, kind: str | None) -> int | None:
    if kind not in (None, "full_attention", "sliding_attention"):
        raise CheckpointError(
            f"config.json: layer_types has {kind!r}; "
            "supported are 'full_attention' and 'sliding_attention'"
        )
    window: int | None = _optional(config, family.keys.window)
    return None if kind == "full_attention" else window


def _rope(
    config: Any, family: Family, head_dim: int, kind: str | None, max_model_len: int | None
) -> RopeConfig:
    parameters = config.rope_parameters.get(kind, config.rope_parameters)
    rope = read_rope(parameters, head_dim, config.max_position_embeddings, max_model_len)
    if rope.size != head_dim and not family.rotates_partly:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {rope.size / head_dim}; "
            f"supported for {family.architecture} is 1"
        )
    return rope


def _longest(max_position_embeddings: int, layers: tuple[LayerConfig, ...]) -> int:
    return min(layer.rope.scaling.max_positions(max_position_embeddings) for layer in layers)


def _activation(config: Any, key: str) -> Activation:
    name = getattr(config, key)
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"config.json: {key} is {name!r}; supported are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _flag(config: Any, key: str | bool) -> bool:
    return key if isinstance(key, bool) else bool(getattr(config, key))


def _optional(config: Any, key: str | None) -> Any:
    """A positive number, or None for what the family or this model does not have."""
    value = None if key is None else getattr(config, key)
    if value is not None and not value > 0:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be positive")
    return value


def _eos_token_ids(config: Mapping[str, Any]) -> frozenset[int]:
    eos = config.get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset({int(eos)})
