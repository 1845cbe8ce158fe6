"""What a checkpoint's quantized layers look like: QuantConfig, and the dictionaries it stands in.

Bits, groups and symmetry, for the whole checkpoint and per module; nothing of how the codes were
found, and nothing of tensors or files. The dictionaries of GPTQ (transformers, GPTQModel,
AutoGPTQ, vLLM), AWQ and compressed-tensors are read; those of GPTQ and compressed-tensors written.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from ..kernels.packing import SUPPORTED_BITS
from .errors import CheckpointError

CHECKPOINT_FORMATS = ("gptq", "gptq_v2", "compressed-tensors")  # what is written
READ_FORMATS = (*CHECKPOINT_FORMATS, "awq")

# What an entry of `dynamic` may change, and what only says how its codes were found.
_DYNAMIC_KEYS = ("bits", "group_size", "sym")
_SOLVER_KEYS = (
    "act_group_aware",
    "damp_auto_increment",
    "damp_percent",
    "desc_act",
    "fallback",
    "foem",
    "gptaq",
    "hessian",
    "mse",
    "static_groups",
    "true_sequential",
)
# The input embedding's name in the families of transformers: compressed-tensors targets its class.
EMBEDDING_NAMES = r".*(?:embed_tokens|embed_in|wte|word_embeddings)$"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleConfig:
    """How one linear layer is quantized. Raises CheckpointError by field name."""

    bits: int = 4  # of a code: 2, 3, 4 or 8
    group_size: int = 64  # input features that share a scale; -1 is one group per row
    sym: bool = True  # the zero point is always 2 ** (bits - 1)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in SUPPORTED_BITS:
            supported = ", ".join(map(str, SUPPORTED_BITS))
            raise CheckpointError(f"bits is {self.bits!r}; supported are {supported}")
        size = self.group_size
        if type(size) is not int or not (size == -1 or size >= 1):
            raise CheckpointError(f"group_size is {size!r}; it must be positive, or -1 for one")
        _check_flag("sym", self.sym)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """How the linear layers of a checkpoint are quantized. Raises CheckpointError by field name."""

    bits: int = 4  # of a code: 2, 3, 4 or 8
    group_size: int = 64  # input features that share a scale; -1 is one group per row
    sym: bool = True  # the zero point is always 2 ** (bits - 1)
    desc_act: bool = False  # groups follow the activation order: `g_idx` is irregular
    damp_percent: float = 0.01  # of the Hessian's mean diagonal, added to its diagonal
    lm_head: bool = False  # the output head is quantized too
    embeddings: bool = False  # the input embedding is quantized too
    # "gptq" stores zero points minus one, "gptq_v2" as they are; "awq" is read, never written
    checkpoint_format: str = "gptq"
    # Regular expression over a module's full name -> what differs there: "+:" (or no prefix)
    # changes bits, group_size or sym, "-:" leaves the module at 16 bits; the first match decides.
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        base = ModuleConfig(bits=self.bits, group_size=self.group_size, sym=self.sym)
        for name in ("desc_act", "lm_head", "embeddings"):
            _check_flag(name, getattr(self, name))
        damp = self.damp_percent
        if isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 <= damp < 1:
            raise CheckpointError(f"damp_percent is {damp!r}; it must lie in [0, 1)")
        if self.checkpoint_format not in READ_FORMATS:
            raise CheckpointError(
                f"checkpoint_format is {self.checkpoint_format!r}; "
                f"supported are {', '.join(READ_FORMATS)}"
            )
        _check_dynamic(self.dynamic, base)

    def for_module(self, name: str) -> ModuleConfig | None:
        """How the module of that full name is quantized; None: it stays at 16 bits."""
        base = ModuleConfig(bits=self.bits, group_size=self.group_size, sym=self.sym)
        for pattern, changes in self.dynamic.items():
            if re.match(_expression(pattern), name):
                return None if pattern.startswith("-:") else _changed(base, changes)
        if name.endswith("lm_head") and not self.lm_head:
            return None
        return base

    def has_rule(self, name: str) -> bool:
        """Whether `dynamic` says anything of the module of that full name."""
        return any(re.match(_expression(pattern), name) for pattern in self.dynamic)

    def for_embedding(self, name: str) -> ModuleConfig | None:
        """The same for an input embedding: None unless `embeddings` is set."""
        return self.for_module(name) if self.embeddings else None

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> QuantConfig:
        """Read what transformers, GPTQModel, AutoGPTQ, AutoAWQ, llm-compressor or we wrote.

        Keys that only describe how the codes were found are ignored. Raises CheckpointError for a
        method, width, layout or option that would make the stored numbers mean something else.
        """
        method = d.get("quant_method") or d.get("method") or "gptq"
        if method not in _READERS:
            raise CheckpointError(f"quant_method is {method!r}; supported are {_listed(_READERS)}")
        return cls(**_READERS[method](d))

    def to_dict(self, packed: Collection[str] = (), dense: Collection[str] = ()) -> dict[str, Any]:
        """The keys that other readers need; of `checkpoint_format`'s kind.

        compressed-tensors names modules instead of patterns: it needs the full names of those that
        are packed and of those matrices that are not. Raises CheckpointError for "awq".
        """
        if self.checkpoint_format == "awq":
            raise CheckpointError("checkpoint_format is 'awq'; this format is read, never written")
        if self.checkpoint_format == "compressed-tensors":
            return _compressed_tensors_dict(self, packed, dense)
        return _gptq_dict(self)


def _check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise CheckpointError(f"{name} is {value!r}; it must be true or false")


def _check_dynamic(dynamic: object, base: ModuleConfig) -> None:
    if not isinstance(dynamic, Mapping):
        raise CheckpointError(f"dynamic is {dynamic!r}; it must map patterns to settings")
    for pattern, changes in dynamic.items():
        try:
            re.compile(_expression(pattern))
        except re.error as error:
            raise CheckpointError(f"dynamic: {pattern!r} is no expression ({error})") from None
        if not isinstance(changes, Mapping):
            raise CheckpointError(f"dynamic: {pattern!r} is {changes!r}; it must be an object")
        for key in changes:
            if key not in _DYNAMIC_KEYS and key not in _SOLVER_KEYS:
                raise CheckpointError(
                    f"dynamic: {pattern!r} sets {key!r}; supported are {_listed(_DYNAMIC_KEYS)}"
                )
        try:
            _changed(base, changes)
        except CheckpointError as error:
            raise CheckpointError(f"dynamic: {pattern!r}: {error}") from None


def _expression(pattern: str) -> str:
    return pattern.removeprefix("+:").removeprefix("-:")


def _changed(base: ModuleConfig, changes: Mapping[str, Any]) -> ModuleConfig:
    known = {key: value for key, value in changes.items() if key in _DYNAMIC_KEYS}
    return ModuleConfig(**{**asdict(base), **known})


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)


def _literal(name: str) -> str:
    return f"^{re.escape(name)}$"  # what GPTQModel, too, looks up as one exact name


# GPTQ


def _read_gptq(d: Mapping[str, Any]) -> dict[str, Any]:
    for key in ("activation", "is_marlin_format", "rotation"):
        if d.get(key):
            raise CheckpointError(f"{key} is {d[key]!r}; this option is not supported")
    if d.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
        raise CheckpointError(f"pack_dtype is {d['pack_dtype']!r}; only 'int32' is supported")
    _require(d, "bits", "group_size")
    meta = d["meta"] if isinstance(d.get("meta"), Mapping) else {}
    damp = d.get("damp_percent")
    damp = meta.get("damp_percent") if damp is None else damp  # where GPTQModel keeps it
    return {
        "bits": d["bits"],
        "group_size": d["group_size"],
        "sym": d.get("sym", True),
        "desc_act": d.get("desc_act", False),
        "damp_percent": 0.01 if damp is None else damp,
        "lm_head": d.get("lm_head", False),
        "embeddings": meta.get("embeddings", False),
        "checkpoint_format": d.get("checkpoint_format") or d.get("format") or "gptq",
        "dynamic": _block_rules(d, d.get("dynamic") or {}),
    }


def _block_rules(d: Mapping[str, Any], dynamic: Any) -> Any:
    """transformers lists the modules of a block that are quantized; the others are not."""
    blocks = d.get("modules_in_block_to_quantize")
    if not blocks or not isinstance(dynamic, Mapping):
        return dynamic
    names = [name for block in blocks for name in ([block] if isinstance(block, str) else block)]
    kept = "|".join(re.escape(name) for name in ("lm_head", *names))
    return {**dynamic, rf"-:(?!(?:.*\.)?(?:{kept})$)": {}}


def _gptq_dict(config: QuantConfig) -> dict[str, Any]:
    dynamic = {pattern: dict(changes) for pattern, changes in config.dynamic.items()}
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.sym,
        "desc_act": config.desc_act,
        "lm_head": config.lm_head,
        "format": config.checkpoint_format,
        "checkpoint_format": config.checkpoint_format,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": config.damp_percent,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {
            "quantizer": [f"lowbit:{version('lowbit')}"],
            # GPTQModel has no key for it: it looks at the tensors' names.
            **({"embeddings": True} if config.embeddings else {}),
        },
    }


def _require(d: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if key not in d:
            raise CheckpointError(f"{key} is missing from the quantization config")


# AWQ


def _read_awq(d: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bits": d.get("bits", d.get("w_bit")), "zero_point": d.get("zero_point", True)}
    names["group_size"] = d.get("group_size", d.get("q_group_size"))
    layout = str(d.get("version") or d.get("format") or "gemm").lower()
    if layout != "gemm":
        raise CheckpointError(f"version is {layout!r}; of AWQ only 'gemm' is supported")
    if names["bits"] != 4:
        raise CheckpointError(f"bits is {names['bits']!r}; of AWQ only 4 is supported")
    _check_flag("zero_point", names["zero_point"])
    skipped = d.get("modules_to_not_convert") or []
    return {
        "bits": 4,
        "group_size": names["group_size"],
        "sym": not names["zero_point"],
        "lm_head": d.get("lm_head", False),
        "checkpoint_format": "awq",
        "dynamic": {f"-:.*{re.escape(name)}": {} for name in skipped},  # a part of the name
    }


# compressed-tensors


def _read_compressed_tensors(d: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_other_compression(d)
    groups = _config_groups(d)
    schemes: dict[str, ModuleConfig] = {}
    for name, group in groups.items():
        for target in group.get("targets") or ():
            schemes.setdefault(target, _weight_scheme(name, group))
    if not schemes:
        raise CheckpointError("config_groups: targets is missing")
    base = schemes.get("Linear", next(iter(schemes.values())))
    ignored = list(d.get("ignore") or ())
    return {
        **asdict(base),
        "lm_head": "lm_head" not in ignored,
        "embeddings": any(is_embedding(target) for target in schemes),
        "checkpoint_format": "compressed-tensors",
        "dynamic": _target_rules(schemes, base, ignored),
    }


def _target_rules(
    schemes: Mapping[str, ModuleConfig], base: ModuleConfig, ignored: list[str]
) -> dict[str, Mapping[str, Any]]:
    rules: dict[str, Mapping[str, Any]] = {
        f"-:{_target_pattern(name)}": {} for name in ignored if name != "lm_head"
    }
    # A module's own name comes before an expression, that before its class.
    for target in sorted(schemes, key=lambda target: target.startswith("re:")):
        is_base = target == "Linear" or (is_embedding(target) and schemes[target] == base)
        if not (is_base and "Linear" in schemes):
            rules[f"+:{_target_pattern(target)}"] = asdict(schemes[target])
    return rules if "Linear" in schemes else {**rules, "-:": {}}


def is_embedding(target: str) -> bool:
    """Whether a module's name, or compressed-tensors' target, is that of an input embedding."""
    return target == "Embedding" or re.fullmatch(EMBEDDING_NAMES, target) is not None


def _refuse_other_compression(d: Mapping[str, Any]) -> None:
    expected = {"format": "pack-quantized", "quantization_status": "compressed"}
    for key, only in expected.items():
        if d.get(key, only) != only:
            raise CheckpointError(f"{key} is {d[key]!r}; only {only!r} is supported")
    for key in ("kv_cache_scheme", "moe_sparsity_config"):
        if d.get(key):
            raise CheckpointError(f"{key} is {d[key]!r}; this option is not supported")
    sparsity = d.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"sparsity_config is {sparsity!r}; sparse weights are not supported")
    transforms = (d.get("transform_config") or {}).get("config_groups")
    if transforms:
        raise CheckpointError("transform_config is set; rotated weights are not supported")


def _config_groups(d: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    groups = d.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("config_groups is missing from the quantization config")
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise CheckpointError(f"config_groups.{name}: weights is missing")
    return groups


def _weight_scheme(name: str, group: Mapping[str, Any]) -> ModuleConfig:
    weights = group["weights"]
    expected = {
        "input_activations": (group.get("input_activations"), (None,)),
        "output_activations": (group.get("output_activations"), (None,)),
        "format": (group.get("format"), (None, "pack-quantized")),
        "weights.type": (weights.get("type", "int"), ("int",)),
        "weights.dynamic": (weights.get("dynamic", False), (False,)),
        "weights.strategy": (weights.get("strategy"), (None, "group", "channel")),
        "weights.block_structure": (weights.get("block_structure"), (None,)),
    }
    for key, (value, allowed) in expected.items():
        if value not in allowed:
            raise CheckpointError(
                f"config_groups.{name}: {key} is {value!r}; supported is {allowed[-1]!r}"
            )
    size = weights.get("group_size")
    channel = weights.get("strategy") == "channel" or (weights.get("strategy") is None and not size)
    try:
        return ModuleConfig(
            bits=weights.get("num_bits"),
            group_size=-1 if channel else size,
            sym=weights.get("symmetric", True),
        )
    except CheckpointError as error:
        raise CheckpointError(f"config_groups.{name}: {error}") from None


def _target_pattern(target: str) -> str:
    if target == "Embedding":
        return EMBEDDING_NAMES
    return target.removeprefix("re:") if target.startswith("re:") else _literal(target)


def _compressed_tensors_dict(
    config: QuantConfig, packed: Collection[str], dense: Collection[str]
) -> dict[str, Any]:
    base = ModuleConfig(bits=config.bits, group_size=config.group_size, sym=config.sym)
    targets: dict[ModuleConfig, list[str]] = {}
    for name in sorted(packed):
        scheme = config.for_module(name)
        if scheme is not None:
            named = targets.setdefault(scheme, [])
            # The class stands for all that differ in nothing; an embedding is of another class.
            named += [name] if scheme != base or is_embedding(name) else []
    if base in targets or not targets:
        targets = {base: ["Linear", *targets.pop(base, [])], **targets}
    ignored = {name for name in dense if not is_embedding(name)}
    ignored |= set() if config.lm_head else {"lm_head"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {"targets": names, "weights": _scheme_dict(scheme)}
            for i, (scheme, names) in enumerate(targets.items())
        },
        "ignore": sorted(ignored),
    }


def _scheme_dict(scheme: ModuleConfig) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }


_READERS = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed_tensors,
}
