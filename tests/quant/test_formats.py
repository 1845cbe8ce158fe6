"""One packed layer in every format: there and back, and against layouts written down by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import AWQ, CONFIG, awq_layer, random_weight, write_raw
from lowbit.kernels.packing import DenseWeight, PackedWeight, dequantize, pack_codes, unpack_codes
from lowbit.quant.checkpoint import CheckpointReader, write_checkpoint
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError
from lowbit.quant.formats import check_format, embedding_matrix, linear_tensors
from safetensors.torch import load_file
from torch import Tensor

GROUP_SIZES = [16, 32, 64, 96, 128, 192, 256, -1]
KINDS = [("gptq", True), ("gptq_v2", True), ("gptq_v2", False)]
KINDS += [("compressed-tensors", True), ("compressed-tensors", False)]


def layer_and_tensors(quant: QuantConfig, in_features: int = 96, out_features: int = 24) -> Any:
    weight = random_weight(in_features, out_features, quant.bits, quant.group_size, sym=quant.sym)
    return weight, linear_tensors("x", weight, quant)


def read_back(folder: Path, tensors: dict[str, Tensor], quant: dict[str, Any]) -> PackedWeight:
    reader = CheckpointReader(write_raw(folder, tensors, quant))
    weight = reader.take_packed("x")
    reader.check_all_consumed()
    return weight


def assert_same(read: PackedWeight, weight: PackedWeight) -> None:
    assert read.input_permutation is None
    assert torch.equal(read.qweight, weight.qweight)
    assert torch.equal(read.scales, weight.scales)
    assert torch.equal(read.zeros, weight.zeros)
    assert torch.equal(dequantize(read), dequantize(weight))
    assert read.bias is not None and weight.bias is not None
    assert torch.equal(read.bias, weight.bias)


# round trips


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("kind", "sym"), KINDS)
def test_a_layer_comes_back_as_it_was(
    tmp_path: Path, bits: int, group_size: int, kind: str, sym: bool
) -> None:
    torch.manual_seed(bits)
    quant = QuantConfig(bits=bits, group_size=group_size, sym=sym, checkpoint_format=kind)
    # 768 is a multiple of every group size; 40 outputs leave 4-, 3- and 2-bit words half empty.
    weight, tensors = layer_and_tensors(quant, 768, 64 if "gptq" in kind and bits == 3 else 40)
    write_checkpoint(tmp_path / "out", tensors, CONFIG, quant)
    reader = CheckpointReader(tmp_path / "out")
    assert_same(reader.take_packed("x"), weight)
    reader.check_all_consumed()
    assert reader.quant_config == quant


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(72, 5), (130, 33), (7, 3)])
@pytest.mark.parametrize("group_size", [32, -1, 128])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_gptq_words_may_be_half_empty(
    tmp_path: Path, bits: int, shape: tuple[int, int], group_size: int, kind: str
) -> None:
    quant = QuantConfig(bits=bits, group_size=group_size, checkpoint_format=kind)
    weight, tensors = layer_and_tensors(quant, *shape)
    assert_same(read_back(tmp_path / "x", tensors, quant.to_dict()), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(72, 5), (130, 33), (7, 3)])
@pytest.mark.parametrize("sym", [True, False])
def test_compressed_channels_may_be_odd(
    tmp_path: Path, bits: int, shape: tuple[int, int], sym: bool
) -> None:
    quant = QuantConfig(bits=bits, group_size=-1, sym=sym, checkpoint_format="compressed-tensors")
    weight, tensors = layer_and_tensors(quant, *shape)
    assert_same(read_back(tmp_path / "x", tensors, quant.to_dict()), weight)


# GPTQ


def test_the_stored_words_are_those_of_the_format() -> None:
    """The words that other readers compare with: see the GPTQ layouts of AutoGPTQ and GPTQModel."""
    for bits, v1, v2 in ((2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888)):
        for version, word in (("gptq", v1), ("gptq_v2", v2)):
            quant = QuantConfig(bits=bits, group_size=32, checkpoint_format=version)
            _, tensors = layer_and_tensors(quant, 64, 32)
            assert set((tensors["x.qzeros"] & 0xFFFFFFFF).flatten().tolist()) <= {
                word,
                word - 2**32,
            }
    _, tensors = layer_and_tensors(QuantConfig(group_size=32), 96, 24)
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
    weight = random_weight(64, 64, bits, 32, sym=False)
    weight.zeros[0, :4] = 0
    minus_one = (weight.zeros.int() - 1) % (1 << bits)
    tensors = linear_tensors(
        "x", weight, QuantConfig(bits=bits, group_size=32, sym=False, checkpoint_format="gptq_v2")
    )
    tensors["x.qzeros"] = pack_codes(minus_one.t(), bits).t().contiguous()
    v1 = QuantConfig(bits=bits, group_size=32, sym=False).to_dict()
    assert_same(read_back(tmp_path / "v1", tensors, v1), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v2_zero_points_under_the_v1_label_are_noticed(tmp_path: Path, bits: int) -> None:
    v2 = QuantConfig(bits=bits, group_size=32, checkpoint_format="gptq_v2")
    weight, tensors = layer_and_tensors(v2, 64, 64)
    label = QuantConfig(bits=bits, group_size=32).to_dict()
    assert_same(read_back(tmp_path / "x", tensors, label), weight)


@pytest.mark.parametrize("in_features", [96, 72])
def test_an_activation_order_becomes_a_permutation(tmp_path: Path, in_features: int) -> None:
    torch.manual_seed(1)
    quant = QuantConfig(group_size=32, desc_act=True)
    groups = torch.arange(in_features) // 32
    shuffled = torch.randperm(in_features)
    g_idx = groups[shuffled]
    weight, tensors = layer_and_tensors(quant, in_features)
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
    write_checkpoint(tmp_path / "out", linear_tensors("x", weight, quant), CONFIG, quant)
    read = CheckpointReader(tmp_path / "out").take_linear("x", 72, 8)
    assert isinstance(read, PackedWeight) and read.input_permutation is not None
    assert torch.equal(dequantize(read), dequantize(weight))


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2"])
def test_groups_of_unequal_sizes_are_read(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(2)
    quant = QuantConfig(group_size=32, sym=kind == "gptq", checkpoint_format=kind)
    weight, tensors = layer_and_tensors(quant)
    codes = unpack_codes(weight.qweight, 4, 96)
    for g_idx in (
        torch.zeros(96, dtype=torch.int32),
        torch.randint(0, 3, (96,), dtype=torch.int32),
        torch.tensor([2] * 8 + [0] * 40 + [1] * 48, dtype=torch.int32),
        torch.tensor([0] * 24 + [2] * 72, dtype=torch.int32),
    ):
        folder = tmp_path / f"x{len(list(tmp_path.iterdir()))}"
        read = read_back(folder, {**tensors, "x.g_idx": g_idx}, quant.to_dict())
        centered = codes.float() - weight.zeros[g_idx.long()].float()
        assert torch.equal(dequantize(read), (centered * weight.scales[g_idx.long()].float()).t())


# AWQ


@pytest.mark.parametrize("sym", [True, False])
def test_awq_is_read(tmp_path: Path, sym: bool) -> None:
    tensors, expected = awq_layer(sym)
    quant = {**AWQ, "zero_point": not sym}
    assert torch.equal(dequantize(read_back(tmp_path / "x", tensors, quant)), expected)
    if sym:
        del tensors["x.qzeros"]
        assert torch.equal(dequantize(read_back(tmp_path / "y", tensors, quant)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.qzeros": None}, "tensor x.qzeros is missing"),
        ({"x.scales": torch.ones(3, 39).half()}, r"x.scales: shape is \[3, 39\]"),
        ({"x.qzeros": torch.zeros(3, 5)}, "x.qzeros: dtype is float32, expected int32"),
        ({"x.qweight": torch.zeros(96, dtype=torch.int32)}, "x.qweight: shape is .* two dimen"),
    ],
)
def test_a_wrong_awq_tensor_is_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors = {k: v for k, v in {**awq_layer()[0], **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message):
        read_back(tmp_path / "x", tensors, AWQ)


# compressed-tensors


def stream(codes: list[int], bits: int) -> list[int]:
    """A little-endian bit stream cut into words, through Python's integers."""
    whole = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


