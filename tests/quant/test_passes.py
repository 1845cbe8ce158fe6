from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from lowbit.quant.errors import SourceError
from lowbit.quant.passes import LayerPasses, paused_bytes
from lowbit.quant.workers import Workers
from torch import Tensor, nn

GROUPS = [["a", "b"], ["c"], ["d"]]
SIZE = 8


class Layer(nn.Module):
    """a and b read the input; c reads their product, where there is anything positive; d the rest.

    A batch whose first number is negative never reaches c, as tokens may never reach an expert.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in "abcd":
            linear = nn.Linear(SIZE, SIZE, bias=False)
            linear.weight.data = torch.randn(SIZE, SIZE, generator=generator)
            self.add_module(name, linear)
        self.calls = {name: 0 for name in "abcd"}
        for name in "abcd":
            self.get_submodule(name).register_forward_pre_hook(self._count(name))

    def _count(self, name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            self.calls[name] += 1

        return hook

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.a(hidden) * self.b(hidden).tanh()
        if hidden.flatten()[0] > 0:
            inner = inner + self.c(inner)
        output: Tensor = hidden + self.d(inner)
        return output


def make_batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(2, 3, SIZE, generator=generator) for _ in range(4)]
    for batch, sign in zip(batches, (1, -1, -1, 1), strict=True):
        batch.view(-1)[0] = sign
    return batches


def passes_of(
    layer: Layer,
    load: Callable[[int], Tensor],
    *,
    groups: list[list[str]] = GROUPS,
    keep_paused: bool = True,
    workers: Workers | None = None,
) -> LayerPasses:
    """Of four batches."""
    workers = workers or Workers(1)
    return LayerPasses(layer, groups, layer, load, range(4), workers, keep_paused=keep_paused)


def inputs_of(passes: LayerPasses, group: int, workers: Workers | None = None) -> list[Tensor]:
    """Of every batch that reaches the group."""
    found = (workers or Workers(1)).map(lambda batch: passes.take(group, batch), range(4))
    return [taken.inputs.clone() for taken in found if taken is not None]


def walk(
    layer: Layer, batches: list[Tensor], *, keep_paused: bool, num_workers: int = 1
) -> list[list[Tensor]]:
    """Every group's inputs, then the outputs; a group's weights change behind it."""
    found = []
    with (
        torch.inference_mode(),
        Workers(num_workers) as workers,
        passes_of(layer, batches.__getitem__, keep_paused=keep_paused, workers=workers) as passes,
    ):
        for i, names in enumerate(GROUPS):
            found.append(inputs_of(passes, i, workers))
            for name in names:
                layer.get_submodule(name).get_parameter("weight").data *= 0.5
        found.append(workers.map(passes.output, range(4)))
    return found


def recomputed(batches: list[Tensor]) -> list[list[Tensor]]:
    """The same, with a whole forward pass of every batch for every group."""
    layer = Layer()
    found = []
    with torch.inference_mode():
        for names in GROUPS:
            seen: list[Tensor] = []
            hook = layer.get_submodule(names[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0].clone())
            )
            for batch in batches:
                layer(batch)
            hook.remove()
            found.append(seen)
            for name in names:
                layer.get_submodule(name).get_parameter("weight").data *= 0.5
        found.append([layer(batch) for batch in batches])
    return found


@pytest.mark.parametrize("keep_paused", [True, False])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_group_is_seen_behind_the_changed_ones(keep_paused: bool, num_workers: int) -> None:
    batches = make_batches()
    found = walk(Layer(), batches, keep_paused=keep_paused, num_workers=num_workers)
    expected = recomputed(batches)
    assert [len(group) for group in found] == [4, 2, 4, 4]
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_paused_passes_compute_nothing_twice() -> None:
    layer = Layer()
    walk(layer, make_batches(), keep_paused=True)
    assert layer.calls == {"a": 4, "b": 4, "c": 2, "d": 4}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_passes_end_with_the_context(num_workers: int) -> None:
    layer, batches = Layer(), make_batches()
    seen = []

    def load(index: int) -> Tensor:
        batch = batches[index].clone()
        seen.append(weakref.ref(batch))
        return batch

    with (
        Workers(num_workers) as workers,
        passes_of(layer, load, workers=workers) as passes,
    ):
        assert len(inputs_of(passes, 0, workers)) == 4
        assert all(batch() is not None for batch in seen)
    assert all(batch() is None for batch in seen)
    hooks = [len(layer.get_submodule(name)._forward_pre_hooks) for name in "abcd"]
    assert hooks == [1, 1, 1, 1]  # the layer's own


def test_replayed_passes_hold_one_batch_at_a_time() -> None:
    layer, batches = Layer(), make_batches()
    seen: list[weakref.ref[Tensor]] = []

    def load(index: int) -> Tensor:
        assert all(batch() is None for batch in seen)
        batch = batches[index].clone()
        seen.append(weakref.ref(batch))
        return batch

    with passes_of(layer, load, keep_paused=False) as passes:
        for batch in range(4):
            assert passes.take(0, batch) is not None
    assert len(seen) == 4


def test_an_error_inside_a_pass_comes_out() -> None:
    class Broken(Layer):
        def forward(self, hidden: Tensor) -> Tensor:
            self.a(hidden)
            raise ArithmeticError("inside")

    layer = Broken()
    with passes_of(layer, lambda _: make_batches()[0], groups=[["a"], ["c"]]) as passes:
        assert len(inputs_of(passes, 0)) == 4
        with pytest.raises(ArithmeticError, match="inside"):
            inputs_of(passes, 1)


@pytest.mark.parametrize("groups", [[["c"], ["a"]], [["a"], ["d"], ["c"]]])
def test_groups_out_of_order_are_refused(groups: list[list[str]]) -> None:
    layer = Layer()
    batches = make_batches()
    with (
        passes_of(layer, batches.__getitem__, groups=groups) as passes,
        pytest.raises(SourceError, match="used twice in a layer, or out of order"),
    ):
        for i in range(len(groups)):
            inputs_of(passes, i)
        Workers(1).map(passes.output, range(4))


def test_a_layer_used_twice_is_refused() -> None:
    class Twice(Layer):
        def forward(self, hidden: Tensor) -> Tensor:
            output: Tensor = self.a(self.a(hidden))
            return output

    layer = Twice()
    with (
        passes_of(layer, lambda _: make_batches()[0], groups=[["a"]]) as passes,
        pytest.raises(SourceError, match="a: is used twice"),
    ):
        inputs_of(passes, 0)
        Workers(1).map(passes.output, range(4))


def test_what_a_paused_pass_holds_is_counted() -> None:
    """Before d: the hidden states and the inner ones, each of 1000 tokens; no weights."""
    layer = Layer()
    hidden = torch.ones(10, 100, SIZE)
    one = hidden.nbytes
    with torch.inference_mode():
        assert paused_bytes(layer, [["a", "b"]], layer, hidden) == one
        assert paused_bytes(layer, GROUPS, layer, hidden) == 2 * one
        assert paused_bytes(layer, [], layer, hidden) == 0
    assert len(layer.a._forward_pre_hooks) == 1
