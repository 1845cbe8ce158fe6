from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import save_family
from hypothesis import given
from hypothesis import strategies as st
from lowbit.quant.checkpoint import CheckpointReader
from lowbit.quant.config import QuantConfig
from lowbit.quant.errors import QuantError
from lowbit.quant.evaluate import load_dequantized
from lowbit.quant.layers import LayeredModel
from lowbit.quant.pipeline import quantize
from lowbit.quant.report import read_report
from lowbit.quant.sensitivity import Candidate, Choice, choose, measure, with_widths
from lowbit.quant.source import load_source
from lowbit.server.cli import main

CONFIG = QuantConfig(bits=4, group_size=32, sym=False, checkpoint_format="gptq_v2")
WIDTHS = (2, 3, 4, 8)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("source"), "llama")


def measured(folder: Path, config: QuantConfig = CONFIG) -> list[Candidate]:
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    return list(measure(LayeredModel(load_source(str(folder))), tokens, config))


# measuring


def test_every_group_is_a_candidate_at_every_width(source: Path) -> None:
    candidates = measured(source)
    kinds = ["q k v", "o", "gate up", "down"]
    assert len(candidates) == 2 * len(kinds)
    for candidate, kind in zip(candidates, kinds * 2, strict=True):
        leaves = [name.rpartition(".")[2].removesuffix("_proj") for name in candidate.names]
        assert leaves == kind.split()
        assert [choice.bits for choice in candidate.choices] == list(WIDTHS)
        costs = [choice.cost for choice in candidate.choices]
        assert costs == sorted(costs, reverse=True)
        assert 0 < costs[-1] < costs[0] / 100
        sizes = [choice.num_bytes for choice in candidate.choices]
        assert sizes == sorted(sizes)


def test_the_cost_is_what_the_layer_s_output_moves_by(source: Path) -> None:
    """A weight that decides nothing costs nothing: the value is multiplied by zero behind it."""
    model = LayeredModel(load_source(str(source)))
    plain = measured(source)
    load_layer = model.load_layer

    def load(index: int) -> torch.nn.Module:
        layer = load_layer(index)
        layer.get_submodule("mlp.down_proj").get_parameter("weight").data.zero_()
        return layer

    model.load_layer = load  # type: ignore[method-assign]
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    silent = list(measure(model, tokens, CONFIG))
    for before, now in zip(plain, silent, strict=True):
        in_mlp = ".mlp." in now.names[0]
        assert all((choice.cost == 0) == in_mlp for choice in now.choices)
        assert all(choice.cost > 0 for choice in before.choices)


def test_the_layers_keep_their_weights(source: Path) -> None:
    assert measured(source) == measured(source)


def test_the_experts_of_a_layer_get_one_width(tmp_path: Path) -> None:
    candidates = measured(save_family(tmp_path, "mixtral"))
    experts = [c for c in candidates if ".experts." in c.names[0]]
    assert len(experts) == 2 * 2  # two layers; gates and ups, downs
    assert sorted(len(candidate.names) for candidate in experts) == [4, 4, 8, 8]


def test_a_rule_of_the_user_stands(source: Path) -> None:
    rules = {r"+:.*\.0\..*down_proj": {"bits": 8}, r"-:.*\.1\..*o_proj": {}}
    config = QuantConfig(bits=4, group_size=32, dynamic=rules)
    names = [name for candidate in measured(source, config) for name in candidate.names]
    assert "model.layers.0.mlp.down_proj" not in names
    assert "model.layers.1.self_attn.o_proj" not in names
    assert len(names) == 2 * 7 - 2


# choosing


def candidate(*choices: tuple[int, float], name: str = "a", weights: int = 8) -> Candidate:
    """Of 8 weights, so that bytes are bits per weight."""
    pairs = zip(WIDTHS, choices, strict=False)
    return Candidate(
        names=(name,),
        num_weights=weights,
        choices=tuple(Choice(bits=b, num_bytes=n, cost=c) for b, (n, c) in pairs),
    )


