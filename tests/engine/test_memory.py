"""What is refused before a model is loaded, and how large the KV cache becomes."""

from __future__ import annotations

import logging

import psutil
import pytest
import torch
from engines import make_engine
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import KernelBackend
from lowbit.server.cli import main
from lowbit.server.config import EngineConfig, InvalidConfig
from lowbit.server.engine import memory
from lowbit.server.engine.build import build_engine
from lowbit.server.model.families import read_config
from lowbit.server.model.loader import load_decoder
from tiny import TinyModel

MODEL = read_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 100,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1000,
    },
    {},
)
TOKEN_BYTES = 2 * 100 * 4 * 16 * 2  # keys and values x layers x heads x D x bfloat16
SEQUENCE_BYTES = 63 * 16 * TOKEN_BYTES  # 1,000 tokens in blocks of 16


class Gpu(CpuBackend):
    """Says that it is a GPU; nothing runs on it here."""

    def __init__(self) -> None:
        super().__init__("bfloat16")
        self.device = torch.device("cuda", 0)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> KernelBackend:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    return Gpu()


def refusal(backend: KernelBackend, weight_bytes: int, usable: int, **settings: int) -> str | None:
    try:
        memory.check_room(weight_bytes, MODEL, backend, EngineConfig(**settings), 1000, usable)
    except InvalidConfig as error:
        return str(error)
    return None


def test_weights_and_one_sequence_must_fit(backend: KernelBackend) -> None:
    assert refusal(backend, 10**9, 10**9 + SEQUENCE_BYTES) is None
    text = refusal(backend, 10**9, 10**9 + SEQUENCE_BYTES - 1)
    assert text == (
        "the weights need 1.00 GB and one sequence of 1000 tokens (max_model_len) 25.8 MB, "
        "together 1.03 GB; NVIDIA Test has 1.03 GB to use; set max_model_len to at most 992"
    )


def test_what_is_advised_is_accepted(backend: KernelBackend) -> None:
    usable = 10**9 + 5_000_000
    text = refusal(backend, 10**9, usable)
    assert text is not None
    advised = int(text.rsplit(" ", 1)[1])
    assert advised == 5_000_000 // (16 * TOKEN_BYTES) * 16
    memory.check_room(10**9, MODEL, backend, EngineConfig(), advised, usable)
    with pytest.raises(InvalidConfig):
        memory.check_room(10**9, MODEL, backend, EngineConfig(), advised + 1, usable)


def test_weights_that_alone_do_not_fit(backend: KernelBackend) -> None:
    text = refusal(backend, 10**9, 10**9 - 1)
    assert text is not None
    assert text.endswith("take fewer bits per weight or a device with more memory")


def test_a_configured_cache_must_fit(backend: KernelBackend) -> None:
    assert refusal(backend, 10**9, 2 * 10**9, kv_cache_memory_bytes=10**9) is None
    text = refusal(backend, 10**9, 2 * 10**9 - 1, kv_cache_memory_bytes=10**9)
    assert text is not None
    assert text.endswith("set kv_cache_memory_bytes to at most 999999999")


def cache_bytes(backend: KernelBackend, usable: int, step: int = 0, **settings: int) -> int:
    return memory.kv_cache_bytes(
        MODEL,
        backend,
        EngineConfig(**settings),
        max_model_len=1000,
        usable=usable,
        step_bytes=step,
    )


def test_a_gpu_gives_the_cache_what_a_step_leaves(backend: KernelBackend) -> None:
    assert cache_bytes(backend, 10**10, step=10**9) == 9 * 10**9
    assert cache_bytes(backend, 10**10, kv_cache_memory_bytes=12345) == 12345
    with pytest.raises(InvalidConfig, match=r"max_num_batched_tokens\) 9\.97 GB; NVIDIA Test has"):
        cache_bytes(backend, 10**10, step=10**10 - SEQUENCE_BYTES + 1)


def test_a_cpu_gives_it_a_gibibyte_if_that_is_free() -> None:
    backend = CpuBackend("bfloat16")
    assert cache_bytes(backend, 10**10) == 1 << 30
    assert cache_bytes(backend, 10**8) == 10**8
    with pytest.raises(InvalidConfig, match=r"this machine has 10\.0 MB to use beside the weights"):
        cache_bytes(backend, 10**7)


def test_the_capacity_and_what_int8_gains_are_logged(
    tiny_model: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        make_engine(tiny_model, num_blocks=10)
        make_engine(tiny_model, "float32", "int8", num_blocks=10)
    lines = [r.message for r in caplog.records if r.message.startswith("the KV cache holds")]
    assert lines == [
        "the KV cache holds 160 tokens in 0.0 MB (bfloat16)",
        "the KV cache holds 160 tokens in 0.0 MB (int8, 1.78 times what 16 bits would hold)",
    ]


def test_without_a_setting_a_full_house_fits(tiny_model: TinyModel) -> None:
    decoder = load_decoder(tiny_model.folder, CpuBackend())
    engine = build_engine(decoder, EngineConfig(max_num_seqs=3))
    assert engine.scheduler.block_manager.num_blocks == 3 * 512 // 16


def test_serving_is_refused_before_weights_are_read(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Memory:
        available = 1_000_000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    assert main(["serve", str(tiny_model.folder), "--kv-cache-memory-bytes", "2000000"]) == 1
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert "kv_cache_memory_bytes 2.0 MB" in line
    assert "this machine has 1.0 MB to use; set kv_cache_memory_bytes to at most" in line


@pytest.mark.parametrize("ratio", [0.0, 1.5, float("nan")])
def test_a_ratio_out_of_range(ratio: float) -> None:
    with pytest.raises(InvalidConfig, match="gpu_memory_ratio is"):
        EngineConfig(gpu_memory_ratio=ratio)


def test_others_share_of_a_gpu_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4)
    device = torch.device("cuda", 0)
    assert memory.free_bytes(device) == 55
    assert memory.usable_bytes(device, EngineConfig(gpu_memory_ratio=0.75)) == 30
