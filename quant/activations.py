"""Hidden states of the calibration batches between two layers: on disk, and in memory to a limit.

Every batch is one file, so that a run can go on where it was killed, and what does not fit into
memory is read back from there. The files are not flushed to the disk, which would take longer than
some layers do: after a power failure a checksum tells which are whole, and finished layers can
always be run again.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import QuantError

_FILE = re.compile(r"(\w+)-(\d+)-\d+\.safetensors(\.tmp)?")


class ActivationStore:
    """What each batch brings to a layer, [B, T, C] fp32. Layers are numbered as their readers.

    Stores of different `kind`, which names their files, share a folder.
    """

    def __init__(self, folder: Path, limit_bytes: int, *, kind: str = "hidden") -> None:
        self._folder = folder
        self._kind = kind
        self._limit_bytes = limit_bytes
        self._lock = Lock()
        self._held: dict[int, tuple[int, Tensor]] = {}  # batch -> its newest layer and state

    def put(self, layer: int, batch: int, hidden: Tensor) -> None:
        """Keep a batch's way into `layer`; its earlier states leave the memory.

        Several threads may, for a batch of their own.
        """
        with self._lock:
            self._held.pop(batch, None)
        self._write(self._path(layer, batch), hidden)
        with self._lock:
            used = sum(tensor.nbytes for _, tensor in self._held.values())
            if used + hidden.nbytes <= self._limit_bytes:
                self._held[batch] = layer, hidden

    def get(self, layer: int, batch: int) -> Tensor:
        found, hidden = self._held.get(batch, (None, None))
        if found == layer and hidden is not None:
            return hidden
        return _read(self._path(layer, batch))

    def holds(self, layer: int, batches: Sequence[int]) -> bool:
        """Whether every batch's file for `layer` is there and undamaged."""
        return all(_is_intact(self._path(layer, batch)) for batch in batches)

    def keep_only(self, layer: int) -> None:
        """Remove the files of all other layers."""
        for path in self._folder.iterdir():
            found = _FILE.fullmatch(path.name)
            ours = found is not None and found[1] == self._kind
            if found and ours and (int(found[2]) != layer or found[3]):
                path.unlink(missing_ok=True)

    def _path(self, layer: int, batch: int) -> Path:
        return self._folder / f"{self._kind}-{layer}-{batch}.safetensors"

    def _write(self, path: Path, hidden: Tensor) -> None:
        hidden = hidden.contiguous()
        partial = path.with_name(f"{path.name}.tmp")
        try:
            save_file({"hidden": hidden}, partial, metadata={"crc32": _checksum(hidden)})
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise QuantError(f"{path}: cannot be written ({error})") from None


def _read(path: Path) -> Tensor:
    """Memory-mapped: its pages are given back with the tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            hidden: Tensor = file.get_tensor("hidden")
    except (OSError, SafetensorError) as error:
        raise QuantError(f"{path}: cannot be read ({error})") from None
    return hidden


def _is_intact(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            return metadata.get("crc32") == _checksum(file.get_tensor("hidden"))
    except (OSError, SafetensorError):
        return False


def _checksum(hidden: Tensor) -> str:
    return f"{zlib.crc32(hidden.numpy().data):08x}"
