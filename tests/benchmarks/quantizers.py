"""GPTQModel and we quantize the same model with the same tokens; one evaluator compares both.

    python tests/benchmarks/quantizers.py SOURCE --gptqmodel-python .../bin/python --work DIR

SOURCE is a GGUF file or a Hugging Face folder; the peer's interpreter has GPTQModel 7.7.0. Both
sides are whole processes, timed and weighed from outside. They calibrate on one half of the topics
of CPython's language reference, and are compared with the 16-bit model on the other half. Without
--gptqmodel-python only our side runs, next to what DIR holds of the peer: its checkpoints do not
change with our code, so DIR keeps them, and a figure from there is marked "cached".

Prints its setup, a table, the bars and one JSON line last. A run of GPTQModel takes minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import torch
from lowbit.quant.calibration import token_batches
from lowbit.quant.evaluate import Comparison, compare, load_dequantized, load_reference
from lowbit.quant.source import Source, build_model, load_source
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

LENGTH = 512
PEER_SCRIPT = Path(__file__).with_name("quantize_gptqmodel.py")
LOWBIT = Path(sysconfig.get_path("scripts")) / "lowbit"

DEFAULT, BEST = "gptqmodel-default", "gptqmodel-best"
OURS, ASYM, NEAREST = "lowbit", "lowbit-asym", "round-to-nearest"
PEER_OPTIONS: dict[str, list[str]] = {DEFAULT: [], BEST: ["--mse", "2.4"]}
OUR_OPTIONS: dict[str, list[str]] = {OURS: ["--sym"], ASYM: ["--asym"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """Our perplexity increase over 16-bit, at most `limit` times a peer's; or a KL divergence."""

    ours: str
    limit: float
    peer: str | None = None  # None: `limit` is the KL divergence itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    bits: int
    group_size: int
    sides: tuple[str, ...]
    bars: tuple[Bar, ...]


