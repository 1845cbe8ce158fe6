from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lowbit.kernels.packing import (
    DenseWeight,
    PackedWeight,
    dequantize,
    num_groups,
    pack_codes,
    pack_zeros,
    unpack_zeros,
)
from lowbit.quant.checkpoint import CheckpointReader, check_output, gptq_tensors, write_checkpoint
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GPTQConfig

CONFIG = {"model_type": "llama", "tie_word_embeddings": False}


def random_weight(
    in_features: int, out_features: int, bits: int, group_size: int, *, sym: bool = True
) -> PackedWeight:
    groups = num_groups(in_features, group_size)
    zeros = torch.full((groups, out_features), 1 << (bits - 1), dtype=torch.uint8)
    if not sym:
        zeros = torch.randint(0, 1 << bits, zeros.shape, dtype=torch.uint8)
    return PackedWeight(
        bits=bits,
        group_size=in_features if group_size == -1 else group_size,
        in_features=in_features,
        out_features=out_features,
        qweight=pack_codes(torch.randint(0, 1 << bits, (in_features, out_features)), bits),
        scales=torch.randn(groups, out_features).to(torch.float16),
        zeros=zeros,
        bias=torch.randn(out_features).to(torch.float16),
    )


def write_raw(folder: Path, tensors: dict[str, Tensor], quant: dict[str, Any] | None) -> Path:
    """A checkpoint as some other tool may have left it."""
    folder.mkdir()
    config = CONFIG if quant is None else {**CONFIG, "quantization_config": quant}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def linear_tensors(quant: QuantConfig, in_features: int = 96, out_features: int = 24) -> Any:
    weight = random_weight(in_features, out_features, quant.bits, quant.group_size, sym=quant.sym)
    return weight, gptq_tensors("x", weight, quant)


