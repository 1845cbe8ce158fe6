"""Where weights come from: a Hugging Face folder, a hub id or a GGUF file.

Ends at a `Source`: a configuration, a tokenizer, and tensors that are read when they are asked for.
Safetensors and GGUF only; code that ships with a model is never run, pickled weights never read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .checkpoint import CheckpointReader
from .errors import SourceError
from .skeleton import Skeleton

# What travels from a source folder to the quantized one, byte for byte.
COMPANION_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "config.json", *COMPANION_FILES]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")


class Weights(Protocol):
    """The tensors of a source under their names on disk, each read when it is asked for."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Tensor: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that can be quantized: every tensor it needs is there, in the right shape."""

    name: str  # as the user wrote it
    config: PretrainedConfig
    config_json: dict[str, Any]  # what becomes the new checkpoint's config.json
    weights: Weights
    places: dict[str, str]  # tensor of the transformers model -> its name on disk
    tokenizer: PreTrainedTokenizerBase
    write_companions: Callable[[Path], None]  # tokenizer, chat template, generation config

    def names(self) -> list[str]:
        """The tensors of the model by their names on disk, sorted."""
        return sorted(self.places.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor on disk; reads no weights."""
        return self.weights.shape(name)

    def tensor(self, name: str) -> Tensor:
        """16-bit or fp32, memory-mapped where the format allows it. Not to be written to."""
        return self.weights.tensor(name)

    def release(self) -> None:
        """Unmap what was read so far, but for tensors that someone still holds."""
        self.weights.release()


def load_source(source: str) -> Source:
    """Open SOURCE. Raises SourceError (or CheckpointError, for a damaged folder) in one line."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _load_folder(source, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(f"{source}: a file must be a .gguf file")
        return _load_gguf(source, path)
    if path.suffix == ".gguf" or path.is_absolute() or not _HUB_ID.fullmatch(source):
        raise SourceError(f"{source}: there is no such file or folder")
    return _load_folder(source, _download(source))


def build_model(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The whole transformers model in memory, experts apart, its tensors as stored or in `dtype`.

    Without `dtype` no tensor is copied.
    """
    skeleton = Skeleton(source.config)
    for name, stored in source.places.items():
        tensor = source.tensor(stored)
        skeleton.fill(name, tensor if dtype is None else tensor.to(dtype))
    model: PreTrainedModel = skeleton.model
    return model


def _download(source: str) -> Path:
    """A hub snapshot's folder, from the network or the local cache."""
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_PATTERNS))
    except HFValidationError:
        raise SourceError(f"{source}: neither a file or folder nor a valid hub id") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise SourceError(
            f"{source}: no such file or folder here, and the hub did not deliver it "
            f"({_first_line(error)})"
        ) from None


def _load_folder(source: str, folder: Path) -> Source:
    weights = _FolderWeights(folder)
    reader = weights.reader
    if reader.quant_config is not None:
        raise SourceError(f"{source}: is quantized already; start from the 16-bit model")
    config: PretrainedConfig = _from_pretrained(AutoConfig, source, folder)
    return Source(
        name=source,
        config=config,
        config_json={k: v for k, v in reader.config.items() if k != "torch_dtype"},
        weights=weights,
        places=_places(source, config, weights),
        tokenizer=_from_pretrained(AutoTokenizer, source, folder),
        write_companions=lambda out: _copy_companions(folder, out),
    )


