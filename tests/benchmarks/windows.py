"""What a sliding window saves and a soft cap costs: attention of one layer on the CPU backend.

    python tests/benchmarks/windows.py [--context 8192] [--window 512] [--repeats 15]

The layer is Gemma 2 2B's: 8 heads, 4 key-value heads of 256. decode: one new token. prefill: a
chunk of 512 new tokens at the end of the context. Each figure is the median of calls that take
turns with the other kinds.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import AttentionSpec, ForwardBatch, KVCache

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 4, 256
BLOCK_SIZE = 16
STEPS = {"decode": 1, "prefill": 512}


def step(num_queries: int, context: int) -> ForwardBatch:
    blocks = torch.randperm(context // BLOCK_SIZE)
    positions = torch.arange(context - num_queries, context)
    return ForwardBatch(
        query_start=torch.tensor([0, num_queries], dtype=torch.int32),
        context_lens=torch.tensor([context], dtype=torch.int32),
        block_tables=blocks.int()[None],
        slot_mapping=blocks[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_size=BLOCK_SIZE,
    )


def seconds(backend: CpuBackend, cache: KVCache, batch: ForwardBatch, spec: AttentionSpec) -> float:
    q = torch.randn(len(batch.slot_mapping), NUM_HEADS, HEAD_DIM)
    plan = backend.plan_attention(batch)
    backend.attention(q, cache, plan, spec)  # the first layer's call makes the plan of all
    start = time.perf_counter()
    backend.attention(q, cache, plan, spec)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    context = arguments.context - arguments.context % BLOCK_SIZE
    backend = CpuBackend()
    (cache,) = backend.allocate_kv_cache(
        1, context // BLOCK_SIZE, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM
    )
    for tensor in cache.tensors:
        tensor.normal_()
    scale = HEAD_DIM**-0.5
    kinds = {
        "all": AttentionSpec(scale=scale),
        "window": AttentionSpec(scale=scale, window=arguments.window),
        "soft cap": AttentionSpec(scale=scale, soft_cap=50.0),
        "both": AttentionSpec(scale=scale, window=arguments.window, soft_cap=50.0),
    }
    print(f"{backend.name}; {torch.get_num_threads()} threads; PyTorch {torch.__version__}")
    print(f"context {context}, window {arguments.window}, median of {arguments.repeats}")
    figures: dict[str, dict[str, float]] = {}
    for name, num_queries in STEPS.items():
        batch = step(num_queries, context)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(arguments.repeats):
            for kind, spec in kinds.items():
                times[kind].append(seconds(backend, cache, batch, spec))
        figures[name] = {kind: 1e3 * median(each) for kind, each in times.items()}
        line = "  ".join(f"{kind} {value:.2f} ms" for kind, value in figures[name].items())
        print(f"{name:8} {line}", flush=True)
    print(json.dumps({"context": context, "window": arguments.window, "milliseconds": figures}))


if __name__ == "__main__":
    main()
