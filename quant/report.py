"""What a run did: one record per linear layer, one for the run, and how far the result drifted.

Records in, `quantization_report.json` and a self-contained `quantization_report.html` out. Knows
nothing of tensors; the figures come from the pipeline and from `quality`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import plots
from .errors import CheckpointError
from .evaluate import Comparison
from .units import format_bytes, format_seconds

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"
SCHEMA_VERSION = 1
NUM_WORST = 10  # modules that the page names before the whole table
MAX_OPEN_ROWS = 60  # a longer table starts folded


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleReport:
    """How one linear layer came out, or the input embedding.

    The embedding is rounded to nearest with no Hessian: its `damp_percent` is 0, and its
    `relative_error` is the squared error of the weights over the squared weights.
    """

    name: str
    bits: int
    group_size: int
    sym: bool
    num_parameters: int
    num_tokens: int  # calibration tokens that reached it; fewer than all for a routed expert
    relative_error: float  # squared output error over squared output, on the calibration text
    damp_percent: float  # the damping that its Hessian took
    fallback: str | None  # why it was rounded to nearest instead, if it was
    seconds: float  # Hessian and solving


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """What a run did."""

    source: str
    settings: dict[str, Any]  # every option that has an influence on the result
    seconds: float
    num_calibration_tokens: int
    num_bytes_16bit: int  # every weight of the source at two bytes
    num_bytes_packed: int  # every tensor of the checkpoint written
    bits_per_weight: float  # of the quantized layers, scales and zero points included
    peak_memory_bytes: int  # of this process, at the end of the run
    modules: tuple[ModuleReport, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How far a checkpoint is from its 16-bit model, and on what text that was measured."""

    reference: str
    text: str  # which text, in words
    num_sequences: int
    sequence_length: int
    comparison: Comparison


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One checkpoint among those that are compared."""

    checkpoint: str
    num_bytes: int  # every tensor of the checkpoint
    num_bytes_16bit: int  # every weight of the 16-bit model at two bytes
    bits_per_weight: float | None  # of the quantized layers; None: nothing is quantized
    quality: Quality

    @property
    def increase(self) -> float | None:
        """Of the perplexity, as a share of the 16-bit model's."""
        found = self.quality.comparison
        if found.perplexity is None or found.reference_perplexity is None:
            return None
        return found.perplexity / found.reference_perplexity - 1


def write_report(folder: Path, report: QuantizeReport, quality: Quality | None) -> None:
    """Write both files into `folder`, each whole or not at all. Raises OSError."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "lowbit_version": version("lowbit"),
        **dataclasses.asdict(report),
        "quality": None if quality is None else dataclasses.asdict(quality),
    }
    _write(folder / REPORT_FILE, to_json(content))
    _write(folder / PAGE_FILE, render_report(report, quality))


def read_report(folder: Path) -> tuple[QuantizeReport, Quality | None]:
    """What `write_report` wrote. Raises CheckpointError in one line for any other content."""
    path = folder / REPORT_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema_version is not {SCHEMA_VERSION}")
        content.pop("lowbit_version")
        found = content.pop("quality")
        modules = tuple(_build(ModuleReport, module) for module in content.pop("modules"))
        report = _build(QuantizeReport, {**content, "modules": modules})
        return report, None if found is None else _quality(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a quantization report ({error})") from None


def write_evaluations(
    evaluations: Sequence[Evaluation], json_path: Path | None, page_path: Path | None
) -> None:
    """Write what `lowbit eval` found to the files that are asked for. Raises OSError."""
    if json_path is not None:
        content = {
            "schema_version": SCHEMA_VERSION,
            "lowbit_version": version("lowbit"),
            "evaluations": [dataclasses.asdict(evaluation) for evaluation in evaluations],
        }
        _write(json_path, to_json(content))
    if page_path is not None:
        _write(page_path, render_evaluations(evaluations))


def format_heading(first: Evaluation) -> str:
    """What stands above the rows of evaluations on the terminal."""
    quality, found = first.quality, first.quality.comparison
    perplexity = found.reference_perplexity
    known = "" if perplexity is None else f", perplexity {perplexity:.3f}"
    return "\n".join(
        (
            f"{quality.reference} at 16 bits: {format_bytes(first.num_bytes_16bit)}{known}",
            f"{found.num_tokens:,} predicted tokens ({quality.num_sequences} windows of "
            f"{quality.sequence_length}) from {quality.text}",
            f"{'size':>9}  {'bits':>6}  {'perplexity':>10}  {'increase':>8}  {'KL mean':>8}  "
            f"{'KL 99 %':>8}  {'top-1':>7}  checkpoint",
        )
    )


def format_row(evaluation: Evaluation) -> str:
    found = evaluation.quality.comparison
    columns = (
        (format_bytes(evaluation.num_bytes), 9),
        (_figure(evaluation.bits_per_weight, ".3f"), 6),
        (_figure(found.perplexity, ".3f"), 10),
        (_figure(evaluation.increase, "+.2%"), 8),
        (_figure(found.kl_divergence, ".5f"), 8),
        (_figure(found.kl_divergence_p99, ".4f"), 8),
        (_figure(found.top1_agreement, ".2%"), 7),
    )
    return "  ".join([*(f"{text:>{width}}" for text, width in columns), evaluation.checkpoint])


def to_json(content: Mapping[str, Any]) -> str:
    """JSON that every parser reads: what is not finite becomes null."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def render_report(report: QuantizeReport, quality: Quality | None) -> str:
    """The page of one run, complete in itself: it loads nothing."""
    worst = sorted(report.modules, key=lambda module: -_sortable(module.relative_error))
    return _page(
        "report.html",
        report=report,
        quality=quality,
        settings=sorted(report.settings.items()),
        worst=worst[:NUM_WORST],
        fallbacks=[module for module in report.modules if module.fallback is not None],
        folded=len(report.modules) > MAX_OPEN_ROWS,
        legend=plots.legend([module.name for module in report.modules]),
        error_plot=plots.error_by_layer(report.modules),
        time_plot=plots.time_by_layer(report.modules),
    )


def render_evaluations(evaluations: Sequence[Evaluation]) -> str:
    """The page that compares checkpoints of one model; with several, their frontier."""
    points = [(e.num_bytes, e.quality.comparison.kl_divergence) for e in evaluations]
    front = pareto_front(points)
    return _page(
        "evaluations.html",
        evaluations=evaluations,
        quality=evaluations[0].quality,
        num_bytes_16bit=evaluations[0].num_bytes_16bit,
        front=front,
        frontier_plot=plots.frontier(points, front) if len(points) > 1 else None,
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by rising first number, of the points that no other beats in both numbers."""
    front: list[int] = []
    least = math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < least:
            front.append(index)
            least = points[index][1]
    return front


def _page(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": format_bytes, "seconds": format_seconds, "figure": _figure}
    return environment.get_template(template).render(version=version("lowbit"), **values)


def _figure(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)  # noqa: RUF001


def _sortable(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _quality(found: dict[str, Any]) -> Quality:
    comparison = _build(Comparison, found["comparison"])
    quality: Quality = _build(Quality, {**found, "comparison": comparison})
    return quality


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """The inverse of asdict; a null that stands where a number must be was not finite."""
    numbers = {field.name for field in dataclasses.fields(kind) if field.type == "float"}
    return kind(**{k: math.nan if v is None and k in numbers else v for k, v in values.items()})


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
