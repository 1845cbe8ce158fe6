from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from families import FAMILIES, save_family
from huggingface_hub.errors import LocalEntryNotFoundError
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError, QuantError
from lowbit.quant.evaluate import load_reference
from lowbit.quant.source import COMPANION_FILES, build_model, load_source
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

IDS = torch.arange(40).unsqueeze(0) * 5


def reference_logits(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(IDS).logits


def logits(source: str) -> torch.Tensor:
    with torch.inference_mode():
        return load_reference(load_source(source))(IDS).logits


def refusal(source: object) -> str:
    with pytest.raises(QuantError) as caught:
        load_source(str(source))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tiny_source: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_source, tmp_path / "model"))


def test_a_folder_is_read_as_transformers_reads_it(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    torch.testing.assert_close(
        logits(str(tiny_source)), reference_logits(tiny_source), rtol=0, atol=0
    )
    assert {source.tensor(name).dtype for name in source.names()} == {torch.float16}
    assert source.shape("model.layers.1.mlp.up_proj.weight") == (104, 72)
    assert source.tokenizer("ab")["input_ids"] == [97, 98]


def test_an_untied_model_with_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(str(tmp_path)), reference_logits(tmp_path), rtol=0, atol=0)


def test_companions_travel_byte_for_byte(tiny_source: Path, tmp_path: Path) -> None:
    load_source(str(tiny_source)).write_companions(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert names <= set(COMPANION_FILES)
    for name in names:
        assert (tmp_path / name).read_bytes() == (tiny_source / name).read_bytes()


def test_weights_of_the_model_stay_where_they_are(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    model = build_model(source)
    name = "model.layers.0.mlp.up_proj.weight"
    assert model.get_parameter(name).data_ptr() == source.tensor(name).data_ptr()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tensors_that_were_released_can_be_read_again(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    held = source.tensor("model.norm.weight")
    source.release()
    assert torch.equal(source.tensor("model.norm.weight"), held)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_of_every_family(tmp_path: Path, name: str) -> None:
    save_family(tmp_path, name)
    factory: Any = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    model, expected = (
        build_model(load_source(str(tmp_path)), torch.float32),
        factory.from_pretrained(tmp_path, dtype=torch.float32),
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-5, atol=1e-5)


def test_a_tied_tensor_may_be_stored_twice_or_under_its_other_name(folder: Path) -> None:
    expected, tensors = logits(str(folder)), load_file(folder / "model.safetensors")
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    save_file({**tensors, head: tensors[embedding].clone()}, folder / "model.safetensors")
    assert torch.equal(logits(str(folder)), expected)
    assert head not in load_source(str(folder)).names()
    tensors[head] = tensors.pop(embedding)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(str(folder)), expected)


# what is refused


@pytest.mark.parametrize("kind", ["t5", "gemma3", "vit", "bart"])
def test_another_architecture(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert f"model type {kind!r} is not supported" in refusal(folder)


@pytest.mark.parametrize("kind", ["no_such_model", None])
def test_an_architecture_that_transformers_does_not_know(folder: Path, kind: str | None) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    assert "its configuration cannot be read" in refusal(folder)


def test_experts_of_another_build(tmp_path: Path) -> None:
    config = GptOssConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    config.save_pretrained(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert "model.layers.0.mlp.experts: experts of this kind are not supported" in message
    assert "has_bias, is_transposed" in message


def test_a_quantized_model(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    quantized = {**config, "quantization_config": QuantConfig().to_dict()}
    (folder / "config.json").write_text(json.dumps(quantized))
    assert "is quantized already" in refusal(folder)


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled .bin weights are never read" in refusal(folder)


def test_a_truncated_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_source(str(folder))


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "its tokenizer cannot be read" in refusal(folder)


def test_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": 7}')
    assert "its tokenizer cannot be read" in refusal(folder)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "twice", "untied"])
def test_tensors_that_do_not_fit(folder: Path, change: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
        expected = f"tensor {name} is missing"
    elif change == "unexpected":
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(1)
        expected = "tensor model.layers.2.mlp.up_proj.weight is not expected"
    elif change == "shape":
        tensors[name] = torch.ones(3, 72, dtype=torch.float16)
        expected = f"tensor {name} has shape [3, 72], expected [104, 72]"
    elif change == "twice":
        tensors[name.removeprefix("model.")] = tensors[name].clone()
        expected = f"tensors {name.removeprefix('model.')} and {name} are the same one"
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
        expected = "tensor lm_head.weight differs from model.embed_tokens.weight"
    save_file(tensors, folder / "model.safetensors")
    assert expected in refusal(folder)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_a_missing_tensor_of_another_family_is_named_as_on_disk(tmp_path: Path, name: str) -> None:
    missing = {
        "gpt2": "transformer.h.1.attn.c_attn.weight",
        "mixtral": "model.layers.1.block_sparse_moe.experts.2.w3.weight",
    }[name]
    tensors = load_file(save_family(tmp_path, name) / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "model.safetensors")
    assert f"tensor {missing} is missing" in refusal(tmp_path)


def test_a_transposed_tensor_of_gpt2(tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    tensors = load_file(save_family(tmp_path, "gpt2") / "model.safetensors")
    tensors[name] = tensors[name].t().contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    assert f"tensor {name} has shape [256, 64], expected [64, 256]" in refusal(tmp_path)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nothing")
    assert "no such file or folder" in refusal("nothing.gguf")
    assert "no such file or folder" in refusal("a/b/c")
    (tmp_path / "model.bin").touch()
    assert "a file must be a .gguf file" in refusal(tmp_path / "model.bin")


# the hub


def test_a_hub_id_is_downloaded(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tiny_source)

    monkeypatch.setattr("lowbit.quant.source.snapshot_download", download)
    assert load_source("someone/tiny").name == "someone/tiny"
    assert asked["name"] == "someone/tiny"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any("bin" in pattern or ".py" in pattern for pattern in patterns)


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("no connection\nand a long explanation")

    monkeypatch.setattr("lowbit.quant.source.snapshot_download", download)
    message = refusal("someone/tiny")
    assert message.startswith("someone/tiny: no such file or folder here, and the hub did not")
    assert message.endswith("(no connection)")


# GGUF

GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    prefix = name.removesuffix(".weight")
    if prefix in top:
        return f"{top[prefix]}.weight"
    _, _, layer, part = prefix.split(".", 3)
    return f"blk.{layer}.{GGUF_LAYER[part]}.weight"


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rotary features as GGUF orders them: feature i of the first half next to i of the second."""
    rows = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.stack([rows[:, 0], rows[:, 1]], axis=2).reshape(weight.shape)


def write_gguf(path: Path, source: Path, architecture: str = "llama", extra: str = "") -> None:
    config = LlamaConfig.from_pretrained(source)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name("Tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    tokens += ["th", *(f"<unused{i}>" for i in range(config.vocab_size - len(tokens) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in load_file(source / "model.safetensors").items():
        values = tensor.float().numpy()
        part = name.split(".")[-2]
        if part in heads:
            values = interleaved(values, heads[part])
        writer.add_tensor(gguf_name(name), values)
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, tiny_source)
    return path


def test_a_gguf_file_computes_what_its_folder_computes(tiny_gguf: Path, tiny_source: Path) -> None:
    torch.testing.assert_close(
        logits(str(tiny_gguf)), reference_logits(tiny_source), rtol=1e-5, atol=1e-5
    )


def test_the_companions_of_a_gguf_file(tiny_gguf: Path, tmp_path: Path) -> None:
    source = load_source(str(tiny_gguf))
    source.write_companions(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (256, 257)
    assert (tmp_path / "tokenizer.json").is_file()
    assert source.config_json["architectures"] == ["LlamaForCausalLM"]
    assert source.config_json["model_type"] == "llama"


def test_gguf_files_of_other_architectures(tiny_source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", tiny_source, architecture="mamba")
    assert "model type 'mamba'; a GGUF file's must be llama" in refusal(tmp_path / "x.gguf")


def test_gguf_tensors_without_a_place(tiny_source: Path, tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", tiny_source, extra="rope_freqs.weight")
    assert "tensor rope_freqs.weight has no place in a Llama model" in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize("keep", [0, 3, 100, -1000])
def test_a_truncated_gguf_file(tiny_gguf: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "x.gguf").write_bytes(tiny_gguf.read_bytes()[:keep])
    assert "not a whole GGUF file" in refusal(tmp_path / "x.gguf")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"<html>" * 1000)
    assert "not a whole GGUF file" in refusal(tmp_path / "x.gguf")
