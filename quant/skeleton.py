"""A transformers model without weights, and what its tensors are called on disk.

A configuration in; a model on the meta device out whose tensors are, one by one, those of a
checkpoint: every weight matrix an `nn.Linear`, experts apart. Knows nothing of files.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

from .errors import SourceError
from .experts import unfuse

# What older releases stored besides the weights, and heads that a language model does not use.
_IGNORED = re.compile(
    r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|position_ids)"
    r"|(bert\.)?pooler\..*|cls\.seq_relationship\..*"
)


class TransposedLinear(nn.Linear):
    """A linear layer whose weight lies on disk as [in_features, out_features], as GPT-2's do."""


class Skeleton:
    """A model of `config` with its parameters on the meta device, in eval mode, in fp32."""

    model: Any  # PreTrainedModel
    shapes: dict[str, tuple[int, ...]]  # of every tensor by its name in the model, as on disk
    tied: dict[str, str]  # name in the model -> the other name of the same tensor

    def __init__(self, config: PretrainedConfig) -> None:
        self.is_causal = is_causal(config)
        factory: Any = AutoModelForCausalLM if self.is_causal else AutoModelForMaskedLM
        with torch.device("meta"):
            model = factory.from_config(copy.deepcopy(config), dtype=torch.float32)
        conversions = get_model_conversion_mapping(model)
        unfuse(model, [c for c in conversions if isinstance(c, WeightConverter)])
        _restore_buffers(model)
        _replace_conv1d(model)
        model.eval()
        model.requires_grad_(False)
        self.model = model
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        state = model.state_dict()
        self.tied = {k: v for k, v in model.all_tied_weights_keys.items() if k in state}
        self.shapes = {name: self._shape_on_disk(name, tensor) for name, tensor in state.items()}
        self._checkpoint_names = _checkpoint_names(model, state)

    def checkpoint_name(self, name: str) -> str:
        """What the tensor or module `name` of the model is called in a new checkpoint."""
        if name in self._checkpoint_names:
            return self._checkpoint_names[name]
        return self._checkpoint_names[f"{name}.weight"].removesuffix(".weight")

    def is_transposed(self, name: str) -> bool:
        """Whether the model's tensor `name` lies transposed on disk."""
        path, _, leaf = name.rpartition(".")
        return leaf == "weight" and isinstance(self.model.get_submodule(path), TransposedLinear)

    def locate(self, name: str) -> str | None:
        """The model's name for the tensor that some checkpoint calls `name`; None: not in it."""
        renamed = name
        for renaming in self._renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        prefix = f"{self.model.base_model_prefix}."
        for candidate in (renamed, prefix + renamed, renamed.removeprefix(prefix), name):
            if candidate in self.shapes:
                return candidate
        return None

    def places(
        self, names: Iterable[str], shape_of: Callable[[str], tuple[int, ...]]
    ) -> dict[str, str]:
        """Name in the model -> name on disk, for a checkpoint with tensors of these names.

        Raises SourceError that names a missing, superfluous or misshapen tensor.
        """
        places: dict[str, str] = {}
        for name in names:
            place = self.locate(name)
            if place is None:
                if _IGNORED.fullmatch(name):
                    continue
                raise SourceError(f"tensor {name} is not expected")
            if place in places:
                raise SourceError(f"tensors {places[place]} and {name} are the same one")
            if shape_of(name) != self.shapes[place]:
                found = f"{list(shape_of(name))}, expected {list(self.shapes[place])}"
                raise SourceError(f"tensor {name} has shape {found}")
            places[place] = name
        for target, origin in self.tied.items():
            if target in places:
                places.setdefault(origin, places[target])
        for name in self.shapes:
            if name not in places and self.tied.get(name) not in places:
                raise SourceError(f"tensor {self.checkpoint_name(name)} is missing")
        return places

    def fill(self, name: str, tensor: Tensor) -> None:
        """Give the model's tensor `name`, and those tied to it, a value as it is on disk."""
        assign(self.model, name, tensor)
        for target in (t for t, origin in self.tied.items() if origin == name):
            path, _, leaf = target.rpartition(".")
            setattr(self.model.get_submodule(path), leaf, self._get(name))

    def _get(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(path), leaf)
        return tensor

    def _shape_on_disk(self, name: str, tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.t().shape if self.is_transposed(name) else tensor.shape)


def assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor`, as it is on disk, the parameter or buffer `name` below `root`."""
    path, _, leaf = name.rpartition(".")
    module = root.get_submodule(path)
    if isinstance(module, TransposedLinear) and leaf == "weight":
        tensor = tensor.t()
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))


def is_causal(config: PretrainedConfig) -> bool:
    """Raises SourceError, by name, for a model that is neither a causal nor a masked LM."""
    kind = type(config)
    causal, masked = kind in MODEL_FOR_CAUSAL_LM_MAPPING, kind in MODEL_FOR_MASKED_LM_MAPPING
    whole = config.get_text_config() is config and not config.is_encoder_decoder
    if not whole or not (causal or masked):
        raise SourceError(
            f"model type {config.model_type!r} is not supported; it must be a decoder or encoder "
            "of text alone"
        )
    if causal and masked:
        decoder: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
        return bool(getattr(config, "is_decoder", False)) or config.architectures == [
            decoder.__name__
        ]
    return causal


def _restore_buffers(model: Any) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, position ids) get their values."""
    for module in model.modules():
        names = [
            name
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        ]
        for name in names:
            module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        if names:
            model._init_weights(module)


def _replace_conv1d(model: nn.Module) -> None:
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = TransposedLinear(module.nx, module.nf, device="meta")
            model.set_submodule(path, linear)


def _checkpoint_names(model: Any, state: Iterable[str]) -> dict[str, str]:
    """What `save_pretrained` calls every tensor of the model."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [
        c.reverse_transform()
        for c in reversed(conversions)
        if isinstance(c, WeightRenaming) and not isinstance(c, PrefixChange)
    ]
    names: dict[str, str] = {}
    for name in state:
        names[name] = name
        for renaming in renamings:
            names[name], _ = renaming.rename_source_key(names[name])
    return names
