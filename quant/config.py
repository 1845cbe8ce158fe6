"""What a checkpoint's quantized layers look like: the dictionary that every reader agrees on.

Bits, groups and symmetry, for the whole checkpoint and per module; nothing of how the codes were
found, and nothing of tensors or files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from ..kernels.packing import SUPPORTED_BITS
from .errors import CheckpointError

CHECKPOINT_FORMATS = ("gptq", "gptq_v2")

# Keys that change what the stored numbers mean. A value other than null or empty is refused.
UNSUPPORTED_KEYS = ("activation", "is_marlin_format", "rotation")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleConfig:
    """How one linear layer is quantized."""

    bits: int = 4  # of a code: 2, 3, 4 or 8
    group_size: int = 64  # input features that share a scale; -1 is one group per row
    sym: bool = True  # the zero point is always 2 ** (bits - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """How the linear layers of a checkpoint are quantized. Raises CheckpointError by field name."""

    bits: int = 4  # of a code: 2, 3, 4 or 8
    group_size: int = 64  # input features that share a scale; -1 is one group per row
    sym: bool = True  # the zero point is always 2 ** (bits - 1)
    desc_act: bool = False  # groups follow the activation order: `g_idx` is irregular
    damp_percent: float = 0.01  # of the Hessian's mean diagonal, added to its diagonal
    lm_head: bool = False  # the output head is quantized too
    checkpoint_format: str = "gptq"  # "gptq" stores zero points minus one, "gptq_v2" as they are
    # Regular expression over a module's full name -> what differs there: "+:" (or no prefix)
    # changes bits, group_size or sym, "-:" leaves the module at 16 bits; the first match decides.
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in SUPPORTED_BITS:
            supported = ", ".join(map(str, SUPPORTED_BITS))
            raise CheckpointError(f"bits is {self.bits!r}; supported are {supported}")
        size = self.group_size
        if type(size) is not int or not (size == -1 or size >= 1):
            raise CheckpointError(f"group_size is {size!r}; it must be positive, or -1 for one")
        for name in ("sym", "desc_act", "lm_head"):
            if type(getattr(self, name)) is not bool:
                value = getattr(self, name)
                raise CheckpointError(f"{name} is {value!r}; it must be true or false")
        damp = self.damp_percent
        if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 <= damp < 1:
            raise CheckpointError(f"damp_percent is {damp!r}; it must lie in [0, 1)")
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            raise CheckpointError(
                f"checkpoint_format is {self.checkpoint_format!r}; "
                f"supported are {', '.join(CHECKPOINT_FORMATS)}"
            )

    def for_module(self, name: str) -> ModuleConfig | None:
        """How the module of that full name is quantized; None: it stays at 16 bits."""
        values: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}
        for pattern, changes in self.dynamic.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                if pattern.startswith("-:"):
                    return None
                return ModuleConfig(**{**values, **changes})
        if name.endswith("lm_head") and not self.lm_head:
            return None
        return ModuleConfig(**values)

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> QuantConfig:
        """Read the dictionary that transformers, GPTQModel, AutoGPTQ or we wrote.

        Keys that only describe how the codes were found are ignored. Raises CheckpointError for a
        method, width, layout or option that would make the stored numbers mean something else.
        """
        method = d.get("quant_method") or d.get("method") or "gptq"
        if method != "gptq":
            raise CheckpointError(f"quant_method is {method!r}; only 'gptq' is supported")
        for key in UNSUPPORTED_KEYS:
            if d.get(key):
                raise CheckpointError(f"{key} is {d[key]!r}; this option is not supported")
        if d.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise CheckpointError(f"pack_dtype is {d['pack_dtype']!r}; only 'int32' is supported")
        for key in ("bits", "group_size"):
            if key not in d:
                raise CheckpointError(f"{key} is missing from the quantization config")
        meta = d.get("meta")
        damp = d.get("damp_percent")
        if damp is None and isinstance(meta, Mapping):  # where GPTQModel keeps it
            damp = meta.get("damp_percent")
        return cls(
            bits=d["bits"],
            group_size=d["group_size"],
            sym=d.get("sym", True),
            desc_act=d.get("desc_act", False),
            damp_percent=0.01 if damp is None else damp,
            lm_head=d.get("lm_head", False),
            checkpoint_format=d.get("checkpoint_format") or d.get("format") or "gptq",
            dynamic=d.get("dynamic") or {},
        )

    def to_dict(self) -> dict[str, Any]:
        """The keys that transformers, GPTQModel and vLLM need to read the checkpoint."""
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "lm_head": self.lm_head,
            "format": self.checkpoint_format,
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "true_sequential": True,
            "damp_percent": self.damp_percent,
            **({"dynamic": {k: dict(v) for k, v in self.dynamic.items()}} if self.dynamic else {}),
            "meta": {"quantizer": [f"lowbit:{version('lowbit')}"]},
        }
