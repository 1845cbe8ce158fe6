"""The quantization_config dictionaries of GPTQ, AWQ and compressed-tensors."""

from __future__ import annotations

from typing import Any

import pytest
from lowbit.quant.config import ModuleConfig, QuantConfig
from lowbit.quant.errors import CheckpointError
from transformers import GPTQConfig


def test_config_round_trip() -> None:
    config = QuantConfig(
        bits=3, group_size=-1, sym=False, desc_act=True, lm_head=True, checkpoint_format="gptq_v2"
    )
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert QuantConfig.from_dict(QuantConfig().to_dict()) == QuantConfig()


def test_config_is_what_transformers_reads() -> None:
    read = GPTQConfig.from_dict(QuantConfig(bits=8, group_size=32).to_dict())
    assert (read.bits, read.group_size, read.desc_act, read.sym) == (8, 32, False, True)
    assert QuantConfig.from_dict(read.to_dict()) == QuantConfig(bits=8, group_size=32)


def test_config_has_the_keys_that_vllm_requires() -> None:
    assert {
        "quant_method",
        "bits",
        "group_size",
        "desc_act",
        "sym",
    } <= QuantConfig().to_dict().keys()


@pytest.mark.parametrize(
    "written",
    [
        {  # GPTQModel
            "bits": 4,
            "group_size": 128,
            "desc_act": False,
            "lm_head": False,
            "method": "gptq",
            "quant_method": "gptq",
            "format": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "dynamic": {},
            "sym": True,
            "meta": {
                "quantizer": ["gptqmodel:7.7.0"],
                "damp_percent": 0.05,
                "static_groups": False,
            },
        },
        {  # AutoGPTQ
            "bits": 4,
            "group_size": 128,
            "damp_percent": 0.05,
            "desc_act": False,
            "static_groups": False,
            "sym": True,
            "true_sequential": True,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            "is_marlin_format": False,
        },
    ],
)
def test_config_of_other_tools_is_read(written: dict[str, Any]) -> None:
    assert QuantConfig.from_dict(written) == QuantConfig(group_size=128, damp_percent=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; supported are gptq, awq, compressed-"),
        ({"bits": 5}, "bits is 5; supported are 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4'"),
        ({"bits": True}, "bits is True"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": -2}, "group_size is -2"),
        ({"group_size": 64.0}, "group_size is 64.0"),
        ({"sym": "yes"}, "sym is 'yes'"),
        ({"desc_act": None}, "desc_act is None"),
        ({"damp_percent": 1.5}, "damp_percent is 1.5"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": None, "format": "gptq_p"}, "checkpoint_format is 'gptq_p'"),
        ({"is_marlin_format": True}, "is_marlin_format is True"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"activation": {"bits": 8}}, "activation is {'bits': 8}"),
        ({"rotation": "hadamard"}, "rotation is 'hadamard'"),
        ({"dynamic": "-:.*mlp"}, "dynamic is '-:.*mlp'; it must map patterns to settings"),
        ({"dynamic": {"-:(": {}}}, r"dynamic: '-:\(' is no expression"),
        ({"dynamic": {"x": 4}}, "dynamic: 'x' is 4; it must be an object"),
        ({"dynamic": {"x": {"bit": 4}}}, "dynamic: 'x' sets 'bit'; supported are bits, group_size"),
        ({"dynamic": {"x": {"pack_dtype": "int8"}}}, "dynamic: 'x' sets 'pack_dtype'"),
        ({"dynamic": {"x": {"bits": 5}}}, "dynamic: 'x': bits is 5"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantConfig.from_dict({**QuantConfig().to_dict(), **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match="group_size is missing"):
        QuantConfig.from_dict({"quant_method": "gptq", "bits": 4})


# settings of single modules


def test_the_first_matching_rule_decides() -> None:
    config = QuantConfig(
        dynamic={
            r"-:.*\.3\.mlp\.down": {},
            r"+:.*\.mlp\.": {"bits": 3, "group_size": 32, "sym": False},
            r"model\.layers\.1\.": {"bits": 8, "mse": 2.4},
        }
    )
    base = ModuleConfig(bits=4, group_size=64, sym=True)
    assert config.for_module("model.layers.0.self_attn.q_proj") == base
    assert config.for_module("model.layers.3.mlp.down_proj") is None
    mlp = ModuleConfig(bits=3, group_size=32, sym=False)
    assert config.for_module("model.layers.1.mlp.up_proj") == mlp
    eight = ModuleConfig(bits=8, group_size=64, sym=True)
    assert config.for_module("model.layers.1.self_attn.q_proj") == eight
    assert config.for_module("x.model.layers.1.self_attn.q_proj") == base  # from the beginning


def test_the_head_and_the_embedding_are_asked_for() -> None:
    head = {"lm_head": {"bits": 8}}
    assert QuantConfig().for_module("lm_head") is None
    assert QuantConfig(lm_head=True).for_module("lm_head") == ModuleConfig()
    assert QuantConfig(dynamic=head).for_module("lm_head") == ModuleConfig(bits=8)
    assert QuantConfig().for_embedding("model.embed_tokens") is None
    eight = QuantConfig(embeddings=True, dynamic={"model.embed_tokens": {"bits": 8}})
    assert eight.for_embedding("model.embed_tokens") == ModuleConfig(bits=8)
    assert QuantConfig.from_dict(eight.to_dict()) == eight


def test_modules_that_transformers_lists_are_the_only_ones() -> None:
    written = {
        **QuantConfig().to_dict(),
        "modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]],
    }
    config = QuantConfig.from_dict(written)
    assert config.for_module("model.layers.0.self_attn.k_proj") == ModuleConfig()
    assert config.for_module("model.layers.0.mlp.up_proj") == ModuleConfig()
    assert config.for_module("model.layers.0.mlp.up_proj_2") is None
    assert config.for_module("model.layers.0.self_attn.o_proj") is None


# AWQ

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


def test_awq_is_read() -> None:
    written = {**AWQ, "modules_to_not_convert": ["visual.", "mlp.gate"]}
    config = QuantConfig.from_dict(written)
    assert (config.checkpoint_format, config.sym) == ("awq", False)
    up = ModuleConfig(bits=4, group_size=128, sym=False)
    assert config.for_module("model.layers.0.mlp.up_proj") == up
    assert config.for_module("model.visual.blocks.0.q") is None
    assert config.for_module("model.layers.0.mlp.gate") is None
    assert config.for_module("lm_head") is None
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}
    assert QuantConfig.from_dict(old).group_size == 64
    with pytest.raises(CheckpointError, match="read, never written"):
        config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "gemv"}, "version is 'gemv'; of AWQ only 'gemm' is supported"),
        ({"bits": 8}, "bits is 8; of AWQ only 4 is supported"),
        ({"group_size": None}, "group_size is None"),
        ({"zero_point": "no"}, "zero_point is 'no'"),
    ],
)
def test_other_awq_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantConfig.from_dict({**AWQ, **change})


