"""Packed checkpoints on disk: reading, checking and writing. The only code that knows the format.

Tensor names, GPTQ v1/v2 conventions, `config.json` and safetensors shards in; canonical weights
out. Knows nothing of models, of how codes were found, or of who reads them. Safetensors only:
nothing here ever unpickles.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..kernels.packing import (
    DenseWeight,
    LinearWeight,
    PackedWeight,
    num_groups,
    pack_codes,
    pack_zeros,
    packed_rows,
    unpack_codes,
    unpack_zeros,
)
from .config import QuantConfig
from .errors import CheckpointError

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
QUANT_CONFIG_FILE = "quantize_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 << 30

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


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

    def names(self) -> list[str]:
        """Every tensor of the checkpoint, sorted."""
        return sorted(self._file_of)

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """A floating tensor (fp16, bf16 or fp32) by its full name, checked and marked as taken."""
        return self._take(name, FLOAT_DTYPES, shape)

    def take_linear(self, prefix: str, in_features: int, out_features: int) -> LinearWeight:
        """The linear layer `prefix`, [out_features, in_features], packed or dense.

        Raises CheckpointError when a tensor is missing, has another dtype or shape, or when
        `g_idx` describes groups that no permutation makes equally large.
        """
        bias_name = f"{prefix}.bias"
        bias = self.take(bias_name, shape=(out_features,)) if bias_name in self else None
        if f"{prefix}.qweight" not in self:
            weight = self.take(f"{prefix}.weight", shape=(out_features, in_features))
            return DenseWeight(weight=weight, bias=bias)
        quant = self.quant_config
        if quant is None:
            raise self._error(f"{prefix}.qweight", f"{CONFIG_FILE} has no quantization_config")
        groups = num_groups(in_features, quant.group_size)
        group_size = in_features if quant.group_size == -1 else quant.group_size
        words = (packed_rows(in_features, quant.bits), out_features)
        scales = self.take(f"{prefix}.scales", shape=(groups, out_features))
        if not bool(torch.isfinite(scales).all()):
            raise self._error(f"{prefix}.scales", "holds values that are not finite")
        qweight = self._take(f"{prefix}.qweight", (torch.int32,), words)
        permutation = self._take_permutation(prefix, in_features, group_size)
        if permutation is not None:
            codes = unpack_codes(qweight, quant.bits, in_features)
            qweight = pack_codes(codes[permutation], quant.bits)
        return PackedWeight(
            bits=quant.bits,
            group_size=group_size,
            in_features=in_features,
            out_features=out_features,
            qweight=qweight,
            scales=scales,
            zeros=self._take_zeros(prefix, quant, groups, out_features),
            input_permutation=permutation,
            bias=bias,
        )

    def check_all_consumed(self) -> None:
        """Raises CheckpointError that lists the tensors nobody took."""
        left = {name for name in self._left if not name.endswith("rotary_emb.inv_freq")}
        if self.config.get("tie_word_embeddings"):
            left.discard("lm_head.weight")  # written next to the embedding it is tied to
        if left:
            names = sorted(left)
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise CheckpointError(
                f"{self.folder}: {len(names)} tensors have no place in this model: "
                f"{', '.join(names[:5])}{more}"
            )

    def _take_zeros(self, prefix: str, quant: QuantConfig, groups: int, columns: int) -> Tensor:
        """True zero points, [G, N] uint8, whichever convention the file follows."""
        words = (groups, packed_rows(columns, quant.bits))
        packed = self._take(f"{prefix}.qzeros", (torch.int32,), words)
        stored = unpack_zeros(packed, quant.bits, columns)
        middle = 1 << (quant.bits - 1)
        if quant.checkpoint_format == "gptq_v2":
            return stored
        # Some symmetric checkpoints carry v2 words under the v1 label (vllm-project/vllm#38966):
        # a symmetric zero point is always the middle code, so the words themselves tell.
        if quant.sym and bool((stored == middle).all()):
            return stored
        return (stored + 1) & ((1 << quant.bits) - 1)  # per field: a carry must not spread

    def _take_permutation(self, prefix: str, in_features: int, group_size: int) -> Tensor | None:
        """None when the groups lie in order; else the order of inputs that makes them so."""
        name = f"{prefix}.g_idx"
        if name not in self:
            return None
        g_idx = self._take(name, INDEX_DTYPES, (in_features,)).to(torch.int64)
        regular = torch.arange(in_features) // group_size
        if torch.equal(g_idx, regular):
            return None
        last = num_groups(in_features, group_size) - 1
        if int(g_idx.min()) < 0 or int(g_idx.max()) > last:
            found = f"holds groups {int(g_idx.min())} to {int(g_idx.max())}"
            raise self._error(name, f"{found}, expected 0 to {last}")
        permutation = torch.argsort(g_idx, stable=True)
        if not torch.equal(g_idx[permutation], regular):
            raise self._error(name, f"its groups do not hold {group_size} inputs each")
        return permutation

    def _take(
        self, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None
    ) -> Tensor:
        if name not in self:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing")
        try:
            tensor: Tensor = self._shards[self._file_of[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise self._error(name, f"cannot be read ({error})") from None
        if tensor.dtype not in dtypes:
            raise self._error(name, f"dtype is {_short(tensor.dtype)}, expected {_short(*dtypes)}")
        if shape is not None and tuple(tensor.shape) != shape:
            raise self._error(name, f"shape is {list(tensor.shape)}, expected {list(shape)}")
        self._left.discard(name)
        return tensor

    def _check_index(self) -> None:
        for name, file in _weight_map(self.folder).items():
            if file in self._shards and name not in self._file_of:
                raise CheckpointError(
                    f"{self.folder / file}: tensor {name} of the index is missing"
                )

    def _error(self, name: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.folder / self._file_of[name]}: tensor {name}: {reason}")


def gptq_tensors(prefix: str, weight: PackedWeight, quant_config: QuantConfig) -> dict[str, Tensor]:
    """The tensors of one packed layer under their GPTQ names.

    qweight [ceil(K*bits/32), N] int32, qzeros [G, ceil(N*bits/32)] int32, scales [G, N] fp16,
    g_idx [K] int32, bias [N] fp16. Raises CheckpointError for scales outside the fp16 range and
    for asymmetric codes in format "gptq", whose zero points other readers cannot tell apart.
    """
    v1 = quant_config.checkpoint_format == "gptq"
    if v1 and not quant_config.sym:
        raise CheckpointError(f"{prefix}: asymmetric codes need checkpoint_format 'gptq_v2'")
    zeros = (weight.zeros - 1) & ((1 << weight.bits) - 1) if v1 else weight.zeros
    scales = weight.scales.to(torch.float16)
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{prefix}: a scale is too large for fp16")
    qweight, g_idx = weight.qweight, torch.arange(weight.in_features) // weight.group_size
    if weight.input_permutation is not None:
        order = torch.argsort(weight.input_permutation)
        codes = unpack_codes(qweight, weight.bits, weight.in_features)
        qweight, g_idx = pack_codes(codes[order], weight.bits), g_idx[order]
    tensors = {
        f"{prefix}.qweight": qweight,
        f"{prefix}.qzeros": pack_zeros(zeros, weight.bits),
        f"{prefix}.scales": scales,
        f"{prefix}.g_idx": g_idx.to(torch.int32),
    }
    if weight.bias is not None:
        tensors[f"{prefix}.bias"] = weight.bias.to(torch.float16)
    return tensors


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


def write_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    quant_config: QuantConfig,
    *,
    write_extras: Callable[[Path], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole checkpoint, or nothing.

    Everything goes to a hidden sibling folder first, is flushed to the disk, and takes its name in
    one rename; `write_extras` adds the tokenizer's files there. Raises CheckpointError when
    `folder` is not free or the disk refuses, and leaves no folder behind then.
    """
    check_output(folder)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{secrets.token_hex(4)}"
    quant = quant_config.to_dict()
    try:
        partial.mkdir()
        _write_json(partial / CONFIG_FILE, {**config, "quantization_config": quant})
        _write_json(partial / QUANT_CONFIG_FILE, quant)
        _write_shards(partial, tensors, max_shard_bytes)
        if write_extras is not None:
            write_extras(partial)
        for path in partial.iterdir():
            # safetensors makes files for the owner alone, whatever the umask says.
            shutil.copymode(partial / CONFIG_FILE, path)
            _flush(path)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(folder: Path, tensors: dict[str, Tensor], max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor.contiguous()
        used += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / SINGLE_FILE, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / INDEX_FILE, index)


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


def _flush(path: Path) -> None:
    """Some file systems report a full disk only here, which must be before the rename."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _short(*dtypes: torch.dtype) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