def ten_a_word(codes: list[int]) -> list[int]:
    runs = [codes[i : i + 10] for i in range(0, len(codes), 10)]
    return [sum(code << (3 * i) for i, code in enumerate(run)) for run in runs]


def compressed_layer(pack: Any, bits: int, sym: bool) -> tuple[dict[str, Tensor], Tensor]:
    """(tensors, the dequantized weight [40, 96]) of groups of 32, `pack` making a row's words."""
    codes = torch.randint(0, 1 << bits, (40, 96))
    zeros = torch.randint(0, 1 << bits, (40, 3))
    zeros = torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros
    scales = torch.rand(40, 3).to(torch.bfloat16) + 0.5
    tensors = {
        "x.weight_packed": torch.tensor([pack(row) for row in codes.tolist()], dtype=torch.int32),
        "x.weight_scale": scales,
        "x.weight_shape": torch.tensor([40, 96]),
    }
    if not sym:
        columns = [pack(column) for column in zeros.t().tolist()]
        tensors["x.weight_zero_point"] = torch.tensor(columns, dtype=torch.int32).t().contiguous()
    groups = torch.arange(96) // 32
    return tensors, (codes - zeros[:, groups]).float() * scales[:, groups].float()


def compressed_config(bits: int, sym: bool) -> QuantConfig:
    return QuantConfig(bits=bits, group_size=32, sym=sym, checkpoint_format="compressed-tensors")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_compressed_tensors_are_the_bit_stream(tmp_path: Path, bits: int, sym: bool) -> None:
    tensors, expected = compressed_layer(lambda row: stream(row, bits), bits, sym)
    config = compressed_config(bits, sym)
    read = read_back(tmp_path / "x", tensors, config.to_dict())
    assert torch.equal(dequantize(read), expected)
    written = linear_tensors("x", read, config, scale_dtype=torch.bfloat16)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor) and written[name].dtype == tensor.dtype, name


