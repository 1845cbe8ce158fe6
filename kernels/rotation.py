"""The rotation of keys and queries where keys are held in int8.

Keys have a few large channels, which would set the scale for all. Rotated, a head's numbers are of
one size; queries are rotated alike, which leaves the products as they are (Ashkboos et al. 2024,
"QuaRot", section 4). Values gain nothing by it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def rotation_size(head_dim: int) -> int:
    """Of the blocks that are rotated by themselves: D's largest divisor that is a power of 2."""
    return head_dim & -head_dim


@functools.cache
def rotation(head_dim: int) -> Tensor:
    """[D, D] float64: Sylvester's orthogonal matrix, or blocks of it where D is no power of 2."""
    size = rotation_size(head_dim)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    blocks: Tensor = torch.block_diag(*[matrix / math.sqrt(size)] * (head_dim // size))
    return blocks