CASES = {
    "w4-g64": Case(
        bits=4,
        group_size=64,
        sides=(NEAREST, DEFAULT, BEST, OURS, ASYM),
        bars=(
            Bar(ours=OURS, limit=0.4, peer=DEFAULT),
            Bar(ours=OURS, limit=0.8, peer=BEST),
            Bar(ours=ASYM, limit=0.25, peer=DEFAULT),
        ),
    ),
    "w3-g32": Case(
        bits=3,
        group_size=32,
        sides=(NEAREST, DEFAULT, OURS),
        bars=(Bar(ours=OURS, limit=0.5, peer=DEFAULT),),
    ),
    "w2-g32": Case(
        bits=2,
        group_size=32,
        sides=(NEAREST, DEFAULT, OURS, ASYM),
        bars=(Bar(ours=OURS, limit=0.5, peer=DEFAULT),),
    ),
    "w8-g64": Case(
        bits=8,
        group_size=64,
        sides=(NEAREST, OURS),
        bars=(Bar(ours=OURS, limit=1e-3),),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one whole process."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    case: str
    side: str
    comparison: Comparison
    cost: Cost | None  # None: nothing to run
    cached: bool

    @property
    def increase(self) -> float:
        """Of the perplexity over the 16-bit model's, as a fraction."""
        found = self.comparison
        assert found.perplexity is not None and found.reference_perplexity is not None
        return found.perplexity / found.reference_perplexity - 1


class Remembered:
    """The 16-bit model's logits on the held-out tokens, computed once for all sides."""

    def __init__(self, model: PreTrainedModel, batches: Tensor) -> None:
        self.config = model.config
        with torch.inference_mode():
            self._logits = {tuple(ids.tolist()): model(ids[None]).logits for ids in batches}

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits[tuple(ids[0].tolist())])


class Bench:
    """The model, the tokens and the work folder that every side shares."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work.absolute()
        self.peer: str | None = arguments.gptqmodel_python
        self.num_sequences: int = arguments.num_sequences
        self.work.mkdir(parents=True, exist_ok=True)
        source = load_source(arguments.source)
        self.text, self.tokens = (
            self.work / "calibration.txt",
            self.work / "calibration.safetensors",
        )
        calibration, held_out = halves()
        self.text.write_text(calibration, encoding="utf-8")
        self._keep_tokens(token_windows(source, calibration, self.num_sequences, seed=0))
        self.evaluation = token_windows(source, held_out, arguments.eval_sequences, seed=1)
        self.folder = as_folder(source, self.work / "model")
        self.source = load_source(str(self.folder))
        self.reference: Any = Remembered(load_reference(self.source), self.evaluation)

    def _keep_tokens(self, ids: Tensor) -> None:
        """Cached checkpoints count only for the tokens they were made with."""
        if self.tokens.exists() and not torch.equal(load_file(self.tokens)["ids"], ids):
            raise SystemExit(f"{self.work}: was made with other calibration tokens; name another")
        save_file({"ids": ids}, self.tokens)

    def measure(self, name: str, side: str) -> Result | None:
        """None: the peer would have to run, and there is no interpreter for it."""
        case = CASES[name]
        if side == NEAREST:
            rounded = round_to_nearest(load_reference(self.source), case)
            return self._result(name, side, rounded, None, cached=False)
        if side in OUR_OPTIONS:
            with tempfile.TemporaryDirectory(dir=self.work) as folder:
                cost = self.run(name, side, Path(folder) / "out")
                model = load_dequantized(Path(folder) / "out")
                return self._result(name, side, model, cost, cached=False)
        out = self.work / f"{side}-{name}"
        record = out.with_suffix(".json")
        cached = record.exists()
        if not cached:
            if self.peer is None:
                return None
            record.write_text(json.dumps(asdict(self.run(name, side, out))))
        cost = Cost(**json.loads(record.read_text()))
        return self._result(name, side, load_dequantized(out), cost, cached=cached)

    def _result(
        self, case: str, side: str, model: PreTrainedModel, cost: Cost | None, *, cached: bool
    ) -> Result:
        found = compare(self.reference, model, self.evaluation)
        return Result(case=case, side=side, comparison=found, cost=cost, cached=cached)

    def run(self, name: str, side: str, out: Path) -> Cost:
        """Let one side quantize into `out`. Raises CalledProcessError; its log stays in DIR."""
        case = CASES[name]
        if side in OUR_OPTIONS:
            command = [str(LOWBIT), "quantize", str(self.folder), str(out), *OUR_OPTIONS[side]]
            command += ["--calibration", str(self.text), "--sequence-length", str(LENGTH)]
            command += ["--num-sequences", str(self.num_sequences), "--seed", "0"]
        else:
            assert self.peer is not None
            command = [self.peer, str(PEER_SCRIPT), str(self.folder), str(self.tokens), str(out)]
            command += PEER_OPTIONS[side]
        layout = ["--bits", str(case.bits), "--group-size", str(case.group_size)]
        return run_measured([*command, *layout], self.work / f"{side}-{name}.log")


def halves() -> tuple[str, str]:
    """(calibration text, held-out text): two halves of the topics of CPython's reference."""
    names = sorted(topics)
    random.Random(0).shuffle(names)
    middle = len(names) // 2
    first, second = (
        "\n\n".join(topics[n] for n in part) for part in (names[:middle], names[middle:])
    )
    return first, second


def token_windows(source: Source, text: str, num_sequences: int, seed: int) -> Tensor:
    """[S, LENGTH] int64, the windows that `lowbit quantize --calibration` draws from that text."""
    return token_batches(
        source.tokenizer, text, num_sequences=num_sequences, sequence_length=LENGTH, seed=seed
    )


def as_folder(source: Source, folder: Path) -> Path:
    """What both sides read: SOURCE itself, or a GGUF file's weights in fp16 safetensors."""
    if Path(source.name).is_dir():
        return Path(source.name)
    if not folder.exists():
        build_model(source, torch.float16).save_pretrained(folder)
        source.write_companions(folder)
    return folder


def round_to_nearest(model: PreTrainedModel, case: Case) -> PreTrainedModel:
    """Every decoder layer's weights on symmetric grids that span each group's largest weight."""
    middle = 1 << (case.bits - 1)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            for group in module.weight.data.split(case.group_size, dim=1):
                largest = group.abs().amax(dim=1, keepdim=True).clamp(min=1e-9)
                scale = 2 * largest / (2 * middle - 1)
                group.copy_((group / scale).round().clamp(-middle, middle - 1) * scale)
    return model


def run_measured(command: list[str], log: Path) -> Cost:
    """Wall time and peak resident memory of a process, from its start to its end."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    peak = 0
    with log.open("wb") as file:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, env=environment
        )
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with status {process.returncode}; see {log}")
    return Cost(seconds=round(seconds, 1), peak_bytes=peak)


def peak_bytes(pid: int) -> int:
    """Of the program that the process runs now: what `wait4` gives counts this one's memory, too,
    which the child has before it is another program.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def time_interleaved(bench: Bench, name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of GPTQModel at its defaults and of us, in turns."""
    found: dict[str, list[float]] = {DEFAULT: [], OURS: []}
    for i in range(rounds):
        for side, seconds in found.items():
            with tempfile.TemporaryDirectory(dir=bench.work) as folder:
                seconds.append(bench.run(name, side, Path(folder) / "out").seconds)
            print(f"timing {name} round {i + 1} {side}: {seconds[-1]:.1f} s", flush=True)
    return found


def describe(arguments: argparse.Namespace, bench: Bench) -> dict[str, object]:
    return {
        "source": Path(arguments.source).name,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "calibration_tokens": load_file(bench.tokens)["ids"].numel(),
        "held_out_tokens": bench.evaluation.numel(),
        "python": platform.python_version(),
        "lowbit": {"torch": version("torch"), "commit": commit()},
        "gptqmodel": peer_versions(bench.peer),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Of this checkout; "+" when it has changes that are not committed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def peer_versions(peer: str | None) -> dict[str, str] | None:
    if peer is None:
        return None
    code = "from importlib.metadata import version as v; print(v('gptqmodel'), v('torch'))"
    printed = subprocess.run([peer, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(zip(("gptqmodel", "torch"), printed.split(), strict=True))


def show(result: Result) -> str:
    found, cost = result.comparison, result.cost
    spent = f"{cost.seconds:7.1f} {cost.peak_bytes / 2**30:6.2f}" if cost else f"{'-':>7} {'-':>6}"
    return (
        f"{result.case:<7} {result.side:<18} {found.perplexity:9.3f} {100 * result.increase:9.2f} "
        f"{found.kl_divergence:8.5f} {100 * found.top1_agreement:6.2f} {spent}"
        f"{'  cached' if result.cached else ''}"
    )


def judge(name: str, bar: Bar, results: dict[str, Result]) -> dict[str, object] | None:
    """None: a side that the bar compares was not measured."""
    if bar.ours not in results or (bar.peer is not None and bar.peer not in results):
        return None
    if bar.peer is None:
        what, found = "KL divergence", results[bar.ours].comparison.kl_divergence
    else:
        what = f"perplexity increase / {bar.peer}'s"
        found = results[bar.ours].increase / results[bar.peer].increase
    verdict = "holds" if found <= bar.limit else "MISSED"
    print(f"bar {name} {bar.ours}: {what} {found:.4g}, at most {bar.limit:g}: {verdict}")
    return {"case": name, **asdict(bar), "found": round(found, 5), "holds": found <= bar.limit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the 16-bit model: a GGUF file or a Hugging Face folder")
    parser.add_argument("--gptqmodel-python", metavar="PATH", help="the peer's interpreter")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="kept between runs")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="*", choices=[NEAREST, *PEER_OPTIONS, *OUR_OPTIONS])
    parser.add_argument("--num-sequences", type=int, default=64, help=f"of {LENGTH} tokens")
    parser.add_argument("--eval-sequences", type=int, default=20, help=f"of {LENGTH} tokens")
    parser.add_argument(
        "--timing", type=int, default=0, metavar="ROUNDS", help="both sides in turns"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the last line here, too")
    arguments = parser.parse_args()
    if arguments.timing and arguments.gptqmodel_python is None:
        parser.error("--timing needs --gptqmodel-python")

    bench = Bench(arguments)
    setup = describe(arguments, bench)
    print(f"setup: {setup}")
    print("case    side              perplexity increase %  KL       top-1 %  seconds    GiB")
    rows, bars = [], []
    for name in arguments.cases:
        results: dict[str, Result] = {}
        for side in CASES[name].sides:
            if arguments.sides and side not in arguments.sides:
                continue
            result = bench.measure(name, side)
            if result is not None:
                results[side] = result
                print(show(result), flush=True)
        rows += [{**asdict(r), "increase": round(r.increase, 5)} for r in results.values()]
        bars += [b for bar in CASES[name].bars if (b := judge(name, bar, results)) is not None]
    timing = time_interleaved(bench, arguments.cases[0], arguments.timing)
    if arguments.timing:
        ratio = statistics.median(timing[OURS]) / statistics.median(timing[DEFAULT])
        print(f"wall time, ours / GPTQModel's, medians of {arguments.timing}: {ratio:.3f}")
    line = json.dumps({"setup": setup, "results": rows, "bars": bars, "timing": timing})
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
