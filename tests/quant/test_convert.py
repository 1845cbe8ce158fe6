"""Conversions between formats, compared tensor by tensor and through the served logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import AWQ, CONFIG, awq_layer, random_weight, write_raw
from lowbit.kernels.packing import dequantize
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant.checkpoint import CheckpointReader, digest, write_checkpoint
from lowbit.quant.config import QuantConfig
from lowbit.quant.convert import convert
from lowbit.quant.errors import CheckpointError
from lowbit.quant.formats import embedding_matrix, linear_tensors
from lowbit.server.cli import main
from lowbit.server.model.loader import load_decoder
from stepping import Prompt, caches_for, run_step
from tiny import build_tiny_model

MIXED = {r"-:.*o_proj": {}, r".*q_proj": {"bits": 8}, r".*down_proj": {"bits": 2, "group_size": -1}}


def contents(folder: Path) -> dict[str, str]:
    reader = CheckpointReader(folder)
    packed = {name: digest(reader.take_packed(name)) for name in reader.packed_prefixes()}
    return packed | {name: digest(reader.take_raw(name)) for name in reader.remaining()}


def logits(folder: Path) -> torch.Tensor:
    decoder = load_decoder(folder, ReferenceBackend())
    prompt = Prompt(list(range(30)), [0, 1])
    run_step(decoder, caches_for(decoder, 2), [(prompt, 30)])
    return torch.stack(prompt.logits)


@pytest.mark.parametrize(
    ("sym", "formats"),
    [
        (True, ("gptq", "compressed-tensors", "gptq_v2", "compressed-tensors", "gptq")),
        (False, ("gptq_v2", "compressed-tensors", "gptq_v2")),
    ],
)
@pytest.mark.parametrize("mixed", [True, False])
def test_there_and_back(tmp_path: Path, sym: bool, formats: tuple[str, ...], mixed: bool) -> None:
    quant = QuantConfig(
        bits=3,
        group_size=32,
        sym=sym,
        lm_head=True,
        checkpoint_format=formats[0],
        dynamic=MIXED if mixed else {},
    )
    settings = {"tie_word_embeddings": False, "intermediate_size": 192}
    folder = build_tiny_model(tmp_path / "0", quant=quant, **settings).folder
    expected = contents(folder)
    for i, kind in enumerate(formats[1:], start=1):
        done = convert(folder, tmp_path / str(i), kind)
        folder = tmp_path / str(i)
        assert (done.read_format, done.written_format) == (formats[i - 1], kind)
        assert done.num_packed == (13 if mixed else 15)
        assert contents(folder) == expected
    assert torch.equal(logits(folder), logits(tmp_path / "0"))
    first, last = (tmp_path / "0" / "model.safetensors", folder / "model.safetensors")
    assert first.read_bytes() == last.read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_awq_becomes_gptq_v2_exactly(tmp_path: Path) -> None:
    tensors, expected = awq_layer()
    tensors["lm_head.weight"] = torch.randn(4, 40).half()
    folder = write_raw(tmp_path / "awq", tensors, AWQ)
    convert(folder, tmp_path / "v2", "gptq_v2")
    reader = CheckpointReader(tmp_path / "v2")
    assert torch.equal(dequantize(reader.take_packed("x")), expected)
    assert torch.equal(reader.take("lm_head.weight"), tensors["lm_head.weight"])
    config = json.loads((tmp_path / "v2" / "config.json").read_text())
    assert config["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert not config["quantization_config"]["sym"]
    convert(folder, tmp_path / "ct", "compressed-tensors")
    assert torch.equal(dequantize(CheckpointReader(tmp_path / "ct").take_packed("x")), expected)


def refusal(tmp_path: Path, folder: Path, kind: str) -> str:
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "out", kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed_folder(folder: Path, quant: QuantConfig, **changes: torch.Tensor) -> Path:
    weight = random_weight(96, 32, quant.bits, quant.group_size, sym=quant.sym)
    tensors = linear_tensors("x", weight, quant)
    return write_raw(folder, {**tensors, **changes}, quant.to_dict())


def test_what_the_other_format_cannot_hold(tmp_path: Path) -> None:
    asym = QuantConfig(group_size=32, sym=False, checkpoint_format="gptq_v2")
    folder = packed_folder(tmp_path / "asym", asym)
    assert "x: asymmetric codes need" in refusal(tmp_path, folder, "gptq")
    uneven = packed_folder(tmp_path / "uneven", QuantConfig(group_size=64))
    assert "x: in_features is 96; compressed-" in refusal(tmp_path, uneven, "compressed-tensors")
    assert "checkpoint_format is 'exl3'" in refusal(tmp_path, folder, "exl3")
    assert "read, never written" in refusal(tmp_path, folder, "awq")


def test_an_activation_order_stays_with_gptq(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, desc_act=True)
    shuffled = (torch.arange(96) // 32)[torch.randperm(96)].int()
    folder = packed_folder(tmp_path / "act", quant, **{"x.g_idx": shuffled})
    assert "x: compressed-tensors holds no activation order" in refusal(
        tmp_path, folder, "compressed-tensors"
    )
    convert(folder, tmp_path / "v2", "gptq_v2")
    assert contents(tmp_path / "v2") == contents(folder)


def test_scales_that_fp16_cannot_hold(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=32, checkpoint_format="compressed-tensors")
    scales = torch.full((32, 3), 1e-9).to(torch.bfloat16)
    folder = packed_folder(tmp_path / "ct", quant, **{"x.weight_scale": scales})
    assert "x: fp16 cannot hold its scale" in refusal(tmp_path, folder, "gptq")


@pytest.mark.parametrize("kind", ["gptq_v2", "compressed-tensors"])
def test_embeddings_stay_with_their_kind_of_format(tmp_path: Path, kind: str) -> None:
    quant = QuantConfig(group_size=32, embeddings=True, checkpoint_format=kind)
    matrix = embedding_matrix(torch.empty(64, 96), quant)
    weight = random_weight(matrix.shape[1], matrix.shape[0], 4, 32)
    tensors = linear_tensors("model.embed_tokens", weight, quant)
    folder = tmp_path / "source"
    write_checkpoint(folder, tensors, CONFIG, quant)
    other = {"gptq_v2": "compressed-tensors", "compressed-tensors": "gptq"}[kind]
    assert "model.embed_tokens: GPTQ groups the rows" in refusal(tmp_path, folder, other)
    same = {"gptq_v2": "gptq", "compressed-tensors": "compressed-tensors"}[kind]
    convert(folder, tmp_path / "same", same)
    assert contents(tmp_path / "same") == contents(folder)


def test_dense_and_damaged_checkpoints(tmp_path: Path) -> None:
    dense = write_raw(tmp_path / "dense", {"x.weight": torch.ones(2, 2)}, None)
    assert "is not quantized" in refusal(tmp_path, dense, "gptq")
    quant = QuantConfig(group_size=32)
    weight = random_weight(96, 32, 4, 32)
    tensors = linear_tensors("x", weight, quant)
    del tensors["x.scales"]
    damaged = write_raw(tmp_path / "damaged", tensors, quant.to_dict())
    assert "tensor x.scales is missing" in refusal(tmp_path, damaged, "compressed-tensors")
    assert "there is no such folder" in refusal(tmp_path, tmp_path / "none", "gptq")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = packed_folder(tmp_path / "a", QuantConfig(group_size=32))
    out = tmp_path / "b"
    assert main(["convert", str(folder), str(out), "--format", "compressed-tensors"]) == 0
    summary = f"wrote {out}: 1 layers from gptq to compressed-tensors, 0 tensors as they were"
    assert summary in capsys.readouterr().out
    assert main(["convert", str(folder), str(out), "--format", "gptq_v2"]) == 1
    assert capsys.readouterr().err == (
        f"lowbit convert: error: {out}: exists and is not empty; choose another folder\n"
    )
