"""Calibration batches on their way through one layer, stopped wherever a Hessian is due.

Each batch's forward pass is a coroutine that pauses before the first linear layer of a group and
hands over that group's input. Once the group is quantized the passes go on behind it, so every
group sees the effect of all earlier ones and no part of the layer is computed twice. A pass stays
with the thread that began it. Knows nothing of Hessians or files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from .errors import SourceError
from .workers import Workers

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a batch brings to a group of linear layers."""

    inputs: Tensor  # [..., K]
    stream: Tensor | None  # the residual stream that their output is added to, if that was asked


class LayerPasses:
    """The batches' passes through one layer. A context: leaving it ends them and their hooks.

    `groups` names the linear layers that share an input, in order of execution, and `load` reads
    a batch's input to the layer. With `keep_paused` all batches wait inside the layer at the same
    time; without, a batch starts again for every group and only one is in memory. The numbers are
    the same. `streams` names, for some of the groups, a module whose input is wanted as well.

    Batches may pass in several threads at once, by `workers.map` over all of `batches`.
    """

    def __init__(
        self,
        layer: nn.Module,
        groups: Sequence[Sequence[str]],
        forward: Forward,
        load: Callable[[int], Tensor],
        batches: Sequence[int],
        workers: Workers,
        *,
        keep_paused: bool,
        streams: Mapping[int, str] | None = None,
    ) -> None:
        self._layer = layer
        self._groups = groups
        self._forward = forward
        self._load = load
        self.batches = batches
        self._workers = workers
        self.keeps_paused = keep_paused
        self._streams = streams or {}
        self._passes: dict[int, _Pass] = {}
        self._hooks = _Hooks()

    def __enter__(self) -> Self:
        self._hooks.register(self._layer, self._groups)
        self._hooks.watch(self._layer, set(self._streams.values()))
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.map(self._end, self.batches)
        self._hooks.remove()

    def take(self, group: int, batch: int) -> Taken | None:
        """What the batch brings to the group; None if it never reaches it. Groups come in order,
        each for all batches before the next.
        """
        self._hooks.first_open = group
        current = self._advance(batch, group)
        taken = None
        if current.group == group:
            assert current.inputs is not None
            name = self._streams.get(group)
            stream = None if name is None else current.watched[name]
            taken = Taken(inputs=current.inputs, stream=stream)
        if not self.keeps_paused:
            current.end()
        return taken

    def output(self, batch: int) -> Tensor:
        """The layer's output, once no group of the batch is wanted any more; forgotten here."""
        self._hooks.first_open = len(self._groups)
        output = self._advance(batch, len(self._groups)).output
        self._passes.pop(batch, None)
        assert output is not None
        return output

    def _end(self, batch: int) -> None:
        current = self._passes.pop(batch, None)
        if current is not None:
            current.end()

    def _advance(self, batch: int, group: int) -> _Pass:
        """The batch's pass, stopped at `group` or later, or finished."""
        current = self._passes.get(batch)
        if current is None:
            current = _Pass(self._forward, self._load(batch))
            if self.keeps_paused:
                self._passes[batch] = current
        while current.group < group and current.output is None:
            current.go_on()
        return current


def paused_bytes(
    layer: nn.Module, groups: Sequence[Sequence[str]], forward: Forward, hidden: Tensor
) -> int:
    """The most bytes of tensors that a pass with this input holds while it is paused."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    hooks = _Hooks()
    hooks.register(layer, groups)
    probe, most = _Pass(forward, hidden), 0
    try:
        while probe.output is None:
            probe.go_on()
            held = _storages(probe.frame)
            most = max(most, sum(size for key, size in held.items() if key not in own))
            hooks.first_open = probe.group + 1
    finally:
        probe.end()
        hooks.remove()
    return most


class _Pass:
    """One batch's pass: where it is stopped and what it has there."""

    def __init__(self, forward: Forward, hidden: Tensor) -> None:
        self._coroutine: Any = greenlet(forward)
        self._arguments: tuple[Tensor, ...] = (hidden,)
        self.group = -1  # the group it is stopped before
        self.inputs: Tensor | None = None  # of that group
        self.watched: dict[str, Tensor] = {}  # module -> what it was last given
        self.output: Tensor | None = None  # of the layer, once it has finished

    @property
    def frame(self) -> FrameType | None:
        return None if self._coroutine is None else self._coroutine.gr_frame

    def go_on(self) -> None:
        """Run to the next stop or to the end."""
        assert self._coroutine is not None
        arguments, self._arguments, self.inputs = self._arguments, (), None
        self._coroutine.watched = self.watched
        found = self._coroutine.switch(*arguments)
        if self._coroutine.dead:
            self._coroutine, self.output = None, found
        else:
            self.group, self.inputs = found

    def end(self) -> None:
        """Give up: the frames of a stopped pass are unwound, and their tensors freed."""
        if self._coroutine is not None:
            self._coroutine.throw(GreenletExit)
        self._coroutine = self.inputs = self.output = None
        self.watched = {}


class _Hooks:
    """Stops a pass before the first linear layer of every group from `first_open` on."""

    def __init__(self) -> None:
        self.first_open = 0
        self._handles: list[Any] = []

    def register(self, layer: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        for index, names in enumerate(groups):
            hook = self._stop(index, names[0])
            self._handles.append(layer.get_submodule(names[0]).register_forward_pre_hook(hook))

    def watch(self, layer: nn.Module, names: Collection[str]) -> None:
        """Keep what these modules are given for the pass that they run in."""
        for name in names:
            hook = self._keep(name)
            self._handles.append(layer.get_submodule(name).register_forward_pre_hook(hook))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            current: Any = getcurrent()
            current.watched[name] = arguments[0]

        return hook

    def _stop(self, group: int, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            current: Any = getcurrent()
            if getattr(current, "last_group", -1) >= group:
                raise SourceError(f"{name}: is used twice in a layer, or out of order")
            current.last_group = group
            if group >= self.first_open:
                current.parent.switch((group, arguments[0]))

        return hook


def _storages(frame: FrameType | None) -> dict[int, int]:
    """Address -> bytes of the tensors in the local variables of a frame and its callers."""
    found: dict[int, int] = {}
    while frame is not None:
        for value in frame.f_locals.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, Tensor):
                    storage = item.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
        frame = frame.f_back
    return found
