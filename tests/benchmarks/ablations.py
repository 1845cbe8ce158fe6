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
from pathlib import Path
from typing import Any

import torch
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
# What each row changes from the one before it; the layout may change, too.
STEPS: dict[str, dict[str, Any]] = {
    "GPTQ on live group grids": {},
    "columns in static order of importance": {"act_order": "static"},
    "scale search, 2.4-norm": {"scale_search": "norm"},
    "scale search, weighted by the Hessian": {"scale_search": "hessian"},
    "signed scales": {"signed_scales": True},
    "coordinate descent, 4 sweeps": {"descent_sweeps": 4},
    "drift of the inputs": {"drift": "inputs"},
    "drift of the residual stream": {"drift": "stream"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the 16-bit model: a GGUF file or a Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--num-sequences", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--eval-sequences", type=int, default=12, help="of 512 tokens")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    source = load_source(arguments.source)
    calibration, held_out = halves()
    text = arguments.work / "calibration.txt"
    text.write_text(calibration, encoding="utf-8")
    batches = token_windows(source, held_out, arguments.eval_sequences, seed=1)
    reference: Any = Remembered(load_reference(source), batches)
    layout = {"bits": arguments.bits, "group_size": arguments.group_size}
    setup = {
        "source": Path(arguments.source).name,
        "processor": processor(),
        "torch": torch.__version__,
        "commit": commit(),
        "calibration_sequences": arguments.num_sequences,
        "held_out_tokens": batches.numel(),
        **layout,
    }
    print(f"setup: {setup}")
    print("KL       top-1 %  perplexity increase %  seconds  with")
    settings, rows = dict(PLAIN), []
    for name, change in STEPS.items():
        settings |= change
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            out = Path(folder) / "out"
            quantize(
                arguments.source,
                out,
                QuantConfig(**layout),
                solver=SolverConfig(**settings),
                calibration_file=text,
                num_sequences=arguments.num_sequences,
                progress=False,
            )
            seconds = time.perf_counter() - started
            found = compare(reference, load_dequantized(out), batches)
        assert found.perplexity is not None and found.reference_perplexity is not None
        increase = found.perplexity / found.reference_perplexity - 1
        print(
            f"{found.kl_divergence:.5f}  {100 * found.top1_agreement:7.2f}  {100 * increase:21.2f}"
            f"  {seconds:7.1f}  {name}",
            flush=True,
        )
        row = {"with": name, "kl": round(found.kl_divergence, 5), "increase": round(increase, 5)}
        rows.append({**row, "top1": round(found.top1_agreement, 4), "seconds": round(seconds, 1)})
    print(json.dumps({"setup": setup, "results": rows}))


if __name__ == "__main__":
    main()
