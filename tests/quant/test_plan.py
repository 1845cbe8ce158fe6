from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import CheckpointError, QuantError, SourceError
from lowbit.quant.gptq import SolverConfig
from lowbit.quant.pipeline import quantize
from lowbit.quant.plan import Plan, Rates, describe, measure_rates, plan_model, plan_run
from lowbit.server.cli import main
from safetensors import safe_open
from transformers import LlamaConfig, OPTConfig, PretrainedConfig

RATES = Rates(
    matmul=1e11, product=1e11, matmul64=5e10, copy=1e9, solver_column=1e-4, solver_weight=1e-8
)  # or every test would measure the machine
GIB = 1 << 30
LLAMA_65B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=22_016,
    num_hidden_layers=80,
    num_attention_heads=64,
    max_position_embeddings=2048,
)
OPT_175B = OPTConfig(
    vocab_size=50_272,
    hidden_size=12_288,
    ffn_dim=49_152,
    num_hidden_layers=96,
    num_attention_heads=96,
    word_embed_proj_dim=12_288,
    max_position_embeddings=2048,
)


def plan(model: PretrainedConfig, config: QuantConfig | None = None, **settings: Any) -> Plan:
    return plan_model("model", model, config or QuantConfig(), rates=RATES, **settings)


def written_bytes(folder: Path) -> int:
    """Of all tensors, by what the files' headers say."""
    sizes = {"F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "U8": 1}
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                found = file.get_slice(name)
                count = 1
                for size in found.get_shape():
                    count *= size
                total += sizes[found.get_dtype()] * count
    return total


# sizes


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", QuantConfig(bits=2, group_size=16)),
        ("llama", QuantConfig(bits=3, group_size=-1, checkpoint_format="compressed-tensors")),
        ("llama", QuantConfig(bits=8, group_size=128, lm_head=True)),
        ("llama", QuantConfig(sym=False, checkpoint_format="gptq_v2", lm_head=True)),
        ("llama with biases", QuantConfig(group_size=32, dynamic={"-:.*mlp": {}})),
        ("llama with biases", QuantConfig(group_size=32, checkpoint_format="compressed-tensors")),
        ("gpt2", QuantConfig(bits=3, group_size=96, sym=False, checkpoint_format="gptq_v2")),
        ("opt", QuantConfig(bits=4, dynamic={r".*\.fc1$": {"bits": 8, "group_size": 32}})),
        ("bloom", QuantConfig(lm_head=True, dynamic={"^lm_head$": {"bits": 8}})),
        ("bert", QuantConfig(bits=8)),
        ("mixtral", QuantConfig(bits=4, group_size=32)),
        ("qwen2 moe", QuantConfig(bits=4, group_size=32, lm_head=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.checkpoint_format}",
)
def test_sizes_are_the_bytes_that_a_run_writes(
    tmp_path: Path, calibration_file: Path, family: str, config: QuantConfig
) -> None:
    source = str(save_family(tmp_path / "source", family))
    settings = {"num_sequences": 16, "sequence_length": 128}
    planned = plan_run(source, config, rates=RATES, **settings)
    done = quantize(
        source,
        tmp_path / "out",
        config,
        calibration_file=calibration_file,
        progress=False,
        **settings,
    )
    assert planned.num_bytes_packed == written_bytes(tmp_path / "out") == done.num_bytes_packed
    assert planned.num_bytes_16bit == done.num_bytes_16bit
    assert planned.num_quantized == len(done.modules)
    assert planned.bits_per_weight == pytest.approx(done.bits_per_weight, rel=1e-12)
    assert planned.num_calibration_tokens == done.num_calibration_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned_from_its_configuration(tmp_path: Path, family: str) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    from_folder = plan_run(str(tmp_path), QuantConfig(group_size=32), rates=RATES)
    from_file = plan_run(str(tmp_path / "config.json"), QuantConfig(group_size=32), rates=RATES)
    assert from_folder.num_parameters == from_file.num_parameters > 0
    assert from_folder.num_bytes_packed == from_file.num_bytes_packed < from_file.num_bytes_16bit


def test_a_row_of_groups_costs_what_the_layout_says() -> None:
    model = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    weights = 4 * 256 * 256 + 3 * 256 * 512
    rest = 64 * 256 + 3 * 256  # the embedding and three norms
    found = plan(model, QuantConfig(bits=4, group_size=128))
    assert found.num_parameters == weights + rest
    assert found.num_bytes_16bit == 2 * (weights + rest)
    assert found.bits_per_weight == 4 + (16 + 4) / 128
    g_idx = 4 * (6 * 256 + 512)
    assert found.num_bytes_packed == weights // 2 + weights // 128 * 5 // 2 + g_idx + 2 * rest


# the claims of the README


def test_llama_65b_at_4_bits_fits_one_80_gb_card() -> None:
    found = plan(LLAMA_65B, QuantConfig(bits=4, group_size=128), gpu="A100-80", kv_tokens=2048)
    assert found.num_parameters == 65_285_660_672  # as published
    assert found.num_bytes_packed / 1e9 == pytest.approx(34.7, abs=0.05)
    assert found.gpu is not None and found.gpu.fits
    assert found.gpu.kv_bytes == 2048 * 2 * 2 * 80 * 8192
    assert found.gpu.max_kv_tokens is not None and found.gpu.max_kv_tokens > 16_000
    assert not plan(LLAMA_65B, gpu="RTX 3090").gpu.fits  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bits", "group_size", "gigabytes", "fits"),
    [
        (4, 128, 91.7, False),
        (4, -1, 88.4, False),  # more than the card has, even without a KV cache
        (3, 128, 69.8, False),  # the checkpoint alone would fit: 1,587 tokens of KV cache do
        (3, -1, 66.6, True),
        (2, 128, 47.9, True),
        (2, 32, 57.1, True),
    ],
)
def test_opt_175b_on_one_80_gb_card(
    bits: int, group_size: int, gigabytes: float, fits: bool
) -> None:
    config = QuantConfig(bits=bits, group_size=group_size)
    found = plan(OPT_175B, config, gpu="A100-80", kv_tokens=2048)
    assert found.num_parameters == pytest.approx(175e9, rel=0.005)
    assert found.num_bytes_packed / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert found.gpu is not None
    assert found.gpu.kv_bytes / 1e9 == pytest.approx(9.66, abs=0.01)  # 9 GiB, as published
    assert found.gpu.fits == fits
    assert (found.gpu.max_kv_tokens or 0) >= (2048 if fits else 0)
    if bits == 4:
        assert found.num_bytes_packed > found.gpu.memory_bytes


