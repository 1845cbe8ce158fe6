"""The input embedding, quantized: what is written, planned, read and served."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import decode
from families import save_family
from lowbit.kernels.packing import PackedEmbedding, dequantize
from lowbit.kernels.reference import ReferenceBackend
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import ModuleConfig, QuantConfig
from lowbit.quant.embedding import packed_embedding, quantize_embedding
from lowbit.quant.errors import CheckpointError, QuantError, SolverError
from lowbit.quant.evaluate import load_dequantized
from lowbit.quant.gptq import SolverConfig, round_to_nearest, solve
from lowbit.quant.grid import GridSearch
from lowbit.quant.journal import Journal
from lowbit.quant.layers import LayeredModel
from lowbit.quant.pipeline import quantize
from lowbit.quant.plan import Rates, describe, plan_run
from lowbit.quant.quality import evaluate_checkpoint
from lowbit.quant.report import PAGE_FILE, QuantizeReport
from lowbit.quant.source import load_source
from lowbit.server.cli import main
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = {"num_sequences": 8, "sequence_length": 32}
RATES = Rates(
    matmul=1e11, product=1e11, matmul64=5e10, copy=1e10, solver_column=1e-5, solver_weight=1e-8
)
EMBEDDINGS = {
    "llama": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "bert": "bert.embeddings.word_embeddings",
    "bloom": "transformer.word_embeddings",
    "gemma3": "model.embed_tokens",
    "opt 350m": "model.decoder.embed_tokens",
}
POSITIONS = {
    "gpt2": "transformer.wpe.weight",
    "bert": "bert.embeddings.position_embeddings.weight",
    "opt 350m": "model.decoder.embed_positions.weight",
}
# An embedding that differs from the layers in all that a rule may change.
RULE = {"+:.*(?:embed_tokens|wte|word_embeddings)$": {"bits": 8, "group_size": 32}}


def config(**changes: Any) -> QuantConfig:
    return QuantConfig(**{"group_size": 32, "embeddings": True, "dynamic": RULE, **changes})


Run = Callable[..., QuantizeReport]


@pytest.fixture(scope="module")
def run(calibration_file: Path) -> Run:
    """`quantize` with few tokens of a short text."""

    def run(source: Path, out: Path, config: QuantConfig, **changes: Any) -> QuantizeReport:
        settings = {"calibration_file": calibration_file, "progress": False, **LENGTHS, **changes}
        return quantize(str(source), out, config, **settings)

    return run


@dataclass(frozen=True)
class Made:
    source: Path
    out: Path
    report: QuantizeReport


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("source") / "llama", "llama")


@pytest.fixture(scope="module", params=["gptq", "gptq_v2", "compressed-tensors"])
def made(
    llama: Path, run: Run, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Made:
    """A tied Llama: 4 bits, and 8 for the embedding; asymmetric where the format can hold that."""
    out = tmp_path_factory.mktemp("made") / "out"
    kind = request.param
    report = run(llama, out, config(checkpoint_format=kind, sym=kind == "gptq"))
    return Made(llama, out, report)


def table_of(source: Path) -> tuple[str, Tensor]:
    model = LayeredModel(load_source(str(source)))
    name = model.embedding_name
    return name, model.other_tensors()[f"{name}.weight"].float()


def rounded(table: Tensor, module: ModuleConfig, *, by_row: bool) -> Tensor:
    """The table as it should come back, computed group by group in fp64."""
    matrix = table if by_row else table.t()
    size = matrix.shape[1] if module.group_size == -1 else module.group_size
    search = GridSearch(bits=module.bits, sym=module.sym)
    parts = []
    for part in matrix.split(size, dim=1):
        grid = search.search(part.t().contiguous(), torch.ones(part.shape[1]))
        scale, zero = grid.scale.double()[:, None], grid.zero.double()[:, None]
        codes = ((part / grid.scale[:, None]).double().round() + zero).clamp(0, 2**module.bits - 1)
        parts.append(((codes - zero) * scale).float())
    found = torch.cat(parts, dim=1)
    return found if by_row else found.t()


def written_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())


# rounding


@pytest.mark.parametrize("group_size", [32, 48, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_rounding_is_what_the_solver_falls_back_to(group_size: int, sym: bool) -> None:
    torch.manual_seed(0)
    weight, importance = torch.randn(70, 104), torch.rand(104) + 0.1
    module = ModuleConfig(bits=3, group_size=group_size, sym=sym)
    found = round_to_nearest(weight, module, importance=importance)
    (expected,) = solve([weight], importance.diag(), [module], fallback="no reason")
    assert torch.equal(found.codes, expected.quantized.codes)
    assert torch.equal(found.scales, expected.quantized.scales)
    assert torch.equal(found.zeros, expected.quantized.zeros)
    assert found.group_size == expected.quantized.group_size


def test_parts_and_dtypes_change_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table comes transposed, in 16 bits, and too large to be converted at once."""
    torch.manual_seed(0)
    table, module = torch.randn(104, 70).half(), ModuleConfig(bits=4, group_size=32)
    whole = round_to_nearest(table.t().float().contiguous(), module)
    monkeypatch.setattr("lowbit.quant.gptq.ROUNDED_AT_ONCE", 96)
    parts = round_to_nearest(table.t(), module)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)


