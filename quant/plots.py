"""Plots as SVG text, for a page that loads nothing: data points in, one `<svg>` element out.

The same input gives the same bytes. Text and axes take the page's own colours, so that one picture
serves a light and a dark page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

# Stand-ins for colours that only the page knows; replaced in the finished text.
FOREGROUND, GRID = "#010203", "#030201"
PAGE_COLOURS = {FOREGROUND: "currentColor", GRID: "var(--line)"}

LINEAR_RANGE = 4  # largest over smallest; a logarithmic axis would show hardly a tick below it

# Colours that stand out on white and on black, each with a marker of its own and its glyph.
STYLES = (
    ("#4e79a7", "o", "●"),
    ("#f28e2b", "s", "■"),
    ("#59a14f", "^", "▲"),
    ("#e15759", "D", "◆"),
    ("#b07aa1", "v", "▼"),
    ("#1aa3a3", "P", "✚"),
    ("#c49a00", "X", "✖"),
    ("#9c755f", "*", "★"),
    ("#d45087", "<", "◀"),
    ("#7f8c9b", ">", "▶"),
)
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
_ID = re.compile(r'(\bid="|href="#|url\(#)')
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


class Module(Protocol):
    """What is drawn of a linear layer."""

    @property
    def name(self) -> str: ...
    @property
    def relative_error(self) -> float: ...
    @property
    def seconds(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Key:
    """How one type of module is drawn."""

    label: str
    colour: str
    glyph: str


def split_name(name: str) -> tuple[int | None, str]:
    """A module's layer and its type, which is the same in every layer and for every expert."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return None, name
    return int(match[1]), re.sub(r"(?<=\.)\d+(?=\.)", "*", match[2])


def legend(names: Sequence[str]) -> list[Key]:
    """One key for each type of module, in order of appearance."""
    styles = [STYLES[i % len(STYLES)] for i in range(len(_types(names)))]
    return [
        Key(label, colour, glyph)
        for label, (colour, _, glyph) in zip(_types(names), styles, strict=True)
    ]


def error_by_layer(modules: Sequence[Module]) -> str:
    """A point for each module: relative output error over the layer, coloured by type."""
    figure, axes = _figure("Decoder layer", "Relative output error")
    series = _series(modules)
    for index, members in enumerate(series.values()):
        colour, marker, _ = STYLES[index % len(STYLES)]
        layers = [layer for layer, _ in members]
        one_a_layer = len(set(layers)) == len(layers)
        axes.plot(
            layers,
            [module.relative_error for _, module in members],
            color=colour,
            marker=marker,
            markersize=5 if one_a_layer else 3,
            markeredgewidth=0,
            linewidth=0.9 if one_a_layer else 0,
            alpha=0.9 if one_a_layer else 0.55,
            gid=f"series-{index}",
        )
    _scale(axes, [module.relative_error for module in modules], _percent)
    _layer_axis(axes, modules)
    return _svg(figure, "error")


def time_by_layer(modules: Sequence[Module]) -> str:
    """A bar for each layer, stacked by type: seconds of Hessians and solving."""
    figure, axes = _figure("Decoder layer", "Seconds")
    heights: dict[int, float] = {}
    for index, members in enumerate(_series(modules).values()):
        spent: dict[int, float] = {}
        for layer, module in members:
            spent[layer] = spent.get(layer, 0.0) + module.seconds
        bars = axes.bar(
            list(spent),
            list(spent.values()),
            bottom=[heights.get(layer, 0.0) for layer in spent],
            color=STYLES[index % len(STYLES)][0],
            width=0.8,
        )
        for layer, bar in zip(spent, bars, strict=True):
            bar.set_gid(f"bar-{index}-{layer}")
        heights |= {layer: heights.get(layer, 0.0) + value for layer, value in spent.items()}
    _layer_axis(axes, modules)
    return _svg(figure, "time")


def frontier(points: Sequence[tuple[float, float]], front: Sequence[int]) -> str:
    """Checkpoints as numbered points (bytes, KL divergence); `front` is drawn as a line."""
    figure, axes = _figure("Checkpoint size, MB", "KL divergence, nats")
    on_front = [points[index] for index in front]
    axes.plot(
        [size / 1e6 for size, _ in on_front],
        [divergence for _, divergence in on_front],
        color=STYLES[0][0],
        linewidth=1.6,
        drawstyle="steps-post",
        gid="front",
    )
    for index, (size, divergence) in enumerate(points):
        beaten = index not in front
        axes.plot(
            [size / 1e6],
            [divergence],
            marker="o",
            markersize=8,
            markeredgewidth=1.6,
            color=STYLES[3][0] if beaten else STYLES[0][0],
            markerfacecolor="none" if beaten else STYLES[0][0],
            gid=f"point-{index}",
        )
        axes.annotate(
            str(index + 1),
            (size / 1e6, divergence),
            xytext=(7, 5) if beaten else (-7, -5),
            textcoords="offset points",
            horizontalalignment="left" if beaten else "right",
            verticalalignment="bottom" if beaten else "top",
            color=FOREGROUND,
        )
    axes.margins(x=0.08, y=0.12)
    _scale(axes, [divergence for _, divergence in points], "{:g}".format)
    return _svg(figure, "frontier")


def _types(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(split_name(name)[1] for name in names))


def _series(modules: Sequence[Module]) -> dict[str, list[tuple[int, Module]]]:
    """Type -> (layer, module); what belongs to no layer stands behind the last one."""
    behind = _num_layers(modules)
    series: dict[str, list[tuple[int, Module]]] = {}
    for module in modules:
        layer, kind = split_name(module.name)
        series.setdefault(kind, []).append((behind if layer is None else layer, module))
    return series


def _num_layers(modules: Sequence[Module]) -> int:
    layers = [split_name(module.name)[0] for module in modules]
    return 1 + max((layer for layer in layers if layer is not None), default=-1)


def _figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8.6, 3.5), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(which="both", color=GRID, labelcolor=FOREGROUND)
    axes.set_xlabel(x_label, color=FOREGROUND)
    axes.set_ylabel(y_label, color=FOREGROUND)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _scale(axes: Axes, values: Sequence[float], form: Callable[[float], str]) -> None:
    """Logarithmic where magnitudes differ, and linear next to a value that is exactly zero."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if max(positive, default=0.0) < LINEAR_RANGE * min(positive, default=1.0):
        axes.set_ylim(bottom=0)
    elif len(positive) == len(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_yscale("symlog", linthresh=min(positive))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _layer_axis(axes: Axes, modules: Sequence[Module]) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    last = _num_layers(modules) - 1
    if any(split_name(module.name)[0] is None for module in modules):
        last += 1
    axes.set_xlim(-0.6, max(last, 0) + 0.6)


def _svg(figure: Figure, name: str) -> str:
    """The figure's `<svg>` element alone; `name` keeps its ids apart from other plots'."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata=_NO_METADATA)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    return _ID.sub(rf"\1{name}-", svg)