# memory and time


def held(found: Plan) -> dict[str, int]:
    return {term.label: term.num_bytes for term in found.memory.terms}


def test_memory_is_that_of_one_layer_and_the_text() -> None:
    exact = SolverConfig(precision="float32")
    some = plan(LLAMA_65B, num_sequences=16, sequence_length=512, solver=exact)
    assert some.peak_memory_bytes == sum(held(some).values())
    layer = 4 * 8192 * 8192 + 3 * 8192 * 22_016 + 2 * 8192
    assert held(some)["the decoder layer, fp32"] == 4 * layer
    assert held(some)["the same at 16 bits"] == 2 * layer
    states = 2 * 4 * 16 * 512 * 8192  # of the quantized model, and of the 16-bit one
    assert held(some)["activations between layers"] == states
    alone = plan(
        LLAMA_65B, num_sequences=16, sequence_length=512, solver=SolverConfig(drift="none")
    )
    assert held(alone)["activations between layers"] == states // 2
    assert held(alone)["the same at 16 bits"] == held(alone)["what the outputs lack"] == 0
    settings = {"num_sequences": 64, "sequence_length": 512, "activation_memory_bytes": 8 * GIB}
    more = plan(LLAMA_65B, **settings)
    assert held(more)["activations between layers"] == 4 * states
    # The 16-bit model sees the drift's tokens only.
    fewer = plan(LLAMA_65B, **settings, solver=SolverConfig(drift_tokens=16_384))
    assert held(fewer)["activations between layers"] == 3 * states
    # Passes that wait inside the layer need no weight that they are past.
    waiting = plan(
        LLAMA_65B, num_sequences=16, sequence_length=512, activation_memory_bytes=8 * GIB
    )
    assert held(waiting)["the same at 16 bits"] == 2 * (3 * 8192 * 22_016 + 2 * 8192)
    # One decoder layer at a time: twice the layers, hardly more memory.
    twice = LlamaConfig(**{**LLAMA_65B.to_dict(), "num_hidden_layers": 160})
    assert plan(twice).peak_memory_bytes == plan(LLAMA_65B).peak_memory_bytes


def test_activations_stay_within_their_limit() -> None:
    settings = {"num_sequences": 512, "sequence_length": 2048}
    bounded = plan(LLAMA_65B, activation_memory_bytes=GIB, **settings)
    unbounded = plan(LLAMA_65B, activation_memory_bytes=1024 * GIB, **settings)
    assert held(bounded)["activations between layers"] == GIB
    assert held(bounded)["activations in the layer"] == 0
    assert unbounded.peak_memory_bytes > bounded.peak_memory_bytes + 30 * GIB


