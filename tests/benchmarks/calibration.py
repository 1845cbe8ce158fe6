"""Which calibration text is best? Quantize with each, compare with the 16-bit model elsewhere.

    python tests/benchmarks/calibration.py SOURCE [--num-sequences 8,16,32] [--candidates a,b]

Prints its setup, a table and one JSON line last. Every text comes from the machine itself: what
the model samples, CPython's own language reference, and, held out, the descriptions of installed
packages, their licences, the source of the standard library, and conversations sampled with
another seed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from lowbit.quant.calibration import builtin_text, token_batches
from lowbit.quant.checkpoint import QuantConfig
from lowbit.quant.evaluate import compare, load_dequantized, load_reference
from lowbit.quant.pipeline import quantize
from lowbit.quant.source import Source, load_source
from transformers import LlamaForCausalLM

LENGTH = 512
EVAL_SEQUENCES = 8


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


@torch.inference_mode()
def sample(source: Source, model: LlamaForCausalLM, num: int, seed: int, opening: str) -> str:
    """`num` texts of LENGTH tokens that the model draws at temperature 1 after `opening`."""
    torch.manual_seed(seed)
    ids = torch.tensor([source.tokenizer(opening)["input_ids"]]).expand(num, -1)
    drawn = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        pad_token_id=0,
    )
    return "\n\n".join(source.tokenizer.batch_decode(drawn))


def chat_opening(source: Source) -> str:
    """The chat template up to where the user's words begin, so that the model invents those too."""
    marker = "LOWBIT-MARKER"
    text = source.tokenizer.apply_chat_template(
        [{"role": "user", "content": marker}], tokenize=False, add_generation_prompt=True
    )
    return str(text).split(marker)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--num-sequences", default="16", help=f"of {LENGTH} tokens; a list")
    parser.add_argument("--candidates", default="reference,sampled,chat,mixed")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.num_sequences.split(",")]

    source = load_source(arguments.source)
    reference = load_reference(source)
    chat = chat_opening(source)
    started = time.monotonic()
    texts = {"reference": builtin_text()}
    if set(arguments.candidates.split(",")) & {"sampled", "chat", "mixed"}:
        texts["sampled"] = sample(source, reference, max(sizes) + 2, 0, "\n")
        texts["chat"] = sample(source, reference, max(sizes) + 2, 1, chat)
        third = max(sizes) * LENGTH * 4 // 3  # characters; four to a token
        texts["mixed"] = "\n\n".join(texts[name][:third] for name in ("sampled", "chat"))
        texts["mixed"] += "\n\n" + texts["reference"][:third]
    print(f"sampling took {time.monotonic() - started:.0f} s")
    held_out = {
        "descriptions": package_descriptions(),
        "licences": licences(),
        "code": standard_library(),
        "conversations": sample(source, reference, EVAL_SEQUENCES + 2, 2, chat),
    }
    batches = {
        name: token_batches(
            source.tokenizer, text, num_sequences=EVAL_SEQUENCES, sequence_length=LENGTH, seed=1
        )
        for name, text in held_out.items()
    }
    tokens = {name: batch.numel() for name, batch in batches.items()}
    setup = {"source": source.name, "machine": platform.machine(), "torch": torch.__version__}
    print(f"setup: {setup} threads {torch.get_num_threads()} held-out tokens {tokens}")
    print(f"{'calibration':>12} {'tokens':>6} {'seconds':>7} {'held out':>13}", end="")
    print("    KL  top-1  perplexity")
    results = []
    for name in arguments.candidates.split(","):
        for size in sizes:
            with tempfile.TemporaryDirectory() as folder:
                file, out = Path(folder) / "text", Path(folder) / "out"
                file.write_text(texts[name], encoding="utf-8")
                report = quantize(
                    arguments.source,
                    out,
                    QuantConfig(),
                    calibration_file=file,
                    num_sequences=size,
                    sequence_length=LENGTH,
                    progress=False,
                )
                candidate = load_dequantized(out)
            for held, batch in batches.items():
                found = compare(reference, candidate, batch)
                print(
                    f"{name:>12} {report.num_calibration_tokens:6} {report.seconds:7.1f} "
                    f"{held:>13} {found.kl_divergence:.4f} {found.top1_agreement:.4f} "
                    f"{found.reference_perplexity:.2f} -> {found.perplexity:.2f}",
                    flush=True,
                )
                results.append(
                    {
                        "calibration": name,
                        "tokens": report.num_calibration_tokens,
                        "seconds": round(report.seconds, 1),
                        "held_out": held,
                        "kl": round(found.kl_divergence, 4),
                        "top1": round(found.top1_agreement, 4),
                        "perplexity": round(found.perplexity, 3),
                        "reference_perplexity": round(found.reference_perplexity, 3),
                    }
                )
    print(json.dumps({"setup": setup, "held_out_tokens": tokens, "results": results}))


if __name__ == "__main__":
    main()
