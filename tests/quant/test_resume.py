"""`lowbit quantize` in processes of its own, ended in every way that a process ends."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lowbit.quant import calibration
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.journal import Journal
from lowbit.quant.report import ModuleReport, read_report
from safetensors.torch import load_file, save_file

NUM_LAYERS = 3
LONG_RUN = 40  # layers of a run that a signal from outside must still find at work
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LOWBIT = Path(sys.executable).with_name("lowbit")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# Imports everything once, then forks a process for every command line that it reads. What ends such
# a process ends it at one exact moment: just before a file is given its name, say.
LAUNCHER = """
import json, os, re, resource, signal, sys, traceback

import lowbit.quant.pipeline
from lowbit.server.cli import main

def run(job):
    signal.alarm(300)  # whatever hangs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    if job["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["max_file_bytes"],) * 2)
    if job["moment"] is not None:
        event, pattern = job["moment"]

        def watch(name, values):
            if name == event and re.search(pattern, str(values[0])):
                os.kill(os.getpid(), job["signal"])

        sys.addaudithook(watch)
    return main(job["arguments"])

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = run(json.loads(line))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Moment = tuple[str, str]  # an audit event of CPython and an expression over its path


class Launcher:
    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._output = folder / "output"

    def run(
        self,
        arguments: list[str],
        *,
        at: Moment | None = None,
        send: signal.Signals = signal.SIGKILL,
        max_file_bytes: int | None = None,
    ) -> tuple[int, str]:
        """(exit status, what the process printed); `send` ends it just before the moment `at`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {
            "arguments": arguments,
            "output": str(self._output),
            "moment": at,
            "signal": int(send),
            "max_file_bytes": max_file_bytes,
        }
        print(json.dumps(job), file=self._process.stdin, flush=True)
        status = int(self._process.stdout.readline())
        return status, self._output.read_text()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    with subprocess.Popen(
        [sys.executable, "-c", LAUNCHER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        yield Launcher(process, tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="module")
def inputs(
    save_source: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """(the model, the calibration text)"""
    folder = tmp_path_factory.mktemp("inputs")
    save_source(folder / "model", num_hidden_layers=NUM_LAYERS, **SIZES)
    (folder / "text").write_text(calibration.reference_text()[:20_000], encoding="utf-8")
    return folder / "model", folder / "text"


@pytest.fixture(scope="module")
def options(inputs: tuple[Path, Path]) -> list[str]:
    """Of a run with three batches, the last one smaller."""
    model, text = inputs
    length = ["--num-sequences", "20", "--sequence-length", "32", "--group-size", "32"]
    length += ["--drift-tokens", "512"]  # two of three batches
    return [str(model), "--calibration", str(text), *length]


@pytest.fixture(scope="module")
def whole(launcher: Launcher, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run writes that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    status, output = launcher.run(["quantize", *options, str(out)])
    assert status == 0, output
    return out


def modules(out: Path) -> list[ModuleReport]:
    return [replace(module, seconds=0.0) for module in read_report(out)[0].modules]


def assert_same_result(out: Path, expected: Path) -> None:
    """Every byte but those that tell how long the run took; and nothing beside the checkpoint."""
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in expected.iterdir()}
    for name in names:
        if "report" not in name:
            assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    assert modules(out) == modules(expected)
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def errors(output: str) -> list[str]:
    """What the command says of its failure; nothing else may look like one."""
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("lowbit quantize: error: ")]


def finished(num_layers: int) -> str:
    return f"{num_layers} of {NUM_LAYERS} layers are finished"


# killed


MOMENTS: list[tuple[Moment, int]] = [  # and how many layers are finished then
    (("os.mkdir", r"/\.out\.work$"), 0),
    (("os.rename", r"/run\.json\.tmp$"), 0),
    (("os.rename", r"/calibration\."), 0),
    (("os.rename", r"/hidden-1-2\."), 0),
    (("os.rename", r"/layer-00000\."), 0),
    (("os.remove", r"/hidden-0-0\."), 1),
    (("os.remove", r"/hidden-1-1\."), 2),
    (("os.rename", r"/layer-00002\."), 2),
    (("os.mkdir", r"/\.out\.work/checkpoint$"), 3),
    (("os.rename", r"/shard-0\."), 3),
    (("os.rename", r"/digests\.json\.tmp$"), 3),
    (("os.rename", r"/\.out\.work/checkpoint$"), 3),
]


@pytest.mark.parametrize(("moment", "num_finished"), MOMENTS, ids=[" ".join(m) for m, _ in MOMENTS])
def test_a_killed_run_goes_on(
    launcher: Launcher,
    options: list[str],
    whole: Path,
    tmp_path: Path,
    moment: Moment,
    num_finished: int,
) -> None:
    out = tmp_path / "out"
    status, _ = launcher.run(["quantize", *options, str(out)], at=moment)
    assert status == -signal.SIGKILL
    assert not out.exists()
    status, output = launcher.run(["quantize", *options, str(out)])
    assert status == 0, output
    assert not num_finished or finished(num_finished) in output
    assert_same_result(out, whole)


@pytest.mark.parametrize("file", ["layer-00000.safetensors", "digests.json"])
def test_a_run_that_is_killed_behind_its_result(
    launcher: Launcher, options: list[str], whole: Path, tmp_path: Path, file: str
) -> None:
    """The checkpoint stands; what is left to do is to tidy up."""
    out = tmp_path / "out"
    moment = "os.remove", rf"/\.out\.work/{re.escape(file)}$"
    status, _ = launcher.run(["quantize", *options, str(out)], at=moment)
    assert status == -signal.SIGKILL
    assert len(CheckpointReader(out).packed_prefixes()) == 7 * NUM_LAYERS
    status, output = launcher.run(["quantize", *options, str(out)])
    assert status == 0, output
    assert_same_result(out, whole)


def test_a_run_that_is_killed_again_and_again(
    launcher: Launcher, options: list[str], whole: Path, tmp_path: Path
) -> None:
    """Each with another limit of what is kept in memory: that changes no number."""
    out = tmp_path / "out"
    moments = [("os.rename", f"/hidden-{i + 1}-1\\.") for i in range(NUM_LAYERS)]
    limits = ["0", "60000", "1000000"]
    for index, (moment, limit) in enumerate(zip(moments, limits, strict=True)):
        arguments = ["quantize", *options, str(out), "--activation-memory", limit]
        status, output = launcher.run(arguments, at=moment)
        assert status == -signal.SIGKILL
        assert index < 2 or finished(index - 1) in output
        assert not out.exists()
    status, output = launcher.run(["quantize", *options, str(out)])
    assert status == 0 and finished(NUM_LAYERS - 1) in output
    assert_same_result(out, whole)


@pytest.fixture(scope="module")
def unfinished(
    launcher: Launcher, options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder where a run was killed that had finished two layers."""
    folder = tmp_path_factory.mktemp("unfinished")
    arguments = ["quantize", *options, str(folder / "out")]
    status, _ = launcher.run(arguments, at=("os.rename", r"/layer-00002\."))
    assert status == -signal.SIGKILL
    return folder


