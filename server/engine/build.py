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
from .graph_runner import CudaRecorder
from .memory import check_room, describe_capacity, kv_cache_bytes, kv_token_bytes, usable_bytes
from .model_runner import ModelRunner
from .profile import CudaPeakMeter, largest_step_bytes, warm_up

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
    num_blocks = _num_blocks(decoder, config, max_model_len, _step_bytes(decoder, config))
    num_tokens = num_blocks * config.block_size
    logger.info("%s", describe_capacity(num_tokens, decoder.config, decoder.backend))
    runner = ModelRunner(decoder, num_blocks, config.block_size)
    if decoder.backend.device.type == "cuda" and config.cuda_graph_memory_bytes:
        runner.record_graphs(
            CudaRecorder(decoder.backend.device),
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            max_bytes=config.cuda_graph_memory_bytes,
        )
    return LLMEngine(
        runner,
        config,
        runs_ahead=decoder.backend.device.type == "cuda",
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


def build_and_warm_up(decoder: Decoder, config: EngineConfig) -> LLMEngine:
    """The same, and on a GPU all that a request could need is compiled."""
    engine = build_engine(decoder, config)
    if decoder.backend.device.type == "cuda":
        assert isinstance(engine.runner, ModelRunner)
        warm_up(engine.runner, config, engine.max_model_len)
    return engine


def _step_bytes(decoder: Decoder, config: EngineConfig) -> int:
    """What is to be left for steps, and for recordings of them."""
    device = decoder.backend.device
    if device.type != "cuda" or config.kv_cache_memory_bytes is not None:
        return 0
    max_model_len = _max_model_len(decoder.config, config)
    peak = largest_step_bytes(decoder, config, max_model_len, CudaPeakMeter(device))
    logger.info("the largest step takes %.2f GB beside weights, keys and values", peak / 1e9)
    return peak + config.cuda_graph_memory_bytes


def _num_blocks(decoder: Decoder, config: EngineConfig, max_model_len: int, step_bytes: int) -> int:
    """As many blocks as the memory holds, but no more than a full house could use."""
    model, backend = decoder.config, decoder.backend
    kv_bytes = kv_cache_bytes(
        model,
        backend,
        config,
        max_model_len=max_model_len,
        usable=usable_bytes(backend.device, config),
        step_bytes=step_bytes,
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
