from __future__ import annotations

import argparse
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from lowbit.kernels.packing import PackedWeight, dequantize, unpack_codes
from lowbit.quant import calibration
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError, QuantError
from lowbit.quant.evaluate import compare, load_dequantized, load_reference
from lowbit.quant.gptq import SolverConfig, solve
from lowbit.quant.layers import is_router
from lowbit.quant.pipeline import quantize
from lowbit.quant.report import PAGE_FILE, ModuleReport, QuantizeReport, read_report
from lowbit.quant.source import load_source
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = QuantConfig(bits=4, group_size=64)
LENGTHS = {"num_sequences": 20, "sequence_length": 64}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GROUPS = (ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
# What the residual stream is that a layer's output is added to: the input of that module.
STREAMS = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
LINEARS = [name for group in GROUPS for name in group]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(calibration.reference_text()[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(text: Path) -> Callable[..., QuantizeReport]:
    """`quantize` with that text and few tokens of it."""

    def run(source: Path, out: Path, config: QuantConfig, **changes: Any) -> QuantizeReport:
        settings = {"calibration_file": text, "progress": False, **LENGTHS, **changes}
        return quantize(str(source), out, config, **settings)

    return run


Run = Callable[..., QuantizeReport]


def windows(source: Path, text: str, seed: int = 0, **changes: int) -> Tensor:
    tokenizer = load_source(str(source)).tokenizer
    return calibration.token_batches(tokenizer, text, seed=seed, **{**LENGTHS, **changes})


@pytest.fixture(scope="module")
def done(
    tiny_source: Path, run: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeReport]:
    out = tmp_path_factory.mktemp("out") / "w4"
    return out, run(tiny_source, out, CONFIG)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its K and N are multiples of 32."""
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


# what the codes are made of


def inputs_of(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What every module of the layers reads, [T, K] fp64, through hooks on the whole model."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0].flatten(0, -2)

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if name.endswith(("_proj", "layernorm", "lm_head")):
            watch(name, module)
    with torch.inference_mode():
        model.double()(ids)
    return found


@pytest.mark.parametrize("drift", ["none", "inputs", "stream"])
def test_every_layer_is_solved_behind_quantized_layers(
    tiny_source: Path, text: Path, run: Run, tmp_path: Path, drift: str
) -> None:
    """In the finished model the inputs of every layer must be those that its Hessian was made of:
    the reported errors, and the very codes, come out again."""
    solver = SolverConfig(drift=drift, precision="float32")
    report = run(tiny_source, tmp_path / "out", CONFIG, solver=solver)
    ids = windows(tiny_source, text.read_text())
    assert report.num_calibration_tokens == ids.numel()
    names = [f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS]
    assert [module.name for module in report.modules] == names
    original, result = (
        load_reference(load_source(str(tiny_source))),
        load_dequantized(tmp_path / "out"),
    )
    wanted, seen = inputs_of(original, ids), inputs_of(result, ids)
    modules = {module.name: module for module in report.modules}
    reader = CheckpointReader(tmp_path / "out")
    for layer in range(2):
        for group in GROUPS:
            full = [f"model.layers.{layer}.{name}" for name in group]
            weights = [original.get_parameter(f"{name}.weight") for name in full]
            x, y = seen[full[0]], wanted[full[0]]
            drifts = [weight @ (y - x).t() @ x for weight in weights]
            if drift == "stream" and group[0] in STREAMS:
                stream = f"model.layers.{layer}.{STREAMS[group[0]]}"
                drifts[0] += (wanted[stream] - seen[stream]).t() @ x
            hessian = x.t() @ x
            solutions = solve(
                [weight.float() for weight in weights],
                hessian.float(),
                [CONFIG.for_module(name) for name in full],
                solver,
                drifts=None if drift == "none" else [part.float() for part in drifts],
            )
            for name, weight, solution in zip(full, weights, solutions, strict=True):
                module = modules[name]
                assert module.relative_error == pytest.approx(solution.relative_error, rel=0.02)
                assert module.num_tokens == ids.numel()
                packed = reader.take_packed(name)
                codes = unpack_codes(packed.qweight, 4, packed.in_features)
                # Sums in another order change a rounding here and there.
                assert (codes == solution.quantized.codes).float().mean() > 0.98
                assert (packed.scales == solution.quantized.scales).float().mean() > 0.95
                if drift == "none":
                    quantized = result.get_parameter(f"{name}.weight")
                    expected = relative_error(weight, quantized, hessian)
                    assert module.relative_error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_solved_behind_the_whole_model(
    save_source: Callable[..., Any], text: Path, run: Run, tmp_path: Path, tied: bool
) -> None:
    """At 8 bits; one that was tied to the embedding no longer is."""
    source, out = tmp_path / "source", tmp_path / "out"
    save_source(source, tie_word_embeddings=tied)
    config = replace(CONFIG, lm_head=True, dynamic={"+:^lm_head$": {"bits": 8}})
    report = run(source, out, config)
    module = report.modules[-1]
    assert (module.name, module.bits, len(report.modules)) == ("lm_head", 8, 15)
    written, original = (load_file(folder / "model.safetensors") for folder in (out, source))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    embedding = original["model.embed_tokens.weight"]
    assert torch.equal(written["model.embed_tokens.weight"], embedding)
    weight = embedding if tied else original["lm_head.weight"]
    model = load_dequantized(out)
    x = inputs_of(model, windows(source, text.read_text()))["lm_head"]
    hessian, form = (x.t() @ x), config.for_module("lm_head")
    (solution,) = solve([weight.float()], hessian.float(), [form], SolverConfig())
    packed = CheckpointReader(out).take_packed("lm_head")
    codes = unpack_codes(packed.qweight, 8, packed.in_features)
    assert (codes == solution.quantized.codes).float().mean() > 0.95
    expected = relative_error(weight.double(), model.get_parameter("lm_head.weight"), hessian)
    assert module.relative_error == pytest.approx(expected, rel=0.01)
    assert 0 < module.relative_error < 1e-4


# every family, width and format


def linear_names(model: PreTrainedModel) -> set[str]:
    """The layers' linear layers, by the model's own names; routers are none of them."""
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return {name for name in names if ".layer" in name or ".h." in name}


def assert_near(source: Path, out: Path, limit: float) -> None:
    """Linear layers differ a little from the source's, everything else is as it was."""
    original, result = load_reference(load_source(str(source))), load_dequantized(out)
    linears = {f"{name}.weight" for name in linear_names(original) if not is_router(name)}
    expected = original.state_dict()
    found = result.state_dict()
    assert found.keys() == expected.keys() and linears < expected.keys()
    for name, tensor in expected.items():
        if name in linears:
            distance = (found[name] - tensor).norm() / tensor.norm()
            assert 0 < distance < limit, name
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(run: Run, tmp_path: Path, name: str) -> None:
    source = save_family(tmp_path / "source", name)
    report = run(source, tmp_path / "out", QuantConfig(group_size=32))
    assert_near(source, tmp_path / "out", 0.3)  # rounding, and what drift moves
    original, result = load_reference(load_source(str(source))), load_dequantized(tmp_path / "out")
    assert len(report.modules) == sum(not is_router(n) for n in linear_names(original))
    assert all(0 < module.relative_error < 0.01 for module in report.modules)
    assert not any(module.fallback for module in report.modules)
    held_out = calibration.reference_text(held_out=True)
    found = compare(original, result, windows(source, held_out, num_sequences=4))
    assert found.kl_divergence < 0.02
    # 4 bits, and 16 for a scale and 4 for a zero point of 32 weights.
    assert report.bits_per_weight == 4 + 20 / 32


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (QuantConfig(bits=2, group_size=16), 0.1),
        (QuantConfig(bits=3, group_size=96), 0.04),
        (QuantConfig(bits=8, group_size=-1), 1e-4),
        (QuantConfig(bits=2, group_size=16, sym=False, checkpoint_format="gptq_v2"), 0.1),
        (QuantConfig(bits=3, group_size=-1, sym=False, checkpoint_format="gptq_v2"), 0.04),
        (QuantConfig(bits=4, group_size=96, sym=False, checkpoint_format="gptq_v2"), 0.01),
        (QuantConfig(bits=3, group_size=16, checkpoint_format="compressed-tensors"), 0.04),
        (QuantConfig(bits=4, checkpoint_format="compressed-tensors", group_size=-1), 0.01),
        (
            QuantConfig(bits=8, checkpoint_format="compressed-tensors", group_size=32, sym=False),
            1e-4,
        ),
    ],
    ids=lambda value: (
        f"{value.checkpoint_format} {value.bits} {value.group_size} {value.sym}"
        if isinstance(value, QuantConfig)
        else ""
    ),
)
def test_widths_groups_and_formats(
    llama: Path, run: Run, tmp_path: Path, config: QuantConfig, limit: float
) -> None:
    report = run(llama, tmp_path / "out", config)
    errors = [module.relative_error for module in report.modules]
    assert limit / 30 < max(errors) < limit
    assert_near(llama, tmp_path / "out", {2: 0.8, 3: 0.5, 4: 0.25, 8: 0.02}[config.bits])
    reader = CheckpointReader(tmp_path / "out")
    assert reader.quant_config is not None
    for name in reader.packed_prefixes():
        assert reader.quant_config.for_module(name) == config.for_module(name)
        packed = reader.take_packed(name)
        size = packed.in_features if config.group_size == -1 else config.group_size
        assert (packed.bits, packed.group_size) == (config.bits, size)
        assert bool((packed.zeros == 1 << (config.bits - 1)).all()) == config.sym
    reader.take("model.embed_tokens.weight")


def test_the_format_changes_no_code(llama: Path, run: Run, tmp_path: Path) -> None:
    config = QuantConfig(group_size=32)
    states = []
    for name in ("gptq", "gptq_v2", "compressed-tensors"):
        run(llama, tmp_path / name, replace(config, checkpoint_format=name))
        states.append(load_dequantized(tmp_path / name).state_dict())
    for key, tensor in states[0].items():
        assert all(torch.equal(state[key], tensor) for state in states[1:])


def test_dynamic_settings(llama: Path, run: Run, tmp_path: Path) -> None:
    dynamic = {
        r"-:.*layers\.0\.mlp\.": {},
        r"+:.*o_proj$": {"bits": 8, "group_size": 16},
        r".*layers\.1\.self_attn": {"bits": 2, "sym": False},
    }
    config = QuantConfig(group_size=32, checkpoint_format="gptq_v2", dynamic=dynamic)
    report = run(llama, tmp_path / "out", config)
    found = {m.name.removeprefix("model.layers."): m for m in report.modules}
    skipped = {f"0.{name}" for name in LINEARS if "mlp" in name}
    assert found.keys() == {f"{i}.{name}" for i in range(2) for name in LINEARS} - skipped
    for name, module in found.items():
        expected = (4, 32, True)
        if name.endswith("o_proj"):
            expected = (8, 16, True)
        elif name.startswith("1.self_attn"):
            expected = (2, 32, False)
        assert (module.bits, module.group_size, module.sym) == expected
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(llama / "model.safetensors")
    for name in skipped:
        key = f"model.layers.{name}.weight"
        assert torch.equal(tensors[key], original[key])
    load_dequantized(tmp_path / "out")


def test_everything_skipped(llama: Path, run: Run, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", QuantConfig(dynamic={"-:.*": {}}))
    assert report.modules == () and report.bits_per_weight == 16
    found = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(llama / "model.safetensors")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in found)


# experts


def starve(folder: Path) -> Path:
    """Expert 3 gets the tokens "~" and no others: feature 0 of the residual stream tells them."""
    save_family(folder, "qwen3 moe")
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0.3
    embedding[ord("~"), 0] = -0.3
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name in tensors:
            if name.startswith(prefix) and name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name][0] = 0
        tensors[f"{prefix}post_attention_layernorm.weight"][0] = 1
        router = tensors[f"{prefix}mlp.gate.weight"]
        router[3] = router[:, 0] = 0
        router[3, 0] = -50
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_nearest(packed: PackedWeight, weight: Tensor) -> bool:
    """Whether no other code of its grid is nearer to any weight."""
    scales = packed.scales.float().repeat_interleave(packed.group_size, 0)[: packed.in_features]
    levels = torch.arange(1 << packed.bits) - (1 << (packed.bits - 1))
    nearest = (weight.t()[..., None] - scales[..., None] * levels).abs().amin(-1)
    return bool(((weight - dequantize(packed)).abs().t() <= nearest + 1e-6).all())


