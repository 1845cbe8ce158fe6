from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowbit.quant import calibration
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import QuantConfig
from lowbit.quant.distributed import Ranks, join_ranks
from lowbit.quant.gptq import SolverConfig
from lowbit.quant.pipeline import quantize

# What two processes do together; each writes down what it saw.
SCRIPT = """
import json, os, sys
import torch
from lowbit.quant.distributed import join_ranks
from lowbit.quant.errors import PeerError, QuantError

with join_ranks() as ranks:
    seen = {"rank": ranks.rank, "share": list(ranks.share(5))}
    total = torch.full((2, 3), float(ranks.rank + 1), dtype=torch.float64)
    ranks.add(total)
    seen["sum"] = total.tolist()
    columns = torch.arange(15, dtype=torch.float16).view(3, 5)
    for dtype in (torch.float16, torch.uint8):
        for sizes in ([2, 3], [0, 5]):
            part = columns.to(dtype).split(sizes, 1)[ranks.rank]
            whole = ranks.gather_columns(part, sizes)
            seen.setdefault("gathered", []).append(bool(torch.equal(whole, columns.to(dtype))))
    for failing in ([1], [0, 1], []):
        try:
            with ranks.together():
                if ranks.rank in failing:
                    raise QuantError("weights of rank %d: häßlich" % ranks.rank)
            seen.setdefault("errors", []).append(None)
        except QuantError as error:
            seen.setdefault("errors", []).append([type(error).__name__, str(error)])
    with open(os.path.join(sys.argv[1], str(ranks.rank)), "w") as file:
        json.dump(seen, file)
"""

QUANTIZE = """
import sys
from lowbit.server.cli import main
sys.exit(main(sys.argv[1:]))
"""


def torchrun(
    tmp_path: Path, script: str, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Two processes on this machine, one thread each."""
    path = tmp_path / "script.py"
    path.write_text(script, encoding="utf-8")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, str(path), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        check=check,
        timeout=200,
    )


def test_one_process_is_a_run_of_its_own() -> None:
    with join_ranks() as ranks:
        assert (ranks.rank, ranks.world_size, ranks.is_first) == (0, 1, True)
        assert list(ranks.share(3)) == [0, 1, 2]
        total = torch.ones(2)
        ranks.add(total)
        assert total.tolist() == [1, 1]
        with pytest.raises(KeyError), ranks.together():
            raise KeyError("as it is")


@pytest.mark.parametrize("count", [0, 1, 5, 8, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_and_slices_cover_everything_once(count: int, world_size: int) -> None:
    shares = [Ranks(rank, world_size).share(count) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    slices = Ranks(0, world_size).slices(count)
    assert len(slices) == world_size
    assert [i for part in slices for i in range(count)[part]] == list(range(count))


def test_two_processes(tmp_path: Path) -> None:
    torchrun(tmp_path, SCRIPT, str(tmp_path))
    first, second = (json.loads((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert (first["share"], second["share"]) == ([0, 2, 4], [1, 3])
    for seen in (first, second):
        assert seen["sum"] == [[3.0] * 3] * 2
        assert seen["gathered"] == [True] * 4
    own = ["QuantError", "weights of rank 1: häßlich"]
    told = ["PeerError", "process 1 of the run: weights of rank 1: häßlich"]
    assert first["errors"] == [told, ["QuantError", "weights of rank 0: häßlich"], None]
    told = ["PeerError", "process 0 of the run: weights of rank 0: häßlich"]
    assert second["errors"] == [own, told, None]


@pytest.mark.parametrize(
    ("precision", "drift_tokens"), [("float32", None), ("bfloat16", None), ("bfloat16", 1024)]
)
def test_two_processes_find_the_codes_of_one(
    tiny_source: Path, tmp_path: Path, precision: str, drift_tokens: int | None
) -> None:
    """Every tensor of the checkpoint, bit for bit, though each sees half of the batches."""
    text = tmp_path / "text"
    text.write_text(calibration.reference_text()[:20_000], encoding="utf-8")
    options = ["--calibration", str(text), "--num-sequences", "20", "--sequence-length", "128"]
    options += ["--precision", precision]
    options += [] if drift_tokens is None else ["--drift-tokens", str(drift_tokens)]
    arguments = ["quantize", str(tiny_source), str(tmp_path / "two"), *options]
    done = torchrun(tmp_path, QUANTIZE, *arguments, "--lm-head-bits", "8")
    assert done.stdout.count("wrote ") == 1
    config = QuantConfig(lm_head=True, dynamic={"+:^lm_head$": {"bits": 8}})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quantize(
            str(tiny_source),
            tmp_path / "one",
            config,
            solver=SolverConfig(drift_tokens=drift_tokens, precision=precision),
            calibration_file=text,
            num_sequences=20,
            sequence_length=128,
            progress=False,
        )
    finally:
        torch.set_num_threads(threads)
    one, two = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "two")
    assert one.names() == two.names()
    for name in one.names():
        assert torch.equal(one.take_raw(name), two.take_raw(name)), name
    assert not list(tmp_path.glob(".*"))


def test_a_refusal_is_one_line_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    arguments = ["quantize", str(tmp_path / "nothing"), str(tmp_path / "out")]
    done = torchrun(tmp_path, QUANTIZE, *arguments, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("lowbit quantize")]
    assert lines == [
        f"lowbit quantize: error: {tmp_path / 'out'}: exists and is not empty; "
        "choose another folder"
    ]
