from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowbit.quant.activations import ActivationStore
from lowbit.quant.errors import QuantError
from torch import Tensor


def states(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 16, generator=generator) for _ in range(count)]


BYTES = states(1)[0].nbytes


@pytest.mark.parametrize("limit", [0, BYTES - 1, BYTES, 2 * BYTES + 1, 100 * BYTES])
def test_what_was_put_comes_back_bit_for_bit(tmp_path: Path, limit: int) -> None:
    store = ActivationStore(tmp_path, limit)
    for layer in range(3):
        expected = [state + layer for state in states()]
        for batch, state in enumerate(expected):
            store.put(layer, batch, state)
        for batch, state in enumerate(expected):
            assert torch.equal(store.get(layer, batch), state)


def test_no_more_is_held_than_the_limit(tmp_path: Path) -> None:
    """Without its file, only what is in memory is still there."""
    store = ActivationStore(tmp_path, 2 * BYTES)
    for layer in range(2):
        for batch, state in enumerate(states()):
            store.put(layer, batch, state)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(store.get(1, 0), states()[0])
    assert torch.equal(store.get(1, 1), states()[1])
    for layer, batch in ((1, 2), (1, 3), (0, 0)):
        with pytest.raises(QuantError, match=f"hidden-{layer}-{batch}.safetensors: cannot be read"):
            store.get(layer, batch)


def test_an_earlier_layer_is_there_until_it_is_removed(tmp_path: Path) -> None:
    """A process that is killed while it computes a layer starts that layer again."""
    store = ActivationStore(tmp_path, 100 * BYTES)
    (tmp_path / "layer-00000.safetensors").touch()  # not the store's
    (tmp_path / "hidden-1-9.safetensors.tmp").touch()  # cut off while it was written
    for layer in range(3):
        store.put(layer, 0, states()[layer])
    assert torch.equal(store.get(0, 0), states()[0])
    store.keep_only(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hidden-1-0.safetensors",
        "layer-00000.safetensors",
    ]
    assert torch.equal(ActivationStore(tmp_path, 0).get(1, 0), states()[1])


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, 0)
    assert not store.holds(1, range(3))
    for batch in range(3):
        store.put(1, batch, states()[batch])
    assert store.holds(1, range(3)) and not store.holds(1, range(4)) and not store.holds(2, [0])
    path = tmp_path / "hidden-1-2.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert not store.holds(1, range(3))
    assert store.holds(1, range(2))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(QuantError, match="cannot be written"):
        ActivationStore(tmp_path / "nothing", 0).put(0, 0, states()[0])