@pytest.mark.parametrize("count", [0, 3, 40])
def test_an_expert_that_saw_too_few_tokens_is_rounded_to_nearest(
    run: Run, tmp_path: Path, count: int
) -> None:
    source, path = starve(tmp_path / "source"), tmp_path / "text"
    plain = calibration.reference_text()[:10_000].encode("ascii", "ignore").replace(b"~", b"")
    path.write_bytes(b"~" * count + plain[: 40 * 64 - count])
    settings = {"calibration_file": path, "num_sequences": 40, "sequence_length": 64}
    report = run(source, tmp_path / "out", QuantConfig(group_size=32), **settings)
    weights, reader = load_file(source / "model.safetensors"), CheckpointReader(tmp_path / "out")
    counts = {m.name: m.num_tokens for m in report.modules if ".experts.3." in m.name}
    assert list(counts.values()) == [count] * 6
    for module in report.modules:
        weight = weights[f"{module.name}.weight"].float()
        nearest = is_nearest(reader.take_packed(module.name), weight)
        if module.name in counts and count < 40:
            reason = f"{count} tokens reached it, 13 are needed"  # 0.5 % of 2560
            assert module.fallback is not None and reason in module.fallback
            assert nearest
        else:
            assert module.fallback is None
            assert not nearest
    page = (tmp_path / "out" / PAGE_FILE).read_text()
    assert ("tokens reached it" in page) == (count < 40)


