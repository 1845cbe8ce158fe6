"""What following a prescribed form costs, on a real checkpoint.

    python tests/benchmarks/structured.py CHECKPOINT [--num-seqs 8] [--rounds 5]

Sequences of equal length decode in turns with a form and without one; the form lets every sequence
run to its last token. Prints its setup, a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from lowbit.kernels.cpu import CpuBackend
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.model.loader import load_decoder
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import SamplingParams, TokenConstraint

sys.path.insert(0, str(Path(__file__).parent))

from quantizers import commit, processor

NUM_TOKENS = 48
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, str]] = {
    "none": {},
    "regex of any text": {"regex": "(.|\n)*"},
    "JSON schema, list of records": {
        "json_schema": json.dumps({"type": "array", "items": RECORD, "minItems": 50})
    },
}


def compiled(
    tokenizer: Tokenizer, engine: LLMEngine, params: SamplingParams
) -> TokenConstraint | None:
    if params.structured_output is None:
        return None
    return tokenizer.constraint(params, engine.vocab_size, engine.eos_token_ids)


def step_milliseconds(
    tokenizer: Tokenizer, engine: LLMEngine, form: dict[str, str], num_seqs: int
) -> float:
    """The median of the steps that decode."""
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, **form)
    for i in range(num_seqs):
        prompt = tokenizer.encode(f"Here is the data of customer {i} as you asked:\n")
        constraint = compiled(tokenizer, engine, params)
        engine.add(engine.new_sequence(str(i), prompt, params, constraint=constraint))
    times = []
    while engine.has_work:
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[4:-4]) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--num-seqs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    setup = {
        "checkpoint": arguments.checkpoint.name,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "num_seqs": arguments.num_seqs,
    }
    print(f"setup: {setup}")
    tokenizer = Tokenizer.from_folder(arguments.checkpoint)
    engine = build_engine(load_decoder(arguments.checkpoint, CpuBackend()), EngineConfig())
    compile_milliseconds = {}
    for name, form in FORMS.items():
        started = time.perf_counter()
        compiled(tokenizer, engine, SamplingParams(**form))
        compile_milliseconds[name] = (time.perf_counter() - started) * 1000
    steps: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(arguments.rounds):
        for name, form in FORMS.items():
            steps[name].append(step_milliseconds(tokenizer, engine, form, arguments.num_seqs))
    medians = {name: statistics.median(values) for name, values in steps.items()}
    print("compile ms   step ms   ratio   form (the first one compiled prepares the vocabulary)")
    for name, median in medians.items():
        ratio = median / medians["none"]
        print(f"{compile_milliseconds[name]:10.1f}   {median:7.2f}   {ratio:5.3f}   {name}")
    figures = {"compile_ms": compile_milliseconds, "step_ms": medians}
    print(json.dumps({**setup, **figures}))


if __name__ == "__main__":
    main()