# compressed-tensors


def scheme(bits: int = 4, size: int | None = 128, **changes: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
        "dynamic": False,
        "actorder": "static",
        "observer": "mse",
        "observer_kwargs": {},
    }
    return {**weights, **changes}


def compressed(*groups: tuple[list[str], dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    named = {
        f"group_{i}": {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for i, (targets, weights) in enumerate(groups)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": named,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.18.0",
        **changes,
    }


def test_compressed_tensors_is_read() -> None:
    read = QuantConfig.from_dict(compressed((["Linear"], scheme(3, symmetric=False))))
    expected = QuantConfig(
        bits=3, group_size=128, sym=False, checkpoint_format="compressed-tensors"
    )
    assert read == expected
    per_channel = scheme(8, None, strategy="channel")
    read = QuantConfig.from_dict(compressed((["Linear"], per_channel), ignore=[]))
    assert (read.bits, read.group_size, read.lm_head) == (8, -1, True)


def test_names_come_before_expressions_and_those_before_the_class() -> None:
    read = QuantConfig.from_dict(
        compressed(
            (["re:.*mlp.*"], scheme(3)),
            (["Linear"], scheme(4)),
            (["model.layers.0.mlp.down_proj"], scheme(8)),
            ignore=["lm_head", "model.layers.1.mlp.gate", "re:.*vision.*"],
        )
    )
    bits = {
        "model.layers.0.self_attn.q_proj": 4,
        "model.layers.0.mlp.up_proj": 3,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.0.mlp.down_proj.x": 3,
        "model.layers.1.mlp.gate": None,
        "model.layers.1.mlp.gate_proj": 3,
        "model.vision.mlp": None,
        "lm_head": None,
    }
    modules = {name: read.for_module(name) for name in bits}
    assert {name: module and module.bits for name, module in modules.items()} == bits


def test_without_the_class_only_what_is_named_is_packed() -> None:
    read = QuantConfig.from_dict(compressed((["re:.*q_proj"], scheme(3))))
    assert read.for_module("model.layers.0.self_attn.q_proj") is not None
    assert read.for_module("model.layers.0.self_attn.k_proj") is None


def test_embeddings_of_compressed_tensors() -> None:
    read = QuantConfig.from_dict(compressed((["Linear"], scheme()), (["Embedding"], scheme(8))))
    assert read.embeddings
    module = read.for_embedding("model.embed_tokens")
    assert module is not None and module.bits == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'; only 'pack-q"),
        ({"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights are not supported"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "rotated weights are not supported"),
        ({"config_groups": {}}, "config_groups is missing"),
        ({"config_groups": {"g": {"targets": ["Linear"]}}}, "config_groups.g: weights is missing"),
    ],
)
def test_other_compression_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantConfig.from_dict(compressed((["Linear"], scheme()), **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "float"}, "group_0: weights.type is 'float'; supported is 'int'"),
        ({"dynamic": True}, "group_0: weights.dynamic is True"),
        ({"strategy": "tensor"}, "group_0: weights.strategy is 'tensor'"),
        ({"strategy": "block", "block_structure": [8, 8]}, "weights.strategy is 'block'"),
        ({"num_bits": 6}, "group_0: bits is 6"),
        ({"group_size": None}, "group_0: group_size is None"),
    ],
)
def test_other_weights_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantConfig.from_dict(compressed((["Linear"], scheme(**change))))