class _FolderWeights:
    """Memory-mapped safetensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader: CheckpointReader | None = None

    @property
    def reader(self) -> CheckpointReader:
        if self._reader is None:
            self._reader = CheckpointReader(self._folder)
        return self._reader

    def names(self) -> list[str]:
        return self.reader.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> Tensor:
        return self.reader.take(name)

    def release(self) -> None:
        self._reader = None  # the pages that were touched count as this process's memory


def _load_gguf(source: str, path: Path) -> Source:
    try:
        file = gguf.GGUFReader(path)
        architecture = file.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise SourceError(f"{source}: not a whole GGUF file ({error})") from None
    if architecture != "llama":
        raise SourceError(f"{source}: model type {architecture!r}; a GGUF file's must be llama")
    config: LlamaConfig = _from_pretrained(AutoConfig, source, path.parent, gguf_file=path.name)
    tokenizer = _from_pretrained(AutoTokenizer, source, path.parent, gguf_file=path.name)
    config.architectures = ["LlamaForCausalLM"]
    config_json: dict[str, Any] = json.loads(config.to_json_string())
    config_json.pop("_model_name_or_path", None)

    def write_companions(out: Path) -> None:
        tokenizer.save_pretrained(out)
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id")}
        GenerationConfig(pad_token_id=config.pad_token_id, **ids).save_pretrained(out)

    weights = _GgufWeights(source, file, config)
    return Source(
        name=source,
        config=config,
        config_json=config_json,
        weights=weights,
        places=_places(source, config, weights),
        tokenizer=tokenizer,
        write_companions=write_companions,
    )


class _GgufWeights:
    """A memory-mapped GGUF file; a tensor is dequantized to fp16 whenever it is asked for."""

    def __init__(self, source: str, file: gguf.GGUFReader, config: LlamaConfig) -> None:
        self._source = source
        self._config = config
        self._tensors = {_gguf_name(source, tensor.name): tensor for tensor in file.tensors}

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        return _gguf_tensor(self._source, self._tensors[name], self._config)

    def release(self) -> None:
        pass


def _places(source: str, config: PretrainedConfig, weights: Weights) -> dict[str, str]:
    """Where every tensor of the model lies, those tied to another one left out.

    Raises SourceError that names what is not supported or does not fit.
    """
    try:
        skeleton = Skeleton(config)
        places = skeleton.places(weights.names(), weights.shape)
        for target, origin in skeleton.tied.items():
            _check_tied(places, target, origin, weights)
    except SourceError as error:
        raise SourceError(f"{source}: {error}") from None
    return {name: stored for name, stored in places.items() if name not in skeleton.tied}


def _check_tied(places: dict[str, str], target: str, origin: str, weights: Weights) -> None:
    """Raises SourceError where config.json ties what the tensors themselves do not."""
    copy, stored = places.get(target), places[origin]
    if copy not in (None, stored) and not torch.equal(weights.tensor(copy), weights.tensor(stored)):
        raise SourceError(f"tensor {copy} differs from {stored}, which tie_word_embeddings denies")


def _gguf_name(source: str, name: str) -> str:
    """The transformers name of a GGUF tensor."""
    match = _GGUF_TENSOR.fullmatch(name)
    names = _GGUF_NAMES if match is None or match["layer"] is None else _GGUF_LAYER_NAMES
    if match is None or match["part"] not in names:
        raise SourceError(f"{source}: tensor {name} has no place in a Llama model")
    prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{prefix}{names[match['part']]}.{match['kind']}"


def _gguf_tensor(source: str, tensor: Any, config: LlamaConfig) -> Tensor:
    """A GGUF tensor dequantized to fp16."""
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise SourceError(f"{source}: tensor {tensor.name} has unknown type {kind}") from None
    weight = torch.from_numpy(values.copy()).to(torch.float16)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    num_heads = heads.get(tensor.name.split(".")[-2])
    return weight if num_heads is None else _undo_rope_interleaving(weight, num_heads)


def _undo_rope_interleaving(weight: Tensor, num_heads: int) -> Tensor:
    """GGUF pairs rotary features (2i, 2i + 1); transformers pairs (i, i + D/2). [H * D, ...]"""
    shape = weight.shape
    return weight.view(num_heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _from_pretrained(factory: Any, source: str, folder: Path, **options: Any) -> Any:
    try:
        return factory.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        what = "tokenizer" if factory is AutoTokenizer else "configuration"
        raise SourceError(f"{source}: its {what} cannot be read ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _copy_companions(folder: Path, out: Path) -> None:
    for name in COMPANION_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
