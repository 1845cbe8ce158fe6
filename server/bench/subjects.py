"""What `lowbit bench engine` measures: random weights of a model's shape, or a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...kernels.interface import KernelBackend
from ...kernels.packing import SUPPORTED_BITS
from ..model.config import ModelConfig
from ..model.decoder import Decoder
from ..model.families import read_config
from ..model.info import model_info, model_size
from ..model.loader import build_decoder, load_decoder
from ..model.random_weights import RandomCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to measure, not loaded yet."""

    name: str
    bits: int
    config: ModelConfig
    weight_bytes: int  # that a step reads
    held_bytes: int  # that loading takes, at least
    load: Callable[[], Decoder]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama-like model by its numbers."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    tied: bool = False
    group_size: int = 128

    def hf_config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "max_position_embeddings": 1 << 17,  # how far it was trained costs nothing
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": self.tied,
        }

    def linear_weights(self) -> int:
        """Of all layers together, without the head."""
        head_dim = self.hidden_size // self.num_heads
        attention = 2 * self.hidden_size * (self.hidden_size + self.num_kv_heads * head_dim)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    def bytes_at(self, bits: float) -> int:
        """Of linear layers with their scales, and the 16-bit head; what a step reads."""
        per_weight = bits / 8 + (2 / self.group_size if bits < 16 else 0)
        return int(self.linear_weights() * per_weight) + 2 * self.vocab_size * self.hidden_size


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="SmolLM2-135M", vocab_size=49152, hidden_size=576, intermediate_size=1536,
            num_layers=30, num_heads=9, num_kv_heads=3, tied=True, group_size=64,
        ),
        Shape(
            name="Llama-3-8B", vocab_size=128256, hidden_size=4096, intermediate_size=14336,
            num_layers=32, num_heads=32, num_kv_heads=8,
        ),
        Shape(
            name="Llama-2-13B", vocab_size=32000, hidden_size=5120, intermediate_size=13824,
            num_layers=40, num_heads=40, num_kv_heads=40,
        ),
        Shape(
            name="LLaMA-65B", vocab_size=32000, hidden_size=8192, intermediate_size=22016,
            num_layers=80, num_heads=64, num_kv_heads=64,
        ),
    )
}  # fmt: skip
WIDTHS = (4, 3, 8, 16)
DEFAULT_SHAPES = {"cpu": ("SmolLM2-135M",), "cuda": ("Llama-3-8B", "Llama-2-13B", "LLaMA-65B")}
_WIDTHS_OF = {"LLaMA-65B": (4,)}  # at more bits it fits no single GPU


def shape_subjects(
    names: Sequence[str] | None, widths: Sequence[int] | None, backend: KernelBackend
) -> list[Subject]:
    """Random weights of each shape at each width; by default those that suit the device.

    Raises ValueError for an unknown one.
    """
    chosen = names if names is not None else DEFAULT_SHAPES[backend.device.type]
    for name in chosen:
        if name not in SHAPES:
            raise ValueError(f"shape is {name!r}; it must be one of {', '.join(SHAPES)}")
    for bits in widths or ():
        if bits not in (*SUPPORTED_BITS, 16):
            raise ValueError(f"bits is {bits}; it must be 2, 3, 4, 8 or 16")
    return [
        _shape_subject(SHAPES[name], bits, backend)
        for name in chosen
        for bits in (_WIDTHS_OF.get(name, WIDTHS) if widths is None else widths)
    ]


def _shape_subject(shape: Shape, bits: int, backend: KernelBackend) -> Subject:
    config = shape.hf_config()

    def load() -> Decoder:
        reader = RandomCheckpoint(config, bits, group_size=shape.group_size, device=backend.device)
        return build_decoder(reader, backend)

    # The cpu backend holds 3 bits in 4, and what is dense in float32.
    held_bits = {2: 4, 3: 4, 16: 32}.get(bits, bits) if backend.device.type == "cpu" else bits
    return Subject(
        name=shape.name,
        bits=bits,
        config=read_config(config, {}),
        weight_bytes=shape.bytes_at(bits),
        held_bytes=shape.bytes_at(held_bits) + 2 * shape.vocab_size * shape.hidden_size,
        load=load,
    )


def checkpoint_subject(folder: Path, backend: KernelBackend) -> Subject:
    """A checkpoint as it stands. Raises CheckpointError."""
    config, num_bytes = model_size(folder)
    quantization = model_info(folder).quantization
    lookup_bytes = 0 if config.tie_word_embeddings else 2 * config.vocab_size * config.hidden_size
    return Subject(
        name=folder.resolve().name,
        bits=quantization.bits if quantization else 16,
        config=config,
        weight_bytes=num_bytes - lookup_bytes,
        held_bytes=num_bytes,
        load=lambda: load_decoder(folder, backend),
    )