def test_quantized_activations_are_refused() -> None:
    d = compressed((["Linear"], scheme()))
    d["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    with pytest.raises(CheckpointError, match="group_0: input_activations is"):
        QuantConfig.from_dict(d)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("lm_head", [True, False])
def test_compressed_tensors_round_trip(group_size: int, lm_head: bool) -> None:
    config = QuantConfig(
        bits=2,
        group_size=group_size,
        sym=False,
        lm_head=lm_head,
        checkpoint_format="compressed-tensors",
    )
    assert QuantConfig.from_dict(config.to_dict()) == config


def test_mixed_modules_are_named_one_by_one() -> None:
    config = QuantConfig(
        checkpoint_format="compressed-tensors",
        embeddings=True,
        dynamic={"-:.*o_proj": {}, ".*down": {"bits": 8}, ".*q_proj": {"bits": 2}},
    )
    packed = {f"m.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "down")}
    packed |= {"m.embed_tokens"}
    dense = {"m.0.o_proj", "m.1.o_proj", "lm_head", "m.0.router"}
    d = config.to_dict(packed, dense)
    targets = {g["weights"]["num_bits"]: g["targets"] for g in d["config_groups"].values()}
    assert targets == {
        4: ["Linear", "m.embed_tokens"],
        8: ["m.0.down", "m.1.down"],
        2: ["m.0.q_proj", "m.1.q_proj"],
    }
    assert d["ignore"] == ["lm_head", "m.0.o_proj", "m.0.router", "m.1.o_proj"]
    read = QuantConfig.from_dict(d)
    for name in packed | dense:
        expected = None if name in dense else config.for_module(name)
        assert read.for_module(name) == expected
    assert read.embeddings
