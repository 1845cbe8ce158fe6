"""A run's finished layers on disk, so that a killed run goes on where it was.

The folder `.NAME.work` next to OUT: a lock, the run's fingerprint, its calibration tokens, and one
file for every finished layer. Each file is written under another name, flushed and renamed: what
has its name is whole. Knows nothing of models, and of checkpoints only the packed weights.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.packing import PackedWeight
from .errors import JournalError
from .report import ModuleReport

LOCK_FILE = "lock"
FINGERPRINT_FILE = "run.json"
CALIBRATION_FILE = "calibration.safetensors"
WIDTHS_FILE = "widths.json"
DIGESTS_FILE = "digests.json"
SECONDS_FILE = "seconds.json"
PARTIAL_FOLDER = "checkpoint"
HEAD = "head"  # the name of the entry for the output head
EMBEDDING = "embedding"  # and for the input embedding

_PACKED_TENSORS = ("qweight", "scales", "zeros", "bias")
_PACKED_NUMBERS = ("bits", "group_size", "in_features", "out_features")

Fingerprint = Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What a finished layer adds to the checkpoint, by full names."""

    packed: dict[str, PackedWeight] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # what stays at 16 bits
    modules: tuple[ModuleReport, ...] = ()


class Journal:
    """The work folder of one run. Every process of the run has one; the first one holds the lock.

    `claim` raises JournalError when a living process works on the same OUT, or when an unfinished
    run had another fingerprint; it names what differs.
    """

    def __init__(self, out: Path) -> None:
        out = out.absolute()
        self.folder = out.parent / f".{out.name}.work"
        self._lock: int | None = None

    def claim(self, fingerprint: Fingerprint, *, restart: bool) -> None:
        """Take the folder for this run, as an unfinished run left it or new."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            try:
                self._open(fingerprint, restart=restart)
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Let another run have the folder; closing the file is what frees its lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the folder and what is in it; last what tells that its run was finished."""
        if self.folder.is_dir():
            self._clear(keep=(LOCK_FILE, FINGERPRINT_FILE, DIGESTS_FILE))
            (self.folder / DIGESTS_FILE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def num_finished(self) -> int:
        """Of the layers, counted from the first one."""
        count = 0
        while self._path(_layer(count)).is_file():
            count += 1
        return count

    def write_layer(self, index: int, entry: Entry) -> None:
        self._write_entry(_layer(index), entry)

    def write_head(self, entry: Entry) -> None:
        self._write_entry(HEAD, entry)

    def write_embedding(self, entry: Entry) -> None:
        self._write_entry(EMBEDDING, entry)

    def read_layer(self, index: int) -> Entry:
        return self._read_entry(_layer(index))

    def read_head(self) -> Entry | None:
        """None: it was not reached."""
        return self._read_entry(HEAD) if self._path(HEAD).is_file() else None

    def read_embedding(self) -> Entry | None:
        """None: it was not reached."""
        return self._read_entry(EMBEDDING) if self._path(EMBEDDING).is_file() else None

    def entries(self, num_layers: int) -> Iterator[Entry]:
        """The embedding's if there is one, those of all layers, the head's; read one at a time."""
        embedding = self.read_embedding()
        if embedding is not None:
            yield embedding
        for index in range(num_layers):
            yield self.read_layer(index)
        head = self.read_head()
        if head is not None:
            yield head

    def write_tokens(self, tokens: Tensor) -> None:
        self._write(CALIBRATION_FILE, {"tokens": tokens}, {})

    def read_tokens(self) -> Tensor | None:
        """[S, L] int64; None: they were not drawn yet."""
        path = self.folder / CALIBRATION_FILE
        if not path.is_file():
            return None
        with _reading(path) as file:
            tokens: Tensor = file.get_tensor("tokens")
        return tokens

    @property
    def partial(self) -> Path:
        """Where the checkpoint is put together; whatever a killed run left there is gone."""
        path = self.folder / PARTIAL_FOLDER
        shutil.rmtree(path, ignore_errors=True)
        return path

    def write_digests(self, digests: Mapping[str, str]) -> None:
        """Name -> digest of what the checkpoint holds; from here on OUT may be there."""
        self._write_json(DIGESTS_FILE, digests)

    def read_digests(self) -> dict[str, str] | None:
        """None: the checkpoint was not put together yet."""
        return self._read_json(DIGESTS_FILE)

    def write_widths(self, widths: Mapping[str, int]) -> None:
        """Full name of a linear layer -> the bits that were chosen for it."""
        self._write_json(WIDTHS_FILE, widths)

    def read_widths(self) -> dict[str, int] | None:
        """None: they were not chosen yet."""
        return self._read_json(WIDTHS_FILE)

    def write_seconds(self, seconds: float) -> None:
        """How long the run has taken so far."""
        self._write_json(SECONDS_FILE, {"seconds": seconds})

    def read_seconds(self) -> float:
        """0 before the first layer is finished."""
        return float((self._read_json(SECONDS_FILE) or {}).get("seconds", 0.0))

    def _write_json(self, file: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(dict(content), indent=2)
        with _writing(self.folder):
            _write_durably(self.folder / file, lambda partial: _write_text(partial, text))

    def _read_json(self, file: str) -> dict[str, Any] | None:
        path = self.folder / file
        if not path.is_file():
            return None
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    def _write_entry(self, name: str, entry: Entry) -> None:
        tensors = {f"plain.{key}": tensor for key, tensor in entry.tensors.items()}
        for prefix, weight in entry.packed.items():
            for part in _PACKED_TENSORS:
                tensor = getattr(weight, part)
                if tensor is not None:
                    tensors[f"packed.{prefix}.{part}"] = tensor
        packed = {
            prefix: {key: getattr(weight, key) for key in _PACKED_NUMBERS}
            for prefix, weight in entry.packed.items()
        }
        modules = [dataclasses.asdict(module) for module in entry.modules]
        metadata = {"packed": json.dumps(packed), "modules": json.dumps(modules)}
        self._write(self._path(name).name, tensors, metadata)

    def _read_entry(self, name: str) -> Entry:
        with _reading(self._path(name)) as file:
            metadata = file.metadata()
            names = set(file.keys())
            packed = {
                prefix: PackedWeight(
                    **numbers,
                    **{
                        part: file.get_tensor(f"packed.{prefix}.{part}")
                        for part in _PACKED_TENSORS
                        if f"packed.{prefix}.{part}" in names
                    },
                )
                for prefix, numbers in json.loads(metadata["packed"]).items()
            }
            plain = [name for name in file.keys() if name.startswith("plain.")]  # noqa: SIM118
            tensors = {name.removeprefix("plain."): file.get_tensor(name) for name in plain}
        modules = tuple(ModuleReport(**module) for module in json.loads(metadata["modules"]))
        return Entry(packed=packed, tensors=tensors, modules=modules)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _write(self, file: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with _writing(self.folder):
            _write_durably(
                self.folder / file, lambda path: save_file(tensors, path, metadata=metadata)
            )

    def _take_lock(self) -> int:
        path = self.folder / LOCK_FILE
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, another run may have finished and removed the file.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            pass
        os.close(descriptor)
        raise JournalError(f"{self.folder}: another run is working on this output")

    def _open(self, fingerprint: Fingerprint, *, restart: bool) -> None:
        if restart:
            self._clear()
        path = self.folder / FINGERPRINT_FILE
        if path.is_file():
            self._compare(json.loads(path.read_text(encoding="utf-8")), fingerprint)
        else:
            self._clear()
            content = json.dumps(dict(fingerprint), indent=2)
            _write_durably(path, lambda partial: _write_text(partial, content))

    def _clear(self, keep: Collection[str] = (LOCK_FILE,)) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in keep:
                path.unlink(missing_ok=True)

    def _compare(self, old: dict[str, Any], new: Fingerprint) -> None:
        for key in {**old, **new}:
            before, now = old.get(key), new.get(key)
            if before != now:
                raise JournalError(
                    f"{self.folder}: an unfinished run had another {key} ({before}, now {now}); "
                    f"--restart discards it"
                )


def _layer(index: int) -> str:
    return f"layer-{index:05d}"


def _write_durably(path: Path, write: Callable[[Path], None]) -> None:
    """A file that either has its name and its whole content, on the disk, or is not there."""
    partial = path.with_name(f"{path.name}.tmp")
    write(partial)
    _flush(partial)
    partial.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_text(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{folder}: cannot be written ({error})") from None


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise JournalError(f"{path}: cannot be read ({error})") from None
