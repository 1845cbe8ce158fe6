"""A GPU that is not there: tensors of PyTorch's FakeTensorMode have shapes, dtypes and a device.

Mixing devices raises, and so does asking the device for a number. Kernels are recorded, not run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from launches import Launch, recorded
from lowbit.kernels import (
    triton_attention,
    triton_backend,
    triton_elementwise,
    triton_linear,
    triton_rope,
)
from lowbit.kernels.tuning import GpuTuning
from lowbit.server.model.decoder import Decoder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
TUNING = GpuTuning(gpu="fake", num_sms=132, k_width=2)
# Behind their declarations, which would answer with a shape: the functions that launch kernels.
OPERATIONS = {triton_linear: ("_linear",), triton_elementwise: ("_rms_norm", "_activate_mul")}


class _Drivers(TorchFunctionMode):
    """x[...] and x.copy_ by the operations they stand for: themselves they ask for a driver."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function is Tensor.__getitem__:
            return _subscript(*arguments)
        if function is Tensor.copy_:
            return torch.ops.aten.copy_(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))


def _subscript(x: Tensor, items: Any) -> Tensor:
    indices: list[Tensor | None] = []
    for item in items if isinstance(items, tuple) else (items,):
        dim = len(indices)
        if isinstance(item, Tensor):
            indices.append(item)
        elif isinstance(item, int):
            x = x.select(dim, item)
        elif item is None:
            x = x.unsqueeze(dim)
            indices.append(None)
        else:
            x = torch.ops.aten.slice(x, dim, item.start, item.stop, item.step or 1)
            indices.append(None)
    return torch.ops.aten.index(x, indices) if any(i is not None for i in indices) else x


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """The launches of kernels within."""
    launches = recorded(monkeypatch)
    for module in (triton_attention, triton_elementwise, triton_linear, triton_rope):
        monkeypatch.setattr(module, "on_device_of", lambda _: contextlib.nullcontext())
    for module, names in OPERATIONS.items():
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name)._init_fn)
    monkeypatch.setitem(triton_linear._tunings, DEVICE, TUNING)
    with FakeTensorMode(), _Drivers(), torch.inference_mode():
        yield launches


def move_to_gpu(decoder: Decoder) -> None:
    """Loaded by the triton backend on the CPU; to be called within."""
    backend = decoder.backend
    assert isinstance(backend, triton_backend.TritonBackend)
    backend.device = DEVICE
    for name, value in vars(decoder).items():
        if name not in ("backend", "config"):
            setattr(decoder, name, _moved(value))


def _moved(value: Any) -> Any:
    """The same with fake tensors for real ones, wherever they are."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    if isinstance(value, list | tuple):
        return type(value)(map(_moved, value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    moved = {name: _moved(each) for name, each in fields.items()}
    if all(moved[name] is each for name, each in fields.items()):
        return value
    return dataclasses.replace(value, **moved)
