"""A decoder and a configuration -> an engine: sizes the KV cache and checks that it can work."""

from __future__ import annotations

import logging
from pathlib import Path

from ...kernels.interface import KernelBackend
from ..config import EngineConfig, InvalidConfig
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.info import model_size
from .drafter import PromptLookupDrafter
from .engine import LLMEngine
from .memory import check_room, describe_capacity, kv_cache_bytes, kv_token_bytes, usable_bytes
from .model_runner import ModelRunner

logger = logging.getLogger(__name__)


def check_before_loading(folder: Path, backend: KernelBackend, config: EngineConfig) -> None:
    """Reads no weights. Raises CheckpointError, or InvalidConfig where they will not fit."""
    model, weight_bytes = model_size(folder, config.max_model_len)
    max_model_len = _max_model_len(model, config)
    usable = usable_bytes(backend.device, config)
    check_room(weight_bytes, model, backend, config, max_model_len, usable)


def build_engine(decoder: Decoder, config: EngineConfig) -> LLMEngine:
    """Raises InvalidConfig when the limits contradict the model or each other."""
    max_model_len = _max_model_len(decoder.config, config)
    num_blocks = _num_blocks(decoder, config, max_model_len)
    num_tokens = num_blocks * config.block_size
    logger.info("%s", describe_capacity(num_tokens, decoder.config, decoder.backend))
    return LLMEngine(
        ModelRunner(decoder, num_blocks, config.block_size),
        config,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=decoder.config.vocab_size,
        eos_token_ids=decoder.config.eos_token_ids,
        num_layers=decoder.config.num_layers,
        drafter=PromptLookupDrafter(config.max_draft_tokens) if config.max_draft_tokens else None,
    )


def _max_model_len(model: ModelConfig, config: EngineConfig) -> int:
    longest = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise InvalidConfig(
            f"max_model_len is {config.max_model_len}; the model was trained for {longest}"
        )
    return config.max_model_len or longest


def _num_blocks(decoder: Decoder, config: EngineConfig, max_model_len: int) -> int:
    """As many blocks as the memory holds, but no more than a full house could use."""
    model, backend = decoder.config, decoder.backend
    kv_bytes = kv_cache_bytes(
        model,
        backend,
        config,
        max_model_len=max_model_len,
        usable=usable_bytes(backend.device, config),
        step_bytes=0,
    )
    block_bytes = config.block_size * kv_token_bytes(model, backend)
    affordable = kv_bytes // block_bytes
    if affordable == 0:
        raise InvalidConfig(
            f"kv_cache_memory_bytes is {kv_bytes}; "
            f"one block of {config.block_size} tokens needs {block_bytes}"
        )
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(affordable, usable)