# the configuration


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
        ({"quant_method": "awq"}, "quant_method is 'awq'; only 'gptq' is supported"),
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
        ({"dynamic": {"-:.*mlp": {}}}, "dynamic is "),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantConfig.from_dict({**QuantConfig().to_dict(), **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(CheckpointError, match="group_size is missing"):
        QuantConfig.from_dict({"quant_method": "gptq", "bits": 4})


# round trips

SHAPES = [(64, 32), (96, 24), (72, 5), (130, 33), (7, 3)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [32, -1, 128])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_layer_comes_back_as_it_was(
    tmp_path: Path, bits: int, shape: tuple[int, int], group_size: int, version: str
) -> None:
    torch.manual_seed(0)
    sym = version == "gptq"
    quant = QuantConfig(bits=bits, group_size=group_size, sym=sym, checkpoint_format=version)
    weight = random_weight(*shape, bits, group_size, sym=sym)
    write_checkpoint(tmp_path / "out", gptq_tensors("x", weight, quant), CONFIG, quant)
    reader = CheckpointReader(tmp_path / "out")
    read = reader.take_linear("x", *shape)
    reader.check_all_consumed()
    assert isinstance(read, PackedWeight)
    assert read.input_permutation is None
    assert torch.equal(read.zeros, weight.zeros)
    assert torch.equal(read.qweight, weight.qweight)
    assert torch.equal(dequantize(read), dequantize(weight))
    assert read.bias is not None and torch.equal(read.bias, weight.bias)
    assert reader.quant_config == quant


def test_the_stored_words_are_those_of_the_format() -> None:
    """The words that other readers compare with: see the GPTQ layouts of AutoGPTQ and GPTQModel."""
    for bits, v1, v2 in ((2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888)):
        for version, word in (("gptq", v1), ("gptq_v2", v2)):
            quant = QuantConfig(bits=bits, group_size=32, checkpoint_format=version)
            _, tensors = linear_tensors(quant, 64, 32)
            assert set((tensors["x.qzeros"] & 0xFFFFFFFF).flatten().tolist()) <= {
                word,
                word - 2**32,
            }
    _, tensors = linear_tensors(QuantConfig(group_size=32), 96, 24)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert shapes == {
        "x.qweight": ((12, 24), torch.int32),
        "x.qzeros": ((3, 3), torch.int32),
        "x.scales": ((3, 24), torch.float16),
        "x.g_idx": ((96,), torch.int32),
        "x.bias": ((24,), torch.float16),
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_asymmetric_zero_point_survives_in_v1_files(tmp_path: Path, bits: int) -> None:
    """Field by field: adding one to a whole word would carry a stored -1 into its neighbour."""
    quant = QuantConfig(bits=bits, group_size=32, sym=False)
    weight = random_weight(64, 40, bits, 32, sym=False)
    weight.zeros[0, :4] = 0
    tensors = gptq_tensors("x", weight, QuantConfig(bits=bits, group_size=32))
    read = CheckpointReader(write_raw(tmp_path / "v1", tensors, quant.to_dict())).take_linear(
        "x", 64, 40
    )
    assert isinstance(read, PackedWeight)
    assert torch.equal(read.zeros, weight.zeros)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v2_zero_points_under_the_v1_label_are_noticed(tmp_path: Path, bits: int) -> None:
    weight = random_weight(64, 40, bits, 32)
    tensors = gptq_tensors("x", weight, QuantConfig(bits=bits, checkpoint_format="gptq_v2"))
    label = QuantConfig(bits=bits, group_size=32).to_dict()
    read = CheckpointReader(write_raw(tmp_path / "x", tensors, label)).take_linear("x", 64, 40)
    assert isinstance(read, PackedWeight)
    assert torch.equal(read.zeros, weight.zeros)


def test_asymmetric_codes_are_not_written_as_v1() -> None:
    weight = random_weight(64, 40, 4, 32, sym=False)
    with pytest.raises(CheckpointError, match="asymmetric codes need checkpoint_format 'gptq_v2'"):
        gptq_tensors("x", weight, QuantConfig(sym=False))


@pytest.mark.parametrize("in_features", [96, 72])
def test_an_activation_order_becomes_a_permutation(tmp_path: Path, in_features: int) -> None:
    torch.manual_seed(1)
    quant = QuantConfig(group_size=32, desc_act=True)
    groups = torch.arange(in_features) // 32
    shuffled = torch.randperm(in_features)
    g_idx = groups[shuffled]
    weight, tensors = linear_tensors(quant, in_features)
    codes = torch.randint(0, 16, (in_features, 24))
    tensors |= {"x.qweight": pack_codes(codes, 4), "x.g_idx": g_idx.to(torch.int32)}
    folder = write_raw(tmp_path / "x", tensors, quant.to_dict())
    read = CheckpointReader(folder).take_linear("x", in_features, 24)
    assert isinstance(read, PackedWeight) and read.input_permutation is not None
    expected = (codes - 8).float() * weight.scales.float()[g_idx]
    assert torch.equal(dequantize(read), expected.t())


def test_a_permuted_layer_comes_back_as_it_was(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, desc_act=True)
    plain = random_weight(72, 8, 4, 32)
    fields = {name: getattr(plain, name) for name in PackedWeight.__slots__}
    weight = PackedWeight(**{**fields, "input_permutation": torch.randperm(72)})
    write_checkpoint(tmp_path / "out", gptq_tensors("x", weight, quant), CONFIG, quant)
    read = CheckpointReader(tmp_path / "out").take_linear("x", 72, 8)
    assert isinstance(read, PackedWeight) and read.input_permutation is not None
    assert torch.equal(dequantize(read), dequantize(weight))


def test_a_layer_without_codes_is_dense(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.randn(5, 7), "x.bias": torch.randn(5)}
    reader = CheckpointReader(write_raw(tmp_path / "x", tensors, None))
    read = reader.take_linear("x", 7, 5)
    assert isinstance(read, DenseWeight)
    assert read.bias is not None and torch.equal(read.bias, tensors["x.bias"])
    assert torch.equal(read.weight, tensors["x.weight"])
    assert reader.quant_config is None
    assert "x.weight" in reader and "x.qweight" not in reader


def test_a_missing_g_idx_is_the_regular_one(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32)
    weight, tensors = linear_tensors(quant)
    del tensors["x.g_idx"]
    folder = write_raw(tmp_path / "x", tensors, quant.to_dict())
    read = CheckpointReader(folder).take_linear("x", 96, 24)
    assert isinstance(read, PackedWeight) and read.input_permutation is None
    assert torch.equal(dequantize(read), dequantize(weight))


# what is wrong with a layer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.qweight": None}, "tensor x.weight is missing"),
        ({"x.qzeros": None}, "tensor x.qzeros is missing"),
        ({"x.scales": None}, "tensor x.scales is missing"),
        (
            {"x.qweight": torch.zeros(12, 24, dtype=torch.int64)},
            "x.qweight: dtype is int64, expected int32",
        ),
        (
            {"x.qweight": torch.zeros(11, 24, dtype=torch.int32)},
            r"x.qweight: shape is \[11, 24\], expected \[12, 24\]",
        ),
        (
            {"x.qzeros": torch.zeros(3, 24, dtype=torch.int32)},
            r"x.qzeros: shape is \[3, 24\], expected \[3, 3\]",
        ),
        (
            {"x.scales": torch.zeros(3, 24, dtype=torch.float64)},
            "x.scales: dtype is float64, expected float16 or bfloat16 or float32",
        ),
        (
            {"x.scales": torch.full((3, 24), torch.nan)},
            "x.scales: holds values that are not finite",
        ),
        ({"x.bias": torch.zeros(23)}, r"x.bias: shape is \[23\], expected \[24\]"),
        (
            {"x.g_idx": torch.full((96,), 3, dtype=torch.int32)},
            "x.g_idx: holds groups 3 to 3, expected 0 to 2",
        ),
        (
            {"x.g_idx": torch.full((96,), -1, dtype=torch.int32)},
            "x.g_idx: holds groups -1 to -1, expected 0 to 2",
        ),
        (
            {"x.g_idx": torch.zeros(96, dtype=torch.int32)},
            "x.g_idx: its groups do not hold 32 inputs each",
        ),
        ({"x.g_idx": torch.zeros(96)}, "x.g_idx: dtype is float32, expected int32 or int64"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    quant = QuantConfig(group_size=32)
    _, tensors = linear_tensors(quant)
    tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    folder = write_raw(tmp_path / "x", tensors, quant.to_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(folder).take_linear("x", 96, 24)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_codes_without_a_quantization_config(tmp_path: Path) -> None:
    _, tensors = linear_tensors(QuantConfig(group_size=32))
    folder = write_raw(tmp_path / "x", tensors, None)
    with pytest.raises(CheckpointError, match=r"config\.json has no quantization_config"):
        CheckpointReader(folder).take_linear("x", 96, 24)


def test_the_separate_config_file_is_read_too(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "x", {"a": torch.ones(1)}, None)
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 128}))
    assert CheckpointReader(folder).quant_config == QuantConfig(group_size=128)


def test_what_nobody_took_is_listed(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.ones(1) for i in range(8)}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1)}
    reader = CheckpointReader(write_raw(tmp_path / "x", tensors, None))
    reader.take("t3")
    with pytest.raises(CheckpointError, match=r"7 tensors .* t0, t1, t2, t4, t5 and 2 more"):
        reader.check_all_consumed()
    for i in range(8):
        reader.take(f"t{i}")
    reader.check_all_consumed()


