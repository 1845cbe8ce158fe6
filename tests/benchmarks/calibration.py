"""Which calibration text is best? Quantize with each, compare with the 16-bit model elsewhere.

    python tests/benchmarks/calibration.py SOURCE [--candidates a b] [--held-out c d]

Prints its setup, a table and one JSON line last. The candidates: CPython's own language reference,
conversations that the model draws itself, and the built-in mixture of both. Held out, all of it
found on the machine: the descriptions of installed packages, their licences, the source of the
standard library, and conversations drawn with another seed. Each candidate takes three minutes or
so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lowbit.quant.calibration import (
    conversation_opening,
    reference_text,
    sample_batches,
    token_batches,
)
from lowbit.quant.config import QuantConfig
from lowbit.quant.evaluate import compare, load_dequantized, load_reference
from lowbit.quant.pipeline import quantize
from lowbit.quant.source import Source, load_source
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))

from quantizers import Remembered, commit, processor

LENGTH = 512
CANDIDATES = ("reference", "sampled", "mixture")
HELD_OUT = ("descriptions", "licences", "code", "conversations")


def package_descriptions() -> str:
    """READMEs: English about software, with tables, links and snippets."""
    texts = {
        distribution.metadata["Name"]: distribution.metadata.get_payload()
        or distribution.metadata["Description"]
        or ""
        for distribution in importlib.metadata.distributions()
    }
    return "\n\n".join(texts[name] for name in sorted(texts) if len(texts[name]) > 500)


def licences() -> str:
    """Legal English, without repeating a licence that many packages share."""
    seen: dict[str, None] = {}
    for distribution in importlib.metadata.distributions():
        for path in distribution.files or ():
            if "LICENSE" in path.name.upper():
                located = Path(str(distribution.locate_file(path)))
                if located.is_file():
                    paragraphs = located.read_text(encoding="utf-8", errors="ignore").split("\n\n")
                    seen.update(dict.fromkeys(p.strip() for p in paragraphs if len(p) > 100))
    return "\n\n".join(sorted(seen))


def standard_library() -> str:
    """Python source."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = random.Random(1).sample(sorted(folder.glob("*.py")), 60)
    return "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument(
        "--num-sequences", type=int, nargs="*", default=[16], help=f"of {LENGTH} tokens"
    )
    parser.add_argument("--candidates", nargs="*", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--held-out", nargs="*", choices=HELD_OUT, default=HELD_OUT)
    parser.add_argument("--eval-sequences", type=int, default=6, help="of each held-out text")
    arguments = parser.parse_args()
    sizes, names = arguments.num_sequences, arguments.candidates

    source = load_source(arguments.source)
    model = load_reference(source)
    candidates: dict[str, str | None] = {"reference": reference_text(), "mixture": None}
    if "sampled" in names:
        candidates["sampled"] = sample(source, model, max(sizes) + 1, seed=1)
    texts = {
        "descriptions": package_descriptions,
        "licences": licences,
        "code": standard_library,
        "conversations": lambda: sample(source, model, arguments.eval_sequences + 1, seed=2),
    }
    held_out = {
        name: token_batches(
            source.tokenizer,
            texts[name](),
            num_sequences=arguments.eval_sequences,
            sequence_length=LENGTH,
            seed=1,
        )
        for name in arguments.held_out
    }
    reference = Remembered(model, torch.cat(list(held_out.values())))
    setup = {
        "source": Path(source.name).name,
        "processor": processor(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "held_out_tokens": {name: batch.numel() for name, batch in held_out.items()},
    }
    print(f"setup: {setup}", flush=True)
    print("calibration tokens seconds      held out     KL  top-1  perplexity")
    results = [
        result
        for name in names
        for size in sizes
        for result in measure(source, reference, name, candidates[name], size, held_out)
    ]
    print(json.dumps({"setup": setup, "results": results}))


def sample(source: Source, model: PreTrainedModel, num_sequences: int, seed: int) -> str:
    """Conversations that the model draws, as text."""
    drawn = sample_batches(
        model,
        conversation_opening(source.tokenizer),
        num_sequences=num_sequences,
        sequence_length=LENGTH,
        seed=seed,
    )
    return "".join(source.tokenizer.batch_decode(drawn))


def measure(
    source: Source,
    reference: Any,
    name: str,
    text: str | None,
    num_sequences: int,
    held_out: dict[str, Tensor],
) -> Iterator[dict[str, object]]:
    """Quantize with one candidate and compare on every held-out text, one row each."""
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "text", Path(folder) / "out"
        if text is not None:
            file.write_text(text, encoding="utf-8")
        report = quantize(
            source.name,
            out,
            QuantConfig(),
            calibration_file=None if text is None else file,
            num_sequences=num_sequences,
            sequence_length=LENGTH,
            progress=False,
        )
        candidate = load_dequantized(out)
    for held, batch in held_out.items():
        found = compare(reference, candidate, batch)
        print(
            f"{name:>11} {report.num_calibration_tokens:6} {report.seconds:7.1f} {held:>13} "
            f"{found.kl_divergence:.4f} {found.top1_agreement:.4f} "
            f"{found.reference_perplexity:.2f} -> {found.perplexity:.2f}",
            flush=True,
        )
        yield {
            "calibration": name,
            "tokens": report.num_calibration_tokens,
            "seconds": round(report.seconds, 1),
            "held_out": held,
            "kl": round(found.kl_divergence, 4),
            "top1": round(found.top1_agreement, 4),
            "perplexity": round(found.perplexity, 3),
            "reference_perplexity": round(found.reference_perplexity, 3),
        }


if __name__ == "__main__":
    main()
