"""A checkpoint of random numbers: a model of a given shape, to measure with. Nothing is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.packing import (
    DenseWeight,
    EmbeddingWeight,
    LinearWeight,
    PackedWeight,
    num_groups,
    packed_rows,
)
from ...quant.checkpoint import CheckpointReader


class RandomCheckpoint(CheckpointReader):
    """Whatever tensor is asked for, in the size that is asked for, made on `device`.

    Linear layers have `bits` bits in symmetric groups of `group_size`, or are dense at 16; the
    output head and the embedding are dense, as `lowbit quantize` leaves them. Their numbers have
    the size that a layer's have, so that hidden states stay what float16 holds.
    """

    def __init__(
        self,
        config: dict[str, Any],
        bits: int,
        *,
        group_size: int = 128,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.folder = Path(f"random weights of {bits} bits")
        self.config = config
        self.generation_config: dict[str, Any] = {}
        self.quant_config = None
        self._bits = bits
        self._group_size = group_size
        self._generator = torch.Generator(device).manual_seed(seed)

    def __contains__(self, name: object) -> bool:
        return False  # of what is optional, nothing

    def names(self) -> list[str]:
        return []

    def packed_prefixes(self) -> list[str]:
        return []

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        assert shape is not None
        if len(shape) == 1:  # the gain of a norm
            return self._uniform(shape, 0.5, 1.5)
        return self._uniform(shape, -1.0, 1.0)

    def take_linear(
        self, prefix: str, in_features: int, out_features: int, *, transposed: bool = False
    ) -> LinearWeight:
        if self._bits == 16 or prefix == "lm_head":
            bound = (3 / in_features) ** 0.5  # a variance of 1 / K
            return DenseWeight(weight=self._uniform((out_features, in_features), -bound, bound))
        return self._packed(in_features, out_features)

    def take_embedding(self, prefix: str, num_rows: int, num_features: int) -> EmbeddingWeight:
        return self.take(f"{prefix}.weight", shape=(num_rows, num_features))

    def check_all_consumed(self) -> None:
        """Nothing is left over of what was made when it was asked for."""

    def _packed(self, in_features: int, out_features: int) -> PackedWeight:
        bits = self._bits
        groups = (num_groups(in_features, self._group_size), out_features)
        step = 12**0.5 / (1 << bits) / in_features**0.5
        # Random words are random codes.
        words = torch.randint(
            -(1 << 31),
            1 << 31,
            (packed_rows(in_features, bits), out_features),
            dtype=torch.int32,
            device=self._generator.device,
            generator=self._generator,
        )
        return PackedWeight(
            bits=bits,
            group_size=self._group_size,
            in_features=in_features,
            out_features=out_features,
            qweight=words,
            scales=self._uniform(groups, 0.5 * step, 1.5 * step),
            zeros=torch.full(
                groups, 1 << (bits - 1), dtype=torch.uint8, device=self._generator.device
            ),
        )

    def _uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        numbers = torch.empty(shape, dtype=torch.float16, device=self._generator.device)
        return numbers.uniform_(low, high, generator=self._generator)
