from __future__ import annotations

import argparse
import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from lowbit.kernels.packing import PackedWeight, unpack_codes
from lowbit.quant import calibration
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError, QuantError
from lowbit.quant.evaluate import compare, load_dequantized, load_reference
from lowbit.quant.gptq import factorize, quantize_weight, relative_error
from lowbit.quant.pipeline import QuantizeReport, calibration_batches, quantize
from lowbit.quant.source import load_source
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

CONFIG = QuantConfig(bits=4, group_size=64)
SETTINGS = {"num_sequences": 20, "sequence_length": 128, "progress": False}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(calibration.reference_text()[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(
    tiny_source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, QuantizeReport]:
    out = tmp_path_factory.mktemp("out") / "w4"
    return out, quantize(str(tiny_source), out, CONFIG, calibration_file=text, **SETTINGS)


def hessians(model: torch.nn.Module, batches: Tensor) -> dict[str, Tensor]:
    """The second moments of every linear layer's inputs, through hooks and in fp64."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: torch.nn.Linear) -> None:
        def hook(_: object, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].flatten(0, 1).double()
            found[name] = found.get(name, 0) + rows.t() @ rows

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            watch(name, module)
    with torch.inference_mode():
        for ids in batches:
            model(ids[None])
    return found


def test_every_layer_is_solved_behind_quantized_layers(
    tiny_source: Path, text: Path, done: tuple[Path, QuantizeReport]
) -> None:
    """In the finished model the inputs of every layer must be those that its Hessian was made of:
    the reported errors, and the very codes, come out again."""
    out, report = done
    source = load_source(str(tiny_source))
    batches = calibration.token_batches(
        source.tokenizer,
        calibration.read_text(text),
        num_sequences=20,
        sequence_length=128,
        seed=0,
    )
    assert report.num_calibration_tokens == batches.numel()
    model = load_dequantized(out)
    seen = hessians(model, batches)
    assert [module.name for module in report.modules] == [
        f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS
    ]
    reader = CheckpointReader(out)
    for module in report.modules:
        weight = source.tensors[f"{module.name}.weight"].float()
        result = model.get_parameter(f"{module.name}.weight")
        expected = relative_error(weight.double(), result.double(), seen[module.name])
        assert module.relative_error == pytest.approx(expected, rel=1e-2)
        assert 0 < module.relative_error < 0.02
        factor = factorize(seen[module.name].float(), group_size=64, damp_percent=0.01)
        solved = quantize_weight(weight, factor, bits=4)
        packed = reader.take_linear(module.name, weight.shape[1], weight.shape[0])
        assert isinstance(packed, PackedWeight)
        codes = unpack_codes(packed.qweight, 4, weight.shape[1])
        assert (codes == solved.codes).float().mean() > 0.98
        assert torch.equal(packed.scales, solved.scales)


def test_the_checkpoint_is_close_to_its_source(
    tiny_source: Path, done: tuple[Path, QuantizeReport]
) -> None:
    source = load_source(str(tiny_source))
    held_out = calibration.token_batches(
        source.tokenizer,
        calibration.reference_text()[50_000:60_000],
        num_sequences=4,
        sequence_length=128,
        seed=0,
    )
    found = compare(load_reference(source), load_dequantized(done[0]), held_out)
    assert found.kl_divergence < 0.2  # random weights at 4 bits; a wrong layer gives 1 and more
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=0.1)


def test_the_files(tiny_source: Path, done: tuple[Path, QuantizeReport]) -> None:
    out, report = done
    written = json.loads((out / "config.json").read_text())
    original = json.loads((tiny_source / "config.json").read_text())
    assert written.pop("quantization_config") == CONFIG.to_dict()
    assert written == {**original, "dtype": "float16"}
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "hi"}]
    source = load_source(str(tiny_source)).tokenizer
    assert tokenizer.apply_chat_template(messages) == source.apply_chat_template(messages)
    assert not list(out.parent.glob(".*"))

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


def test_the_same_seed_gives_the_same_bytes(
    tiny_source: Path, text: Path, done: tuple[Path, QuantizeReport], tmp_path: Path
) -> None:
    quantize(str(tiny_source), tmp_path / "b", CONFIG, calibration_file=text, **SETTINGS)
    again = (tmp_path / "b" / "model.safetensors").read_bytes()
    assert again == (done[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(bits=2, group_size=32),
        QuantConfig(bits=3, group_size=-1),
        QuantConfig(bits=8, group_size=128, checkpoint_format="gptq_v2"),
    ],
)
def test_other_widths_and_groups(
    tiny_source: Path, text: Path, tmp_path: Path, config: QuantConfig
) -> None:
    report = quantize(str(tiny_source), tmp_path / "out", config, calibration_file=text, **SETTINGS)
    limit = {2: 0.3, 3: 0.05, 8: 1e-4}[config.bits]
    assert max(module.relative_error for module in report.modules) < limit
    load_dequantized(tmp_path / "out")
    assert CheckpointReader(tmp_path / "out").quant_config == config


def test_the_default_mixes_the_reference_with_conversations(
    tiny_source: Path, tmp_path: Path
) -> None:
    report = quantize(str(tiny_source), tmp_path / "out", CONFIG, **SETTINGS)
    assert report.num_calibration_tokens == 20 * 128
    source = load_source(str(tiny_source))
    mixture = calibration_batches(source, None, 20, 128, 0, False)
    reference = calibration.token_batches(
        source.tokenizer,
        calibration.reference_text(0),
        num_sequences=10,
        sequence_length=128,
        seed=0,
    )
    assert torch.equal(mixture[:10], reference)
    assert source.tokenizer.decode(mixture[10]).startswith("<bos>[user] ")


def test_a_users_text_is_not_mixed(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    batches = calibration_batches(source, "All of it. " * 300, 20, 128, 0, False)
    assert set(batches.flatten().tolist()) == set(b"All of it. ")


def test_without_any_opening_the_reference_stands_alone(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    source.tokenizer.chat_template = None
    source.tokenizer.bos_token = None
    batches = calibration_batches(source, None, 6, 128, 0, False)
    assert batches.shape == (6, 128)
    assert int(batches.max()) < 256


def test_the_progress_bar_tells_the_time_left(
    tiny_source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SETTINGS, "progress": True}
    quantize(str(tiny_source), tmp_path / "out", CONFIG, calibration_file=text, **settings)
    shown = capsys.readouterr().err
    assert "8/8" in shown and "layers.1.mlp.down_proj" in shown and "<00:00" in shown


# what is refused


def refusal(source: Path, out: Path, config: QuantConfig = CONFIG, text: Path | None = None) -> str:
    """The message, after a check that nothing was left behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(QuantError) as caught:
        quantize(str(source), out, config, calibration_file=text, **SETTINGS)
    assert sorted(out.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (QuantConfig(sym=False), "sym is false"),
        (QuantConfig(desc_act=True), "desc_act is true"),
        (QuantConfig(lm_head=True), "lm_head is true"),
    ],
)
def test_unsupported_settings(tmp_path: Path, config: QuantConfig, message: str) -> None:
    assert message in refusal(tmp_path / "no-source", tmp_path / "out", config)


def test_an_occupied_output_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize("no-source", tmp_path / "out", CONFIG)


def test_a_bad_calibration_text_is_refused_before_the_source_is_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    message = refusal(tmp_path / "no-source", tmp_path / "out", text=tmp_path / "empty")
    assert "empty: holds no text" in message


def test_too_short_a_calibration_text(tiny_source: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("hello")
    message = refusal(tiny_source, tmp_path / "out", text=tmp_path / "short")
    assert "5 tokens; at least 2048 are needed" in message


def damaged(source: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(
    tiny_source: Path, tmp_path: Path, name: str, value: float
) -> None:
    source = damaged(tiny_source, tmp_path / "model", name, value)
    message = refusal(source, tmp_path / "out")
    assert message == f"tensor {name} holds values that are not finite"


def test_an_activation_that_is_not_finite_is_named(
    tiny_source: Path, text: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_source, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for part in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"):
        tensors[f"model.layers.0.{part}.weight"].fill_(6e4)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(folder, tmp_path / "out", text=text)
    assert message.startswith("model.layers.0.mlp.down_proj: the Hessian of its inputs")


def test_a_tokenizer_of_another_model(tiny_source: Path, text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_source, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = tensors[name][:100].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "the model's vocabulary ends at 99" in refusal(folder, tmp_path / "out", text=text)


def test_too_little_disk_space(
    tiny_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0 MiB are free" in refusal(tiny_source, tmp_path / "out")


@pytest.mark.slow
def test_the_real_model(real_model_file: Path, tmp_path: Path) -> None:
    report = quantize(str(real_model_file), tmp_path / "out", CONFIG, progress=False)
    source = load_source(str(real_model_file))
    held_out = calibration.token_batches(
        source.tokenizer, inspect.getsource(argparse), num_sequences=4, sequence_length=256, seed=0
    )
    found = compare(load_reference(source), load_dequantized(tmp_path / "out"), held_out)
    assert found.kl_divergence < 0.3
    assert found.top1_agreement > 0.7
    assert report.num_bytes_packed < 0.45 * report.num_bytes_16bit
