"""What choosing the next tokens costs, for a whole step of sequences.

    python tests/benchmarks/sampler.py [--num-seqs 64] [--vocab-size 49152] [--repeats 20]

Logits are random with the spread of a real model's; every sequence has a prompt of 500 tokens and a
completion of 500. Prints its setup, a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lowbit.server.engine.sampler import Sampler
from lowbit.server.engine.sequence import Sequence
from lowbit.server.types import SamplingParams

sys.path.insert(0, str(Path(__file__).parent))

from quantizers import commit, processor

NUM_PROMPT_TOKENS = NUM_COMPLETION_TOKENS = 500
LOGIT_DEVIATION = 3.0
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.9, temperature 0.6": {"top_p": 0.9, "temperature": 0.6},
    "min_p 0.05": {"min_p": 0.05},
    "greedy, three penalties": {
        "temperature": 0,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "greedy, 1000 allowed tokens": {"temperature": 0, "allowed_token_ids": tuple(range(1000))},
    "greedy, 20 logprobs": {"temperature": 0, "top_logprobs": 20},
}


def sequences(number: int, vocab_size: int, settings: dict[str, Any]) -> list[Sequence]:
    generator = torch.Generator().manual_seed(1)
    length = NUM_PROMPT_TOKENS + NUM_COMPLETION_TOKENS
    return [
        Sequence(
            request_id=str(i),
            token_ids=torch.randint(0, vocab_size, (length,), generator=generator).tolist(),
            num_prompt_tokens=NUM_PROMPT_TOKENS,
            max_tokens=10_000,
            params=SamplingParams(**settings),
            stop_token_ids=frozenset({2}),
            seed=i,
        )
        for i in range(number)
    ]


def median_milliseconds(logits: torch.Tensor, batch: list[Sequence], repeats: int) -> float:
    sampler = Sampler()
    sampler.draw(logits, batch).wait()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        sampler.draw(logits, batch).wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=49_152)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    setup = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "num_seqs": arguments.num_seqs,
        "vocab_size": arguments.vocab_size,
    }
    print(f"setup: {setup}")
    generator = torch.Generator().manual_seed(0)
    logits = LOGIT_DEVIATION * torch.randn(
        arguments.num_seqs, arguments.vocab_size, generator=generator
    )
    print("ms for all   ms per sequence   sequences of this kind")
    milliseconds = {}
    for name, settings in KINDS.items():
        batch = sequences(arguments.num_seqs, arguments.vocab_size, settings)
        milliseconds[name] = median_milliseconds(logits, batch, arguments.repeats)
        each = milliseconds[name] / arguments.num_seqs
        print(f"{milliseconds[name]:10.1f}   {each:15.3f}   {name}")
    print(json.dumps({**setup, "milliseconds": milliseconds}))


if __name__ == "__main__":
    main()
