"""How many bits each linear layer gets: measured where it stands, chosen under a size budget.

For every group of layers that read the same input, and for every width, the group is rounded to
nearest and its decoder layer is run: how far the output moves is what that width costs there. One
decoder layer at a time is in memory, as in the run itself. Then the widths are chosen that cost
least in all and stay within the budget together.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kernels.packing import SUPPORTED_BITS
from .config import QuantConfig
from .errors import CheckpointError, QuantError
from .formats import check_layer, weight_bytes
from .gptq import round_to_nearest
from .layers import LayeredModel
from .stages import Target, find_targets, load_layer

NUM_SEQUENCES = 4  # of the calibration text: layers differ by factors, windows by percents
_EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One width of a group of linear layers."""

    bits: int
    num_bytes: int  # of codes, scales and zero points
    cost: float  # how far the decoder layer's output moves: see `_distance`


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Linear layers that get one width; `choices` from few bits to many."""

    names: tuple[str, ...]  # on disk
    num_weights: int
    choices: tuple[Choice, ...]


@torch.inference_mode()
def measure(model: LayeredModel, tokens: Tensor, config: QuantConfig) -> Iterator[Candidate]:
    """Every group of linear layers with the cost of each width, in order of execution.

    tokens [S, L] int64, of which the first NUM_SEQUENCES are used. Group size and symmetry are
    those of `config`; a layer with a rule of its own there keeps the rule's width. The experts of a
    layer are one group, as who serves them wants it. Raises QuantError for a layer that the format
    cannot hold at any width, or whose weights are not finite.
    """
    hidden = model.embed(tokens[:NUM_SEQUENCES])
    for index in range(model.num_layers):
        layer = load_layer(model, index)
        groups = _open_groups(model, layer, index, config)
        with _watched_inputs(layer, [t.name for targets in groups for t in targets]) as importance:
            output = model.call_layer(layer, index, hidden)
        for targets in groups:
            linears = {target.name: _linear(layer, target.name) for target in targets}
            choices = []
            for bits in _widths(targets, linears, config):
                wide = [_with_bits(target, bits) for target in targets]
                with _rounded(wide, linears, importance):
                    moved = _distance(model.call_layer(layer, index, hidden), output)
                size = sum(_num_bytes(t, linears[t.name], config) for t in wide)
                choices.append(Choice(bits=bits, num_bytes=size, cost=moved))
            yield Candidate(
                names=tuple(target.full_name for target in targets),
                num_weights=sum(linear.weight.numel() for linear in linears.values()),
                choices=tuple(choices),
            )
        hidden = output


def choose(candidates: Sequence[Candidate], target_bpw: float) -> dict[str, int]:
    """Full name of a layer -> its bits: the least cost in all with `target_bpw` bits per weight.

    Bits per weight count codes, scales and zero points. Every group starts at its fewest bits; then
    the step that saves most cost per byte is taken, again and again, as long as one fits. Raises
    QuantError when even the fewest bits are too many.
    """
    steps = [_steps(candidate.choices) for candidate in candidates]
    taken = [0] * len(candidates)
    num_weights = sum(candidate.num_weights for candidate in candidates)
    left = target_bpw * num_weights / 8 - sum(step[0].num_bytes for step in steps)
    if left < 0:
        least = 8 * sum(step[0].num_bytes for step in steps) / num_weights
        raise QuantError(f"target_bpw is {target_bpw:g}; the least for this model is {least:.3f}")
    waiting = [(-_gain(step, 0), i) for i, step in enumerate(steps) if len(step) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, i = heapq.heappop(waiting)
        now, following = steps[i][taken[i]], steps[i][taken[i] + 1]
        if following.num_bytes - now.num_bytes > left:
            continue
        left -= following.num_bytes - now.num_bytes
        taken[i] += 1
        if taken[i] + 1 < len(steps[i]):
            heapq.heappush(waiting, (-_gain(steps[i], taken[i]), i))
    return {
        name: steps[i][taken[i]].bits
        for i, candidate in enumerate(candidates)
        for name in candidate.names
    }


def with_widths(
    config: QuantConfig, widths: Mapping[str, int], *, others: Collection[str] = ()
) -> QuantConfig:
    """The config that gives each layer those bits: the most frequent width, and rules beside it.

    Modules called `others` keep the width that `config` gives them.
    """
    if not widths:
        return config
    bits = Counter(widths.values()).most_common(1)[0][0]
    kept = {name: config.bits for name in others if not config.has_rule(name)}
    rules = {
        f"+:^{re.escape(name)}$": {"bits": width}
        for name, width in {**widths, **kept}.items()
        if width != bits
    }
    return replace(config, bits=bits, dynamic={**config.dynamic, **rules})


def _open_groups(
    model: LayeredModel, layer: nn.Module, index: int, config: QuantConfig
) -> list[list[Target]]:
    """The layers that no rule names, in groups that get one width."""
    merged: dict[str, list[Target]] = {}
    for group in find_targets(model, layer, index, config, check=False):
        for target in group.targets:
            if not config.has_rule(target.full_name):
                key = _EXPERT.sub("*", group.targets[0].name)
                merged.setdefault(key, []).append(target)
    return list(merged.values())


def _widths(
    targets: Sequence[Target], linears: Mapping[str, nn.Linear], config: QuantConfig
) -> list[int]:
    """The widths at which the format holds all of these layers."""
    refusals: list[CheckpointError] = []
    widths = []
    for bits in SUPPORTED_BITS:
        try:
            for target in (_with_bits(target, bits) for target in targets):
                linear = linears[target.name]
                sizes = linear.in_features, linear.out_features
                check_layer(config.checkpoint_format, target.full_name, target.config, *sizes)
            widths.append(bits)
        except CheckpointError as error:
            refusals.append(error)
    if not widths:
        raise refusals[0]
    return widths


def _with_bits(target: Target, bits: int) -> Target:
    return replace(target, config=replace(target.config, bits=bits))


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _num_bytes(target: Target, linear: nn.Linear, config: QuantConfig) -> int:
    sizes = linear.in_features, linear.out_features
    return weight_bytes(target.config, *sizes, config.checkpoint_format)


@contextmanager
def _watched_inputs(layer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Name -> the sum of each input feature's squares, [K] fp32, over what passes meanwhile."""
    sums: dict[str, Tensor] = {}

    def add(name: str, inputs: Tensor) -> None:
        sums[name] = sums.get(name, 0) + inputs.flatten(0, -2).square().sum(dim=0)

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: add(name, args[0])
        )
        for name in names
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _rounded(
    targets: Sequence[Target], linears: Mapping[str, nn.Linear], importance: Mapping[str, Tensor]
) -> Iterator[None]:
    """With the weights of these layers rounded to nearest."""
    originals = {target.name: linears[target.name].weight for target in targets}
    for target in targets:
        rounded = round_to_nearest(
            originals[target.name], target.config, importance=importance[target.name]
        )
        linears[target.name].weight = nn.Parameter(rounded.dequantize(), requires_grad=False)
    try:
        yield
    finally:
        for name, original in originals.items():
            linears[name].weight = original


def _distance(moved: Tensor, output: Tensor) -> float:
    """Squared change over squared output, the mean over all tokens. [B, L, C] twice.

    Relative for each token alone: the few with activations of enormous size would drown the others.
    """
    change = (moved - output).square().sum(dim=-1, dtype=torch.float64)
    return float((change / output.square().sum(dim=-1).clamp(min=1e-30)).mean())


def _steps(choices: Sequence[Choice]) -> list[Choice]:
    """The choices on the lower convex hull: each step saves less cost per byte than the one before.

    What is not on it is never worth its bytes while a neighbour is to be had.
    """
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.num_bytes, choice.cost)):
        if hull and choice.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(steps: Sequence[Choice], taken: int) -> float:
    return _slope(steps[taken], steps[taken + 1])


def _slope(fewer: Choice, more: Choice) -> float:
    """Cost saved for a byte."""
    return (fewer.cost - more.cost) / (more.num_bytes - fewer.num_bytes)
