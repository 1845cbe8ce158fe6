"""The input embedding, rounded to nearest: its rows are looked up, so no input has a Hessian.

What a format cannot hold is refused; what is finished is an `Entry`. Knows nothing of files.
Shapes: V tokens, C features of a row.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.packing import PackedEmbedding
from .config import ModuleConfig, QuantConfig, is_embedding
from .errors import CheckpointError, SolverError
from .formats import check_format, embedding_matrix
from .gptq import SolverConfig, round_to_nearest
from .journal import Entry
from .report import ModuleReport
from .stages import pack

ROWS_AT_ONCE = 4096  # of a table that are compared together


def check_embedding(config: QuantConfig, name: str, num_rows: int, num_features: int) -> None:
    """Raises CheckpointError when the config's format cannot hold that table, [V, C]."""
    if config.for_embedding(name) is None:
        return
    if config.checkpoint_format == "compressed-tensors":
        if not is_embedding(name):
            raise CheckpointError(f"{name}: other readers of compressed-tensors take no such name")
        check_format(config, name, num_features, num_rows)
    else:
        check_format(config, name, num_rows, num_features)


def quantize_embedding(
    name: str, table: Tensor, config: QuantConfig, solver: SolverConfig, *, num_tokens: int
) -> Entry:
    """The table [V, C], as stored, on searched grids; each weight's error counts the same.

    `num_tokens` is that of the calibration text. The report's `relative_error` is the squared error
    of the weights over the squared weights: there are no outputs to compare. Raises CheckpointError
    for what the format cannot hold, SolverError for a value that is not finite.
    """
    started = time.monotonic()
    module = config.for_embedding(name)
    assert module is not None
    check_embedding(config, name, *table.shape)
    try:
        packed = pack(round_to_nearest(embedding_matrix(table, config), module, solver), None)
    except SolverError as error:
        raise SolverError(f"{name}: {error}") from None
    entry = Entry(packed={name: packed})
    lost = _relative_error(packed_embedding(entry, name, config), table)
    report = _report(name, module, table.numel(), lost, num_tokens, time.monotonic() - started)
    return replace(entry, modules=(report,))


def packed_embedding(entry: Entry, name: str, config: QuantConfig) -> PackedEmbedding:
    """What `quantize_embedding` made, to look tokens up in."""
    by_row = config.checkpoint_format == "compressed-tensors"
    return PackedEmbedding(weight=entry.packed[name], by_row=by_row)


def _relative_error(packed: PackedEmbedding, table: Tensor) -> float:
    lost = energy = 0.0
    for ids in torch.arange(len(table)).split(ROWS_AT_ONCE):
        rows = table[ids].float()
        lost += float((rows - packed.rows(ids)).square().sum(dtype=torch.float64))
        energy += float(rows.square().sum(dtype=torch.float64))
    return lost / energy if energy > 0 else 0.0


def _report(
    name: str, module: ModuleConfig, size: int, error: float, num_tokens: int, seconds: float
) -> ModuleReport:
    return ModuleReport(
        name=name,
        bits=module.bits,
        group_size=module.group_size,
        sym=module.sym,
        num_parameters=size,
        num_tokens=num_tokens,
        relative_error=error,
        damp_percent=0.0,
        fallback=None,
        seconds=seconds,
    )
