from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM


def save_tiny_source(folder: Path, **overrides: object) -> LlamaForCausalLM:
    """A 2-layer 16-bit Llama with a tokenizer; its K are 72 and 104, no multiples of 64."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 72,
        "intermediate_size": 104,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "bos_token_id": 256,
        "eos_token_id": 257,
        **overrides,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.float16).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    save_tiny_source(folder)
    return folder


@pytest.fixture(scope="session")
def save_source() -> Callable[..., LlamaForCausalLM]:
    """`save_tiny_source`, for a model of another shape."""
    return save_tiny_source


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny layers gain nothing from a second thread, and on a busy machine wait for it long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    return path
