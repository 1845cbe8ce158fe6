"""Quantize with GPTQModel. Run by GPTQModel's own interpreter; imports nothing of ours.

    python quantize_gptqmodel.py FOLDER TOKENS OUT --bits 4 --group-size 64 [--mse 2.4] ...

TOKENS is a safetensors file with `ids` [S, L] int64. What is not named keeps GPTQModel's default;
group-aware order is one.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.cpu_count = lambda: 8  # with two cores its thread pool refuses to start

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asym", action="store_true", help="written as gptq_v2")
    parser.add_argument("--desc-act", action="store_true", help="in place of group-aware order")
    parser.add_argument("--mse", type=float, help="norm of the scale search")
    arguments = parser.parse_args()

    settings = {} if arguments.mse is None else {"mse": arguments.mse}
    if arguments.desc_act:
        settings |= {"desc_act": True, "act_group_aware": False}
    if arguments.asym:
        settings |= {"sym": False, "format": "gptq_v2"}
    config = QuantizeConfig(bits=arguments.bits, group_size=arguments.group_size, **settings)
    model = GPTQModel.load(str(arguments.folder), config, device="cpu")
    ids = load_file(arguments.tokens)["ids"].tolist()
    calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(calibration, batch_size=1, backend=BACKEND.TORCH)
    model.save(str(arguments.out))


if __name__ == "__main__":
    main()
