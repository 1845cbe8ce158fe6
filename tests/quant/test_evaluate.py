from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from lowbit.kernels.packing import dequantize
from lowbit.quant.checkpoint import write_checkpoint
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from lowbit.quant.evaluate import compare, load_dequantized, load_reference, perplexity
from lowbit.quant.formats import linear_tensors
from lowbit.quant.layers import LayeredModel
from lowbit.quant.source import load_source
from safetensors.torch import save_file
from tiny import TinyModel, build_tiny_model, random_packed_weight
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)


@pytest.fixture(scope="module")
def model(tiny_source: Path) -> LlamaForCausalLM:
    return load_reference(load_source(str(tiny_source)))


@pytest.fixture(scope="module")
def batches() -> torch.Tensor:
    return torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(0))


def test_a_model_agrees_with_itself(model: LlamaForCausalLM, batches: torch.Tensor) -> None:
    same = compare(model, model, batches)
    assert same.num_tokens == 3 * 19
    assert same.kl_divergence == 0
    assert same.top1_agreement == 1
    assert same.perplexity == same.reference_perplexity
    assert perplexity(model, batches) == pytest.approx(same.perplexity, rel=1e-5)


def test_figures_are_those_of_the_definitions(
    model: LlamaForCausalLM, batches: torch.Tensor
) -> None:
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    for parameter in other.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    divergence, losses, other_losses, agreed = [], [], [], []
    with torch.inference_mode():
        for ids in batches:
            logits, other_logits = model(ids[None]).logits[0], other(ids[None]).logits[0]
            for t in range(len(ids) - 1):
                p = torch.softmax(logits[t].double(), -1).tolist()
                q = torch.softmax(other_logits[t].double(), -1).tolist()
                divergence.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
                losses.append(-math.log(p[ids[t + 1]]))
                other_losses.append(-math.log(q[ids[t + 1]]))
                agreed.append(p.index(max(p)) == q.index(max(q)))
    found = compare(model, other, batches)
    count = len(losses)
    assert found.num_tokens == count
    assert found.kl_divergence == pytest.approx(sum(divergence) / count, rel=1e-4)
    assert found.reference_perplexity == pytest.approx(math.exp(sum(losses) / count), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(sum(other_losses) / count), rel=1e-5)
    assert found.top1_agreement == sum(agreed) / count
    assert found.kl_divergence > 0


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(30)[None] * 5).logits


