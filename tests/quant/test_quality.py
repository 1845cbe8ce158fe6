from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from families import save_family
from lowbit.quant.calibration import reference_text, token_batches
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CalibrationError, CheckpointError, QuantError
from lowbit.quant.quality import HELD_OUT, evaluate, evaluate_checkpoint
from lowbit.quant.report import (
    PAGE_FILE,
    REPORT_FILE,
    ModuleReport,
    QuantizeReport,
    read_report,
    write_report,
)
from lowbit.server.cli import main
from safetensors.torch import load_file
from tiny import TinyModel, build_tiny_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FEW = {"num_sequences": 3, "sequence_length": 64}
FEW_OPTIONS = ["--num-sequences", "3", "--sequence-length", "64"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("quality") / "w4")


@pytest.fixture(scope="module")
def source(checkpoint: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit model near the checkpoint: the same weights, disturbed."""
    folder = tmp_path_factory.mktemp("quality") / "source"
    config = LlamaConfig(**checkpoint.oracle.config.to_dict())
    model = LlamaForCausalLM(config)
    torch.manual_seed(7)
    for mine, theirs in zip(model.parameters(), checkpoint.oracle.parameters(), strict=True):
        mine.data = theirs.data + 0.02 * torch.randn_like(theirs)
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint.folder).save_pretrained(folder)
    return folder


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("Whatever is written here is compared, word by word.\n" * 200)
    return path


def log_probabilities(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.log_softmax(model(ids).logits[:, :-1].double(), dim=-1)


def test_the_figures_are_those_of_both_models_on_the_text(
    source: Path, checkpoint: TinyModel, tmp_path: Path
) -> None:
    path = text_file(tmp_path)
    found = evaluate_checkpoint(str(source), checkpoint.folder, text_file=path, seed=3, **FEW)
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids = token_batches(tokenizer, path.read_text(), seed=3, **FEW)
    original = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    p, q = log_probabilities(original, ids), log_probabilities(checkpoint.oracle, ids)
    divergence = (p.exp() * (p - q)).sum(dim=-1).flatten()
    compared = found.comparison
    assert compared.num_tokens == divergence.numel() == 3 * 63
    assert compared.kl_divergence == pytest.approx(float(divergence.mean()), rel=1e-4)
    ordered = divergence.sort().values.tolist()  # 99 % of 188 steps: between the 187th and 188th
    expected = ordered[186] + 0.12 * (ordered[187] - ordered[186])
    assert compared.kl_divergence_p99 == pytest.approx(expected, rel=1e-4)
    loss = -q.gather(2, ids[:, 1:, None]).mean()
    assert compared.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    agreed = (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean()
    assert compared.top1_agreement == pytest.approx(float(agreed))
    assert (found.reference, found.text) == (str(source), str(path))
    assert (found.num_sequences, found.sequence_length) == (3, 64)


def test_the_default_text_is_never_calibrated_on(source: Path, checkpoint: TinyModel) -> None:
    def paragraphs(text: str) -> set[str]:
        """Topics quote one another; headings and one-line examples may be alike by chance."""
        found = {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}
        return {paragraph for paragraph in found if len(paragraph) > 60}

    held_out, calibrated = reference_text(1, held_out=True), reference_text(1)
    assert len(paragraphs(held_out)) > 200
    assert not paragraphs(held_out) & paragraphs(calibrated)
    assert len(held_out) + len(calibrated) > 0.99 * sum(map(len, topics.values()))
    assert evaluate_checkpoint(str(source), checkpoint.folder, **FEW).text == HELD_OUT


def test_sizes_are_those_of_the_files(source: Path, checkpoint: TinyModel) -> None:
    (found,) = evaluate(str(source), [checkpoint.folder], **FEW)
    tensors = load_file(checkpoint.folder / "model.safetensors")
    parts = ("qweight", "qzeros", "scales")
    packed = sum(t.nbytes for n, t in tensors.items() if n.endswith(parts))
    weights = sum(
        module.weight.numel()
        for name, module in checkpoint.oracle.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert found.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert found.bits_per_weight == 8 * packed / weights
    parameters = sum(p.numel() for p in checkpoint.oracle.parameters())
    assert found.num_bytes_16bit == 2 * parameters


def test_a_16_bit_model_equals_itself(source: Path) -> None:
    (found,) = evaluate(str(source), [source], **FEW)
    assert found.bits_per_weight is None
    assert found.quality.comparison.kl_divergence == 0
    assert found.num_bytes == found.num_bytes_16bit
    assert found.increase == 0


def test_an_encoder_is_compared_without_perplexity(tmp_path: Path) -> None:
    folder = save_family(tmp_path / "bert", "bert")
    (found,) = evaluate(str(folder), [folder], **FEW)
    assert found.quality.comparison.perplexity is None
    assert found.increase is None
    assert found.quality.comparison.num_tokens == 3 * 64  # every position, not all but the first


def test_a_report_of_the_run_gets_the_figures(
    source: Path, checkpoint: TinyModel, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in checkpoint.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    module = ModuleReport(
        name="model.layers.0.self_attn.q_proj",
        bits=4,
        group_size=64,
        sym=True,
        num_parameters=1,
        num_tokens=1,
        relative_error=0.1,
        damp_percent=0.01,
        fallback=None,
        seconds=1.0,
    )
    made = QuantizeReport(
        source="source",
        settings={},
        seconds=1.0,
        num_calibration_tokens=1,
        num_bytes_16bit=1,
        num_bytes_packed=1,
        bits_per_weight=4.5,
        peak_memory_bytes=1,
        modules=(module,),
    )
    write_report(folder, made, None)
    before = (folder / PAGE_FILE).read_text()
    found = evaluate_checkpoint(str(source), folder, **FEW)
    assert read_report(folder) == (made, found)
    assert (folder / PAGE_FILE).read_text() != before
    evaluate_checkpoint(str(source), checkpoint.folder, **FEW)
    assert not (checkpoint.folder / REPORT_FILE).exists()  # none is made up where there was none


def test_what_cannot_be_compared_is_refused_before_any_work(
    source: Path, checkpoint: TinyModel, tmp_path: Path
) -> None:
    other = build_tiny_model(tmp_path / "other", vocab_size=330)
    (tmp_path / "short.txt").write_text("too short")
    for folders, file, kind, message in (
        ([checkpoint.folder, tmp_path / "nothing"], None, CheckpointError, "no such folder"),
        ([other.folder], None, CheckpointError, "vocab_size is 330"),
        ([checkpoint.folder], tmp_path / "short.txt", CalibrationError, "9 tokens"),
        ([checkpoint.folder], tmp_path / "absent.txt", CalibrationError, "cannot be read"),
    ):
        with pytest.raises(kind, match=message) as refusal:
            next(evaluate(str(source), folders, text_file=file, **FEW))
        assert len(str(refusal.value).splitlines()) == 1
    with pytest.raises(QuantError, match="is quantized already"):
        next(evaluate(str(checkpoint.folder), [checkpoint.folder], **FEW))


def test_the_command_prints_a_table_and_writes_its_files(
    source: Path, checkpoint: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    w8 = build_tiny_model(tmp_path / "w8", quant=QuantConfig(bits=8, group_size=32))
    files = ["--json", str(tmp_path / "e.json"), "--html", str(tmp_path / "e.html")]
    names = [str(checkpoint.folder), str(w8.folder)]
    assert main(["eval", str(source), *names, *FEW_OPTIONS, *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{source} at 16 bits: ")
    assert HELD_OUT in lines[1]
    assert [line.split()[-1] for line in lines[2:]] == ["checkpoint", *names]
    written = json.loads((tmp_path / "e.json").read_text())["evaluations"]
    assert [row["checkpoint"] for row in written] == names
    for row, line in zip(written, lines[3:], strict=True):
        assert f"{row['quality']['comparison']['kl_divergence']:.5f}" in line
        assert f"{row['bits_per_weight']:.3f}" in line
    assert (tmp_path / "e.html").read_text().count("<svg") == 1


def test_the_commands_refusals_are_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(source), str(tmp_path / "nothing")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("lowbit eval: error: ")
    assert str(tmp_path / "nothing") in err


def test_the_same_seed_is_the_same_text(source: Path, checkpoint: TinyModel) -> None:
    first = evaluate_checkpoint(str(source), checkpoint.folder, seed=1, **FEW)
    assert evaluate_checkpoint(str(source), checkpoint.folder, seed=1, **FEW) == first
    other = evaluate_checkpoint(str(source), checkpoint.folder, seed=2, **FEW)
    assert dataclasses.asdict(other) != dataclasses.asdict(first)