def test_a_gpu_holds_what_is_computed_with() -> None:
    """And the processor what waits: the activations between layers, and what is finished."""
    settings: dict[str, Any] = {"solver": SolverConfig(precision="bfloat16"), "num_sequences": 64}
    alone = plan(LLAMA_65B, **settings)
    found = plan(LLAMA_65B, device=torch.device("cuda"), **settings)
    assert found.gpu_memory is not None and (alone.device, found.device) == ("cpu", "cuda")
    on_gpu, beside = (
        {t.label: t.num_bytes for t in p.terms} for p in (found.gpu_memory, found.memory)
    )
    largest_layer = 4 * (4 * 8192**2 + 3 * 8192 * 22_016 + 2 * 8192)
    assert on_gpu["the decoder layer, fp32"] <= largest_layer
    assert on_gpu["the Hessian and its factor"] >= 8 * 22_016**2
    between = 64 * 512 * 8192 * 4 * 2  # of both models
    assert beside["activations between layers"] == min(between, 2 << 30)
    assert not {"the decoder layer, fp32", "the Hessian and its factor"} & {*beside}
    assert not {"activations between layers", "its packed weights"} & {*on_gpu}
    assert found.memory.num_bytes < alone.memory.num_bytes
    assert "\nGPU memory " in describe(found) and "\nGPU memory " not in describe(alone)
    assert found.num_bytes_packed == alone.num_bytes_packed


def test_time_is_the_sum_of_its_parts_and_follows_the_machine() -> None:
    found = plan(LLAMA_65B)
    assert found.seconds == pytest.approx(sum(seconds for _, seconds in found.time))
    assert all(seconds > 0 for _, seconds in found.time)
    tenfold = Rates(
        matmul=1e12, product=1e12, matmul64=5e11, copy=1e10, solver_column=1e-5, solver_weight=1e-9
    )
    faster = plan_model("model", LLAMA_65B, QuantConfig(), rates=tenfold)
    assert faster.seconds == pytest.approx(found.seconds / 10)
    twice = plan(LLAMA_65B, num_sequences=32)
    parts, more = dict(found.time), dict(twice.time)
    assert more["Hessians"] == pytest.approx(2 * parts["Hessians"])
    assert more["solving"] == parts["solving"]


def test_an_expert_sees_its_share_of_the_tokens() -> None:
    model = FAMILIES["mixtral"]()
    all_of_them = FAMILIES["mixtral"]()
    all_of_them.num_experts_per_tok = all_of_them.num_local_experts
    some, every = dict(plan(model).time), dict(plan(all_of_them).time)
    assert some["forward passes"] < every["forward passes"]
    assert some["Hessians"] < every["Hessians"]
    assert some["solving"] == every["solving"]


def test_the_machine_is_measured() -> None:
    rates = measure_rates()
    assert 1e8 < rates.matmul < 1e15
    assert 1e8 < rates.matmul64 < 1e15
    assert 1e7 < rates.copy < 1e13
    assert rates.solver_column >= 0 and rates.solver_weight >= 0
    assert rates.solver_column + rates.solver_weight > 0


# a GPU


@pytest.mark.parametrize(
    ("name", "found", "gib"),
    [
        ("A100-80", "A100-80", 80),
        ("a100 80gb", "A100-80", 80),
        ("H100", "H100-80", 79.6),
        ("rtx_4090", "RTX4090", 24),
        ("l4", "L4", 22.5),
        ("L40S", "L40S", 45),
        ("H200", "H200-141", 140.4),
    ],
)
def test_gpus_go_by_several_names(name: str, found: str, gib: float) -> None:
    fit = plan(FAMILIES["llama"](), gpu=name).gpu
    assert fit is not None
    assert fit.name == found
    assert fit.memory_bytes / GIB == pytest.approx(gib, abs=0.1)
    assert fit.usable_bytes == int(0.9 * fit.memory_bytes)


@pytest.mark.parametrize(
    ("name", "message"),
    [("A100", "known are A100-40, A100-80$"), ("voodoo", "gpu is 'voodoo'"), ("", "gpu is ''")],
)
def test_an_unknown_gpu(name: str, message: str) -> None:
    with pytest.raises(QuantError, match=message):
        plan(FAMILIES["llama"](), gpu=name)


def test_an_encoder_has_no_kv_cache() -> None:
    fit = plan(FAMILIES["bert"](), gpu="T4", kv_tokens=2048).gpu
    assert fit is not None
    assert (fit.kv_bytes, fit.max_kv_tokens) == (0, None)