def test_a_checkpoint_computes_with_its_dequantized_weights(tiny_model: TinyModel) -> None:
    loaded = load_dequantized(tiny_model.folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(loaded), logits(tiny_model.oracle), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_widths(tmp_path: Path, bits: int) -> None:
    tiny = build_tiny_model(tmp_path / "tiny", quant=QuantConfig(bits=bits, group_size=32))
    loaded = load_dequantized(tiny.folder)
    torch.testing.assert_close(logits(loaded), logits(tiny.oracle), rtol=1e-5, atol=1e-5)


def test_a_quantized_head_and_biases_are_read(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=16, lm_head=True)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=False,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    tensors = {name: parameter.data for name, parameter in model.named_parameters()}
    head = random_packed_weight(32, 50, group_size=16)
    del tensors["lm_head.weight"]
    tensors |= linear_tensors("lm_head", head, quant)
    write_checkpoint(tmp_path / "out", tensors, config.to_dict(), quant)
    loaded = load_dequantized(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, dequantize(head))
    assert torch.equal(
        loaded.model.layers[0].mlp.up_proj.bias, model.model.layers[0].mlp.up_proj.bias
    )


MIXED = QuantConfig(
    group_size=32, dynamic={r".*\.1\..*": {"bits": 8}, r"-:.*\b(o_proj|c_proj|dense)$": {}}
)


def packed_and_dense(folder: Path, quant: QuantConfig) -> tuple[dict[str, Tensor], ...]:
    """The tensors of a packed checkpoint of random codes, and those that they stand for."""
    model = LayeredModel(load_source(str(folder)))
    packed, dense = model.other_tensors(), model.other_tensors()
    for index in range(model.num_layers):
        layer = model.load_layer(index)
        names = {name for group in model.linear_groups(layer, index) for name in group.names}
        configs = {name: quant.for_module(model.checkpoint_name(index, name)) for name in names}
        chosen = {name: config for name, config in configs.items() if config is not None}
        dense |= model.layer_tensors(layer, index, set())
        packed |= model.layer_tensors(layer, index, set(chosen))
        for name, config in chosen.items():
            linear, full = layer.get_submodule(name), model.checkpoint_name(index, name)
            assert isinstance(linear, torch.nn.Linear)
            weight = random_packed_weight(
                linear.in_features, linear.out_features, bits=config.bits, group_size=32
            )
            matrix = dequantize(weight)
            gpt2 = "transformer.wte.weight" in dense  # stores its matrices transposed
            dense[f"{full}.weight"] = matrix.t().contiguous() if gpt2 else matrix
            packed |= linear_tensors(full, replace(weight, bias=linear.bias), quant)
    return packed, dense


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_of_every_family_with_mixed_bits(tmp_path: Path, name: str) -> None:
    folder = save_family(tmp_path / "dense", name)
    packed, dense = packed_and_dense(folder, MIXED)
    assert {n.rpartition(".")[2] for n in packed} >= {"qweight", "weight"}
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(tmp_path / "packed", packed, config, MIXED)
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    factory: Any = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    expected = factory.from_pretrained(folder, dtype=torch.float32)
    loaded = load_dequantized(tmp_path / "packed")
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_checkpoint_named_as_older_releases_did(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "dense", "gpt2")
    packed, _ = packed_and_dense(folder, MIXED)
    old = {name.removeprefix("transformer."): tensor for name, tensor in packed.items()}
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(tmp_path / "new", packed, config, MIXED)
    write_checkpoint(tmp_path / "old", old, config, MIXED)
    loaded = (load_dequantized(tmp_path / part) for part in ("new", "old"))
    assert torch.equal(*map(logits, loaded))


@pytest.mark.parametrize("name", ["attn.c_attn.bias", "mlp.c_fc.scales", "attn.c_proj.bias"])
def test_a_checkpoint_without_a_tensor(tmp_path: Path, name: str) -> None:
    folder = save_family(tmp_path / "dense", "gpt2")
    packed, _ = packed_and_dense(folder, MIXED)
    del packed[f"transformer.h.0.{name}"]
    config = json.loads((folder / "config.json").read_text())
    write_checkpoint(tmp_path / "packed", packed, config, MIXED)
    with pytest.raises(CheckpointError, match=rf"tensor transformer\.h\.0\.{name} is missing"):
        load_dequantized(tmp_path / "packed")


def test_masked_language_models_are_compared_at_every_position(tmp_path: Path) -> None:
    save_family(tmp_path / "a", "bert")
    save_family(tmp_path / "b", "bert", seed=1)
    models = [load_reference(load_source(str(tmp_path / part))) for part in "ab"]
    ids = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        p, q = (torch.softmax(model(ids).logits.double(), -1) for model in models)
    found = compare(*models, ids)
    assert found.num_tokens == 24
    assert found.perplexity is None
    assert found.reference_perplexity is None
    assert found.kl_divergence == pytest.approx(float((p * (p / q).log()).sum()) / 24, rel=1e-4)
    agreed = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(agreed))


def test_a_checkpoint_with_tensors_left_over(tmp_path: Path) -> None:
    quant = QuantConfig(group_size=16)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    tensors = dict(LlamaForCausalLM(config).state_dict())
    del tensors["lm_head.weight"]
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(1)
    write_checkpoint(tmp_path / "out", tensors, config.to_dict(), quant)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_dequantized(tmp_path / "out")
