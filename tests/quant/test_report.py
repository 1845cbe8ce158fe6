from __future__ import annotations

import dataclasses
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lowbit.quant import plots
from lowbit.quant.errors import CheckpointError
from lowbit.quant.evaluate import Comparison
from lowbit.quant.report import (
    PAGE_FILE,
    REPORT_FILE,
    Evaluation,
    ModuleReport,
    Quality,
    QuantizeReport,
    format_heading,
    format_row,
    pareto_front,
    read_report,
    render_evaluations,
    render_report,
    write_evaluations,
    write_report,
)

SVG = "{http://www.w3.org/2000/svg}"
HREF = "{http://www.w3.org/1999/xlink}href"
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
HOSTILE = "model.layers.0.<script>alert(1)</script>\"' onload=x $\\frac{1}{0}$ &amp; _a"


def module(name: str, **changes: object) -> ModuleReport:
    values: dict[str, object] = {
        "name": name,
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "num_parameters": 1 << 20,
        "num_tokens": 8192,
        "relative_error": 0.01,
        "damp_percent": 0.01,
        "fallback": None,
        "seconds": 1.5,
    }
    return ModuleReport(**{**values, **changes})  # type: ignore[arg-type]


def dense_modules(num_layers: int) -> list[ModuleReport]:
    return [
        module(
            f"model.layers.{layer}.{kind}",
            relative_error=0.001 * (1 + layer) * 3.0**index,
            seconds=1.0 + layer + index / 4,
        )
        for layer in range(num_layers)
        for index, kind in enumerate(LINEARS)
    ]


def report(modules: list[ModuleReport], **changes: object) -> QuantizeReport:
    values: dict[str, object] = {
        "source": "some/model",
        "settings": {"bits": 4, "dynamic": {"-:.*gate": {}}, "calibration": "built-in"},
        "seconds": 12.5,
        "num_calibration_tokens": 8192,
        "num_bytes_16bit": 270_000_000,
        "num_bytes_packed": 100_000_000,
        "bits_per_weight": 4.3125,
        "peak_memory_bytes": 1 << 30,
        "modules": tuple(modules),
    }
    return QuantizeReport(**{**values, **changes})  # type: ignore[arg-type]


def quality(**changes: object) -> Quality:
    values: dict[str, object] = {
        "num_tokens": 5000,
        "reference_perplexity": 10.0,
        "perplexity": 11.0,
        "kl_divergence": 0.0625,
        "kl_divergence_p99": 0.75,
        "top1_agreement": 0.875,
    }
    return Quality(
        reference="some/model",
        text="a held-out text",
        num_sequences=10,
        sequence_length=512,
        comparison=Comparison(**{**values, **changes}),  # type: ignore[arg-type]
    )


def evaluation(checkpoint: str, num_bytes: int, divergence: float) -> Evaluation:
    return Evaluation(
        checkpoint=checkpoint,
        num_bytes=num_bytes,
        num_bytes_16bit=270_000_000,
        bits_per_weight=4.25,
        quality=quality(kl_divergence=divergence),
    )


