"""A decoder and a configuration -> an engine: sizes the KV cache and checks that it can work."""

from __future__ import annotations

from ..config import EngineConfig, InvalidConfig
from ..model.decoder import Decoder
from .drafter import PromptLookupDrafter
from .engine import LLMEngine
from .model_runner import ModelRunner


def build_engine(decoder: Decoder, config: EngineConfig) -> LLMEngine:
    """Raises InvalidConfig when the limits contradict the model or each other."""
    max_model_len = _max_model_len(decoder, config)
    num_blocks = _num_blocks(decoder, config, max_model_len)
    return LLMEngine(
        ModelRunner(decoder, num_blocks, config.block_size),
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=decoder.config.vocab_size,
        eos_token_ids=decoder.config.eos_token_ids,
        drafter=PromptLookupDrafter(config.max_draft_tokens) if config.max_draft_tokens else None,
    )


def _max_model_len(decoder: Decoder, config: EngineConfig) -> int:
    longest = decoder.config.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise InvalidConfig(
            f"max_model_len is {config.max_model_len}; the model was trained for {longest}"
        )
    return config.max_model_len or longest


def _num_blocks(decoder: Decoder, config: EngineConfig, max_model_len: int) -> int:
    """As many blocks as the memory holds, but no more than a full house could use."""
    model = decoder.config
    heads_per_token = 2 * model.num_layers * model.num_kv_heads
    block_bytes = (
        config.block_size * heads_per_token * decoder.backend.kv_head_bytes(model.head_dim)
    )
    affordable = config.kv_cache_memory_bytes // block_bytes
    if affordable == 0:
        raise InvalidConfig(
            f"kv_cache_memory_bytes is {config.kv_cache_memory_bytes}; "
            f"one block of {config.block_size} tokens needs {block_bytes}"
        )
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(affordable, usable)