@pytest.mark.parametrize("tied", [True, False])
def test_a_second_copy_of_a_tied_head_may_stay(tmp_path: Path, tied: bool) -> None:
    folder = write_raw(tmp_path / "x", {"lm_head.weight": torch.ones(1)}, None)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    reader = CheckpointReader(folder)
    if tied:
        reader.check_all_consumed()
        return
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        reader.check_all_consumed()


# what is wrong with a folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    quant = QuantConfig(group_size=32)
    _, tensors = linear_tensors(quant)
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, tensors, CONFIG, quant, max_shard_bytes=500)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def open_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        CheckpointReader(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    assert "there is no such folder" in open_error(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "there is no such folder" in open_error(tmp_path / "file")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert "config.json: there is no such file" in open_error(checkpoint)


@pytest.mark.parametrize("content", ["{", "", "[1]", "\xff"])
def test_a_broken_config(checkpoint: Path, content: str) -> None:
    (checkpoint / "config.json").write_bytes(content.encode("latin-1"))
    assert "config.json: not " in open_error(checkpoint)


def test_a_quantization_config_that_is_no_object(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"quantization_config": 4}')
    assert "quantization_config is not an object" in open_error(checkpoint)


def test_another_quant_method_names_the_file(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert "config.json: quant_method is 'awq'" in open_error(checkpoint)


def test_a_missing_shard(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard}: this shard is named in" in open_error(checkpoint)


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_a_truncated_shard(checkpoint: Path, keep: int) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[:keep])
    assert f"{shard}: not a whole safetensors file" in open_error(checkpoint)


def test_a_shard_that_is_something_else(checkpoint: Path) -> None:
    shard = sorted(checkpoint.glob("*.safetensors"))[0]
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 50)
    assert f"{shard}: not a whole safetensors file" in open_error(checkpoint)


def test_an_index_that_names_an_absent_tensor(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["y.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    assert "tensor y.weight of the index is missing" in open_error(checkpoint)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_that_points_elsewhere(checkpoint: Path, file: object) -> None:
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x.weight": file}})
    )
    assert "is not a file of this folder" in open_error(checkpoint)


def test_no_weights(checkpoint: Path) -> None:
    for path in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("*.index.json")]:
        path.unlink()
    assert "holds no .safetensors" in open_error(checkpoint)
    (checkpoint / "pytorch_model.bin").touch()
    assert "pickled .bin weights are never read" in open_error(checkpoint)


# writing


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes fail beyond it, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32)
    _, tensors = linear_tensors(quant, 960, 960)
    with (
        file_size_limit(100_000),
        pytest.raises(CheckpointError, match=r"out: cannot be written \("),
    ):
        write_checkpoint(tmp_path / "out", tensors, CONFIG, quant)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_extras_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "tokenizer.json").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(
            tmp_path / "out", {"a": torch.ones(1)}, CONFIG, QuantConfig(), write_extras=fail
        )
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(
            tmp_path / "out", {"a": torch.ones(1)}, CONFIG, QuantConfig(), write_extras=interrupt
        )
    assert list(tmp_path.iterdir()) == []