class Page(HTMLParser):
    """What a browser would see of a page: elements, the text of its tables, what it would load."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def loads(page: Page) -> list[str]:
    """Everything that a browser would fetch."""
    names = {"src", "href", "xlink:href", "srcset", "action", "data", "poster"}
    found = [value for _, name, value in page.attributes if name in names]
    styles = [value for _, name, value in page.attributes if name == "style"]
    found += re.findall(r"url\(([^)]*)\)", " ".join([*styles, *page.texts]))
    return [target for target in found if not target.startswith("#")]


def group(svg: str, name: str) -> ElementTree.Element:
    (found,) = [g for g in ElementTree.fromstring(svg).iter(f"{SVG}g") if g.get("id") == name]
    return found


def markers(svg: str, name: str) -> list[tuple[float, float]]:
    """Where the points of a group lie, x to the right and y upwards."""
    return [
        (float(use.get("x", "nan")), -float(use.get("y", "nan")))
        for use in group(svg, name).iter(f"{SVG}use")
    ]


# the JSON


def test_the_keys_are_those_that_others_may_rely_on(tmp_path: Path) -> None:
    write_report(tmp_path, report(dense_modules(1)), quality())
    content = json.loads((tmp_path / REPORT_FILE).read_text())
    assert list(content) == [
        "schema_version",
        "lowbit_version",
        "source",
        "settings",
        "seconds",
        "num_calibration_tokens",
        "num_bytes_16bit",
        "num_bytes_packed",
        "bits_per_weight",
        "peak_memory_bytes",
        "modules",
        "quality",
    ]
    assert content["schema_version"] == 1
    assert content["modules"][1] == {
        "name": "model.layers.0.self_attn.o_proj",
        "bits": 4,
        "group_size": 64,
        "sym": True,
        "num_parameters": 1 << 20,
        "num_tokens": 8192,
        "relative_error": 0.003,
        "damp_percent": 0.01,
        "fallback": None,
        "seconds": 1.25,
    }
    assert content["quality"] == {
        "reference": "some/model",
        "text": "a held-out text",
        "num_sequences": 10,
        "sequence_length": 512,
        "comparison": {
            "num_tokens": 5000,
            "reference_perplexity": 10.0,
            "perplexity": 11.0,
            "kl_divergence": 0.0625,
            "kl_divergence_p99": 0.75,
            "top1_agreement": 0.875,
        },
    }


@pytest.mark.parametrize(
    "measured",
    [None, quality(), quality(perplexity=None, reference_perplexity=None)],
    ids=["unmeasured", "causal", "masked"],
)
def test_what_was_written_is_read(tmp_path: Path, measured: Quality | None) -> None:
    written = report([*dense_modules(2), module("lm_head", fallback="no tokens", sym=False)])
    write_report(tmp_path, written, measured)
    assert read_report(tmp_path) == (written, measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == [PAGE_FILE, REPORT_FILE]


def test_figures_that_are_not_finite_are_null_in_the_json(tmp_path: Path) -> None:
    broken = report([module("model.layers.0.mlp.up_proj", relative_error=math.nan)])
    write_report(tmp_path, broken, quality(kl_divergence=math.inf))
    content = json.loads(
        (tmp_path / REPORT_FILE).read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert content["modules"][0]["relative_error"] is None
    assert content["quality"]["comparison"]["kl_divergence"] is None
    found, measured = read_report(tmp_path)
    assert math.isnan(found.modules[0].relative_error)
    assert measured is not None and math.isnan(measured.comparison.kl_divergence)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("modules"),
        lambda content: content.update(schema_version=99),
        lambda content: content.update(more=1),
        lambda content: content["modules"][0].pop("bits"),
        lambda content: content.update(quality=[]),
    ],
)
def test_a_report_of_another_make_is_refused(tmp_path: Path, damage: object) -> None:
    write_report(tmp_path, report(dense_modules(1)), None)
    content = json.loads((tmp_path / REPORT_FILE).read_text())
    damage(content)  # type: ignore[operator]
    (tmp_path / REPORT_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=REPORT_FILE) as refusal:
        read_report(tmp_path)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_report_that_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / REPORT_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="not a quantization report"):
        read_report(tmp_path)


# the page


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = Page(render_report(report(dense_modules(3)), quality()))
    assert loads(page) == []
    assert page.counts["svg"] == 2
    assert page.counts["link"] == page.counts["img"] == page.counts["iframe"] == 0
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_page_shows_every_module_and_figure() -> None:
    fallback = module("lm_head", fallback="7 tokens reached it", relative_error=0.34567)
    page = Page(render_report(report([*dense_modules(3), fallback]), quality()))
    text = " ".join(page.texts)
    for shown in [*dense_modules(3), fallback]:
        assert shown.name in page.texts
    for figure in (
        "34.567%",
        "7 tokens reached it",
        "1 of 10 layers fell back",
        "100.0 MB",
        "270.0 MB",
        "4.312",
        "11.000",
        "10.000",
        "0.0625",
        "0.750",
        "87.50%",
        "a held-out text",
        "5,000",
        "8,192",
        "12.5 s",
        "1.1 GB",
        "built-in",
    ):
        assert figure in text, figure


def test_a_page_without_quality_says_how_to_get_it() -> None:
    page = Page(render_report(report(dense_modules(1)), None))
    assert "lowbit eval" in " ".join(page.texts)
    assert "KL divergence, nats" not in " ".join(page.texts)


def test_a_page_without_perplexity_shows_none() -> None:
    masked = quality(perplexity=None, reference_perplexity=None)
    assert "perplexity;" not in render_report(report(dense_modules(1)), masked)


def test_hostile_names_stay_text() -> None:
    hostile = module(HOSTILE, fallback=HOSTILE)
    made = report([hostile], source=HOSTILE, settings={HOSTILE: HOSTILE})
    expected = Page(render_report(report(dense_modules(1)), None)).counts
    page = Page(render_report(made, dataclasses.replace(quality(), text=HOSTILE)))
    assert page.counts["script"] == expected["script"] == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    # Heading, title, module, fallback, two settings cells: as written, character for character.
    assert sum(HOSTILE in text for text in page.texts) >= 6
    assert loads(page) == []


@pytest.mark.parametrize("num_experts", [0, 3, 64])
def test_a_long_table_is_folded_below_the_worst(num_experts: int) -> None:
    experts = [
        module(f"model.layers.0.mlp.experts.{i}.up_proj", relative_error=0.5 + i / 1000)
        for i in range(num_experts)
    ]
    page = Page(render_report(report([*dense_modules(2), *experts]), None))
    folded = num_experts > 50
    assert ("Largest errors" in page.texts) == folded
    assert (("details", "open", "") in page.attributes) == (not folded)
    if folded:
        assert page.texts.index(experts[-1].name) < page.texts.index(experts[0].name)


def test_a_run_that_quantized_nothing_has_a_page() -> None:
    assert Page(render_report(report([]), None)).counts["svg"] == 2


def test_the_same_report_is_the_same_page() -> None:
    made = report(dense_modules(4))
    assert render_report(made, quality()) == render_report(made, quality())


# the plots


def test_the_type_of_a_module_is_the_same_in_every_layer() -> None:
    assert plots.split_name("model.layers.3.mlp.up_proj") == (3, "mlp.up_proj")
    assert plots.split_name("transformer.h.11.attn.c_attn") == (11, "attn.c_attn")
    assert plots.split_name("h.0.mlp.c_fc") == (0, "mlp.c_fc")
    assert plots.split_name("lm_head") == (None, "lm_head")
    for expert in (0, 17):
        name = f"model.layers.2.block_sparse_moe.experts.{expert}.w1"
        assert plots.split_name(name) == (2, "block_sparse_moe.experts.*.w1")


def test_every_module_is_a_point_at_its_layer_and_error() -> None:
    modules = [*dense_modules(5), module("lm_head", relative_error=0.02)]
    svg = plots.error_by_layer(modules)
    assert [key.label for key in plots.legend([m.name for m in modules])] == [*LINEARS, "lm_head"]
    drawn = [markers(svg, f"error-series-{i}") for i in range(4)]
    assert [len(points) for points in drawn] == [5, 5, 5, 1]
    columns = [x for x, _ in drawn[0]]
    steps = [b - a for a, b in pairwise(columns)]
    assert steps == pytest.approx([steps[0]] * 4) and steps[0] > 0
    assert all([x for x, _ in points] == columns for points in drawn[:3])
    assert drawn[3][0][0] == pytest.approx(columns[-1] + steps[0])  # behind the last layer
    # Heights are the logarithms of the errors, up to one scale and one offset.
    expected = [math.log(modules[3 * i + k].relative_error) for k in range(3) for i in range(5)]
    heights = [y for points in drawn[:3] for _, y in points]
    slope = (heights[-1] - heights[0]) / (expected[-1] - expected[0])
    assert slope > 0
    assert heights == pytest.approx(
        [heights[0] + slope * (value - expected[0]) for value in expected], abs=0.01
    )


def test_every_expert_is_a_point() -> None:
    modules = [
        module(f"model.layers.{layer}.mlp.experts.{i}.up_proj", relative_error=0.01 + i / 100)
        for layer in range(2)
        for i in range(40)
    ]
    assert len(markers(plots.error_by_layer(modules), "error-series-0")) == 80
    svg = plots.time_by_layer(modules)
    for layer in range(2):  # one bar for all experts of a layer
        assert len(list(group(svg, f"time-bar-0-{layer}").iter(f"{SVG}path"))) == 1


def test_errors_that_are_zero_are_drawn_too() -> None:
    modules = [
        module(f"model.layers.{i}.mlp.up_proj", relative_error=e)
        for i, e in enumerate((0.0, 0.001, 0.1))
    ]
    heights = [y for _, y in markers(plots.error_by_layer(modules), "error-series-0")]
    assert len(heights) == 3 and heights == sorted(heights)


def test_a_layers_bars_stand_on_each_other_and_show_its_seconds() -> None:
    modules = dense_modules(3)
    svg = plots.time_by_layer(modules)

    def extent(index: int, layer: int) -> tuple[float, float]:
        (path,) = group(svg, f"time-bar-{index}-{layer}").iter(f"{SVG}path")
        ys = [-float(y) for _, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d", ""))]
        return min(ys), max(ys)

    bottom, top = extent(0, 0)
    per_second = (top - bottom) / modules[0].seconds
    for layer in range(3):
        for index in range(3):
            low, high = extent(index, layer)
            seconds = modules[3 * layer + index].seconds
            assert high - low == pytest.approx(per_second * seconds, rel=1e-3)
            below = bottom if index == 0 else extent(index - 1, layer)[1]
            assert low == pytest.approx(below, abs=0.01)


def test_plots_take_their_colours_from_the_page() -> None:
    for svg in (plots.error_by_layer(dense_modules(2)), plots.time_by_layer(dense_modules(2))):
        assert "currentColor" in svg and "var(--line)" in svg
        assert "#000000" not in svg and "#ffffff" not in svg


# comparing checkpoints


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.floats(0, 1, allow_nan=False)), min_size=1, max_size=12
    )
)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, float]]) -> None:
    front = pareto_front(points)
    assert [points[i] for i in front] == sorted({points[i] for i in front})
    for i, (size, loss) in enumerate(points):
        beaten = any((a <= size and b <= loss) and (a, b) != (size, loss) for a, b in points)
        equal = [points[j] for j in front]
        assert ((size, loss) in equal) == (not beaten), i


def test_the_frontier_shows_every_checkpoint_and_marks_the_front() -> None:
    evaluations = [
        evaluation("w8", 180_000_000, 0.001),
        evaluation("w4", 100_000_000, 0.05),
        evaluation("bad w4", 110_000_000, 0.2),
        evaluation("w2", 70_000_000, 1.5),
    ]
    html = render_evaluations(evaluations)
    page = Page(html)
    assert loads(page) == []
    svg = html[html.index("<svg") : html.index("</svg>") + len("</svg>")]
    places = [markers(svg, f"frontier-point-{i}") for i in range(4)]
    assert [len(place) for place in places] == [1, 1, 1, 1]
    assert [i for i, _ in sorted(enumerate(places), key=lambda p: p[1][0][0])] == [3, 1, 2, 0]
    (line,) = group(svg, "frontier-front").iter(f"{SVG}path")
    corners = re.findall(r"[ML] (\S+) (\S+)", line.get("d", ""))
    ends = {(round(float(x), 3), round(-float(y), 3)) for x, y in corners}
    assert {i for i, [place] in enumerate(places) if tuple(round(v, 3) for v in place) in ends} == {
        0,
        1,
        3,
    }
    rows = "".join(page.texts)
    assert rows.count("frontier") == 3
    for shown in ("w8", "bad w4", "100.0 MB", "+10.00%", "0.20000", "87.50%"):
        assert shown in rows, shown


def test_a_single_checkpoint_needs_no_frontier() -> None:
    page = Page(render_evaluations([evaluation("w4", 100_000_000, 0.05)]))
    assert page.counts["svg"] == 0
    assert "1 quantized checkpoint\n" in "".join(page.texts)


def test_evaluations_as_rows_and_as_json(tmp_path: Path) -> None:
    masked = dataclasses.replace(
        evaluation("out/bert", 90_000_000, 0.05),
        bits_per_weight=None,
        quality=quality(perplexity=None, reference_perplexity=None),
    )
    rows = [evaluation("out/w4", 100_000_000, 0.05), masked]
    assert format_row(rows[0]).split() == [
        "100.0", "MB", "4.250", "11.000", "+10.00%", "0.05000", "0.7500", "87.50%", "out/w4"
    ]  # fmt: skip
    assert format_row(masked).split()[2:5] == ["–", "–", "–"]  # noqa: RUF001
    heading = format_heading(rows[0]).splitlines()
    assert "perplexity 10.000" in heading[0] and "a held-out text" in heading[1]
    assert heading[2].index("checkpoint") == format_row(rows[0]).index("out/w4")
    write_evaluations(rows, tmp_path / "e.json", None)
    content = json.loads((tmp_path / "e.json").read_text())
    assert [e["checkpoint"] for e in content["evaluations"]] == ["out/w4", "out/bert"]
    assert content["evaluations"][0]["quality"]["comparison"]["kl_divergence"] == 0.05
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]