@pytest.mark.parametrize(
    ("name", "routers"),
    [
        ("mixtral", ["block_sparse_moe.gate"]),
        ("qwen2 moe", ["mlp.gate", "mlp.shared_expert_gate"]),
        ("qwen3 moe", ["mlp.gate"]),
    ],
)
def test_routers_are_never_quantized(
    run: Run, tmp_path: Path, name: str, routers: list[str]
) -> None:
    source = save_family(tmp_path / "source", name)
    config = QuantConfig(group_size=32, dynamic={"+:.*gate$": {"bits": 8}})
    report = run(source, tmp_path / "out", config)
    found, original = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source)
    )
    for key in [f"model.layers.{i}.{router}.weight" for i in range(2) for router in routers]:
        assert torch.equal(found[key], original[key])
    assert all("proj" in m.name or ".experts." in m.name for m in report.modules)


# the run and its files


def test_the_checkpoint_is_close_to_its_source(
    tiny_source: Path, done: tuple[Path, QuantizeReport]
) -> None:
    held_out = windows(tiny_source, calibration.reference_text(held_out=True), num_sequences=8)
    original = load_reference(load_source(str(tiny_source)))
    found = compare(original, load_dequantized(done[0]), held_out)
    assert found.kl_divergence < 0.2  # random weights at 4 bits; a wrong layer gives 1 and more
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=0.1)