@pytest.fixture
def out(unfinished: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed, in a folder of its own."""
    shutil.copytree(unfinished, tmp_path / "run")
    return tmp_path / "run" / "out"


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, lambda path: os.truncate(path, 100), flip_last_byte],
    ids=["missing", "cut off", "changed"],
)
def test_lost_activations_are_made_again(
    launcher: Launcher,
    options: list[str],
    whole: Path,
    out: Path,
    damage: Callable[[Path], None],
) -> None:
    """After a power failure, say: these files are not flushed to the disk."""
    damaged = list((out.parent / ".out.work").glob("*-2-1.safetensors"))
    assert damaged
    for path in damaged:
        damage(path)
    status, output = launcher.run(["quantize", *options, str(out)])
    assert status == 0 and finished(2) in output
    assert_same_result(out, whole)


def test_a_damaged_layer_is_named(launcher: Launcher, options: list[str], out: Path) -> None:
    path = out.parent / ".out.work" / "layer-00001.safetensors"
    os.truncate(path, 100)
    status, output = launcher.run(["quantize", *options, str(out)])
    assert status == 1 and not out.exists()
    (line,) = errors(output)
    assert f"{path}: cannot be read" in line


# refused, or discarded


def refused(launcher: Launcher, arguments: list[str], out: Path) -> str:
    """The one line that it says; what the unfinished run left is as it was."""
    work = out.parent / ".out.work"
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    status, output = launcher.run(["quantize", *arguments, str(out)])
    assert status == 1 and not out.exists()
    assert {path.name: path.read_bytes() for path in work.iterdir()} == before
    (line,) = errors(output)
    return line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--bits", "8"], "another bits (4, now 8)"),
        (["--asym"], "another sym (True, now False)"),
        (["--group-size", "64"], "another group_size (32, now 64)"),
        (["--seed", "5"], "another seed (0, now 5)"),
        (["--num-sequences", "21"], "another num_sequences (20, now 21)"),
        (["--damp-percent", "0.1"], "another damp_percent (0.01, now 0.1)"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_another_setting_is_refused_by_name(
    launcher: Launcher, options: list[str], out: Path, change: list[str], message: str
) -> None:
    line = refused(launcher, [*options, *change], out)
    assert f"{out.parent}/.out.work: an unfinished run had {message}; --restart discards" in line


def test_another_calibration_text_is_refused(
    launcher: Launcher, options: list[str], inputs: tuple[Path, Path], out: Path, tmp_path: Path
) -> None:
    """One character of a file of the same name and size."""
    text = tmp_path / "text"
    text.write_bytes(inputs[1].read_bytes()[:-1] + b"!")
    line = refused(launcher, [*options, "--calibration", str(text)], out)
    assert "an unfinished run had another calibration text (" in line


def test_the_same_text_elsewhere_is_no_other_text(
    launcher: Launcher,
    options: list[str],
    inputs: tuple[Path, Path],
    whole: Path,
    out: Path,
    tmp_path: Path,
) -> None:
    shutil.copyfile(inputs[1], tmp_path / "text")
    arguments = ["quantize", *options, "--calibration", str(tmp_path / "text"), str(out)]
    status, output = launcher.run(arguments)
    assert status == 0 and finished(2) in output
    assert_same_result(out, whole)


def test_another_model_is_refused(
    launcher: Launcher, options: list[str], inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """One weight of one layer, in a folder of the same name."""
    model, out = tmp_path / "model", tmp_path / "run" / "out"
    shutil.copytree(inputs[0], model)
    arguments = [str(model), *options[1:]]
    moment = "os.rename", r"/layer-00001\."
    status, _ = launcher.run(["quantize", *arguments, str(out)], at=moment)
    assert status == -signal.SIGKILL
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "an unfinished run had another model (" in refused(launcher, arguments, out)


def test_restart_discards_what_was_finished(
    launcher: Launcher, options: list[str], out: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "fresh" / "out"
    arguments = ["quantize", *options, "--bits", "8"]
    assert launcher.run([*arguments, str(expected)])[0] == 0
    status, output = launcher.run([*arguments, str(out), "--restart"])
    assert status == 0 and "layers are finished" not in output
    assert_same_result(out, expected)


def test_an_output_inside_the_models_folder(
    launcher: Launcher, options: list[str], inputs: tuple[Path, Path], whole: Path, tmp_path: Path
) -> None:
    """The run's own files there are no change of the model."""
    model = tmp_path / "model"
    shutil.copytree(inputs[0], model)
    arguments = ["quantize", str(model), *options[1:], str(model / "out")]
    status, _ = launcher.run(arguments, at=("os.rename", r"/layer-00001\."))
    assert status == -signal.SIGKILL
    status, output = launcher.run(arguments)
    assert status == 0 and finished(1) in output, output
    assert modules(model / "out") == modules(whole)


def test_a_run_that_is_still_at_work_is_left_alone(
    launcher: Launcher, options: list[str], out: Path
) -> None:
    journal = Journal(out)
    journal.claim(json.loads((journal.folder / "run.json").read_text()), restart=False)
    try:
        for more in ([], ["--restart"]):
            line = refused(launcher, [*options, *more], out)
            assert line.endswith(f"{journal.folder}: another run is working on this output")
    finally:
        journal.release()


# a full disk


SHORT = ["--num-sequences", "4", "--sequence-length", "8"]  # activations smaller than any layer
WIDE_LAYER = ["--dynamic", r"model\.layers\.1\.=bits=8"]


@pytest.fixture(scope="module")
def short_options(options: list[str]) -> list[str]:
    return [*options, *SHORT, *WIDE_LAYER]


@pytest.fixture(scope="module")
def short_whole(
    launcher: Launcher, short_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    status, output = launcher.run(["quantize", *short_options, str(out)])
    assert status == 0, output
    return out


@pytest.mark.parametrize(
    ("max_file_bytes", "place", "num_finished"),
    [
        (3_000, "/.out.work/hidden-0-0.safetensors", 0),
        (13_000, "/.out.work", 1),
        (30_000, "/out", NUM_LAYERS),
    ],
    ids=["activations", "a layer", "the checkpoint"],
)
def test_a_full_disk(
    launcher: Launcher,
    short_options: list[str],
    short_whole: Path,
    tmp_path: Path,
    max_file_bytes: int,
    place: str,
    num_finished: int,
) -> None:
    """A limit of a file's size stands for it: the system refuses to write, in the middle."""
    out = tmp_path / "out"
    arguments = ["quantize", *short_options, str(out)]
    status, output = launcher.run(arguments, max_file_bytes=max_file_bytes)
    assert status == 1
    (line,) = errors(output)
    assert line.startswith(f"lowbit quantize: error: {tmp_path}{place}: cannot be written (")
    assert "File too large" in line
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".out.work"] if num_finished else [])
    kept = f"{num_finished} finished layers are kept in {tmp_path}/.out.work"
    assert (kept in output) == bool(num_finished)
    status, output = launcher.run(arguments)
    assert status == 0, output
    assert not num_finished or finished(num_finished) in output
    assert_same_result(out, short_whole)