@given(
    st.lists(
        st.lists(st.floats(0.001, 1000), min_size=4, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.floats(2, 9),
)
def test_the_budget_holds_and_nothing_cheap_is_left(costs: list[list[float]], bpw: float) -> None:
    candidates = [
        candidate(*zip(WIDTHS, sorted(row, reverse=True), strict=True), name=f"m{i}")
        for i, row in enumerate(costs)
    ]
    widths = choose(candidates, bpw)
    assert sum(widths.values()) <= bpw * len(costs) + 1e-9
    cost = sum(_cost(c, widths[c.names[0]]) for c in candidates)
    # No choice with fewer bytes costs less; and no other choice is better by more than one step.
    used = sum(widths.values())
    for other in itertools.product(WIDTHS, repeat=len(candidates)):
        if sum(other) <= used - 4:  # a step is at most 4 bytes: what greed may leave over
            total = sum(_cost(c, b) for c, b in zip(candidates, other, strict=True))
            assert cost <= total * (1 + 1e-9)


def _cost(candidate: Candidate, bits: int) -> float:
    return next(choice.cost for choice in candidate.choices if choice.bits == bits)


def test_bits_go_where_they_count() -> None:
    candidates = [
        candidate((2, 1.0), (3, 0.9), (4, 0.8), (8, 0.7), name="dull"),
        candidate((2, 99.0), (3, 20.0), (4, 5.0), (8, 0.1), name="keen"),
    ]
    assert choose(candidates, 3.0) == {"dull": 2, "keen": 4}
    assert choose(candidates, 5.0) == {"dull": 2, "keen": 8}
    assert choose(candidates, 8.0) == {"dull": 8, "keen": 8}


def test_a_width_that_is_worse_for_more_bytes_is_skipped() -> None:
    odd = candidate((2, 5.0), (3, 7.0), (4, 1.0), (8, 0.5))
    assert choose([odd], 3.5) == {"a": 2}
    assert choose([odd], 4.0) == {"a": 4}


def test_a_budget_below_the_least_is_refused() -> None:
    with pytest.raises(QuantError, match=r"target_bpw is 1\.9; the least for this model is 2\.000"):
        choose([candidate((2, 5.0), (3, 1.0))], 1.9)


def test_the_config_names_what_differs_from_most() -> None:
    widths = {"m.0.a": 3, "m.1.a": 3, "m.10a": 4, "m.0.b": 8}
    config = with_widths(CONFIG, widths)
    for name, bits in widths.items():
        module = config.for_module(name)
        assert module is not None and module.bits == bits
    assert config.bits == 3
    assert len(config.dynamic) == 2


def test_what_stands_outside_the_layers_keeps_its_width() -> None:
    base = replace(CONFIG, bits=8, lm_head=True, dynamic={"+:^head$": {"bits": 4}})
    config = with_widths(base, {"a": 3, "b": 3}, others=["embedding", "head"])
    embedding, head = config.for_module("embedding"), config.for_module("head")
    assert embedding is not None and embedding.bits == 8
    assert head is not None and head.bits == 4


# a run


@pytest.mark.parametrize("target", [3.6, 5.25])
def test_a_run_meets_its_target(source: Path, tmp_path: Path, target: float) -> None:
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--group-size", "32"]
    arguments += ["--num-sequences", "20", "--sequence-length", "110"]
    assert main([*arguments, "--target-bpw", str(target)]) == 0
    report, _ = read_report(tmp_path / "out")
    assert target - 0.5 < report.bits_per_weight <= target
    assert len({module.bits for module in report.modules}) > 1
    reader = CheckpointReader(tmp_path / "out")
    assert reader.quant_config is not None
    for module in report.modules:
        assert reader.take_packed(module.name).bits == module.bits
    load_dequantized(tmp_path / "out")


def test_a_bad_target_is_refused_before_work(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, message in (("1.5", "must lie in [2.0, 16.0]"), ("nan", "must lie in [2.0, 16.0]")):
        out = tmp_path / "out"
        assert main(["quantize", str(source), str(out), "--target-bpw", target]) == 1
        error = capsys.readouterr().err
        assert "target_bpw is" in error and message in error
        assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["quantize", str(source), str(out), "--target-bpw", "3.5", "--bits", "3"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_a_target_below_the_least_names_the_least(source: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantError, match=r"target_bpw is 2; the least for this model is 2\.\d+"):
        quantize(str(source), tmp_path / "out", CONFIG, target_bpw=2.0, progress=False)
    assert not list(tmp_path.iterdir())
