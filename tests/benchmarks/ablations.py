"""What each ingredient of the solver is worth: one more of them in every row.

    python tests/benchmarks/ablations.py SOURCE --work DIR [--num-sequences 16] [--bits 4]

SOURCE is a GGUF file or a Hugging Face folder. Every row is a whole run of the pipeline on the same
tokens, compared with the 16-bit model on text that it was not calibrated on: the halves of
`quantizers.py`. Prints its setup, a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lowbit.quant import gptq
from lowbit.quant.config import QuantConfig
from lowbit.quant.evaluate import compare, load_dequantized, load_reference
from lowbit.quant.gptq import SolverConfig
from lowbit.quant.pipeline import quantize
from lowbit.quant.source import load_source

sys.path.insert(0, str(Path(__file__).parent))

from quantizers import Remembered, commit, halves, processor, token_windows

PLAIN: dict[str, Any] = {
    "act_order": "none",
    "scale_search": "none",
    "signed_scales": False,
    "descent_sweeps": 0,
    "drift": "none",
}
STALE = "GPTQ on stale group grids, as published"
# What each row changes from the one before it; the layout may change, too.
STEPS: dict[str, dict[str, Any]] = {
    STALE: {},
    "live group grids": {},
    "columns in static order of importance": {"act_order": "static"},
    "scale search, 2.4-norm": {"scale_search": "norm"},
    "scale search, weighted by the Hessian": {"scale_search": "hessian"},
    "signed scales": {"signed_scales": True},
    "coordinate descent, 4 sweeps": {"descent_sweeps": 4},
    "drift of the inputs": {"drift": "inputs"},
    "drift of the residual stream": {"drift": "stream"},
}


HEADINGS = "KL       top-1 %  perplexity increase %  bits/weight  seconds  "


class Trial:
    """A model, its calibration text and held-out text; runs of the pipeline on them."""

    def __init__(self, arguments: argparse.Namespace, config: QuantConfig) -> None:
        self._source, self._work, self._config = arguments.source, arguments.work, config
        self._num_sequences = arguments.num_sequences
        self._work.mkdir(parents=True, exist_ok=True)
        source = load_source(self._source)
        calibration, held_out = halves()
        self._text = self._work / "calibration.txt"
        self._text.write_text(calibration, encoding="utf-8")
        self._batches = token_windows(source, held_out, arguments.eval_sequences, seed=1)
        self._reference: Any = Remembered(load_reference(source), self._batches)
        self.setup = {
            "source": Path(self._source).name,
            "processor": processor(),
            "torch": torch.__version__,
            "commit": commit(),
            "calibration_sequences": self._num_sequences,
            "held_out_tokens": self._batches.numel(),
        }

    def measure(self, config: QuantConfig | None = None, **options: Any) -> dict[str, float]:
        """Of one run with these options of `quantize`, compared with the 16-bit model."""
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self._work) as folder:
            out = Path(folder) / "out"
            report = quantize(
                self._source,
                out,
                config or self._config,
                calibration_file=self._text,
                num_sequences=self._num_sequences,
                progress=False,
                **options,
            )
            seconds = time.perf_counter() - started
            found = compare(self._reference, load_dequantized(out), self._batches)
        assert found.perplexity is not None and found.reference_perplexity is not None
        return {
            "kl": round(found.kl_divergence, 5),
            "top1": round(found.top1_agreement, 4),
            "increase": round(found.perplexity / found.reference_perplexity - 1, 5),
            "bits_per_weight": round(report.bits_per_weight, 4),
            "seconds": round(seconds, 1),
        }


def row_of(found: dict[str, Any]) -> str:
    return (
        f"{found['kl']:.5f}  {100 * found['top1']:7.2f}  {100 * found['increase']:21.2f}  "
        f"{found['bits_per_weight']:11.3f}  {found['seconds']:7.1f}  "
    )


@contextmanager
def stale_grids() -> Iterator[None]:
    """Every group's grid is found when its block of 128 columns begins: the groups behind the
    block's first one do not see what the columns before them have left to make up for.
    """
    live = gptq._blocks

    def blocks(groups: list[int], *, whole_groups: bool) -> Iterator[tuple[int, int, slice | None]]:
        for start, end, _ in live(groups, whole_groups=False):
            for group in sorted({*groups[start:end]}):
                first = groups.index(group)
                if first >= start:
                    yield first, first, slice(first, first + groups.count(group))
            yield start, end, None

    gptq._blocks = blocks
    try:
        yield
    finally:
        gptq._blocks = live


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the 16-bit model: a GGUF file or a Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-sequences", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--eval-sequences", type=int, default=12, help="of 512 tokens")
    arguments = parser.parse_args()

    layout = {"bits": arguments.bits, "group_size": arguments.group_size}
    trial = Trial(arguments, QuantConfig(**layout))
    setup = trial.setup | layout
    print(f"setup: {setup}")
    print(f"{HEADINGS}with")
    settings, rows = dict(PLAIN), []
    for name, change in STEPS.items():
        settings |= change
        with stale_grids() if name == STALE else nullcontext():
            rows.append({"with": name, **trial.measure(solver=SolverConfig(**settings))})
        print(row_of(rows[-1]) + name, flush=True)
    print(json.dumps({"setup": setup, "results": rows}))


if __name__ == "__main__":
    main()
