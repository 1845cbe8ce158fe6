"""The numbers of a decoder, read from a checkpoint's config.json; what is not served is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...quant.errors import CheckpointError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One Llama-like decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    eos_token_ids: frozenset[int]

    @classmethod
    def from_hf(cls, config: dict[str, Any], generation_config: dict[str, Any]) -> ModelConfig:
        """Read the keys that transformers writes to config.json and generation_config.json.

        Raises CheckpointError naming the key.
        """
        architectures = config.get("architectures") or []
        if not any(name in SUPPORTED_ARCHITECTURES for name in architectures):
            raise CheckpointError(
                f"config.json: architectures is {architectures}; "
                f"supported is {', '.join(SUPPORTED_ARCHITECTURES)}"
            )
        _refuse_unsupported(config)
        num_heads = _number(config, "num_attention_heads")
        hidden_size = _number(config, "hidden_size")
        num_kv_heads = _number(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads is {num_heads}; "
                f"it must be a multiple of num_key_value_heads ({num_kv_heads})"
            )
        return cls(
            vocab_size=_number(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_number(config, "intermediate_size"),
            num_layers=_number(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_number(config, "head_dim", hidden_size // num_heads),
            max_position_embeddings=_number(config, "max_position_embeddings"),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(_rope(config).get("rope_theta", config.get("rope_theta", 10000.0))),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            # An instruct model's end of turn often stands in generation_config.json alone.
            eos_token_ids=_eos_token_ids(config) | _eos_token_ids(generation_config),
        )


def _number(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be a positive integer")
    return value


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; before, rope_scaling stood beside rope_theta.
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _refuse_unsupported(config: dict[str, Any]) -> None:
    rope_type = _rope(config).get("rope_type", _rope(config).get("type", "default"))
    supported = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope_type, "default"),
        "partial_rotary_factor": (_rope(config).get("partial_rotary_factor", 1.0), 1.0),
        "sliding_window": (config.get("sliding_window"), None),
    }
    for key, (value, allowed) in supported.items():
        if value != allowed:
            raise CheckpointError(f"config.json: {key} is {value!r}; supported is {allowed!r}")


def _eos_token_ids(config: dict[str, Any]) -> frozenset[int]:
    eos = config.get("eos_token_id")
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset({int(eos)})
