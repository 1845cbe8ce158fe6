"""Does a run take the memory that `lowbit plan` says? Random Llamas, whole processes, peak memory.

    python tests/benchmarks/memory.py [--hidden 4096 --intermediate 11008 --layers 2] --work DIR

Every layer takes the memory of every other, so two of a model's layers show what all of them take.
Prints its setup, one row per number of calibration sequences, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from lowbit.quant.config import QuantConfig
from lowbit.quant.plan import plan_run
from lowbit.quant.units import format_bytes
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from byte_tokenizer import byte_tokenizer

LENGTH = 512
LOWBIT = Path(sysconfig.get_path("scripts")) / "lowbit"


def make_model(folder: Path, hidden: int, intermediate: int, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 128,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(config, dtype=torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def run(model: Path, num_sequences: int) -> tuple[int, float]:
    """(peak resident memory in bytes, seconds) of one `lowbit quantize`."""
    with tempfile.TemporaryDirectory(dir=model.parent) as folder:
        # With a calibration text of the user's, no text is drawn from the model.
        text = Path(folder) / "text"
        text.write_text("The quick brown fox jumps over the lazy dog. " * 4000, encoding="utf-8")
        command = [str(LOWBIT), "quantize", str(model), str(Path(folder) / "out")]
        command += ["--calibration", str(text), "--num-sequences", str(num_sequences)]
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
        return usage.ru_maxrss * 1024, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--num-sequences", type=int, nargs="*", default=[16], help="a run for each")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    shape = (arguments.hidden, arguments.intermediate, arguments.layers)
    model = arguments.work.absolute() / "model-{}-{}-{}".format(*shape)
    if not model.exists():
        make_model(model, *shape)
    setup = {"machine": platform.machine(), "torch": torch.__version__, "shape": shape}
    print(f"setup: {setup}")
    print("sequences      planned     measured  measured/planned  seconds")
    rows = []
    for count in arguments.num_sequences:
        plan = plan_run(str(model), QuantConfig(), num_sequences=count, sequence_length=LENGTH)
        peak, seconds = run(model, count)
        ratio = peak / plan.peak_memory_bytes
        planned = format_bytes(plan.peak_memory_bytes)
        print(f"{count:9}  {planned:>11}  {format_bytes(peak):>11}  {ratio:16.3f}  {seconds:7.1f}")
        row = {"num_sequences": count, "planned": plan.peak_memory_bytes, "measured": peak}
        rows.append({**row, "seconds": round(seconds, 1)})
    print(json.dumps({"setup": setup, "results": rows}))


if __name__ == "__main__":
    main()