def test_grouped_query_attention_caches_its_key_value_heads_alone() -> None:
    fit = plan(FAMILIES["qwen3"](), gpu="T4", kv_tokens=10).gpu  # 2 layers, 2 heads of 32
    assert fit is not None
    assert fit.kv_bytes == 10 * 2 * 2 * 2 * 2 * 32


# refusals and the command


def test_sizes_that_a_format_cannot_hold_are_refused_by_name() -> None:
    model = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    with pytest.raises(CheckpointError, match=r"^model\.layers\.0\.self_attn\.q_proj: in_features"):
        plan(model, QuantConfig(bits=3, group_size=32))
    with pytest.raises(CheckpointError, match=r"q_proj.*gptq_v2"):
        plan(model, QuantConfig(sym=False))
    with pytest.raises(QuantError, match="lm_head is true"):
        plan(FAMILIES["bert"](), QuantConfig(lm_head=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_sequences": 0}, "num_sequences is 0"),
        ({"sequence_length": -1}, "sequence_length is -1"),
        ({"kv_tokens": -5}, "kv_tokens is -5"),
    ],
)
def test_settings_out_of_range(settings: dict[str, int], message: str) -> None:
    with pytest.raises(QuantError, match=message):
        plan(FAMILIES["llama"](), **settings)


def test_sources_that_cannot_be_planned(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    FAMILIES["llama"]().save_pretrained(tmp_path / "packed")
    packed = tmp_path / "packed" / "config.json"
    quantized = '{"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64},'
    packed.write_text(packed.read_text().replace("{", quantized, 1))
    for source, message in (
        (tmp_path / "nothing", "no such file or folder"),
        (tmp_path / "nothing.json", "no such file or folder"),
        (tmp_path / "nothing.gguf", "no such file or folder"),
        (tmp_path / "bad", "configuration cannot be read"),
        (tmp_path / "packed", "is quantized already"),
    ):
        with pytest.raises(SourceError, match=message) as refusal:
            plan_run(str(source), QuantConfig(), rates=RATES)
        assert str(source) in str(refusal.value)
        assert len(str(refusal.value).splitlines()) == 1


def test_the_description_names_every_figure() -> None:
    text = describe(plan(LLAMA_65B, QuantConfig(group_size=128), gpu="A100-80", kv_tokens=2048))
    for shown in (
        "65,285,660,672 parameters",
        "560 linear layers",
        "130.6 GB at 16 bits",
        "34.7 GB packed",
        "4.156 bits per weight",
        "the decoder layer, fp32",
        "an estimate",
        "forward passes",
        "fits A100-80",
        "5.4 GB KV cache of 2,048 tokens",
        "90%",
    ):
        assert shown in text, shown
    assert "does not fit" in describe(plan(OPT_175B, gpu="A100-80"))


def test_the_command_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    OPT_175B.save_pretrained(tmp_path)
    options = ["--bits", "3", "--group-size", "-1", "--gpu", "a100-80"]
    assert main(["plan", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert "66.6 GB packed" in out and "fits A100-80" in out and "2,266 tokens" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5"], "bits is 5"),
        (["--dynamic", "x=5"], "dynamic is 'x=5'"),
        (["--dynamic", "x=bits=four"], "its values must be numbers"),
        (["--dynamic", "(=bits=8"], "is no expression"),
        (["--gpu", "A100"], "known are A100-40, A100-80"),
        (["--asym", "--format", "gptq"], "asymmetric codes need"),
        (["--format", "awq"], "never written"),
        (["--lm-head-bits", "7"], "bits is 7"),
    ],
)
def test_the_commands_refusals_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("lowbit plan: error: ") and message in line


def test_the_commands_options_reach_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    dynamic = ["--dynamic", r".*v_proj=bits=8,group_size=32", "--dynamic=-:.*o_proj"]
    expected = QuantConfig(
        bits=3,
        group_size=32,
        sym=False,
        lm_head=True,
        checkpoint_format="gptq_v2",
        dynamic={
            "^lm_head$": {"bits": 8},
            ".*v_proj": {"bits": 8, "group_size": 32},
            "-:.*o_proj": {},
        },
    )
    options = ["--bits", "3", "--group-size", "32", "--asym", "--lm-head-bits", "8", *dynamic]
    # 300 rows are no multiple of 32, but the head has 8 bits.
    assert main(["plan", str(tmp_path), *options, "--num-sequences", "3"]) == 0
    found = capsys.readouterr().out
    wanted = plan_run(str(tmp_path), expected, rates=RATES, num_sequences=3)
    assert f"({wanted.num_bytes_packed:,} bytes)" in found
    assert f"{wanted.num_calibration_tokens:,} calibration tokens" in found
