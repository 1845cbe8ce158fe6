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
from checkpoints import CONFIG, random_weight, write_raw
from lowbit.kernels.packing import PackedWeight, dequantize
from lowbit.quant.checkpoint import (
    CheckpointReader,
    CheckpointWriter,
    check_output,
    digest,
    verify_checkpoint,
    write_checkpoint,
)
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from lowbit.quant.formats import linear_tensors
from safetensors import safe_open
from torch import Tensor


def linear_tensors_of(quant: QuantConfig, in_features: int = 96, out_features: int = 24) -> Any:
    weight = random_weight(in_features, out_features, quant.bits, quant.group_size, sym=quant.sym)
    return weight, linear_tensors("x", weight, quant)


def test_codes_without_a_quantization_config(tmp_path: Path) -> None:
    _, tensors = linear_tensors_of(QuantConfig(group_size=32))
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
    _, tensors = linear_tensors_of(quant)
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
    (checkpoint / "config.json").write_text('{"quantization_config": {"quant_method": "hqq"}}')
    assert "config.json: quant_method is 'hqq'" in open_error(checkpoint)


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
    _, tensors = linear_tensors_of(quant, 960, 960)
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


# writing piece by piece


def test_shards_are_written_as_they_fill(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", CONFIG, QuantConfig(), max_shard_bytes=100) as writer:
        for i in range(5):
            writer.add({f"t{i}": torch.full((20,), float(i))})  # 80 bytes: a shard each
            (partial,) = tmp_path.iterdir()
            assert len(list(partial.glob("*.safetensors"))) == i
            assert not (tmp_path / "out").exists()
        assert writer.num_bytes == 400
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    reader = CheckpointReader(tmp_path / "out")
    for i in range(5):
        assert torch.equal(reader.take(f"t{i}"), torch.full((20,), float(i)))
    assert len(list((tmp_path / "out").glob("model-0000?-of-00005.safetensors"))) == 5


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with (
        pytest.raises(CheckpointError, match="out: tensor a is written twice"),
        CheckpointWriter(tmp_path / "out", CONFIG, QuantConfig()) as writer,
    ):
        writer.add({"a": torch.ones(1)})
        writer.add({"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_an_error_between_two_pieces_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="solver"),
        CheckpointWriter(tmp_path / "out", CONFIG, QuantConfig(), max_shard_bytes=1) as writer,
    ):
        writer.add({"a": torch.ones(1)})
        writer.add({"b": torch.ones(1)})
        raise RuntimeError("solver")
    assert list(tmp_path.iterdir()) == []


def test_one_tensor_under_two_names_is_written_twice(tmp_path: Path) -> None:
    table = torch.randn(3, 4)
    write_checkpoint(tmp_path / "out", {"e": table, "h": table}, CONFIG, QuantConfig())
    reader = CheckpointReader(tmp_path / "out")
    assert torch.equal(reader.take("e"), table) and torch.equal(reader.take("h"), table)


def test_a_format_that_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this format is read, never written"):
        CheckpointWriter(tmp_path / "out", CONFIG, QuantConfig(checkpoint_format="awq"))


# what was written, read again


def whole(tmp_path: Path) -> tuple[Path, dict[str, str], dict[str, Tensor]]:
    quant = QuantConfig(group_size=32)
    weight, tensors = linear_tensors_of(quant)
    tensors = {**tensors, "norm.weight": torch.randn(7)}
    write_checkpoint(tmp_path / "out", tensors, CONFIG, quant)
    expected = {"x": digest(weight), "norm.weight": digest(tensors["norm.weight"])}
    return tmp_path / "out", expected, tensors


def test_a_checkpoint_is_what_was_written(tmp_path: Path) -> None:
    folder, expected, _ = whole(tmp_path)
    verify_checkpoint(folder, expected)


@pytest.mark.parametrize("name", ["x.qweight", "x.qzeros", "x.scales", "x.bias", "norm.weight"])
def test_one_flipped_bit_is_noticed(tmp_path: Path, name: str) -> None:
    folder, expected, tensors = whole(tmp_path)
    changed = tensors[name].clone()
    changed.view(-1).view(torch.uint8)[2] ^= 4
    (folder / "model.safetensors").unlink()
    (folder / "config.json").unlink()
    damaged = tmp_path / "damaged"
    quant = QuantConfig(group_size=32)
    write_checkpoint(damaged, {**tensors, name: changed}, CONFIG, quant)
    with pytest.raises(CheckpointError, match=f"{name.split('.')[0]}.* is not what was written"):
        verify_checkpoint(damaged, expected)


def test_what_is_missing_or_too_much_is_named(tmp_path: Path) -> None:
    folder, expected, _ = whole(tmp_path)
    with pytest.raises(CheckpointError, match=r"y\.weight is missing"):
        verify_checkpoint(folder, {**expected, "y.weight": "0"})
    del expected["norm.weight"]
    with pytest.raises(CheckpointError, match=r"no place in this model: norm\.weight"):
        verify_checkpoint(folder, expected)


def test_a_digest_is_of_the_weight_not_of_its_layout() -> None:
    weight = random_weight(96, 24, 4, 32)
    fields = {name: getattr(weight, name) for name in PackedWeight.__slots__}
    halves = {
        "group_size": 16,
        "scales": weight.scales.repeat_interleave(2, dim=0),
        "zeros": weight.zeros.repeat_interleave(2, dim=0),
    }
    finer = PackedWeight(**{**fields, **halves})
    assert torch.equal(dequantize(finer), dequantize(weight))
    assert digest(finer) == digest(weight)
    assert digest(random_weight(96, 24, 4, 32)) != digest(weight)
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))
    assert digest(torch.zeros(2)) != digest(torch.zeros(2, dtype=torch.int32))
