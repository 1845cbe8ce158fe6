"""What the scheduler itself costs: CPU time of schedule + update per step, nothing computed.

    python tests/benchmarks/scheduler.py

No model, no torch: a runner that answers at once stands in for them. Three parts: decoding with
256 and 1,024 running sequences, each step scheduled after the last one's update, or ahead of it, as
on a GPU; the prefix cache where nothing is ever found in it; and sequences coming and going.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import sys
import time
from itertools import product
from statistics import median

from lowbit.server.config import EngineConfig
from lowbit.server.engine.engine import Done, LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, SequenceResult
from lowbit.server.types import SamplingParams

BARS_MS = {256: 1.0, 1024: 4.0}
VOCAB_SIZE = 50_000
PROMPT_TOKENS = 256


class InstantRunner:
    """Answers every sequence with the same token. The time it takes itself is not counted."""

    def launch(self, output: SchedulerOutput, previous: object = None) -> Done:
        result = SequenceResult((SampledToken(1, -1.0),))
        return Done([result for each in output.sequences if each.yields_token])


def make_engine(num_running: int, *, prefix_cache: bool = True) -> LLMEngine:
    config = EngineConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=8192,
        max_queued_requests=1 << 20,
        max_queued_tokens=1 << 30,
        max_itl_stretch=0.0,
        prefix_cache=prefix_cache,
    )
    return LLMEngine(
        InstantRunner(),
        config,
        num_blocks=num_running * 128,  # for all steps: nobody is preempted
        max_model_len=1 << 20,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({0}),
    )


def add(engine: LLMEngine, number: int, max_tokens: int, rng: random.Random) -> None:
    num_tokens = PROMPT_TOKENS + number % 16  # they do not all begin a block in the same step
    prompt = [rng.randrange(1, VOCAB_SIZE) for _ in range(num_tokens)]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    engine.add(engine.new_sequence(f"r{number}", prompt, params))


def scheduler_seconds(engine: LLMEngine) -> float:
    """CPU time of one step's schedule and update."""
    scheduler = engine.scheduler
    began = time.process_time()
    output = scheduler.schedule()
    scheduled = time.process_time()
    results = engine.runner.launch(output).wait()
    executed = time.process_time()
    scheduler.update(output, results)
    return scheduled - began + time.process_time() - executed


def seconds_ahead(engine: LLMEngine, num_steps: int) -> list[float]:
    """CPU time of each step's update and of scheduling the one after the next before it."""
    scheduler = engine.scheduler
    output = scheduler.schedule()
    seconds = []
    for _ in range(num_steps):
        results = engine.runner.launch(output).wait()
        began = time.process_time()
        following = scheduler.schedule_after(output)
        scheduler.update(output, results)
        seconds.append(time.process_time() - began)
        assert following is not None
        output = following
    return seconds


def decode_ms(num_running: int, num_steps: int, *, ahead: bool) -> tuple[float, float]:
    """(mean, 99th percentile) of a step with so many sequences that all decode."""
    engine = make_engine(num_running)
    rng = random.Random(0)
    for number in range(num_running):
        add(engine, number, 1 << 15, rng)
    while engine.scheduler.num_waiting:
        engine.step()
    for _ in range(2):  # the last prompts' last chunks
        engine.step()
    assert engine.last_step.num_generation_tokens == num_running
    if ahead:
        seconds = sorted(seconds_ahead(engine, num_steps))
    else:
        seconds = sorted(scheduler_seconds(engine) for _ in range(num_steps))
    return 1e3 * sum(seconds) / num_steps, 1e3 * seconds[int(0.99 * num_steps)]


def churn_us(*, prefix_cache: bool, num_requests: int = 2000) -> float:
    """CPU time per computed token where 64 sequences of some 264 + 64 tokens come and go."""
    engine = make_engine(64, prefix_cache=prefix_cache)
    rng = random.Random(1)
    for number in range(num_requests):
        add(engine, number, 64, rng)
    seconds = 0.0
    while engine.has_work:
        seconds += scheduler_seconds(engine)
    return 1e6 * seconds / (num_requests * (PROMPT_TOKENS + 7.5 + 63))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1000, help="measured for each size")
    arguments = parser.parse_args()
    gc.disable()  # a collection in the middle of a step would be charged to it
    print(f"Python {sys.version.split()[0]}, {platform.machine()}, {arguments.steps} steps each\n")
    print("running | ahead | mean ms | p99 ms | bar ms")
    figures: dict[str, float] = {}
    for (num_running, bar), ahead in product(BARS_MS.items(), (False, True)):
        mean, p99 = decode_ms(num_running, arguments.steps, ahead=ahead)
        print(f"{num_running:7} | {ahead!s:5} | {mean:7.3f} | {p99:6.3f} | {bar:6.1f}")
        name = f"decode_{num_running}" + ahead * "_ahead"
        figures |= {f"{name}_mean_ms": mean, f"{name}_p99_ms": p99}
    print("\nprefix cache, nothing found | CPU us per token, median of 5")
    for prefix_cache in (False, True):
        cost = median(churn_us(prefix_cache=prefix_cache) for _ in range(5))
        name = "on" if prefix_cache else "off"
        print(f"{name:27} | {cost:.3f}")
        figures[f"churn_cache_{name}_us_per_token"] = cost
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
