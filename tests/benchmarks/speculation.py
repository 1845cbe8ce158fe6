"""Decoding with and without prompt-lookup drafts, one stream and eight, on a real checkpoint.

    python tests/benchmarks/speculation.py CHECKPOINT [--rounds 3] [--only NAME]
        [--max-draft-tokens 8]

Copying: the model is asked to repeat texts, and repeats most of each. Unfriendly: stories, sampled
at temperature 1, in which little comes back. Prompts run in turns with and without drafts; the time
is that from the first token (of each) to the last. Every token must be the same with and without
drafts, or this ends with an error. Prints its setup, a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.model.loader import load_decoder
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import ChatMessage, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))

from quantizers import commit, processor

PASSAGES = [
    "The harbour office opens at seven. Captain Ines Varga checks the tide tables, signs the log "
    "and sends the pilot boat to the northern buoy. By nine the first freighter has docked, and "
    "the cranes begin to lift containers of coffee, copper wire and spare bicycle parts.",
    "To reset the pump, close valve B, wait for the pressure to fall below two bar, then hold the "
    "green switch for five seconds. If the lamp blinks twice, open valve B slowly. If it does not "
    "blink, call the night engineer and write the serial number in the maintenance book.",
    "def total_price(items, discount):\n    total = 0\n    for item in items:\n        price = "
    "item.price * item.quantity\n        if item.on_sale:\n            price = price * (1 - "
    "discount)\n        total = total + price\n    return total\n",
    "Maria bought three lemons, two loaves of bread and a jar of honey at the market on Tuesday. "
    "On Wednesday she baked a lemon cake for her neighbour Tomas, who had repaired her roof after "
    "the storm. Tomas shared the cake with his sister Helga and their old dog Biscuit.",
]
COPY_REQUEST = "Repeat the following text exactly, word for word:\n\n"
STORIES = [
    "Write a story about a lighthouse.",
    "Invent a strange animal and describe it.",
    "What would you do on the moon?",
    "Tell me about an unusual dream.",
]


@dataclass(frozen=True)
class Workload:
    batches: list[list[list[int]]]  # prompts that run together
    params: dict[str, Any]


def workloads(tokenizer: Tokenizer) -> dict[str, Workload]:
    def chats(texts: list[str]) -> list[list[int]]:
        return [tokenizer.encode_chat([ChatMessage(role="user", content=text)]) for text in texts]

    copies = chats([COPY_REQUEST + passage for passage in PASSAGES])
    stories = chats(STORIES)
    random = {"temperature": 1.0, "ignore_eos": True}
    return {
        "copying, greedy": Workload([[each] for each in copies], {"temperature": 0}),
        "copying, temperature 0.7": Workload([[each] for each in copies], {"temperature": 0.7}),
        "unfriendly, temperature 1": Workload([[each] for each in stories], random),
        "unfriendly, greedy": Workload(
            [[each] for each in stories], {"temperature": 0, "ignore_eos": True}
        ),
        "copying, greedy, 8 at once": Workload([copies * 2], {"temperature": 0}),
        "unfriendly, temperature 1, 8 at once": Workload([stories * 2], random),
    }


@dataclass(frozen=True)
class Decoded:
    tokens: list[list[int]]
    num_timed: int  # tokens made after each sequence had its first
    seconds: float  # that those took
    num_steps: int  # the same


def decode(engine: LLMEngine, prompts: list[list[int]], params: SamplingParams) -> Decoded:
    for i, prompt in enumerate(prompts):
        engine.add(engine.new_sequence(str(i), prompt, replace(params, seed=params.seed + i)))
    tokens: list[list[int]] = [[] for _ in prompts]
    started, num_timed, num_steps = 0.0, 0, 0
    while engine.has_work:
        timing = started > 0
        for output in engine.step():
            tokens[int(output.request_id)].append(output.token_id)
            num_timed += timing
        num_steps += timing
        if not timing and all(tokens):
            started = time.perf_counter()
    return Decoded(tokens, num_timed, time.perf_counter() - started, num_steps)


def measure(
    engines: dict[str, LLMEngine], workload: Workload, max_tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens per second with and without, medians over the rounds; their ratio; tokens a step."""
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    num_tokens = num_steps = 0
    for round_ in range(rounds):
        runs: dict[str, list[Decoded]] = {name: [] for name in engines}
        for i, prompts in enumerate(workload.batches):
            seed = 1000 * round_ + 10 * i
            params = SamplingParams(**workload.params, seed=seed, max_tokens=max_tokens)
            for name, engine in engines.items():
                runs[name].append(decode(engine, prompts, params))
            assert runs["with"][-1].tokens == runs["without"][-1].tokens, "the output changed"
        for name, decoded in runs.items():
            total = sum(each.num_timed for each in decoded)
            speeds[name].append(total / sum(each.seconds for each in decoded))
        num_tokens += sum(each.num_timed for each in runs["with"])
        num_steps += sum(each.num_steps for each in runs["with"])
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        **medians,
        "ratio": medians["with"] / medians["without"],
        "tokens_per_step": num_tokens / num_steps,
        "tokens": num_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--max-draft-tokens", type=int, default=8)
    arguments = parser.parse_args()
    decoder = load_decoder(arguments.checkpoint, CpuBackend())
    setup = {
        "checkpoint": arguments.checkpoint.name,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "max_draft_tokens": arguments.max_draft_tokens,
        "rounds": arguments.rounds,
    }
    print(f"setup: {setup}")
    engines = {
        "without": build_engine(decoder, EngineConfig()),
        "with": build_engine(decoder, EngineConfig(max_draft_tokens=arguments.max_draft_tokens)),
    }
    print("without   with   ratio   tokens a step   tokens   workload (tokens/s)")
    rows = {}
    for name, workload in workloads(Tokenizer.from_folder(arguments.checkpoint)).items():
        if arguments.only not in name:
            continue
        row = rows[name] = measure(engines, workload, arguments.max_tokens, arguments.rounds)
        print(
            f"{row['without']:7.1f}  {row['with']:5.1f}   {row['ratio']:5.2f}   "
            f"{row['tokens_per_step']:13.2f}   {row['tokens']:6.0f}   {name}",
            flush=True,
        )
    print(json.dumps({**setup, "workloads": rows}))


if __name__ == "__main__":
    main()
