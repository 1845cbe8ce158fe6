from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from families import FAMILIES, save_family
from lowbit.quant.errors import SourceError
from lowbit.quant.layers import LayeredModel, is_router
from lowbit.quant.source import load_source
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, RwkvConfig
from transformers.models.llama.modeling_llama import LlamaModel

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = [("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


def experts(first: str, second: str, third: str) -> list[tuple[str, ...]]:
    names = [f"mlp.experts.{i}." for i in range(4)]
    return [g for n in names for g in ((n + first, n + second), (n + third,))]


LLAMA = [ATTENTION, ("self_attn.o_proj",), *MLP]
OPT = [ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)]
SHARED = "mlp.shared_expert."
GROUPS: dict[str, list[tuple[str, ...]]] = {
    "bert": [
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    ],
    "bloom": [
        ("self_attention.query_key_value",),
        ("self_attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "mixtral": [*LLAMA[:2], *experts("w1", "w3", "w2")],
    "opt": OPT,
    "opt 350m": OPT,
    "phi3": [
        ("self_attn.qkv_proj",),
        ("self_attn.o_proj",),
        ("mlp.gate_up_proj",),
        ("mlp.down_proj",),
    ],
    "qwen2 moe": [
        *LLAMA[:2],
        (f"{SHARED}gate_proj", f"{SHARED}up_proj"),
        (f"{SHARED}down_proj",),
        *experts("gate_proj", "up_proj", "down_proj"),
    ],
    "qwen3 moe": [*LLAMA[:2], *experts("gate_proj", "up_proj", "down_proj")],
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny 16-bit model, named after its family."""
    return save_family(tmp_path_factory.mktemp("family") / request.param, request.param)


def oracle(folder: Path) -> Any:
    kinds = json.loads((folder / "config.json").read_text())["architectures"]
    factory: Any = AutoModelForMaskedLM if kinds == ["BertForMaskedLM"] else AutoModelForCausalLM
    return factory.from_pretrained(folder, dtype=torch.float32)


def layered(folder: Path) -> LayeredModel:
    return LayeredModel(load_source(str(folder)))


def random_ids(*shape: int) -> Tensor:
    return torch.randint(0, 258, shape, generator=torch.Generator().manual_seed(0))


def walk(model: LayeredModel, ids: Tensor) -> Tensor:
    hidden = model.embed(ids)
    for index in range(model.num_layers):
        hidden = model.call_layer(model.load_layer(index), index, hidden)
    return model.logits(hidden)


def assert_walks_like_transformers(folder: Path, shapes: list[tuple[int, int]]) -> None:
    model, expected = layered(folder), oracle(folder)
    for shape in shapes:
        ids = random_ids(*shape)
        found = walk(model, ids)
        assert not found.requires_grad
        with torch.inference_mode():
            torch.testing.assert_close(found, expected(ids).logits, rtol=1e-5, atol=1e-5)


# what the model computes


def test_layer_by_layer_computes_what_transformers_computes(family: Path) -> None:
    # Longer than the sliding windows of 8 tokens; a shape met before must be met again.
    assert_walks_like_transformers(family, [(3, 20), (2, 33), (1, 5), (3, 20)])


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama", "qwen2 moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sources_of_other_types(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    assert_walks_like_transformers(save_family(tmp_path, name, dtype=dtype), [(2, 12)])


def test_logits_before_any_layer_was_called(tmp_path: Path) -> None:
    model = layered(save_family(tmp_path, "bloom"))
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    transformer = oracle(tmp_path)
    with torch.inference_mode():
        expected = transformer.lm_head(transformer.transformer.ln_f(hidden))
    torch.testing.assert_close(model.logits(hidden), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt 350m", "mixtral"])
def test_the_head_projects_what_head_input_returns(tmp_path: Path, name: str) -> None:
    model = layered(save_family(tmp_path, name))
    hidden = model.embed(random_ids(2, 9))
    owner = model.embedding_name if model.tied_head else model.head_name
    head = model.other_tensors()[f"{owner}.weight"].float()
    torch.testing.assert_close(
        model.head_input(hidden) @ head.T, model.logits(hidden), rtol=1e-5, atol=1e-5
    )


def test_a_layer_as_it_is_stored_computes_the_same(family: Path) -> None:
    model = layered(family)
    hidden = model.embed(random_ids(2, 9))
    for index in range(model.num_layers):
        plain, stored = model.load_layer(index), model.load_layer(index, products=torch.float32)
        weights = [m.weight for m in stored.modules() if isinstance(m, torch.nn.Linear)]
        assert weights and all(weight.dtype == torch.float16 for weight in weights)
        with torch.inference_mode():
            expected = model.call_layer(plain, index, hidden)
            found = model.call_layer(stored, index, hidden)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        hidden = expected


def test_a_layer_in_bfloat16_computes_nearly_the_same(family: Path) -> None:
    model = layered(family)
    hidden = model.embed(random_ids(2, 9))
    plain, rounded = model.load_layer(0), model.load_layer(0, products=torch.bfloat16)
    for name, module in rounded.named_modules():
        if isinstance(module, torch.nn.Linear):
            dtype = torch.float16 if is_router(name) else torch.bfloat16
            assert module.weight.dtype == dtype and module.weight.is_contiguous()
    with torch.inference_mode():
        expected = model.call_layer(plain, 0, hidden)
        found = model.call_layer(rounded, 0, hidden)
    assert found.dtype == torch.float32
    change = (found - expected).norm() / (expected - hidden).norm()
    assert 0 < float(change) < 0.02


def test_two_copies_of_a_layer_do_not_touch_each_other(tmp_path: Path) -> None:
    model = layered(save_family(tmp_path, "mixtral"))
    original, changed = model.load_layer(1), model.load_layer(1)
    hidden = model.embed(random_ids(2, 9))
    before = model.call_layer(original, 1, hidden)
    for parameter in changed.parameters():
        parameter.zero_()
    assert torch.equal(model.call_layer(changed, 1, hidden), hidden)
    assert torch.equal(model.call_layer(original, 1, hidden), before)
    assert torch.equal(model.call_layer(model.load_layer(1), 1, hidden), before)


def test_layers_are_of_plain_linear_layers_in_fp32(family: Path) -> None:
    layer = layered(family).load_layer(0)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    assert all(linear.weight.is_contiguous() for linear in linears)
    matrices = sum(parameter.ndim > 1 for parameter in layer.parameters())
    routers = "moe" in family.name or family.name == "mixtral"
    assert matrices == len(linears) + routers  # nothing else multiplies


# one layer in memory


def num_materialized() -> int:
    """Numbers in parameters that are not on the meta device, in this whole process."""
    found = [o for o in gc.get_objects() if type(o) is nn.Parameter]
    return sum(parameter.numel() for parameter in found if not parameter.is_meta)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_one_layer_at_a_time_is_in_memory(tmp_path: Path, name: str) -> None:
    save_family(tmp_path, name)
    gc.collect()
    at_start = num_materialized()
    model = layered(tmp_path)
    hidden = model.embed(random_ids(2, 9))
    alone = num_materialized()
    assert alone - at_start == sum(tensor.numel() for tensor in model.other_tensors().values())
    for index in range(model.num_layers):
        layer = model.load_layer(index)
        hidden = model.call_layer(layer, index, hidden)
        model.linear_groups(layer, index)
        size = sum(parameter.numel() for parameter in layer.parameters())
        assert num_materialized() - alone == size
        del layer
        gc.collect()
        assert num_materialized() == alone


def test_the_embedding_stays_as_it_is_stored(tmp_path: Path) -> None:
    model = layered(save_family(tmp_path, "llama"))
    model.embed(random_ids(2, 9))
    assert model.other_tensors()["model.embed_tokens.weight"].dtype == torch.float16


# linear layers


def test_linear_layers_that_read_the_same_tensor_form_a_group(family: Path) -> None:
    # The probe's tokens are all the same: two of four experts see none of them.
    model = layered(family)
    for index in range(model.num_layers):
        groups = model.linear_groups(model.load_layer(index), index)
        assert [group.names for group in groups] == GROUPS.get(family.name, LLAMA)


def test_the_stream_that_an_output_is_added_to_is_found(family: Path) -> None:
    llama = {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"}
    expected = {
        "bert": {"attention.output.dense": "", "output.dense": "intermediate"},
        "bloom": {"self_attention.dense": "", "mlp.dense_4h_to_h": "post_attention_layernorm"},
        "gemma2": {},  # a norm stands between
        "gemma3": {},
        "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
        "mixtral": {"self_attn.o_proj": ""},  # the experts' outputs are summed up first
        "qwen2 moe": {"self_attn.o_proj": ""},
        "qwen3 moe": {"self_attn.o_proj": ""},
        "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
        "opt 350m": {"self_attn.out_proj": "", "fc2": "fc1"},
    }
    model = layered(family)
    for index in range(model.num_layers):
        groups = model.linear_groups(model.load_layer(index), index)
        found = {group.names[0]: group.stream for group in groups if group.stream is not None}
        assert found == expected.get(family.name, llama)


def test_every_expert_is_called_with_the_tokens_routed_to_it(tmp_path: Path) -> None:
    model = layered(save_family(tmp_path, "qwen3 moe"))
    layer = model.load_layer(0)
    seen: list[tuple[str, int]] = []
    for name, module in layer.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.append((name, len(args[0])))
            )
    model.call_layer(layer, 0, model.embed(torch.zeros(2, 9, dtype=torch.int64)))
    assert [name for name, _ in seen] == [f"mlp.experts.{i}.gate_proj" for i in range(4)]
    assert sorted(count for _, count in seen) == [0, 0, 18, 18]  # top 2, all tokens alike


def test_routers_are_told_by_their_names() -> None:
    routers = ["mlp.gate", "block_sparse_moe.gate", "mlp.shared_expert_gate", "feed_forward.router"]
    assert all(map(is_router, routers))
    others = ["mlp.gate_proj", "mlp.experts.0.gate_proj", "mlp.gate_up_proj", "mlp.experts.3.w1"]
    assert not any(map(is_router, others))


# names and values on disk


def test_all_tensors_have_their_names_and_values_on_disk(family: Path) -> None:
    model = layered(family)
    written = model.other_tensors()
    for index in range(model.num_layers):
        written |= model.layer_tensors(model.load_layer(index), index, set())
    stored = load_file(family / "model.safetensors")
    assert written.keys() == stored.keys()
    for name, tensor in stored.items():
        torch.testing.assert_close(written[name].float(), tensor.float(), rtol=0, atol=0)


def test_quantized_layers_are_left_out_under_their_names_on_disk(family: Path) -> None:
    model = layered(family)
    layer = model.load_layer(1)
    names = {name for group in model.linear_groups(layer, 1) for name in group.names}
    whole, rest = (model.layer_tensors(layer, 1, quantized) for quantized in (set(), names))
    left_out = whole.keys() - rest.keys()
    expected = {
        f"{model.checkpoint_name(1, name)}.{leaf}"
        for name in names
        for leaf, _ in layer.get_submodule(name).named_parameters()
    }
    assert left_out == expected
    assert all(tensor.ndim == 1 or "gate" in name for name, tensor in rest.items())


def test_experts_have_the_names_that_other_readers_expect(tmp_path: Path) -> None:
    mixtral = layered(save_family(tmp_path / "mixtral", "mixtral"))
    assert mixtral.checkpoint_name(1, "mlp.experts.3.w2") == (
        "model.layers.1.block_sparse_moe.experts.3.w2"
    )
    router = mixtral.layer_tensors(mixtral.load_layer(0), 0, set())
    assert "model.layers.0.block_sparse_moe.gate.weight" in router
    qwen = layered(save_family(tmp_path / "qwen", "qwen2 moe"))
    assert qwen.checkpoint_name(0, "mlp.experts.0.gate_proj") == (
        "model.layers.0.mlp.experts.0.gate_proj"
    )


@pytest.mark.parametrize(
    ("name", "head", "embedding", "tied", "layer"),
    [
        ("bert", None, "bert.embeddings.word_embeddings", True, "bert.encoder.layer.1"),
        ("gpt2", "lm_head", "transformer.wte", True, "transformer.h.1"),
        ("llama", "lm_head", "model.embed_tokens", True, "model.layers.1"),
        ("mistral", "lm_head", "model.embed_tokens", False, "model.layers.1"),
        ("opt", "lm_head", "model.decoder.embed_tokens", True, "model.decoder.layers.1"),
    ],
)
def test_the_parts_of_a_model(
    tmp_path: Path, name: str, head: str | None, embedding: str, tied: bool, layer: str
) -> None:
    model = layered(save_family(tmp_path, name))
    assert (model.head_name, model.embedding_name) == (head, embedding)
    assert (model.tied_head, model.layer_name(1)) == (tied, layer)
    assert model.num_layers == 2


# layouts of older checkpoints


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, metadata={"format": "pt"})


def as_openai_stored_gpt2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones(1, 1, 128, 128).tril()
    found = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": mask.bool() for i in range(2)}
    return found | masks | {"h.0.attn.masked_bias": torch.tensor(-1e4)}


def as_google_stored_bert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def old(name: str) -> str:
        for new, was in (("weight", "gamma"), ("bias", "beta")):
            name = name.replace(f"LayerNorm.{new}", f"LayerNorm.{was}")
        return name

    heads = {
        "bert.pooler.dense.weight": torch.ones(64, 64),
        "bert.pooler.dense.bias": torch.ones(64),
    }
    heads |= {"cls.seq_relationship.weight": torch.ones(2, 64)}
    return {old(name): tensor for name, tensor in tensors.items()} | heads


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", as_openai_stored_gpt2),
        ("bert", as_google_stored_bert),
        ("bloom", without_prefix),
    ],
)
def test_layouts_of_older_releases(
    tmp_path: Path, name: str, layout: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    names = set(load_file(save_family(tmp_path, name) / "model.safetensors"))
    rewrite(tmp_path, layout)
    assert_walks_like_transformers(tmp_path, [(2, 9)])
    model = layered(tmp_path)
    layers = [model.layer_tensors(model.load_layer(i), i, set()) for i in range(2)]
    assert {*model.other_tensors(), *layers[0], *layers[1]} == names  # written as of today


def test_a_sharded_source(tmp_path: Path) -> None:
    save_family(tmp_path / "one", "qwen2 moe")
    folder = tmp_path / "many"
    oracle(tmp_path / "one").half().save_pretrained(folder, max_shard_size="50KB")
    for path in (tmp_path / "one").glob("tokenizer*"):
        path.rename(folder / path.name)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_walks_like_transformers(folder, [(2, 9)])


# what is refused


def test_layers_that_read_the_tokens_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaModel.forward

    def with_tokens(self: Any, input_ids: Tensor, **options: Any) -> Any:
        return forward(self, input_ids, tokens=input_ids, **options)

    source = load_source(str(save_family(tmp_path, "llama")))
    monkeypatch.setattr(LlamaModel, "forward", with_tokens)
    with pytest.raises(SourceError, match="'llama': its layers read more than hidden states"):
        LayeredModel(source)


def test_layers_that_hand_on_more_than_hidden_states_are_refused(tmp_path: Path) -> None:
    config = RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="'rwkv' cannot be run layer by layer"):
        walk(layered(tmp_path), random_ids(1, 4))
