"""Make the committed fixtures: tiny random Llamas, quantized and run by GPTQModel.

    python tests/interop/make_fixtures.py PEER_PYTHON [NAME ...]

PEER_PYTHON is an interpreter with GPTQModel (see README.md beside the fixtures for the version that
made the committed ones). Each fixture is a checkpoint as the peer wrote it, without the tokenizer
and without the one machine path in its settings, and `peer.safetensors`: what the peer computes
from it (see peer_gptqmodel.py), less what would make the file large.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

from byte_tokenizer import byte_tokenizer  # noqa: E402

FIXTURES = {
    "w4-g32-sym": ["--bits", "4"],
    "w8-g32-sym": ["--bits", "8"],
    "w3-g32-sym": ["--bits", "3"],
    "w2-g32-sym": ["--bits", "2"],
    "w4-g32-sym-desc-act": ["--bits", "4", "--desc-act"],
    "w4-g32-asym": ["--bits", "4", "--asym"],
    "w3-g32-asym": ["--bits", "3", "--asym"],
}
FILES = ("config.json", "quantize_config.json", "model.safetensors")
KEPT = ("layers.0.self_attn.k_proj", "layers.1.self_attn.o_proj", "logits.short")
NUM_TOKENS = 32


def main(peer: str, *names: str) -> None:
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "source"
        save_source(source)
        torch.manual_seed(1)
        save_file({"ids": torch.randint(0, 256, (64, 64))}, source / "tokens")
        prompts = {"short": torch.randint(0, 256, (7,)), "long": torch.randint(0, 256, (24,))}
        save_file(prompts, source / "prompts")
        for name in names or FIXTURES:
            made = Path(work) / name
            quantize = [str(HERE.parent / "benchmarks" / "quantize_gptqmodel.py")]
            quantize += [str(source), str(source / "tokens"), str(made), "--group-size", "32"]
            subprocess.run([peer, *quantize, *FIXTURES[name]], check=True, cwd=work)
            run = [str(HERE / "peer_gptqmodel.py"), str(source / "prompts"), str(NUM_TOKENS)]
            subprocess.run([peer, *run, str(made)], check=True, cwd=work)
            keep(made, HERE / "fixtures" / name, prompts)


def save_source(folder: Path) -> None:
    """Two layers whose attention and MLP both matter to the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
    )
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def keep(made: Path, fixture: Path, prompts: dict[str, torch.Tensor]) -> None:
    shutil.rmtree(fixture, ignore_errors=True)
    fixture.mkdir(parents=True)
    for name in FILES:
        shutil.copyfile(made / name, fixture / name)
    for name in ("config.json", "quantize_config.json"):
        without_machine_path(fixture / name)
    peer = load_file(made / "peer.safetensors")
    kept = {
        name: tensor
        for name, tensor in peer.items()
        if name.startswith("greedy.") or name.endswith(KEPT)
    }
    kept |= {f"prompt.{name}": prompt for name, prompt in prompts.items()}
    save_file(kept, fixture / "peer.safetensors")


def without_machine_path(path: Path) -> None:
    settings = json.loads(path.read_text())
    quant = settings.get("quantization_config", settings)
    quant["meta"].pop("offload_to_disk_path", None)
    path.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
