"""Engines over the tiny random model, and prompts for them."""

from __future__ import annotations

import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KernelBackend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.model.loader import load_decoder
from tiny import TinyModel

HEADS_PER_BLOCK = 16 * 2 * 2 * 2  # tokens x (keys, values) x layers x KV heads
HEAD_DIM = 16


def make_engine(
    tiny: TinyModel,
    precision: str = "bfloat16",
    kv_cache_dtype: str = "auto",
    *,
    backend: KernelBackend | None = None,
    num_blocks: int = 64,
    **settings: int,
) -> LLMEngine:
    backend = backend or CpuBackend(precision, kv_cache_dtype)
    per_block = HEADS_PER_BLOCK * backend.kv_head_bytes(HEAD_DIM)
    config = EngineConfig(kv_cache_memory_bytes=num_blocks * per_block, **settings)
    return build_engine(load_decoder(tiny.folder, backend), config)


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (length,), generator=generator).tolist()
