"""What memory a device has left, and what weights, keys and values will take of it."""

from __future__ import annotations

import psutil
import torch

from ...kernels.interface import KernelBackend
from ..config import EngineConfig, InvalidConfig
from ..model.config import ModelConfig

_DEFAULT_CPU_BYTES = 1 << 30  # of keys and values


def free_bytes(device: torch.device) -> int:
    """What can still be allocated; what PyTorch keeps for later allocations counts as free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + kept
    return int(psutil.virtual_memory().available)


def usable_bytes(device: torch.device, config: EngineConfig) -> int:
    """What is free, less what `gpu_memory_ratio` leaves to others of a GPU."""
    free = free_bytes(device)
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return max(0, free - int((1 - config.gpu_memory_ratio) * total))
    return free


def kv_token_bytes(model: ModelConfig, backend: KernelBackend) -> int:
    """Keys and values of one token in all layers."""
    heads = 2 * model.num_layers * model.num_kv_heads
    return heads * backend.kv_head_bytes(model.head_dim)


def check_room(
    weight_bytes: int,
    model: ModelConfig,
    backend: KernelBackend,
    config: EngineConfig,
    max_model_len: int,
    usable: int,
) -> None:
    """To be asked before weights are read. Raises InvalidConfig where they cannot fit, with one
    sequence of full length or with the KV cache of the configured size."""
    kv_bytes = config.kv_cache_memory_bytes
    what = "kv_cache_memory_bytes"
    if kv_bytes is None:
        kv_bytes = _sequence_bytes(max_model_len, model, backend, config)
        what = f"one sequence of {max_model_len} tokens (max_model_len)"
    if weight_bytes + kv_bytes <= usable:
        return
    left = usable - weight_bytes
    if left < config.block_size * kv_token_bytes(model, backend):
        remedy = "take fewer bits per weight or a device with more memory"
    elif config.kv_cache_memory_bytes is None:
        blocks = left // (config.block_size * kv_token_bytes(model, backend))
        remedy = f"set max_model_len to at most {blocks * config.block_size}"
    else:
        remedy = f"set kv_cache_memory_bytes to at most {left}"
    raise InvalidConfig(
        f"the weights need {_size(weight_bytes)} and {what} {_size(kv_bytes)}, together "
        f"{_size(weight_bytes + kv_bytes)}; {_name(backend.device)} has "
        f"{_size(usable)} to use; {remedy}"
    )


def kv_cache_bytes(
    model: ModelConfig,
    backend: KernelBackend,
    config: EngineConfig,
    *,
    max_model_len: int,
    usable: int,
    step_bytes: int,
) -> int:
    """What keys and values get: what is configured, else on a GPU all that a step leaves of
    `usable`, on a CPU 1 GiB or, where that is more, one sequence of full length.

    `step_bytes` is what the largest step takes for a moment. Raises InvalidConfig where not even
    one sequence of full length is left.
    """
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    sequence = _sequence_bytes(max_model_len, model, backend, config)
    left = usable - step_bytes
    if left < sequence:
        raise InvalidConfig(
            f"one sequence of {max_model_len} tokens (max_model_len) needs {_size(sequence)} "
            f"and a step of {config.max_num_batched_tokens} tokens (max_num_batched_tokens) "
            f"{_size(step_bytes)}; {_name(backend.device)} has {_size(usable)} to use "
            "beside the weights; lower either"
        )
    if backend.device.type == "cuda":
        return left
    return min(left, max(_DEFAULT_CPU_BYTES, sequence))


def describe_capacity(num_tokens: int, model: ModelConfig, backend: KernelBackend) -> str:
    """For the log: what the cache holds, and what its dtype gains."""
    num_bytes = num_tokens * kv_token_bytes(model, backend)
    gain = 2 * model.head_dim / backend.kv_head_bytes(model.head_dim)
    dtype = str(backend.kv_dtype).removeprefix("torch.")
    text = f"the KV cache holds {num_tokens} tokens in {_size(num_bytes)} ({dtype}"
    return text + (f", {gain:.2f} times what 16 bits would hold)" if gain > 1 else ")")


def _sequence_bytes(
    num_tokens: int, model: ModelConfig, backend: KernelBackend, config: EngineConfig
) -> int:
    num_blocks = -(-num_tokens // config.block_size)
    return num_blocks * config.block_size * kv_token_bytes(model, backend)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
