"""Which tiles a GPU's linear kernels use: what `lowbit tune` measured, else sensible defaults.

Tiles change how fast a result comes, never its bits: what is added up in which order depends on
N, K, the group size and the GPU's `ctas_per_sm` alone. Knows no tensors and no Triton.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

TUNED_FOLDER = Path(__file__).parent / "tuned"
ROW_BLOCKS = (16, 32, 64)  # rows of x that one program takes
_PART_TILE = 128  # outputs that the number of parts is counted in
BLOCK_K = 128  # inputs per step of a program; parts of K are whole steps
_MINBLOCK_KS = 4


class InvalidTuning(ValueError):
    """A file of tuning results that cannot be used. The text names the file and the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """One program's tile and how it is compiled."""

    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuTuning:
    """How one GPU runs the linear kernels."""

    gpu: str
    num_sms: int
    k_width: int  # the fragment order that its tensor cores take from registers
    ctas_per_sm: int = 4  # programs that K is cut for
    gemv_max_rows: int = 0  # up to here the fp32 kernel is the faster one
    gemm_max_rows: int = 192  # beyond, dequantize and let cuBLAS multiply
    block_n: int = 128  # outputs per program, of 16 rows, where nothing was measured
    tiles: dict[tuple[int, int], TileConfig] = field(default_factory=dict)  # (bits, row block)

    def tile(self, bits: int, rows: int) -> TileConfig:
        """For a row block, or 1 for the fp32 kernel."""
        return self.tiles.get((bits, rows)) or self._default_tile(rows)

    def _default_tile(self, rows: int) -> TileConfig:
        """What compiles without spills and issues the fewest instructions per weight."""
        if rows == 1:
            # 16 bytes for every thread: 16 outputs and 64 inputs of 4 bits make a warp.
            return TileConfig(block_n=self.block_n // 2, num_warps=self.block_n // 32, num_stages=4)
        if rows == 16:
            return TileConfig(block_n=self.block_n, num_warps=4, num_stages=4)
        if rows == 32:  # 8 warps would dequantize every weight twice, but on sm_90
            return TileConfig(block_n=self.block_n, num_warps=4, num_stages=3)
        return TileConfig(block_n=128, num_warps=8, num_stages=3)

    def num_parts(self, in_features: int, out_features: int) -> int:
        """Into how many parts K is cut, so that one wave of programs fills the GPU."""
        tiles = -(-out_features // _PART_TILE)
        blocks = -(-in_features // BLOCK_K)
        return max(1, min(self.ctas_per_sm * self.num_sms // tiles, blocks // _MINBLOCK_KS))


def row_block(num_rows: int) -> int:
    """The smallest row block that holds them, or the largest there is."""
    return next((block for block in ROW_BLOCKS if block >= num_rows), ROW_BLOCKS[-1])


def default_tuning(gpu: str, num_sms: int, capability: tuple[int, int]) -> GpuTuning:
    """For a GPU that nobody measured.

    wgmma (sm_90) takes pairs of inputs from registers, mma.sync four; on sm_100 the operand
    passes through tensor memory, and either order will do. The more compute a GPU has per byte of
    bandwidth, the earlier dequantizing first wins.
    """
    return GpuTuning(
        gpu=gpu,
        num_sms=num_sms,
        k_width=2 if capability[0] == 9 else 4,
        gemm_max_rows=512 if capability in ((8, 6), (8, 9), (12, 0)) else 192,
        block_n=64 if capability[0] >= 10 else 128,
    )


def tuned_file(folder: Path, gpu: str, triton_version: str) -> Path:
    """Where results for that GPU and that Triton (its first two numbers) are kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"{slug}-triton-{'.'.join(triton_version.split('.')[:2])}.json"


def load_tuning(defaults: GpuTuning, triton_version: str, folder: Path = TUNED_FOLDER) -> GpuTuning:
    """The measured tuning of that GPU; `defaults` where there is none.

    Raises InvalidTuning for a file that is damaged or of another GPU.
    """
    path = tuned_file(folder, defaults.gpu, triton_version)
    if not path.exists():
        return defaults
    try:
        data = json.loads(path.read_text())
        entries = [(entry.pop("bits"), entry.pop("rows"), entry) for entry in data.pop("tiles")]
        tiles = {(bits, rows): TileConfig(**entry) for bits, rows, entry in entries}
        data.pop("triton")
        tuning = GpuTuning(tiles=tiles, **data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InvalidTuning(f"{path}: {error}; measure again with `lowbit tune`") from error
    if (tuning.gpu, tuning.num_sms) != (defaults.gpu, defaults.num_sms):
        raise InvalidTuning(
            f"{path}: gpu is {tuning.gpu!r} with {tuning.num_sms} SMs; "
            f"this one is {defaults.gpu!r} with {defaults.num_sms}"
        )
    return tuning


def save_tuning(tuning: GpuTuning, triton_version: str, folder: Path = TUNED_FOLDER) -> Path:
    """Write the results where `load_tuning` finds them."""
    tiles = [
        {"bits": bits, "rows": rows, **asdict(tile)}
        for (bits, rows), tile in sorted(tuning.tiles.items())
    ]
    data = {**asdict(tuning), "triton": triton_version, "tiles": tiles}
    folder.mkdir(parents=True, exist_ok=True)
    path = tuned_file(folder, tuning.gpu, triton_version)
    path.write_text(json.dumps(data, indent=1) + "\n")
    return path
