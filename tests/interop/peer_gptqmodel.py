"""Run checkpoints in GPTQModel's torch backend. Run by its interpreter; imports nothing of ours.

    python peer_gptqmodel.py PROMPTS NUM_TOKENS CHECKPOINT [CHECKPOINT ...]

PROMPTS is a safetensors file of token ids, one [T] int64 tensor per prompt. For each CHECKPOINT a
file CHECKPOINT/peer.safetensors is written: `greedy.PROMPT` [NUM_TOKENS] int64, `logits.PROMPT`
[T, V] and `weight.MODULE` [N, K] of every quantized layer, both fp32.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.cpu_count = lambda: 8  # with two cores its thread pool refuses to start
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else it compiles the dequantization of every layer

import torch  # noqa: E402
from gptqmodel import BACKEND, GPTQModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402


def main(prompts: str, num_tokens: str, *checkpoints: str) -> None:
    for checkpoint in checkpoints:
        # It loads no float32, but computes in it; fp16 would decide near ties by rounding.
        model = GPTQModel.load(
            checkpoint, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
        ).model.float()
        tensors = dict(run(model, load_file(prompts), int(num_tokens)))
        save_file(tensors, Path(checkpoint) / "peer.safetensors")


@torch.inference_mode()
def run(
    model: torch.nn.Module, prompts: dict[str, Tensor], num_tokens: int
) -> Iterator[tuple[str, Tensor]]:
    for name, prompt in prompts.items():
        ids = prompt[None]
        yield f"logits.{name}", model(ids).logits[0].contiguous()
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        yield f"greedy.{name}", ids[0, len(prompt) :].clone()
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            yield f"weight.{name}", module.dequantize_weight().t().contiguous()


if __name__ == "__main__":
    main(*sys.argv[1:])
