from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from lowbit.kernels.packing import dequantize
from lowbit.quant.checkpoint import gptq_tensors, write_checkpoint
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from lowbit.quant.evaluate import compare, load_dequantized, load_reference, perplexity
from lowbit.quant.source import load_source
from tiny import TinyModel, build_tiny_model, random_packed_weight
from transformers import LlamaConfig, LlamaForCausalLM


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


def logits(model: LlamaForCausalLM) -> torch.Tensor:
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
    tensors |= gptq_tensors("lm_head", head, quant)
    write_checkpoint(tmp_path / "out", tensors, config.to_dict(), quant)
    loaded = load_dequantized(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, dequantize(head))
    assert torch.equal(
        loaded.model.layers[0].mlp.up_proj.bias, model.model.layers[0].mlp.up_proj.bias
    )


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
