"""Runs that compute on a GPU: on a device that stands for one where there is none.

What stands for it (`mirror`) computes what the processor computes, so results are equal bit for
bit, and raises an error where its tensors meet the processor's, as CUDA would.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_family
from lowbit.quant import stages
from lowbit.quant.calibration import reference_text
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import QuantConfig
from lowbit.quant.devices import resolve_device
from lowbit.quant.errors import QuantError
from lowbit.quant.gptq import SolverConfig
from lowbit.quant.journal import Journal
from lowbit.quant.pipeline import quantize
from lowbit.quant.report import read_report
from lowbit.server.cli import main

BOTH_HEADS = {"lm_head": True, "dynamic": {"+:^lm_head$": {"bits": 8}}}
CASES: dict[str, dict[str, Any]] = {  # family, and what is asked for
    "llama": {},
    "llama, drawn text": {"calibrated": False, "solver": {"precision": "float32"}},
    "llama, few bytes": {"activation_memory_bytes": 1},
    "llama, half of the drift": {"solver": {"drift_tokens": 256, "precision": "bfloat16"}},
    "llama, no drift": {"solver": {"drift": "none", "act_order": "none"}},
    "llama with biases": {"solver": {"act_order": "group"}, "config": {"group_size": 32}},
    "llama, target": {"target_bpw": 4.8},
    "llama, head": {"config": {"embeddings": True, **BOTH_HEADS}},
    "llama, restarted": {"stops": True},
    "bert": {},
    "bloom": {},
    "gemma3": {},
    "gpt2": {"config": {"sym": False, "checkpoint_format": "gptq_v2"}},
    "opt 350m": {},
    "qwen2 moe": {},
}

SCRIPT = """
import json, sys
from pathlib import Path

import mirror
import torch
from lowbit.quant import pipeline
from lowbit.quant.config import QuantConfig
from lowbit.quant.gptq import SolverConfig
from lowbit.quant.journal import Journal

torch.set_num_threads(1)
folder, device = Path(sys.argv[1]), mirror.set_up()
there = torch.ones(2, device=device)
try:
    there + torch.ones(2)
    raise SystemExit("a mixture passed")
except RuntimeError:
    assert (there + 1).cpu().tolist() == [2, 2]

class Stop(Exception):
    pass

def stop(self, index, entry, write=Journal.write_layer):
    if index == 1:
        raise Stop
    write(self, index, entry)

def run(name, where, out, *, calibrated=True, stops=False, config=None, solver=None, **options):
    pipeline.resolve_device = lambda _: where
    options["calibration_file"] = folder / "text" if calibrated else None
    options |= {"num_sequences": 12, "sequence_length": 48, "progress": False}
    source = str(folder / name.partition(",")[0])
    arguments = source, out, QuantConfig(**(config or {}))
    options["solver"] = SolverConfig(descent_sweeps=1, **(solver or {}))
    if stops:
        write, Journal.write_layer = Journal.write_layer, stop
        try:
            pipeline.quantize(*arguments, **options)
        except Stop:
            Journal.write_layer = write
        for path in Journal(out).folder.glob("hidden-*"):
            path.unlink()
    pipeline.quantize(*arguments, **options)

for name, options in json.loads(sys.argv[2]).items():
    for where in (torch.device("cpu"), device):
        run(name, where, folder / "out" / where.type / name, **options)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every case, below "cpu" and below "mirror"."""
    folder = tmp_path_factory.mktemp("devices")
    for family in {name.partition(",")[0] for name in CASES}:
        save_family(folder / family, family)
    (folder / "text").write_text(reference_text()[:20_000], encoding="utf-8")
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(CASES)],
        env={**os.environ, "PYTHONPATH": support},
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.mark.parametrize("case", CASES)
def test_a_device_finds_what_the_processor_finds(results: Path, case: str) -> None:
    expected, found = (CheckpointReader(results / kind / case) for kind in ("cpu", "mirror"))
    assert expected.names() == found.names()
    for name in expected.names():
        assert torch.equal(expected.take_raw(name), found.take_raw(name)), name


def test_the_report_names_the_device(results: Path) -> None:
    for kind in ("cpu", "mirror"):
        assert read_report(results / kind / "llama")[0].settings["device"] == kind


# which device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Which of them were made the process's own."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    return chosen


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_the_processor_computes() -> None:
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_a_machine_has_a_gpu(
    two_gpus: list[torch.device], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert resolve_device(name) == torch.device("cuda:0")
    for key, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(key, value)
    assert resolve_device(name) == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(QuantError, match=f"device is '{name}'; 3 processes .* has 2 CUDA devices"):
        resolve_device(name)


@pytest.mark.usefixtures("two_gpus")
def test_gpus_that_cannot_add_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(QuantError, match="NCCL"):
        resolve_device("cuda")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda", "device is 'cuda'; PyTorch finds no CUDA device on this machine"),
        ("tpu", "device is 'tpu'; it must be one of auto, cpu, cuda"),
    ],
)
def test_what_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", "nothing", str(out), "--device", name]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"lowbit quantize: error: {message}"
    assert not list(tmp_path.iterdir())


def test_a_gpu_whose_memory_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_family(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(reference_text()[:20_000], encoding="utf-8")

    def solve(*arguments: Any, solve: Any = stages.solve, **options: Any) -> Any:
        if journal.num_finished():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return solve(*arguments, **options)

    monkeypatch.setattr(stages, "solve", solve)
    out = tmp_path / "run" / "out"
    journal = Journal(out)
    few = ["--num-sequences", "4", "--sequence-length", "16", "--device", "cpu"]
    arguments = ["quantize", str(tmp_path / "model"), str(out), *few]
    assert main([*arguments, "--calibration", str(tmp_path / "text")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lowbit quantize: error: the memory of cpu is full; with a smaller "
        "activation_memory_bytes less of it is needed"
    )
    assert journal.num_finished() == 1 and not out.exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2 moe"])
def test_a_gpu_finds_the_processors_codes(tmp_path: Path, family: str) -> None:
    """But for a few: sums are added up in another order, and a code at a tie moves those behind."""
    save_family(tmp_path / "model", family)
    (tmp_path / "text").write_text(reference_text()[:20_000], encoding="utf-8")
    for device in ("cpu", "cuda"):
        quantize(
            str(tmp_path / "model"),
            tmp_path / device,
            QuantConfig(),
            solver=SolverConfig(precision="float32"),
            calibration_file=tmp_path / "text",
            num_sequences=40,
            sequence_length=64,
            device=device,
            progress=False,
        )
    reports = [read_report(tmp_path / device)[0].modules for device in ("cpu", "cuda")]
    for expected, found in zip(*reports, strict=True):
        assert (found.name, found.fallback) == (expected.name, expected.fallback)
        assert found.relative_error == pytest.approx(expected.relative_error, rel=0.02)
    one, other = (CheckpointReader(tmp_path / device) for device in ("cpu", "cuda"))
    words = [name for name in one.names() if name.endswith(".qweight")]
    assert words
    for name in words:
        same = one.take_raw(name) == other.take_raw(name)  # words of eight codes
        assert same.float().mean() > 0.9, name
