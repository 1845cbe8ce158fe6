"""Bits per weight that are chosen layer by layer, beside one width for all at the same size.

    python tests/benchmarks/target_bpw.py SOURCE --work DIR [--group-size 64] [--widths 3 4]

SOURCE is a GGUF file or a Hugging Face folder. Each width once as it is and once as `--target-bpw`
of the very size that it takes; `--targets` adds sizes in between. Text, tokens and comparison are
those of `ablations.py`. Each width takes some six minutes. Prints its setup, a table and one JSON
line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lowbit.quant.config import QuantConfig

sys.path.insert(0, str(Path(__file__).parent))

from ablations import HEADINGS, Trial, row_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="the 16-bit model: a GGUF file or a Hugging Face folder")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="*", default=[3, 4])
    parser.add_argument("--targets", type=float, nargs="*", default=[])
    parser.add_argument("--num-sequences", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--eval-sequences", type=int, default=12, help="of 512 tokens")
    arguments = parser.parse_args()

    trial = Trial(arguments, QuantConfig(group_size=arguments.group_size))
    setup = trial.setup | {"group_size": arguments.group_size}
    print(f"setup: {setup}")
    print(f"{HEADINGS}with")
    rows = []

    def add(name: str, found: dict[str, float]) -> None:
        rows.append({"with": name, **found})
        print(row_of(found) + name, flush=True)

    targets = list(arguments.targets)
    for bits in arguments.widths:
        config = QuantConfig(bits=bits, group_size=arguments.group_size)
        found = trial.measure(config)
        add(f"{bits} bits everywhere", found)
        targets.append(found["bits_per_weight"])
    for target in sorted(targets):
        add(f"--target-bpw {target:g}", trial.measure(target_bpw=target))
    print(json.dumps({"setup": setup, "results": rows}))


if __name__ == "__main__":
    main()
