"""Run checkpoints in vLLM's CPU build. Run by its interpreter; imports nothing of ours.

    python peer_vllm.py PROMPTS NUM_TOKENS CHECKPOINT [CHECKPOINT ...]

PROMPTS is a safetensors file of token ids, one [T] int64 tensor per prompt. For each CHECKPOINT a
file CHECKPOINT/peer.safetensors is written: `greedy.PROMPT` [NUM_TOKENS] int64.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with this one
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def main(prompts: str, num_tokens: str, *checkpoints: str) -> None:
    named = load_file(prompts)
    sampling = SamplingParams(
        temperature=0, max_tokens=int(num_tokens), ignore_eos=True, detokenize=False
    )
    for checkpoint in checkpoints:
        model = LLM(
            checkpoint, dtype="float16", max_model_len=128, max_num_seqs=4, enforce_eager=True
        )
        token_ids = [{"prompt_token_ids": ids.tolist()} for ids in named.values()]
        found = model.generate(token_ids, sampling)
        tokens = {
            f"greedy.{name}": torch.tensor(output.outputs[0].token_ids)
            for name, output in zip(named, found, strict=True)
        }
        save_file(tokens, Path(checkpoint) / "peer.safetensors")
        del model
        cleanup_dist_env_and_memory()  # before the next one's, or it would end that one's instead


if __name__ == "__main__":
    main(*sys.argv[1:])