FIXTURE = Path(__file__).parent / "fixtures" / "compressed_tensors"


def test_what_the_compressed_tensors_package_packed() -> None:
    """Made by compressed-tensors 0.20; see fixtures/make_compressed_tensors.py."""
    reader = CheckpointReader(FIXTURE)
    assert reader.quant_config is not None
    expected = load_file(FIXTURE / "expected.safetensors")
    assert len(expected) == 16
    stored = load_file(FIXTURE / "model.safetensors")
    for name, restored in expected.items():
        read = reader.take_linear(name, 96, 20)
        assert isinstance(read, PackedWeight)
        # The package multiplies in bfloat16: the product of a scale and a code, rounded once.
        assert torch.equal(dequantize(read).to(torch.bfloat16), restored), name
        for key, tensor in linear_tensors(
            name, read, reader.quant_config, scale_dtype=torch.bfloat16
        ).items():
            assert torch.equal(tensor, stored[key]), key
    reader.check_all_consumed()


@pytest.mark.parametrize("sym", [True, False])
def test_three_bits_of_older_versions(tmp_path: Path, sym: bool) -> None:
    tensors, expected = compressed_layer(ten_a_word, 3, sym)
    read = read_back(tmp_path / "x", tensors, compressed_config(3, sym).to_dict())
    assert torch.equal(dequantize(read), expected)