# Ctrl-C


@pytest.mark.parametrize(
    ("moment", "num_finished"),
    [
        (("os.rename", r"/hidden-0-1\."), 0),
        (("os.rename", r"/hidden-3-0\."), 2),
        (("os.rename", r"/\.quantization_report\.json\.partial$"), 3),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_ctrl_c_keeps_finished_layers_and_says_how_to_go_on(
    launcher: Launcher,
    options: list[str],
    whole: Path,
    tmp_path: Path,
    moment: Moment,
    num_finished: int,
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", *options, str(out)]
    status, output = launcher.run(arguments, at=moment, send=signal.SIGINT)
    assert status == 130
    assert not errors(output)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".out.work"] if num_finished else [])
    told = f"{num_finished} finished layers are kept in {tmp_path}/.out.work; the same command goes"
    assert (told in output) == bool(num_finished)
    status, output = launcher.run(arguments)
    assert status == 0, output
    assert not num_finished or finished(num_finished) in output
    assert_same_result(out, whole)


# the command as it is installed, ended from outside


class Command:
    """`lowbit`, whose progress goes to a pipe of 4 KiB: unread, it waits after a few layers."""

    def __init__(self, arguments: list[str]) -> None:
        reading, writing = os.pipe()
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
        with _signals_heeded():
            self._process = subprocess.Popen(
                [str(LOWBIT), *arguments],
                stderr=writing,
                stdout=subprocess.DEVNULL,
                env=ENVIRONMENT,
            )
        os.close(writing)
        self._reading = reading
        self.output = b""

    def read_until(self, text: bytes) -> None:
        while text not in self.output:
            part = os.read(self._reading, 128)
            assert part, self.output.decode()
            self.output += part

    def end(self, send: signal.Signals | None = None) -> int:
        if send is not None:
            self._process.send_signal(send)
        while part := os.read(self._reading, 4096):
            self.output += part
        os.close(self._reading)
        return self._process.wait()


@contextmanager
def _signals_heeded() -> Iterator[None]:
    """A process that is started meanwhile heeds Ctrl-C, though these tests may run in the
    background of a shell that has them, and all that they start, ignore it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_installed_command(
    launcher: Launcher,
    inputs: tuple[Path, Path],
    save_source: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model, out, expected = (tmp_path / name for name in ("model", "run/out", "expected/out"))
    save_source(model, **SIZES, num_hidden_layers=LONG_RUN)
    text = ["--calibration", str(inputs[1]), *SHORT]
    arguments = ["quantize", str(model), *text, "--group-size", "32"]

    killed = Command([*arguments, str(out)])
    killed.read_until(b"model.layers.1.")
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    assert not out.exists()
    assert (out.parent / ".out.work" / "layer-00000.safetensors").is_file()

    again = Command([*arguments, str(out)])
    assert again.end() == 0
    assert f"of {LONG_RUN} layers are finished".encode() in again.output
    assert launcher.run([*arguments, str(expected)])[0] == 0
    assert_same_result(out, expected)


@pytest.mark.slow
def test_the_installed_command_is_interrupted(
    inputs: tuple[Path, Path], save_source: Callable[..., Any], tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "run" / "out"
    save_source(model, **SIZES, num_hidden_layers=LONG_RUN)
    text = ["--calibration", str(inputs[1]), *SHORT]
    interrupted = Command(["quantize", str(model), str(out), *text, "--group-size", "32"])
    interrupted.read_until(b"model.layers.1.")
    assert interrupted.end(signal.SIGINT) == 130
    kept = f"finished layers are kept in {out.parent}/.out.work; the same command goes on"
    assert kept.encode() in interrupted.output
    assert b"Traceback" not in interrupted.output
    assert [path.name for path in out.parent.iterdir()] == [".out.work"]
