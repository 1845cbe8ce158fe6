"""The engine under pressure with a real model: long prompts beside streams, and the prefix cache.

    python tests/benchmarks/engine.py CHECKPOINT [--only itl|chat|cold] [--streams 8]
        [--prompt-tokens 1000 6000]

itl:  streams decode; a long prompt arrives. Inter-token latencies of the streams while it is
      computed, without and with --max-itl-stretch, and of the same tokens without the prompt.
chat: five turns of a conversation, each prompt holding all before it. TTFT of each turn with and
      without the prefix cache.
cold: prompts that have nothing in common. Throughput with and without the prefix cache, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from lowbit.kernels.interface import load_backend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.model.decoder import Decoder
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams

STREAM_PROMPT_TOKENS = 64
MAX_STREAM_TOKENS = 4000
NUM_TURNS = 5
TURN_TOKENS = 300  # of a question
ANSWER_TOKENS = 40
COLD_ROUNDS = 25
Figures = dict[str, float]


def make_engine(decoder: Decoder, **settings: object) -> LLMEngine:
    return build_engine(decoder, EngineConfig(**settings))  # type: ignore[arg-type]


def random_prompt(decoder: Decoder, length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, decoder.config.vocab_size) for _ in range(length)]


def add(engine: LLMEngine, request_id: str, prompt: list[int], max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine.add(engine.new_sequence(request_id, prompt, params))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# itl


def itl(decoder: Decoder, num_streams: int, prompt_tokens: list[int]) -> Figures:
    figures: Figures = {}
    print(f"\n{num_streams} streams of {STREAM_PROMPT_TOKENS} tokens, then a long prompt; ms")
    print("prompt | max_itl_stretch | alone p50, p99 | beside it p50, p99 | p99 ratio | TTFT, s")
    for num_tokens in prompt_tokens:
        for stretch in (0.0, EngineConfig().max_itl_stretch):
            alone, beside, ttft = inter_token_latencies(decoder, num_streams, num_tokens, stretch)
            ratio = percentile(beside, 0.99) / percentile(alone, 0.99)
            print(
                f"{num_tokens:6} | {stretch:15} | {median(alone) * 1e3:6.1f} "
                f"{percentile(alone, 0.99) * 1e3:7.1f} | {median(beside) * 1e3:9.1f} "
                f"{percentile(beside, 0.99) * 1e3:8.1f} | {ratio:9.2f} | {ttft:.1f}",
                flush=True,
            )
            name = f"{num_tokens}_stretch_{stretch:g}"
            figures |= {f"itl_p99_ratio_{name}": ratio, f"ttft_{name}_seconds": ttft}
    return figures


def inter_token_latencies(
    decoder: Decoder, num_streams: int, prompt_tokens: int, stretch: float
) -> tuple[list[float], list[float], float]:
    """(without the long prompt, while it is computed, the long prompt's TTFT), in seconds.

    Both of the same tokens of the streams: their contexts grow meanwhile, and make steps longer.
    """
    engine = start_streams(decoder, num_streams, stretch)
    add(engine, "long", random_prompt(decoder, prompt_tokens, 99), 4)
    began = time.perf_counter()
    beside = run_until(engine, lambda output: output.request_id == "long")
    ttft = time.perf_counter() - began
    alone = run_steps(start_streams(decoder, num_streams, stretch), len(beside))
    return alone, beside, ttft


def start_streams(decoder: Decoder, num_streams: int, stretch: float) -> LLMEngine:
    engine = make_engine(decoder, max_itl_stretch=stretch)
    for i in range(num_streams):
        add(engine, f"s{i}", random_prompt(decoder, STREAM_PROMPT_TOKENS, i), MAX_STREAM_TOKENS)
    while engine.scheduler.num_waiting:
        engine.step()
    run_steps(engine, 10)
    return engine


def run_steps(engine: LLMEngine, num_steps: int) -> list[float]:
    seconds = []
    for _ in range(num_steps):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def run_until(engine: LLMEngine, is_last: Callable[..., bool]) -> list[float]:
    seconds = []
    while True:
        began = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - began)
        if any(is_last(output) for output in outputs):
            return seconds


# chat


def chat(decoder: Decoder) -> Figures:
    without, with_cache = (turn_ttfts(decoder, prefix_cache) for prefix_cache in (False, True))
    print(f"\nchat of {NUM_TURNS} turns, {TURN_TOKENS} + {ANSWER_TOKENS} tokens each; TTFT in ms")
    print("turn | without | with the prefix cache | ratio")
    for turn, (slow, fast) in enumerate(zip(without, with_cache, strict=True), 1):
        print(f"{turn:4} | {slow * 1e3:7.0f} | {fast * 1e3:21.0f} | {fast / slow:.2f}")
    return {"chat_turn_5_ttft_ratio": with_cache[-1] / without[-1]}


def turn_ttfts(decoder: Decoder, prefix_cache: bool) -> list[float]:
    engine = make_engine(decoder, prefix_cache=prefix_cache)
    conversation: list[int] = []
    seconds = []
    for turn in range(NUM_TURNS):
        conversation += random_prompt(decoder, TURN_TOKENS, turn)
        add(engine, f"t{turn}", conversation, ANSWER_TOKENS)
        began = time.perf_counter()
        first = run_first(engine)
        seconds.append(time.perf_counter() - began)
        conversation = [*conversation, first, *run_rest(engine)]
    return seconds


def run_first(engine: LLMEngine) -> int:
    while True:
        for output in engine.step():
            assert output.token_id is not None
            return output.token_id


def run_rest(engine: LLMEngine) -> list[int]:
    tokens = []
    while engine.has_work:
        tokens += [output.token_id for output in engine.step() if output.token_id is not None]
    return tokens


# cold


def cold(decoder: Decoder) -> Figures:
    """Rounds of both in turns, each first as often, so that a slow spell meets both."""
    speeds: dict[bool, list[float]] = {False: [], True: []}
    for round_number in range(COLD_ROUNDS):
        for prefix_cache in (round_number % 2 == 0, round_number % 2 == 1):
            speeds[prefix_cache].append(tokens_per_second(decoder, prefix_cache, round_number))
    ratio = median(on / off for off, on in zip(speeds[False], speeds[True], strict=True))
    print("\n16 prompts of 128 tokens with nothing in common, 16 tokens each; tokens/s")
    for prefix_cache, values in speeds.items():
        name = "with   " if prefix_cache else "without"
        print(f"{name} | {', '.join(f'{value:.0f}' for value in values)}")
    print(f"median of the rounds' ratios: {ratio:.3f}")
    return {"cold_throughput_ratio": ratio}


def tokens_per_second(decoder: Decoder, prefix_cache: bool, round_number: int) -> float:
    engine = make_engine(decoder, prefix_cache=prefix_cache, max_itl_stretch=0.0)
    for i in range(16):
        add(engine, f"r{i}", random_prompt(decoder, 128, 1000 * round_number + i), 16)
    began = time.perf_counter()
    run_rest(engine)
    return 16 * (128 + 16) / (time.perf_counter() - began)


PARTS: dict[str, Callable[[Decoder], Figures]] = {"chat": chat, "cold": cold}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", choices=("itl", *PARTS))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[1000, 6000])
    arguments = parser.parse_args()
    backend = load_backend("auto")
    decoder = load_decoder(arguments.checkpoint, backend)
    print(f"{backend.name}; torch {torch.__version__}; {arguments.checkpoint.name}")
    figures: Figures = {}
    if arguments.only in (None, "itl"):
        figures |= itl(decoder, arguments.streams, arguments.prompt_tokens)
    for name, part in PARTS.items():
        if arguments.only in (None, name):
            figures |= part(decoder)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