def test_an_activation_order_of_older_versions(tmp_path: Path) -> None:
    tensors, _ = compressed_layer(lambda row: stream(row, 4), 4, True)
    g_idx = (torch.arange(96) // 32)[torch.randperm(96)]
    quant = compressed_config(4, True)
    plain = read_back(tmp_path / "x", tensors, quant.to_dict())
    tensors["x.weight_g_idx"] = g_idx.to(torch.int32)
    read = read_back(tmp_path / "y", tensors, quant.to_dict())
    codes = unpack_codes(plain.qweight, 4, 96).float() - 8
    assert torch.equal(dequantize(read), (codes * plain.scales[g_idx].float()).t())
    with pytest.raises(CheckpointError, match=r"x: compressed-tensors holds no activation order"):
        linear_tensors("x", read, quant)


def test_scales_are_stored_in_the_models_type_where_that_is_exact() -> None:
    quant = compressed_config(4, True)
    weight = random_weight(96, 40, 4, 32)
    tensors = linear_tensors("x", weight, quant, scale_dtype=torch.bfloat16)
    assert tensors["x.weight_scale"].dtype == torch.float16  # eleven bits do not fit in eight
    fields = {name: getattr(weight, name) for name in PackedWeight.__slots__}
    coarse = PackedWeight(**{**fields, "scales": weight.scales.to(torch.bfloat16).half()})
    tensors = linear_tensors("x", coarse, quant, scale_dtype=torch.bfloat16)
    assert tensors["x.weight_scale"].dtype == torch.bfloat16
    assert torch.equal(tensors["x.weight_scale"].float(), coarse.scales.t().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight_zero_point": None}, "tensor x.weight_zero_point is missing"),
        ({"x.weight_scale": None}, "tensor x.weight_scale is missing"),
        ({"x.weight_shape": None}, "tensor x.weight_shape is missing"),
        ({"x.weight_shape": torch.tensor([96, 40])}, r"x.weight_packed: shape is \[40, 12\]"),
        ({"x.weight_shape": torch.tensor([40, 96, 1])}, r"x.weight_shape: shape is \[3\]"),
        (
            {"x.weight_packed": torch.zeros(40, 11, dtype=torch.int32)},
            r"x.weight_packed: shape is \[40, 11\], expected \[40, 12\]",
        ),
        ({"x.weight_scale": torch.ones(40, 2)}, r"weight_scale: shape is \[40, 2\]"),
        ({"x.weight_scale": torch.full((40, 3), torch.inf)}, "holds values that are not finite"),
        ({"x.input_scale": torch.ones(1)}, "no place in this model: x.input_scale"),
    ],
)
def test_a_wrong_compressed_tensor_is_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    tensors, _ = compressed_layer(lambda row: stream(row, 4), 4, False)
    tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_back(tmp_path / "x", tensors, compressed_config(4, False).to_dict())
    assert "\n" not in str(refusal.value)


def test_a_weight_shape_that_contradicts_the_model(tmp_path: Path) -> None:
    tensors, _ = compressed_layer(lambda row: stream(row, 4), 4, True)
    folder = write_raw(tmp_path / "x", tensors, compressed_config(4, True).to_dict())
    with pytest.raises(
        CheckpointError, match=r"x\.weight_shape: is \[40, 96\], expected \[40, 64\]"
    ):
        CheckpointReader(folder).take_linear("x", 64, 40)


# what a format cannot hold


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        ({"sym": False}, (64, 64), "x: asymmetric codes need checkpoint_format 'gptq_v2'"),
        ({"bits": 3}, (72, 64), "x: in_features is 72; 3-bit GPTQ needs a multiple of 32"),
        ({"bits": 3}, (64, 40), "x: out_features is 40; 3-bit GPTQ needs a multiple of 32"),
        (
            {"checkpoint_format": "compressed-tensors"},
            (96, 64),
            "x: in_features is 96; compressed-tensors needs a multiple of group_size 64",
        ),
        ({"dynamic": {"x": {"sym": False}}}, (64, 64), "x: asymmetric codes need"),
        ({"checkpoint_format": "awq"}, (64, 64), "x: AWQ checkpoints are read, never written"),
    ],
)
def test_what_a_format_cannot_hold_is_known_before(
    config: dict[str, Any], shape: tuple[int, int], message: str
) -> None:
    quant = QuantConfig(**config)
    with pytest.raises(CheckpointError, match=message):
        check_format(quant, "x", *shape)
    module = quant.for_module("x")
    assert module is not None
    weight = random_weight(*shape, module.bits, module.group_size, sym=module.sym)
    with pytest.raises(CheckpointError, match=message):
        linear_tensors("x", weight, quant)


def test_what_it_can_hold_is_not_refused() -> None:
    check_format(QuantConfig(bits=3, checkpoint_format="compressed-tensors"), "x", 128, 5)
    check_format(QuantConfig(bits=3, dynamic={"-:x": {}}), "x", 7, 5)
    check_format(QuantConfig(bits=4, group_size=96), "x", 7, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 8}, "x: has 4 bits and groups of 32; the quantization config says 8 and 32"),
        ({"group_size": 64}, "has 4 bits and groups of 32; the quantization config says 4 and 64"),
        ({"sym": True}, "x: has asymmetric codes; the quantization config says sym"),
        ({"dynamic": {"-:x": {}}}, "x: the quantization config leaves this layer at 16 bits"),
    ],
)
def test_a_layer_that_its_config_does_not_describe(config: dict[str, Any], message: str) -> None:
    settings = {"group_size": 32, "sym": False, "checkpoint_format": "gptq_v2", **config}
    with pytest.raises(CheckpointError, match=message):
        linear_tensors("x", random_weight(96, 32, 4, 32, sym=False), QuantConfig(**settings))


