"""The command line's refusals: one clear line, a status that is not 0, no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from lowbit.server.cli import main
from lowbit.server.rpc.tenants import KeyRing
from tiny import TinyModel

LOWBIT = str(Path(sysconfig.get_path("scripts")) / "lowbit")


def refusal(*arguments: str) -> str:
    """The one line on stderr, of a real process, in which Triton interprets nothing."""
    done = subprocess.run(
        [LOWBIT, *arguments, "--log-level", "error"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"lowbit {arguments[0]}: error: ")
    return line


@pytest.fixture
def checkpoint(tiny_model: TinyModel, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.folder, tmp_path / "checkpoint"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "nothing") in refusal("serve", str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in refusal(
        "quantize", str(tmp_path / "nothing"), str(tmp_path / "out")
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_for_the_backend_that_needs_one(checkpoint: Path) -> None:
    line = refusal("serve", str(checkpoint), "--backend", "triton")
    assert "backend is 'triton'; it needs a CUDA device, and PyTorch finds none" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_too_old(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla T4")
    assert main(["serve", str(checkpoint), "--backend", "triton"]) == 1
    assert "compute capability 8.0 or higher, and Tesla T4 has 7.5" in capsys.readouterr().err


def test_a_truncated_shard(checkpoint: Path) -> None:
    shard = checkpoint / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors" in refusal("serve", str(checkpoint))


def test_a_folder_without_a_tokenizer(checkpoint: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    assert str(checkpoint) in refusal("serve", str(checkpoint))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "port is 70000; it must lie in [0, 65535]"),
        (["--max-num-seqs", "0"], "max_num_seqs is 0; it must be at least 1"),
        (["--max-num-seqs", "600"], "it must be at least max_num_seqs (600)"),
        (["--max-model-len", "100000"], "max_model_len is 100000; the model was trained for 512"),
        (["--kv-cache-memory-bytes", "10"], "kv_cache_memory_bytes is 10; one block of 16 tokens"),
        (["--backend", "reference", "--cpu-precision", "float32"], "cpu_precision is 'float32'"),
        (["--drain-grace-seconds", "-1"], "drain_grace_seconds is -1"),
        (["--host", "0.0.0.0"], "host is '0.0.0.0', which others can reach, without TLS"),
    ],
)
def test_settings_out_of_range(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["serve", str(tiny_model.folder), *options]) == 1
    assert message in capsys.readouterr().err


def test_quantize_settings_are_checked_before_the_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", "anything", out, "--bits", "5"]) == 1
    assert "bits is 5" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert main(["quantize", "anything", out]) == 1
    assert "not empty" in capsys.readouterr().err


def test_no_server_to_talk_to() -> None:
    assert "127.0.0.1:1" in refusal("generate", "hello", "--address", "127.0.0.1:1")


def test_a_key_and_its_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "acme & sons"]) == 0
    printed = capsys.readouterr().out
    key = printed.splitlines()[0].split()[-1]
    (tmp_path / "keys.toml").write_text(printed)
    ring = KeyRing(tmp_path / "keys.toml")
    assert ring.tenant_of([("authorization", f"Bearer {key}")]).name == "acme & sons"