def test_packing_in_parts_changes_no_word(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table, quant = torch.randn(104, 70), config()
    arguments = ("model.embed_tokens", table, quant, SolverConfig())
    whole = quantize_embedding(*arguments, num_tokens=5).packed["model.embed_tokens"]
    monkeypatch.setattr("lowbit.quant.stages.CODES_AT_ONCE", 300)
    parts = quantize_embedding(*arguments, num_tokens=5).packed["model.embed_tokens"]
    assert torch.equal(parts.qweight, whole.qweight)
    assert torch.equal(dequantize(parts), dequantize(whole))


def test_a_value_that_is_not_finite_is_refused() -> None:
    table = torch.zeros(64, 64)
    table[40, 3] = torch.inf
    with pytest.raises(SolverError, match=r"^wte: its weight holds values that are not finite"):
        quantize_embedding("wte", table, config(), SolverConfig(), num_tokens=1)


# a run


def test_the_table_that_comes_back_is_the_rounded_one(made: Made) -> None:
    name, table = table_of(made.source)
    reader = CheckpointReader(made.out)
    quant = reader.quant_config
    assert quant is not None
    assert quant.embeddings
    module = quant.for_embedding(name)
    assert module == ModuleConfig(bits=8, group_size=32, sym=quant.sym)
    by_row = quant.checkpoint_format == "compressed-tensors"
    expected = rounded(table, module, by_row=by_row)
    loaded = load_dequantized(made.out)
    assert torch.equal(loaded.get_input_embeddings().weight, expected)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    packed = reader.take_embedding(name, *table.shape)
    assert isinstance(packed, PackedEmbedding)
    assert torch.equal(packed.rows(torch.arange(len(table))), expected)


def test_a_tied_head_stays_tied(made: Made) -> None:
    assert json.loads((made.out / "config.json").read_text())["tie_word_embeddings"] is True
    names = CheckpointReader(made.out).names()
    assert not any(name.startswith("lm_head") for name in names)
    assert "model.embed_tokens.weight" not in names


def test_the_report_has_the_embedding_first(made: Made) -> None:
    name, table = table_of(made.source)
    found = made.report.modules[0]
    restored = load_dequantized(made.out).get_input_embeddings().weight
    lost = float((table - restored).double().square().sum() / table.double().square().sum())
    assert (found.name, found.bits, found.group_size) == (name, 8, 32)
    assert found.relative_error == pytest.approx(lost, rel=1e-5)
    assert 0 < found.relative_error < 1e-3
    assert (found.num_parameters, found.num_tokens) == (table.numel(), 8 * 32)
    assert (found.fallback, found.damp_percent) == (None, 0.0)
    assert name in (made.out / PAGE_FILE).read_text()


def test_eight_bits_cost_hardly_anything(llama: Path, run: Run, tmp_path: Path) -> None:
    everything = QuantConfig(bits=8, group_size=32, embeddings=True)
    run(llama, tmp_path / "out", everything)
    quality = evaluate_checkpoint(str(llama), tmp_path / "out", num_sequences=4, sequence_length=64)
    assert 0 < quality.comparison.kl_divergence < 1e-3


def test_the_layers_make_up_for_the_embedding(
    llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """They are solved behind the quantized table: their codes are others than without it."""
    settings = {"calibration_file": calibration_file, "progress": False, **LENGTHS}
    coarse = {".*embed_tokens$": {"bits": 2}}
    for name, embeddings in (("with", True), ("without", False)):
        quant = QuantConfig(group_size=32, embeddings=embeddings, dynamic=coarse)
        quantize(str(llama), tmp_path / name, quant, **settings)
    first = "model.layers.0.self_attn.q_proj"
    found = [CheckpointReader(tmp_path / name).take_packed(first) for name in ("with", "without")]
    assert not torch.equal(found[0].qweight, found[1].qweight)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
def test_hidden_states_start_at_the_quantized_table(llama: Path, kind: str) -> None:
    model = LayeredModel(load_source(str(llama)))
    name, table = table_of(llama)
    quant = config(checkpoint_format=kind)
    entry = quantize_embedding(name, table, quant, SolverConfig(), num_tokens=1)
    packed = packed_embedding(entry, name, quant)
    ids = torch.tensor([[5, 5, 299, 0]])
    assert torch.equal(model.embed(ids, packed), packed.rows(ids[0])[None])
    assert torch.equal(model.embed(ids), table[ids])  # the model's own again


def test_a_resumed_run_writes_the_same(
    llama: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = config()
    run(llama, tmp_path / "whole", quant)
    write = Journal.write_layer

    def fail_behind_the_first(self: Journal, index: int, entry: Any) -> None:
        if index:
            raise QuantError("killed")
        write(self, index, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_layer", fail_behind_the_first)
        with pytest.raises(QuantError, match="killed"):
            run(llama, tmp_path / "killed", quant)
    run(llama, tmp_path / "killed", quant)
    whole, resumed = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", [True, False])
def test_the_head_has_bits_of_its_own(
    run: Run, save_source: Callable[..., Any], tmp_path: Path, tied: bool, head: bool
) -> None:
    """A quantized one is a matrix of its own, made of the 16-bit weight."""
    original = save_source(tmp_path / "source", tie_word_embeddings=tied)
    rules = {**RULE, "+:^lm_head$": {"bits": 8, "group_size": 24}}
    quant = config(group_size=24, lm_head=head, dynamic=rules)
    run(tmp_path / "source", tmp_path / "out", quant)
    reader = CheckpointReader(tmp_path / "out")
    assert reader.config["tie_word_embeddings"] is (tied and not head)
    loaded = load_dequantized(tmp_path / "out")
    weight = loaded.get_output_embeddings().weight
    expected = original.lm_head.weight.detach().float()
    if head:
        assert torch.equal(weight, dequantize(reader.take_packed("lm_head")))
        assert float((weight - expected).norm() / expected.norm()) < 0.01
    elif not tied:
        assert torch.equal(weight, expected)
    else:
        assert weight is loaded.get_input_embeddings().weight


def test_a_rule_leaves_the_embedding_alone(llama: Path, run: Run, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", config(dynamic={"-:.*embed_tokens$": {}}))
    assert all("embed" not in module.name for module in report.modules)
    names = CheckpointReader(tmp_path / "out").names()
    assert "model.embed_tokens.weight" in names
    load_dequantized(tmp_path / "out")


# families and sizes


@pytest.mark.parametrize("kind", ["gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_families(run: Run, tmp_path: Path, family: str, kind: str) -> None:
    """What is planned is what is written; everything else outside the layers stays as it was."""
    source = save_family(tmp_path / "source", family)
    quant = config(checkpoint_format=kind, sym=False)
    planned = plan_run(str(source), quant, rates=RATES, **LENGTHS)
    report = run(source, tmp_path / "out", quant)
    assert planned.num_bytes_packed == written_bytes(tmp_path / "out") == report.num_bytes_packed
    assert planned.bits_per_weight == pytest.approx(report.bits_per_weight, rel=1e-12)
    assert planned.quantizes_embedding
    assert planned.num_quantized + 1 == len(report.modules)
    name, table = table_of(source)
    assert report.modules[0].name == name == EMBEDDINGS[family]
    loaded = load_dequantized(tmp_path / "out")
    module = ModuleConfig(bits=8, group_size=32, sym=False)
    expected = rounded(table, module, by_row=kind == "compressed-tensors")
    assert torch.equal(loaded.get_input_embeddings().weight, expected)
    if family in POSITIONS:
        written = load_file(tmp_path / "out" / "model.safetensors")[POSITIONS[family]]
        places = LayeredModel(load_source(str(source))).other_tensors()
        assert torch.equal(written, places[POSITIONS[family]])


@pytest.mark.parametrize(
    ("bits", "kind"), [(2, "gptq"), (3, "compressed-tensors"), (4, "gptq"), (3, "gptq")]
)
@pytest.mark.parametrize("group_size", [32, -1])
def test_widths(
    run: Run,
    save_source: Callable[..., Any],
    tmp_path: Path,
    bits: int,
    kind: str,
    group_size: int,
) -> None:
    """3 bits in GPTQ's layout need a vocabulary of whole periods of 32, and as many features."""
    save_source(tmp_path / "source", hidden_size=64, head_dim=16, num_attention_heads=4)
    rules = {".*embed_tokens$": {"bits": bits, "group_size": group_size}, "-:": {}}
    quant = QuantConfig(embeddings=True, checkpoint_format=kind, dynamic=rules)
    run(tmp_path / "source", tmp_path / "out", quant)
    planned = plan_run(str(tmp_path / "source"), quant, rates=RATES, **LENGTHS)
    assert planned.num_bytes_packed == written_bytes(tmp_path / "out")
    _, table = table_of(tmp_path / "source")
    module = ModuleConfig(bits=bits, group_size=group_size)
    expected = rounded(table, module, by_row=kind == "compressed-tensors")
    found = load_dequantized(tmp_path / "out").get_input_embeddings().weight
    assert torch.equal(found, expected)


def test_the_plan_names_the_embedding(llama: Path) -> None:
    planned = plan_run(str(llama), config(), rates=RATES)
    assert "14 linear layers and the embedding to quantize" in describe(planned)


# serving


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "compressed-tensors"])
def test_greedy_tokens_are_those_of_transformers(
    run: Run, save_source: Callable[..., Any], tmp_path: Path, kind: str, tied: bool
) -> None:
    save_source(tmp_path / "source", tie_word_embeddings=tied, intermediate_size=96)
    quant = config(group_size=24, checkpoint_format=kind, dynamic={".*embed_tokens": {"bits": 8}})
    run(tmp_path / "source", tmp_path / "out", quant)
    oracle = load_dequantized(tmp_path / "out")
    prompt = torch.tensor([70, 111, 120, 32, 74, 9, 300])
    logits, tokens = decode(tmp_path / "out", ReferenceBackend(), prompt, 12)
    with torch.inference_mode():
        expected = oracle(prompt[None]).logits[0]
        generated = oracle.generate(
            prompt[None],
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert tokens == generated[0, len(prompt) :].tolist()


# what is refused


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        (
            config(dynamic={".*embed_tokens": {"bits": 3}}),
            "model.embed_tokens: in_features is 300; 3-bit GPTQ needs a multiple of 32",
        ),
        (
            config(dynamic={".*embed_tokens": {"sym": False}}),
            "model.embed_tokens: asymmetric codes need checkpoint_format 'gptq_v2'",
        ),
        (
            config(
                checkpoint_format="compressed-tensors",
                dynamic={".*embed_tokens": {"group_size": 48}},
            ),
            "model.embed_tokens: in_features is 64; compressed-tensors needs a multiple of",
        ),
    ],
)
def test_what_the_format_cannot_hold(
    llama: Path, run: Run, tmp_path: Path, quant: QuantConfig, message: str
) -> None:
    """By the run before work starts, and by the plan."""
    with pytest.raises(CheckpointError) as caught:
        run(llama, tmp_path / "out", quant)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        plan_run(str(llama), quant, rates=RATES)
    assert message in str(caught.value)


def test_a_name_that_other_readers_do_not_know() -> None:
    quant = config(checkpoint_format="compressed-tensors")
    with pytest.raises(CheckpointError, match=r"^table: other readers"):
        quantize_embedding("table", torch.zeros(64, 64), quant, SolverConfig(), num_tokens=1)


# the command


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_bad_width_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    places = ["anything", *([str(tmp_path / "out")] if command == "quantize" else [])]
    assert main([command, *places, "--embedding-bits", "5"]) == 1
    assert "embedding_bits is 5; supported are" in capsys.readouterr().err


def test_the_command(
    llama: Path, tmp_path: Path, calibration_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ["--group-size", "32", "--embedding-bits", "8"]
    text = ["--calibration", str(calibration_file), "--num-sequences", "2"]
    length = ["--sequence-length", "32"]
    out = tmp_path / "out"
    assert main(["quantize", str(llama), str(out), *layout, *text, *length]) == 0
    quant = CheckpointReader(out).quant_config
    assert quant is not None
    assert quant.for_embedding("model.embed_tokens") == ModuleConfig(bits=8, group_size=32)
    assert quant.for_module("model.layers.0.mlp.up_proj") == ModuleConfig(bits=4, group_size=32)
    assert "largest relative error" in capsys.readouterr().out
