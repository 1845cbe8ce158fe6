"""A device for tests of code that runs on GPUs: tensors of the processor, kept apart.

What PyTorch offers for backends written in Python. Every operation on the device's tensors computes
what the processor computes, and, as with CUDA, raises an error where one of them meets a tensor of
the processor, unless that is a single number, an index, or the other end of a copy. To be set up in
a process of its own: the device is the process's accelerator from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "mirror"
COPIES = ("_copy_from", "copy_", "_to_copy")  # from another device, or to one
FACTORIES = ("arange", "eye")  # which PyTorch lets grow from an empty tensor otherwise
INDEXED = ("index.Tensor", "index_put_", "_index_put_impl_")  # indices may be on the processor


class Mirrored(Tensor):
    """A tensor of the device, around the one of the processor that has its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Mirrored:
        own: Mirrored = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        own.inner = inner
        return own

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, _: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return compute(operation, *args, **(kwargs or {}))

    # What PyTorch does not ask an operation for.

    def tolist(self) -> Any:
        return self.inner.tolist()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()


def compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on tensors of the device, or one that makes them."""
    if operation is torch.ops.aten._has_compatible_shallow_copy_type.default:
        return False  # a module that is moved gets new parameters, as around any subclass
    values, structure = tree_flatten((args, kwargs))
    _refuse_mixtures(str(operation), values)
    owners = {id(value.inner): value for value in values if isinstance(value, Mirrored)}
    inner_args, inner_kwargs = tree_unflatten([_inner(value) for value in values], structure)
    found = operation(*inner_args, **inner_kwargs)
    for owner in owners.values():
        assert owner.shape == owner.inner.shape, f"{operation} changed a tensor's size"
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == "cpu":
        return found

    def own(tensor: Tensor) -> Tensor:
        owner = owners.get(id(tensor))  # of what was written to
        return Mirrored(tensor) if owner is None else owner

    return tree_map_only(Tensor, own, found)


def _refuse_mixtures(operation: str, values: Sequence[Any]) -> None:
    name = operation.removeprefix("aten.")
    if name.startswith(COPIES + INDEXED):
        return
    foreign = [v for v in values if isinstance(v, Tensor) and not isinstance(v, Mirrored)]
    if any(value.dim() for value in foreign):
        raise RuntimeError(f"{operation}: expected all tensors on {NAME}, but found one on cpu")


def _inner(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.inner if isinstance(value, Mirrored) else value


def _tensor(original: Any, data: Any, *, device: Any = None, **options: Any) -> Tensor:
    made: Tensor = original(data, **options)
    return made if device is None else made.to(device)


def set_up() -> torch.device:
    """Make the device known to this process, for good."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        own.impl(name, partial(compute, getattr(torch.ops.aten, name).default), "PrivateUse1")
    _kept.extend((library, own))
    torch.tensor = partial(_tensor, torch.tensor)  # PyTorch's own fails on such a device
    return torch.device(NAME, 0)


_kept: list[Any] = []  # a library that is freed takes its operations with it