def test_the_files(tiny_source: Path, done: tuple[Path, QuantizeReport]) -> None:
    out, report = done
    written = json.loads((out / "config.json").read_text())
    original = json.loads((tiny_source / "config.json").read_text())
    quant = written.pop("quantization_config")
    assert quant == CONFIG.to_dict() == json.loads((out / "quantize_config.json").read_text())
    assert written == {**original, "dtype": "float16"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "hi"}]
    source = load_source(str(tiny_source)).tokenizer
    assert tokenizer.apply_chat_template(messages) == source.apply_chat_template(messages)
    assert [path.name for path in out.parent.iterdir()] == [out.name]

    tensors = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in tensors  # tied, as it was
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    original_tensors = load_file(tiny_source / "model.safetensors")
    kept = [name for name in original_tensors if "norm" in name or "embed" in name]
    assert len(kept) == 6
    for name in kept:
        assert torch.equal(tensors[name], original_tensors[name])
    assert report.num_bytes_packed == sum(tensor.nbytes for tensor in tensors.values())
    assert report.num_bytes_16bit == sum(tensor.nbytes for tensor in original_tensors.values())


def test_the_report(tiny_source: Path, done: tuple[Path, QuantizeReport]) -> None:
    out, report = done
    assert read_report(out) == (report, None)
    assert report.source == str(tiny_source)
    assert report.num_calibration_tokens == 20 * 64
    settings = {"bits": 4, "group_size": 64, "seed": 0, "calibration": "text", **LENGTHS}
    assert settings.items() <= report.settings.items()
    seconds = sum(module.seconds for module in report.modules)
    assert 0 < seconds < report.seconds
    weights = load_file(tiny_source / "model.safetensors")
    for module in report.modules:
        assert module.num_parameters == weights[f"{module.name}.weight"].numel()
        assert (module.bits, module.group_size, module.sym) == (4, 64, True)
        assert module.damp_percent == 0.01


