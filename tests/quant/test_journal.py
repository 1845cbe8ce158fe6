from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lowbit.kernels.packing import PackedWeight
from lowbit.quant.errors import JournalError
from lowbit.quant.journal import Entry, Journal
from lowbit.quant.report import ModuleReport
from tiny import random_packed_weight

FINGERPRINT = {"bits": "4", "seed": "0"}

HOLD = """
import sys
from pathlib import Path
from lowbit.quant.journal import Journal
Journal(Path(sys.argv[1])).claim({"bits": "4", "seed": "0"}, restart=False)
print("held", flush=True)
sys.stdin.read()
"""


def report(name: str, error: float) -> ModuleReport:
    return ModuleReport(
        name=name,
        bits=4,
        group_size=64,
        sym=True,
        num_parameters=6,
        num_tokens=100,
        relative_error=error,
        damp_percent=0.01,
        fallback=None,
        seconds=1 / 3,
    )


def make_entry(seed: int = 0) -> Entry:
    torch.manual_seed(seed)
    weight = random_packed_weight(72, 40, bits=3, sym=False)
    biased = random_packed_weight(72, 24)
    biased = PackedWeight(
        **{f: getattr(biased, f) for f in biased.__slots__ if f != "bias"},
        bias=torch.randn(24).half(),
    )
    return Entry(
        packed={"model.layers.0.a": weight, "model.layers.0.b": biased},
        tensors={"model.layers.0.norm.weight": torch.randn(72).half()},
        modules=(report("model.layers.0.a", 0.1), report("model.layers.0.b", 2**-40)),
    )


def same(a: Entry, b: Entry) -> bool:
    weights = [
        getattr(entry.packed[name], field)
        for entry in (a, b)
        for name in sorted(entry.packed)
        for field in PackedWeight.__slots__
    ]
    half = len(weights) // 2
    equal = [
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(weights[:half], weights[half:], strict=True)
    ]
    tensors = all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    names = list(a.packed) == list(b.packed) and a.tensors.keys() == b.tensors.keys()
    return all(equal) and tensors and names and a.modules == b.modules


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "out")
    journal.claim(FINGERPRINT, restart=False)
    return journal


def reopened(journal: Journal, fingerprint: dict[str, str], *, restart: bool = False) -> Journal:
    journal.release()
    again = Journal(journal.folder.parent / "out")
    again.claim(fingerprint, restart=restart)
    return again


def test_entries_come_back_as_they_were(journal: Journal) -> None:
    assert journal.folder.name == ".out.work"
    for index in range(3):
        assert journal.num_finished() == index
        journal.write_layer(index, make_entry(index))
    assert journal.read_head() is None
    head = Entry(packed={"lm_head": random_packed_weight(64, 8)}, modules=(report("lm_head", 0),))
    journal.write_head(head)
    journal.write_tokens(torch.arange(12).view(3, 4))
    again = reopened(journal, FINGERPRINT)
    assert again.num_finished() == 3
    entries = list(again.entries(3))
    assert all(same(a, make_entry(i)) for i, a in enumerate(entries[:3])) and len(entries) == 4
    assert same(entries[3], head)
    assert torch.equal(again.read_tokens(), torch.arange(12).view(3, 4))


def test_an_entry_without_anything_quantized(journal: Journal) -> None:
    entry = Entry(tensors={"x.weight": torch.ones(3, 2)})
    journal.write_layer(0, entry)
    assert same(journal.read_layer(0), entry)


def test_a_layer_that_was_cut_off_does_not_count(journal: Journal) -> None:
    journal.write_layer(0, make_entry())
    (journal.folder / "layer-00001.safetensors.tmp").write_bytes(b"half of it")
    assert reopened(journal, FINGERPRINT).num_finished() == 1


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"bits": "3", "seed": "0"}, r"another bits \(4, now 3\)"),
        ({"bits": "4"}, r"another seed \(0, now None\)"),
        ({**FINGERPRINT, "model": "x"}, r"another model \(None, now x\)"),
    ],
)
def test_a_run_of_another_kind_is_refused_and_can_be_discarded(
    journal: Journal, now: dict[str, str], message: str
) -> None:
    journal.write_layer(0, make_entry())
    journal.write_tokens(torch.zeros(2, 2))
    with pytest.raises(JournalError, match=message + "; --restart discards it"):
        reopened(journal, now)
    again = reopened(journal, FINGERPRINT)
    assert again.num_finished() == 1
    fresh = reopened(again, now, restart=True)
    assert fresh.num_finished() == 0 and fresh.read_tokens() is None
    assert reopened(fresh, now).num_finished() == 0


def test_one_run_at_a_time(journal: Journal, tmp_path: Path) -> None:
    for restart in (False, True):
        with pytest.raises(JournalError, match="another run is working on this output"):
            Journal(tmp_path / "out").claim(FINGERPRINT, restart=restart)
    Journal(tmp_path / "other").claim(FINGERPRINT, restart=False)


def test_a_dead_process_holds_no_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(JournalError, match="another run is working"):
            Journal(tmp_path / "out").claim(FINGERPRINT, restart=False)
        process.kill()
        process.wait()
    Journal(tmp_path / "out").claim(FINGERPRINT, restart=False)


def test_a_removed_journal_leaves_nothing(journal: Journal, tmp_path: Path) -> None:
    journal.write_layer(0, make_entry())
    journal.remove()
    journal.release()
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(journal: Journal) -> None:
    journal.write_layer(0, make_entry())
    path = journal.folder / "layer-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(JournalError, match=r"layer-00000.safetensors: cannot be read"):
        journal.read_layer(0)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="cannot be written"):
        Journal(tmp_path / "file" / "out").claim(FINGERPRINT, restart=False)
