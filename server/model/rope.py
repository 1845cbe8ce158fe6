"""Rotary positions: how fast each pair of features turns, and how a longer context was trained in.

Pure functions of a checkpoint's numbers. R: the features of a head that rotate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...quant.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How a model was taught positions beyond those it was first trained with: here, not at all."""

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return 1.0

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        """Radians per position of each pair of features, [R / 2] float32 -> the same."""
        return frequencies

    def max_positions(self, max_position_embeddings: int) -> int:
        """How far a model goes whose config.json says `max_position_embeddings`."""
        return max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Positions divided by `factor` (Chen et al. 2023, "Position Interpolation")."""

    factor: float

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """Pairs that turn less than `low_freq_factor` times in the original context are slowed by
    `factor`, those that turn more than `high_freq_factor` times are kept (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        band = self.high_freq_factor - self.low_freq_factor
        kept = ((turns - self.low_freq_factor) / band).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling(RopeScaling):
    """The same with a ramp over the pairs between `beta_fast` and `beta_slow` turns, and sharper
    attention (Peng et al. 2023, "YaRN", sections 3.2 and 3.4)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._growth(self.mscale) / self._growth(self.mscale_all_dim)
        return self._growth(1.0)

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        size = 2 * len(frequencies)
        first = self._pair_that_turns(self.beta_fast, size, theta)
        last = self._pair_that_turns(self.beta_slow, size, theta)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        width = last - first or 0.001
        slowed = ((torch.arange(len(frequencies)) - first) / width).clamp(0, 1)
        return slowed * frequencies / self.factor + (1 - slowed) * frequencies

    def max_positions(self, max_position_embeddings: int) -> int:
        stretched = int(self.original_max_position_embeddings * self.factor)
        return max(max_position_embeddings, stretched)

    def _pair_that_turns(self, times: float, size: int, theta: float) -> float:
        length = self.original_max_position_embeddings
        return size * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    def _growth(self, weight: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRopeScaling(RopeScaling):
    """A factor of its own for each pair: one set up to the original context, another one for a
    model that is to go beyond it (Ding et al. 2024, "LongRoPE")."""

    short_factor: tuple[float, ...]  # [R / 2]
    long_factor: tuple[float, ...]  # [R / 2]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None
    long: bool = False  # which set is in use

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(
            1 + math.log(self.factor) / math.log(self.original_max_position_embeddings)
        )

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / torch.tensor(self.long_factor if self.long else self.short_factor)

    def max_positions(self, max_position_embeddings: int) -> int:
        original = self.original_max_position_embeddings
        return max_position_embeddings if self.long else min(max_position_embeddings, original)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """The rotary positions of a layer."""

    size: int  # R; 0: nothing rotates, positions are learned
    theta: float = 10000.0
    scaling: RopeScaling = RopeScaling()

    def frequencies(self) -> Tensor:
        """Radians per position of each pair of features: [R / 2] float32.

        RoFormer (Su et al. 2021), section 3.2.2.
        """
        exponents = torch.arange(0, self.size, 2) / max(self.size, 1)
        return self.scaling.scale(1.0 / self.theta**exponents, self.theta)


_SCALINGS: dict[str, type[RopeScaling]] = {
    "default": RopeScaling,
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "yarn": YarnScaling,
    "longrope": LongRopeScaling,
}
_OTHER_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}


def read_rope(
    parameters: Mapping[str, Any],
    head_dim: int,
    max_position_embeddings: int,
    max_model_len: int | None,
) -> RopeConfig:
    """`rope_parameters` as transformers writes them, for one kind of layer.

    A LongRoPE model that is to go beyond its original context takes its long factors for all
    positions: keys in the cache cannot change when a sequence grows. Raises CheckpointError
    naming the key.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in _SCALINGS:
        raise CheckpointError(
            f"config.json: rope_type is {kind!r}; supported are {', '.join(_SCALINGS)}"
        )
    _refuse_unknown(kind, parameters)
    share = _number("partial_rotary_factor", parameters.get("partial_rotary_factor", 1.0))
    size = int(head_dim * share)
    if size % 2 or not 0 < size <= head_dim:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {share}; "
            f"{size} features of {head_dim} would rotate, which must be an even number"
        )
    original = parameters.get("original_max_position_embeddings")
    if kind in ("yarn", "longrope") and parameters.get("factor") is None and original:
        parameters = {**parameters, "factor": max_position_embeddings / original}
    return RopeConfig(
        size=size,
        theta=_number("rope_theta", parameters.get("rope_theta")),
        scaling=_read_scaling(kind, parameters, size, max_model_len),
    )


def _scaling_fields(kind: str) -> dict[str, Field[Any]]:
    """Those that config.json sets, by name."""
    return {field.name: field for field in fields(_SCALINGS[kind]) if field.name != "long"}


def _refuse_unknown(kind: str, parameters: Mapping[str, Any]) -> None:
    for key in parameters.keys() - _scaling_fields(kind).keys() - _OTHER_KEYS:
        if parameters[key] is not None:
            raise CheckpointError(
                f"config.json: {key} is {parameters[key]!r}; "
                f"a rope_type of {kind!r} has no such key"
            )


def _read_scaling(
    kind: str, parameters: Mapping[str, Any], size: int, max_model_len: int | None
) -> RopeScaling:
    settings: dict[str, Any] = {}
    for key, field in _scaling_fields(kind).items():
        value = parameters.get(key)
        if value is None and field.default is not MISSING:
            continue
        if key.endswith(("short_factor", "long_factor")):
            settings[key] = _numbers(key, value, size // 2)
        else:
            settings[key] = value if isinstance(value, bool) else _number(key, value)
    if kind == "longrope" and max_model_len is not None:
        settings["long"] = max_model_len > settings["original_max_position_embeddings"]
    return _SCALINGS[kind](**settings)


def _numbers(key: str, value: Any, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be {count} numbers")
    return tuple(_number(key, number) for number in value)


def _number(key: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"config.json: {key} is {value!r}; it must be a positive number")
    return value