def test_an_occupied_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not a folder"):
        check_output(tmp_path / "file")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        check_output(tmp_path)
    with pytest.raises(CheckpointError, match="nothing can be written in"):
        check_output(tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        write_checkpoint(tmp_path, {"a": torch.ones(1)}, CONFIG, QuantConfig())
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "out", {"a": torch.ones(1)}, CONFIG, QuantConfig())
    assert "a" in CheckpointReader(tmp_path / "out")


def test_what_is_written(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32)
    write_checkpoint(
        tmp_path / "new" / "out",
        {"a": torch.ones(1)},
        CONFIG,
        quant,
        write_extras=lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
    )
    folder = tmp_path / "new" / "out"
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "quantize_config.json", "model.safetensors", "tokenizer.json"}
    config = json.loads((folder / "config.json").read_text())
    assert config == {**CONFIG, "quantization_config": quant.to_dict()}
    assert json.loads((folder / "quantize_config.json").read_text()) == quant.to_dict()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_the_index_of_several_shards(checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    sizes = 0
    for name, file in index["weight_map"].items():
        with safe_open(checkpoint / file, framework="pt") as shard:
            sizes += shard.get_tensor(name).nbytes
            assert shard.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sizes
    assert not list(checkpoint.parent.glob(".*"))


def test_scales_beyond_fp16_are_refused() -> None:
    weight = random_weight(64, 8, 4, 32)
    fields = {name: getattr(weight, name) for name in PackedWeight.__slots__}
    large = PackedWeight(**{**fields, "scales": torch.full((2, 8), 1e6)})
    with pytest.raises(CheckpointError, match="x: a scale is too large for fp16"):
        gptq_tensors("x", large, QuantConfig(group_size=32))


def test_zero_points_pack_along_the_outputs() -> None:
    zeros = torch.randint(0, 8, (3, 37), dtype=torch.uint8)
    assert torch.equal(unpack_zeros(pack_zeros(zeros, 3), 3, 37), zeros)
