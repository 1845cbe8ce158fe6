"""Packed checkpoints on disk: reading, checking and writing folders of safetensors.

`config.json`, shards and their index in, canonical weights out (`formats` knows how a layer lies in
its tensors), and back. Knows nothing of models, of how codes were found, or of who reads them.
Safetensors only: nothing here ever unpickles.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.packing import (
    DenseWeight,
    EmbeddingWeight,
    LinearWeight,
    PackedEmbedding,
    PackedWeight,
    dequantize,
    select_outputs,
)
from .config import ModuleConfig, QuantConfig
from .errors import CheckpointError
from .formats import (
    CODES_NAME,
    FLOAT_DTYPES,
    LayerShape,
    packed_features,
    read_linear,
)

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
QUANT_CONFIG_FILE = "quantize_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 1 << 30  # what a writer holds at a time
_NO_WEIGHTS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
_DIGEST_WEIGHTS = 1 << 24  # of a packed layer that are dequantized together


class CheckpointReader:
    """A checkpoint folder, opened. Every tensor is taken once; what is left over is an error.

    Tensors are memory-mapped: taking one reads nothing until it is used. Opening raises
    CheckpointError when the folder, its config or a shard is missing, truncated or not valid.
    """

    config: dict[str, Any]  # config.json
    generation_config: dict[str, Any]  # generation_config.json, empty where there is none
    quant_config: QuantConfig | None  # None: nothing in this checkpoint is quantized

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder")
        self.config = _read_json(self.folder / CONFIG_FILE)
        generation = self.folder / GENERATION_CONFIG_FILE
        self.generation_config = _read_json(generation) if generation.is_file() else {}
        self.quant_config = _read_quant_config(self.folder, self.config)
        self._shards = {path.name: _open_shard(path) for path in _shard_paths(self.folder)}
        self._file_of = {
            name: file
            for file, shard in self._shards.items()
            for name in shard.keys()  # noqa: SIM118 (a safetensors handle is no mapping)
        }
        self._check_index()
        self._left = set(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    @property
    def num_bytes(self) -> int:
        """Of all shards together."""
        return sum((self.folder / name).stat().st_size for name in self._shards)

    def names(self) -> list[str]:
        """Every tensor of the checkpoint, sorted."""
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, from the file's header: nothing is read. Raises CheckpointError."""
        return tuple(self._shard(name).get_slice(name).get_shape())

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """A floating tensor (fp16, bf16 or fp32) by its full name, checked and marked as taken."""
        return self.take_raw(name, FLOAT_DTYPES, shape)

    def take_linear(
        self, prefix: str, in_features: int, out_features: int, *, transposed: bool = False
    ) -> LinearWeight:
        """The linear layer `prefix`, [out_features, in_features], packed or dense.

        `transposed`: a dense one lies there as [in_features, out_features], as GPT-2's do. Raises
        CheckpointError when a tensor is missing, has another dtype or shape, when `g_idx` names
        groups that do not exist, or when the config leaves a packed layer at 16 bits.
        """
        module = self._packed_module(prefix)
        if module is None:
            shape = (in_features, out_features) if transposed else (out_features, in_features)
            weight = self.take(f"{prefix}.weight", shape=shape)
            weight = weight.t() if transposed else weight
            return DenseWeight(weight=weight, bias=self._take_bias(prefix, out_features))
        return self._take_packed(prefix, module, in_features, out_features)

    def take_packed(self, prefix: str) -> PackedWeight:
        """A packed layer whose size its own tensors tell; `packed_prefixes` lists them."""
        module = self._packed_module(prefix)
        if module is None:
            raise CheckpointError(f"{self.folder}: {prefix} is not packed")
        return self._take_packed(prefix, module, *self.packed_features(prefix))

    def packed_features(self, prefix: str) -> tuple[int, int]:
        """(in_features, out_features) of a packed layer, from its tensors' shapes."""
        module = self._packed_module(prefix)
        if module is None or self.quant_config is None:
            raise CheckpointError(f"{self.folder}: {prefix} is not packed")
        return packed_features(self, prefix, module, self.quant_config)

    def take_embedding(self, prefix: str, num_rows: int, num_features: int) -> EmbeddingWeight:
        """The embedding table `prefix`, [num_rows, num_features], packed or dense."""
        module, quant = self._packed_module(prefix), self.quant_config
        if module is None or quant is None:
            return self.take(f"{prefix}.weight", shape=(num_rows, num_features))
        by_row = quant.checkpoint_format == "compressed-tensors"
        sizes = (num_features, num_rows) if by_row else (num_rows, num_features)
        return PackedEmbedding(weight=self._take_packed(prefix, module, *sizes), by_row=by_row)

    def packed_prefixes(self) -> list[str]:
        """The full names of all packed layers, sorted."""
        marks = {f".{name}" for name in CODES_NAME.values()}
        return [n[: -len(m)] for n in self.names() for m in marks if n.endswith(m)]

    def remaining(self) -> list[str]:
        """Every tensor that nobody took yet, sorted."""
        return sorted(self._left)

    def check_all_consumed(self) -> None:
        """Raises CheckpointError that lists the tensors nobody took.

        What older releases stored of rotary frequencies and causal masks is no weight.
        """
        left = {name for name in self._left if not name.endswith(_NO_WEIGHTS)}
        if self.config.get("tie_word_embeddings"):
            left.discard("lm_head.weight")  # written next to the embedding it is tied to
        if left:
            names = sorted(left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"{self.folder}: {len(names)} tensors have no place in this model: "
                f"{', '.join(names[:5])}{more}"
            )

    def take_raw(
        self,
        name: str,
        dtypes: tuple[torch.dtype, ...] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """A tensor, if given of one of those dtypes and of that shape, marked as taken."""
        try:
            tensor: Tensor = self._shard(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self.error(name, f"cannot be read ({error})") from None
        if dtypes is not None and tensor.dtype not in dtypes:
            raise self.error(name, f"dtype is {_short(tensor.dtype)}, expected {_short(*dtypes)}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise self.error(name, f"shape is {list(tensor.shape)}, expected {list(shape)}")
        self._left.discard(name)
        return tensor

    def error(self, name: str, reason: str) -> CheckpointError:
        """What is wrong with a tensor, with the file that holds it."""
        return CheckpointError(f"{self.folder / self._file_of[name]}: tensor {name}: {reason}")

    def _shard(self, name: str) -> Any:
        if name not in self:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        return self._shards[self._file_of[name]]

    def _packed_module(self, prefix: str) -> ModuleConfig | None:
        """How a packed layer is quantized; None for one that stands there as a dense weight."""
        quant = self.quant_config
        name = f"{prefix}.{CODES_NAME[quant.checkpoint_format] if quant else 'qweight'}"
        if name not in self:
            return None
        if quant is None:
            raise self.error(name, f"{CONFIG_FILE} has no quantization_config")
        module = quant.for_module(prefix)
        if module is None:
            raise self.error(name, "the quantization config leaves this layer at 16 bits")
        return module

    def _take_packed(
        self, prefix: str, module: ModuleConfig, in_features: int, out_features: int
    ) -> PackedWeight:
        assert self.quant_config is not None  # _packed_module found the layer by it
        layer = LayerShape(
            prefix=prefix, in_features=in_features, out_features=out_features, module=module
        )
        return read_linear(self, layer, self.quant_config, self._take_bias(prefix, out_features))

    def _take_bias(self, prefix: str, out_features: int) -> Tensor | None:
        name = f"{prefix}.bias"
        return self.take(name, shape=(out_features,)) if name in self else None

    def _check_index(self) -> None:
        for name, file in _weight_map(self.folder).items():
            if file in self._shards and name not in self._file_of:
                raise CheckpointError(
                    f"{self.folder / file}: tensor {name} of the index is missing"
                )


def check_output(folder: Path) -> None:
    """Raises CheckpointError unless `folder` is free to be created. Call it before long work."""
    if folder.is_symlink() or folder.exists():
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: exists and is not a folder")
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder}: exists and is not empty; choose another folder")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{folder}: nothing can be written in {parent}")


class CheckpointWriter:
    """A checkpoint written piece by piece: `with CheckpointWriter(...) as writer: writer.add(...)`.

    Everything goes to the folder `partial`, or a hidden sibling, first; a shard is written as soon
    as it is full, so no more than one is ever held. Leaving the block flushes the files to the disk
    and gives the folder its name in one rename; leaving it through an exception removes what was
    written.
    Raises CheckpointError when `folder` is not free or the disk refuses.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        quant_config: QuantConfig,
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        partial: Path | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        hidden = f".{folder.name}.partial-{secrets.token_hex(4)}"
        self._partial = partial or self.folder.parent / hidden
        quant_config.to_dict()  # a format that is never written is refused now
        self._config, self._quant_config = config, quant_config
        self._max_shard_bytes = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        self._names: list[list[str]] = []  # of each shard that stands on the disk
        self._added: dict[str, int] = {}  # number of dimensions of each tensor

    def __enter__(self) -> Self:
        check_output(self.folder)
        try:
            with self._writing():
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self._partial.mkdir()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                with self._writing():
                    self._finish()
        finally:
            self._discard()

    @property
    def num_bytes(self) -> int:
        """Of all tensors added so far."""
        return self._total_bytes

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Tensors under their full names, each once; they must not change afterwards."""
        for name, tensor in tensors.items():
            if name in self._added:
                raise CheckpointError(f"{self.folder}: tensor {name} is written twice")
            if self._shard and self._shard_bytes + tensor.nbytes > self._max_shard_bytes:
                self._flush_shard()
            self._added[name] = tensor.dim()
            self._shard[name] = self._own(tensor.contiguous())
            self._shard_bytes += tensor.nbytes
            self._total_bytes += tensor.nbytes

    def add_files(self, write: Callable[[Path], None]) -> None:
        """Let `write` put further files (a tokenizer's) into the folder it is given."""
        with self._writing():
            write(self._partial)

    def _own(self, tensor: Tensor) -> Tensor:
        # safetensors refuses one tensor under two names, as an untied head may come.
        held = {other.data_ptr() for other in self._shard.values()}
        return tensor.clone() if tensor.data_ptr() in held else tensor

    def _flush_shard(self) -> None:
        path = self._partial / f"shard-{len(self._names)}.safetensors"
        with self._writing():
            save_file(self._shard, path, metadata={"format": "pt"})
        self._names.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _finish(self) -> None:
        if self._shard or not self._names:
            self._flush_shard()
        self._name_shards()
        self._write_configs()
        for path in self._partial.iterdir():
            # safetensors makes files for the owner alone, whatever the umask says.
            shutil.copymode(self._partial / CONFIG_FILE, path)
            _flush(path)
        self._partial.replace(self.folder)
        _flush(self.folder.parent)

    def _write_configs(self) -> None:
        marks = tuple(f".{name}" for name in set(CODES_NAME.values()))
        packed = {name.rpartition(".")[0] for name in self._added if name.endswith(marks)}
        dense = {n[:-7] for n, dim in self._added.items() if n.endswith(".weight") and dim == 2}
        quant = self._quant_config.to_dict(packed, dense)
        _write_json(self._partial / CONFIG_FILE, {**self._config, "quantization_config": quant})
        _write_json(self._partial / QUANT_CONFIG_FILE, quant)

    def _name_shards(self) -> None:
        count = len(self._names)
        files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        files = files if count > 1 else [SINGLE_FILE]
        for i, file in enumerate(files):
            (self._partial / f"shard-{i}.safetensors").rename(self._partial / file)
        if count > 1:
            pairs = zip(self._names, files, strict=True)
            weight_map = {name: file for names, file in pairs for name in names}
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            _write_json(self._partial / INDEX_FILE, index)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder}: cannot be written ({error})") from error

    def _discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    quant_config: QuantConfig,
    *,
    write_extras: Callable[[Path], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole checkpoint, or nothing: see CheckpointWriter.

    `write_extras` adds the tokenizer's files. Raises CheckpointError when `folder` is not free or
    the disk refuses, and leaves no folder behind then.
    """
    with CheckpointWriter(folder, config, quant_config, max_shard_bytes=max_shard_bytes) as writer:
        writer.add(tensors)
        if write_extras is not None:
            writer.add_files(write_extras)


def digest(value: PackedWeight | Tensor) -> str:
    """What a tensor holds, as a name: dtype, shape and bytes of it; of a packed layer, its
    dequantized float32 weight and its bias.
    """
    found = hashlib.sha256()
    if isinstance(value, PackedWeight):
        found.update(f"packed {value.out_features} {value.in_features}".encode())
        num_rows = max(1, _DIGEST_WEIGHTS // value.in_features)
        for outputs in torch.arange(value.out_features).split(num_rows):
            # 0 * a negative scale is -0; adding 0 makes it the 0 that it is elsewhere.
            _update(found, dequantize(select_outputs(value, outputs)) + 0.0)
        value = torch.empty(0) if value.bias is None else value.bias.to(torch.float32)
    found.update(f"{value.dtype} {list(value.shape)}".encode())
    _update(found, value)
    return found.hexdigest()


def verify_checkpoint(folder: Path, expected: Mapping[str, str]) -> None:
    """Re-read a checkpoint and compare everything in it with what should have been written.

    `expected`: full name of a packed layer, or of another tensor -> its `digest`. Raises
    CheckpointError naming what is missing, differs or is not expected.
    """
    reader = CheckpointReader(folder)
    packed = set(reader.packed_prefixes())
    for name, written in expected.items():
        value = reader.take_packed(name) if name in packed else reader.take_raw(name)
        if digest(value) != written:
            raise CheckpointError(f"{folder}: {name} is not what was written")
    reader.check_all_consumed()


def _shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each known to exist."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        paths = [folder / file for file in sorted(set(_weight_map(folder).values()))]
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path}: this shard is named in {INDEX_FILE} but missing")
        return paths
    single = sorted(folder.glob("*.safetensors"))  # AutoGPTQ: gptq_model-4bit-128g.safetensors
    if len(single) == 1:
        return single
    found = f"{len(single)} .safetensors files without an index" if single else "no .safetensors"
    pickled = " (pickled .bin weights are never read)" if any(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder}: holds {found}{pickled}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the index; empty when the checkpoint has a single file."""
    path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() or not path.is_file():
        return {}
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: {file!r} is not a file of this folder")
    return weight_map


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from None


def _read_quant_config(folder: Path, config: dict[str, Any]) -> QuantConfig | None:
    path, found = folder / CONFIG_FILE, config.get("quantization_config")
    if found is None:
        path = folder / QUANT_CONFIG_FILE
        found = _read_json(path) if path.is_file() else None
    if found is None:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: quantization_config is not an object")
    try:
        return QuantConfig.from_dict(found)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _update(found: Any, tensor: Tensor) -> None:
    found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _flush(path: Path) -> None:
    """Some file systems report a full disk only here, which must be before the rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(*dtypes: torch.dtype) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