def without_seconds(report: QuantizeReport) -> list[ModuleReport]:
    return [replace(module, seconds=0.0) for module in report.modules]


@pytest.mark.parametrize("activation_memory_bytes", [0, 100_000, 2 << 30])
def test_the_same_seed_gives_the_same_bytes(
    tiny_source: Path,
    run: Run,
    done: tuple[Path, QuantizeReport],
    tmp_path: Path,
    activation_memory_bytes: int,
) -> None:
    """However many activations stay in memory."""
    settings = {"activation_memory_bytes": activation_memory_bytes}
    report = run(tiny_source, tmp_path / "out", CONFIG, **settings)
    again = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert again == (done[0] / "model.safetensors").read_bytes()
    assert without_seconds(report) == without_seconds(done[1])


def test_another_seed_gives_other_codes(
    tiny_source: Path, run: Run, done: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    run(tiny_source, tmp_path / "out", CONFIG, seed=1)
    other = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert other != (done[0] / "model.safetensors").read_bytes()


def test_windows_are_no_longer_than_the_model_takes(
    tiny_source: Path, run: Run, tmp_path: Path
) -> None:
    report = run(tiny_source, tmp_path / "out", CONFIG, num_sequences=2, sequence_length=300)
    assert report.num_calibration_tokens == 2 * 256


def test_without_a_file_the_built_in_text_is_read(
    tiny_source: Path, run: Run, tmp_path: Path
) -> None:
    settings = {"calibration_file": None, "activation_memory_bytes": 0}  # too little to draw
    report = run(tiny_source, tmp_path / "out", CONFIG, **settings)
    assert report.num_calibration_tokens == 20 * 64
    path = tmp_path / "text"
    path.write_text(calibration.reference_text(), encoding="utf-8")
    run(tiny_source, tmp_path / "again", CONFIG, calibration_file=path)
    found = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert found[0] == found[1]


def test_the_progress_bar_tells_the_time_left(
    tiny_source: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_source, tmp_path / "out", CONFIG, progress=True)
    shown = capsys.readouterr().err
    assert "2/2" in shown and "layers.1.mlp.down_proj error" in shown and "<00:00" in shown


# what is refused


def refusal(run: Run, source: Path, out: Path, config: QuantConfig = CONFIG, **changes: Any) -> str:
    """The message, after a check that nothing was left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(QuantError) as caught:
        run(source, out, config, **changes)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            QuantConfig(desc_act=True),
            "desc_act is true; checkpoints like that are read, never made",
        ),
        (QuantConfig(checkpoint_format="awq"), "checkpoint_format is 'awq'; this format is read"),
    ],
)
def test_unsupported_settings(run: Run, tmp_path: Path, config: QuantConfig, message: str) -> None:
    assert message in refusal(run, tmp_path / "no-source", tmp_path / "out", config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(sym=False), "q_proj: asymmetric codes need checkpoint_format 'gptq_v2'"),
        (QuantConfig(bits=3), "q_proj: in_features is 72; 3-bit GPTQ needs a multiple of 32"),
        (
            QuantConfig(checkpoint_format="compressed-tensors"),
            "q_proj: in_features is 72; compressed-tensors needs a multiple of group_size 64",
        ),
        (
            QuantConfig(dynamic={"+:.*down_proj": {"sym": False}}),
            "model.layers.0.mlp.down_proj: asymmetric codes need",
        ),
    ],
)
def test_a_layer_that_the_format_cannot_hold_is_named(
    tiny_source: Path, run: Run, tmp_path: Path, config: QuantConfig, message: str
) -> None:
    assert message in refusal(run, tiny_source, tmp_path / "out", config)


def test_a_negative_limit_of_memory(tiny_source: Path, run: Run, tmp_path: Path) -> None:
    message = refusal(run, tiny_source, tmp_path / "out", activation_memory_bytes=-1)
    assert message == "activation_memory_bytes is -1; it must be at least 0"


def test_a_head_that_is_not_there(run: Run, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", "bert")
    message = refusal(run, source, tmp_path / "out", QuantConfig(lm_head=True))
    assert message == "lm_head is true; this model has no output head"


def test_an_occupied_output_is_refused_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        run(tmp_path / "no-source", tmp_path / "out", CONFIG)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_bad_calibration_text_is_refused_before_the_source_is_read(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    changes = {"calibration_file": tmp_path / "empty"}
    message = refusal(run, tmp_path / "no-source", tmp_path / "out", **changes)
    assert message.endswith("empty: holds no text")


def test_too_short_a_calibration_text(tiny_source: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("hello")
    changes = {"calibration_file": tmp_path / "short"}
    message = refusal(run, tiny_source, tmp_path / "out", **changes)
    assert message == "the calibration text has 5 tokens; at least 2048 are needed"


def changed(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(
    tiny_source: Path, run: Run, tmp_path: Path, name: str, value: float
) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[7] = value

    source = changed(tiny_source, tmp_path / "model", damage)
    message = refusal(run, source, tmp_path / "out")
    assert message == f"tensor {name} holds values that are not finite"


def test_an_activation_that_is_not_finite_is_named(
    tiny_source: Path, run: Run, tmp_path: Path
) -> None:
    def enlarge(tensors: dict[str, Tensor]) -> None:
        for part in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"):
            tensors[f"model.layers.0.{part}.weight"].fill_(6e4)

    source = changed(tiny_source, tmp_path / "model", enlarge)
    message = refusal(run, source, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    assert message == f"{name}: its inputs hold values that are not finite"


@pytest.mark.parametrize("name", ["model.layers.0.input_layernorm.weight", "model.norm.weight"])
def test_a_weight_beyond_the_fp16_range_is_named(
    tiny_source: Path, run: Run, tmp_path: Path, name: str
) -> None:
    """What is not quantized is stored in fp16, whatever it was."""

    def enlarge(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].float()
        tensors[name][3] = 7e4

    source = changed(tiny_source, tmp_path / "model", enlarge)
    message = refusal(run, source, tmp_path / "out")
    assert message == f"tensor {name} holds values beyond the fp16 range"


def test_a_tokenizer_of_another_model(
    save_source: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    save_source(tmp_path / "model", vocab_size=100, bos_token_id=1, eos_token_id=2)
    message = refusal(run, tmp_path / "model", tmp_path / "out")
    assert "the model's vocabulary ends at 99" in message


def test_too_little_disk_space(
    tiny_source: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0 MiB are free" in refusal(run, tiny_source, tmp_path / "out")


@pytest.mark.slow
def test_the_real_model(real_model_file: Path, tmp_path: Path) -> None:
    fewer = {"num_sequences": 8, "sequence_length": 256}
    report = quantize(str(real_model_file), tmp_path / "out", CONFIG, progress=False, **fewer)
    source = load_source(str(real_model_file))
    held_out = calibration.token_batches(
        source.tokenizer, inspect.getsource(argparse), num_sequences=4, sequence_length=256, seed=0
    )
    found = compare(load_reference(source), load_dequantized(tmp_path / "out"), held_out)
    assert found.kl_divergence < 0.3
    assert found.top1_agreement > 0.7
    assert report.num_bytes_packed < 0.45 * report.num_bytes_16bit
