"""What KV caches of 8 bits cost and save, beside the default cache, on a real checkpoint.

    python tests/benchmarks/kv_cache.py CHECKPOINT [--windows 8] [--window-tokens 1024]

Every window is a prompt whose logits are compared at each position: with the default cache
(bfloat16), with int8, and with the float32 backend, which rounds nothing. The triton backend's int8
and fp8 are the float32 backend with keys and values rounded as its kernel rounds them (a test
compares the two): what they cost alone, on any machine. Decode steps are timed in turns at a long
context. Prints its setup, a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
import time
import typing
from pathlib import Path

import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KVCache
from lowbit.kernels.triton_backend import TritonBackend
from lowbit.server.model.decoder import Decoder
from lowbit.server.model.loader import load_decoder
from lowbit.server.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from kv_rounding import rounded, rounded_keys
from quantizers import commit, processor
from stepping import BLOCK_SIZE, Prompt, caches_for, run_step

CHUNK = 256
NUM_TIMED_STEPS = 60
TRITON = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class RoundingBackend(CpuBackend):
    """float32, but for what the triton backend's cache makes of keys and values."""

    def __init__(self, kind: str) -> None:
        super().__init__("float32")
        self._kind = kind

    def store(
        self, keys: torch.Tensor, values: torch.Tensor, cache: KVCache, slots: torch.Tensor
    ) -> None:
        keys, values = rounded_keys(keys, self._kind), rounded(values, self._kind)
        super().store(keys, values, cache, slots)


def logits_of(decoder: Decoder, token_ids: list[int]) -> torch.Tensor:
    """[T, V] of a prompt that is computed in chunks, so that later ones read the cache."""
    prompt = Prompt(token_ids, list(range(-(-len(token_ids) // BLOCK_SIZE))))
    caches = caches_for(decoder, len(prompt.blocks))
    for start in range(0, len(token_ids), CHUNK):
        run_step(decoder, caches, [(prompt, min(CHUNK, len(token_ids) - start))])
    return torch.stack(prompt.logits)


def compare(reference: torch.Tensor, other: torch.Tensor, token_ids: list[int]) -> dict[str, float]:
    left, right = reference.log_softmax(-1), other.log_softmax(-1)
    targets = torch.tensor(token_ids[1:])[:, None]
    return {
        "kl": (left.exp() * (left - right)).sum(-1).mean().item(),
        "top1": (left.argmax(-1) == right.argmax(-1)).double().mean().item(),
        "nll": -right[:-1].gather(1, targets).mean().item(),
    }


def step_milliseconds(decoders: dict[str, Decoder], token_ids: list[int]) -> dict[str, float]:
    """Medians of one sequence's decode step after all the tokens, taken in turns."""
    prompts, caches = {}, {}
    num_blocks = -(-(len(token_ids) + NUM_TIMED_STEPS) // BLOCK_SIZE)
    for name, decoder in decoders.items():
        prompts[name] = Prompt(token_ids + token_ids[:NUM_TIMED_STEPS], list(range(num_blocks)))
        caches[name] = caches_for(decoder, num_blocks)
        for start in range(0, len(token_ids), CHUNK):
            number = min(CHUNK, len(token_ids) - start)
            run_step(decoder, caches[name], [(prompts[name], number)])
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(NUM_TIMED_STEPS):
        for name, decoder in decoders.items():
            started = time.perf_counter()
            run_step(decoder, caches[name], [(prompts[name], 1)])
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def quality(decoders: dict[str, Decoder], windows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Means over the windows: each cache against float32, and int8 against bfloat16."""
    pairs = [("bfloat16", "int8")]
    pairs += [("float32", other) for other in decoders if other != "float32"]
    figures: dict[str, list[dict[str, float]]] = {}
    for window in windows:
        logits = {name: logits_of(decoder, window) for name, decoder in decoders.items()}
        for left, right in pairs:
            row = compare(logits[left], logits[right], window)
            figures.setdefault(f"{right} against {left}", []).append(row)
    return {
        name: {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        for name, rows in figures.items()
    }


def tokens_per_gib(decoders: dict[str, Decoder]) -> dict[str, int]:
    config = decoders["int8"].config
    heads = 2 * config.num_layers * config.num_kv_heads
    backends = {name: decoders[name].backend for name in ("bfloat16", "int8")}
    for kind, dtype in TRITON.items():
        backends[f"triton {kind}"] = TritonBackend(torch.device("cpu"), kv_dtype=dtype)
    return {
        name: (1 << 30) // (heads * backend.kv_head_bytes(config.head_dim))
        for name, backend in backends.items()
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-tokens", type=int, default=1024)
    parser.add_argument("--text", type=Path, help="default: code and comments of Python's library")
    arguments = parser.parse_args()
    text = arguments.text.read_text() if arguments.text else inspect.getsource(typing)
    ids = Tokenizer.from_folder(arguments.checkpoint).encode(text)
    size = arguments.window_tokens
    windows = [ids[i * size : (i + 1) * size] for i in range(arguments.windows)]
    windows = [window for window in windows if len(window) == size]
    setup = {
        "checkpoint": arguments.checkpoint.name,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "windows": len(windows),
        "window_tokens": size,
    }
    print(f"setup: {setup}")
    decoders = {
        "float32": load_decoder(arguments.checkpoint, CpuBackend("float32")),
        "bfloat16": load_decoder(arguments.checkpoint, CpuBackend("bfloat16")),
        "int8": load_decoder(arguments.checkpoint, CpuBackend("bfloat16", "int8")),
        **{
            f"triton {kind}": load_decoder(arguments.checkpoint, RoundingBackend(kind))
            for kind in TRITON
        },
    }
    means = quality(decoders, windows)
    print("KL         top-1 %   nll      comparison")
    for name, row in means.items():
        print(f"{row['kl']:.2e}   {row['top1'] * 100:6.2f}   {row['nll']:.4f}   {name}")
    tokens = tokens_per_gib(decoders)
    decoders = {name: decoders[name] for name in ("bfloat16", "int8")}
    milliseconds = step_milliseconds(decoders, windows[0])
    print("tokens in 1 GiB   decode step ms   cache")
    for name, number in tokens.items():
        duration = f"{milliseconds[name]:.2f}" if name in milliseconds else "not measured"
        print(f"{number:15,}   {duration:>14}   {name}")
    print(
        json.dumps({**setup, "quality": means, "tokens_per_gib": tokens, "step_ms": milliseconds})
    )


if __name__ == "__main__":
    main()
