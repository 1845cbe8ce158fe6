"""Where weights come from: a Hugging Face folder, a hub id or a GGUF file.

Ends at a `Source`: a configuration, 16-bit tensors under their transformers names, a tokenizer.
Safetensors and GGUF only; code that ships with a model is never run, pickled weights never read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from .checkpoint import CheckpointReader
from .errors import SourceError

SUPPORTED_MODEL_TYPES = ("llama",)

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model that can be quantized."""

    name: str  # as the user wrote it
    config: LlamaConfig
    config_json: dict[str, Any]  # what becomes the new checkpoint's config.json
    tensors: dict[str, Tensor]  # 16-bit or fp32, memory-mapped where the format allows it
    tokenizer: PreTrainedTokenizerBase
    write_companions: Callable[[Path], None]  # tokenizer, chat template, generation config


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


def build_model(config: LlamaConfig, tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    """A transformers model that uses `tensors` as they are, without a copy or a dtype change.

    Raises SourceError that names a missing, superfluous or misshapen tensor.
    """
    config._attn_implementation = "sdpa"  # causal without a mask of T x T numbers
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tensors = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        tensors.pop("lm_head.weight", None)
    for name in expected.keys() ^ tensors.keys():
        raise SourceError(f"tensor {name} is {'missing' if name in expected else 'not expected'}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            found = f"{list(tensor.shape)}, expected {list(expected[name])}"
            raise SourceError(f"tensor {name} has shape {found}")
    model.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    # Its buffers are no part of a checkpoint and were made without storage above.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.eval()
    model.requires_grad_(False)
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
    reader = CheckpointReader(folder)
    _check_architecture(source, reader.config.get("model_type"))
    if reader.quant_config is not None:
        raise SourceError(f"{source}: is quantized already; start from the 16-bit model")
    return Source(
        name=source,
        config=_from_pretrained(AutoConfig, source, folder),
        config_json={k: v for k, v in reader.config.items() if k != "torch_dtype"},
        tensors={name: reader.take(name) for name in reader.names()},
        tokenizer=_from_pretrained(AutoTokenizer, source, folder),
        write_companions=lambda out: _copy_companions(folder, out),
    )


def _load_gguf(source: str, path: Path) -> Source:
    try:
        file = gguf.GGUFReader(path)
        architecture = file.fields["general.architecture"].contents()
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise SourceError(f"{source}: not a whole GGUF file ({error})") from None
    _check_architecture(source, architecture)
    config: LlamaConfig = _from_pretrained(AutoConfig, source, path.parent, gguf_file=path.name)
    tokenizer = _from_pretrained(AutoTokenizer, source, path.parent, gguf_file=path.name)
    config.architectures = ["LlamaForCausalLM"]
    config_json: dict[str, Any] = json.loads(config.to_json_string())
    config_json.pop("_model_name_or_path", None)

    def write_companions(out: Path) -> None:
        tokenizer.save_pretrained(out)
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id")}
        GenerationConfig(pad_token_id=config.pad_token_id, **ids).save_pretrained(out)

    return Source(
        name=source,
        config=config,
        config_json=config_json,
        tensors=dict(_gguf_tensor(source, tensor, config) for tensor in file.tensors),
        tokenizer=tokenizer,
        write_companions=write_companions,
    )


def _gguf_tensor(source: str, tensor: Any, config: LlamaConfig) -> tuple[str, Tensor]:
    """A GGUF tensor dequantized to fp16, under its transformers name."""
    match = _GGUF_TENSOR.fullmatch(tensor.name)
    names = _GGUF_NAMES if match is None or match["layer"] is None else _GGUF_LAYER_NAMES
    if match is None or match["part"] not in names:
        raise SourceError(f"{source}: tensor {tensor.name} has no place in a Llama model")
    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        kind = tensor.tensor_type.name
        raise SourceError(f"{source}: tensor {tensor.name} has unknown type {kind}") from None
    weight = torch.from_numpy(values.copy()).to(torch.float16)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    num_heads = heads.get(match["part"])
    if num_heads is not None:
        weight = _undo_rope_interleaving(weight, num_heads)
    prefix = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{prefix}{names[match['part']]}.{match['kind']}", weight


def _undo_rope_interleaving(weight: Tensor, num_heads: int) -> Tensor:
    """GGUF pairs rotary features (2i, 2i + 1); transformers pairs (i, i + D/2). [H * D, ...]"""
    shape = weight.shape
    return weight.view(num_heads, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape)


def _check_architecture(source: str, model_type: object) -> None:
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise SourceError(f"{source}: model type {model_type!r}; supported are {supported}")


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
