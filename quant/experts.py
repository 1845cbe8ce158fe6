"""Fused expert weights, taken apart: one module of `nn.Linear` per expert, named as on disk.

transformers keeps the experts of a layer in three-dimensional parameters. A quantizer needs them
one by one, and a checkpoint stores them so. Knows nothing of files or of whole models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import MergeModulelist, WeightConverter

from .errors import SourceError

FUSED_NAMES = {"gate_up_proj", "down_proj"}


class Expert(nn.Module):
    """down(activation(gate(x)) * up(x)); its linear layers carry their names on disk."""

    def __init__(
        self,
        names: tuple[str, str, str],
        hidden_size: int,
        intermediate_size: int,
        apply_gate: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.names = names
        self.apply_gate = apply_gate
        gate, up, down = names
        self.add_module(gate, nn.Linear(hidden_size, intermediate_size, bias=False))
        self.add_module(up, nn.Linear(hidden_size, intermediate_size, bias=False))
        self.add_module(down, nn.Linear(intermediate_size, hidden_size, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        """[T, C] -> [T, C]."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        output: Tensor = down(self.apply_gate(torch.cat([gate(hidden), up(hidden)], dim=-1)))
        return output


class Experts(nn.ModuleList):
    """The experts of one layer in index order. Each is called, with no tokens if it must be."""

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, C], expert of each slot [T, k] int64, weight of each slot [T, k] -> [T, C]."""
        output = torch.zeros_like(hidden)
        for index, expert in enumerate(self):
            tokens, slots = torch.where(top_k_index == index)
            weighted = expert(hidden[tokens]) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def unfuse(model: nn.Module, converters: list[WeightConverter]) -> None:
    """Replace every fused experts module of a model on the meta device by `Experts`.

    Raises SourceError for an experts module of another build, or with unknown names on disk.
    """
    for path, module in list(model.named_modules()):
        if hasattr(module, "has_gate"):
            _check_supported(path, module)
            model.set_submodule(path, _unfused(path, module, converters))


def _unfused(path: str, fused: Any, converters: list[WeightConverter]) -> Experts:
    num_experts, hidden_size, intermediate_size = fused.get_parameter("down_proj").shape
    gate, up = _disk_names(f"{path}.gate_up_proj", converters)
    (down,) = _disk_names(f"{path}.down_proj", converters)
    fused.gate_up_proj = fused.down_proj = None  # only its gating rule is used from here on
    with torch.device("meta"):
        return Experts(
            Expert((gate, up, down), hidden_size, intermediate_size, fused._apply_gate)
            for _ in range(num_experts)
        )


def _disk_names(target: str, converters: list[WeightConverter]) -> list[str]:
    """The per-expert names that are merged into the fused parameter `target`: w1 and w3, say."""
    for converter in converters:
        merges = isinstance(converter.operations[0], MergeModulelist)
        if merges and target.endswith(converter.target_patterns[0]):
            sources = [pattern.rpartition("*.")[2] for pattern in converter.source_patterns]
            return [name.removesuffix(".weight") for name in sources]
    raise SourceError(f"{target}: the names of its experts on disk are not known")


def _check_supported(path: str, module: nn.Module) -> None:
    unusual = [
        name
        for name, usual in (
            ("has_gate", True),
            ("has_bias", False),
            ("is_transposed", False),
            ("is_concatenated", True),
            ("has_post_expert_norm", False),
        )
        if getattr(module, name, usual) is not usual
    ]
    names = {name for name, _ in module.named_parameters()}
    if unusual or names != FUSED_NAMES:
        found = ", ".join(unusual) or ", ".join(sorted(names))
        raise SourceError(f"{path}: experts of this kind are not supported ({found})")