@pytest.mark.parametrize("scale", [1e6, 1 + 2**-12])
def test_scales_that_fp16_changes_are_refused(scale: float) -> None:
    weight = random_weight(64, 8, 4, 32)
    fields = {name: getattr(weight, name) for name in PackedWeight.__slots__}
    large = PackedWeight(**{**fields, "scales": torch.full((2, 8), scale)})
    with pytest.raises(CheckpointError, match=r"x: fp16 cannot hold its scale 1.* exactly"):
        linear_tensors("x", large, QuantConfig(group_size=32))


# single modules and embeddings


def test_modules_of_one_checkpoint_may_differ(tmp_path: Path) -> None:
    quant = QuantConfig(
        group_size=32,
        checkpoint_format="gptq_v2",
        dynamic={"b": {"bits": 8, "group_size": -1}, "c": {"bits": 2, "sym": False}, "-:d": {}},
    )
    layers = {
        "a": random_weight(96, 32, 4, 32),
        "b": random_weight(96, 32, 8, -1),
        "c": random_weight(96, 32, 2, 32, sym=False),
    }
    for kind in ("gptq_v2", "compressed-tensors"):
        config = QuantConfig(group_size=32, checkpoint_format=kind, dynamic=quant.dynamic)
        tensors = {"d.weight": torch.randn(32, 96)}
        for name, weight in layers.items():
            tensors |= linear_tensors(name, weight, config)
        write_checkpoint(tmp_path / kind, tensors, CONFIG, config)
        reader = CheckpointReader(tmp_path / kind)
        for name, weight in layers.items():
            assert_same(reader.take_packed(name), weight)
        assert isinstance(reader.take_linear("d", 96, 32), DenseWeight)
        reader.check_all_consumed()


def test_codes_of_a_layer_that_should_have_none(tmp_path: Path) -> None:
    _, tensors = layer_and_tensors(QuantConfig(group_size=32))
    quant = QuantConfig(group_size=32, dynamic={"-:x": {}})
    with pytest.raises(CheckpointError, match=r"x\.qweight: the quantization config leaves this"):
        read_back(tmp_path / "x", tensors, quant.to_dict())


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_embeddings_are_looked_up_packed(tmp_path: Path, kind: str, bits: int) -> None:
    sym = kind == "gptq"
    quant = QuantConfig(bits=bits, group_size=32, sym=sym, embeddings=True, checkpoint_format=kind)
    table = torch.empty(160, 64)  # 160 tokens, 64 features
    out_features, in_features = embedding_matrix(table, quant).shape
    weight = random_weight(in_features, out_features, bits, 32, sym=sym)
    tensors = linear_tensors("model.embed_tokens", weight, quant)
    del tensors["model.embed_tokens.bias"]
    write_checkpoint(tmp_path / "out", tensors, CONFIG, quant)
    embedding = CheckpointReader(tmp_path / "out").take_embedding("model.embed_tokens", 160, 64)
    assert not isinstance(embedding, Tensor)
    matrix = dequantize(weight)
    expected = matrix if kind == "compressed-tensors" else matrix.t()
    ids = torch.tensor([0, 159, 31, 32, 10, 10, 11, 21, 42])
    assert torch.equal(embedding.rows(ids), expected[ids])
    head = embedding.as_linear()
    as_matrix = head.weight if isinstance(head, DenseWeight) else dequantize(head)
    assert torch.equal(as_matrix.float(), expected)


# layers that are not packed, and damaged ones


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
    weight, tensors = layer_and_tensors(quant)
    del tensors["x.g_idx"]
    folder = write_raw(tmp_path / "x", tensors, quant.to_dict())
    read = CheckpointReader(folder).take_linear("x", 96, 24)
    assert isinstance(read, PackedWeight) and read.input_permutation is None
    assert torch.equal(dequantize(read), dequantize(weight))


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
        ({"x.g_idx": torch.zeros(96)}, "x.g_idx: dtype is float32, expected int32 or int64"),
    ],
)
def test_a_wrong_tensor_is_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    quant = QuantConfig(group_size=32)
    _, tensors = layer_and_tensors(quant)
    tensors = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    folder = write_raw(tmp_path / "x", tensors, quant.to_dict())
    with pytest.raises(CheckpointError, match=message) as caught:
        CheckpointReader(folder).take_linear("x", 96, 24)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
