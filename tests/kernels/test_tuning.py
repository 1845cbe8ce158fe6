from __future__ import annotations

import json
from pathlib import Path

import pytest
from lowbit.kernels.tuning import (
    GpuTuning,
    InvalidTuning,
    TileConfig,
    default_tuning,
    load_tuning,
    row_block,
    save_tuning,
    tuned_file,
)

TUNED = GpuTuning(
    gpu="NVIDIA H100 80GB HBM3",
    num_sms=132,
    k_width=2,
    ctas_per_sm=3,
    gemv_max_rows=1,
    tiles={(4, 16): TileConfig(block_n=64, num_warps=4, num_stages=6)},
)
DEFAULTS = default_tuning(TUNED.gpu, 132, (9, 0))


def test_results_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = save_tuning(TUNED, "3.7.1", tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3-triton-3.7.json"
    assert load_tuning(DEFAULTS, "3.7.0", tmp_path) == TUNED
    assert TUNED.tile(4, 16).num_stages == 6
    assert TUNED.tile(8, 16) == DEFAULTS.tile(8, 16)


def test_another_gpu_or_triton_gets_defaults(tmp_path: Path) -> None:
    save_tuning(TUNED, "3.7.1", tmp_path)
    other = default_tuning("NVIDIA L4", 58, (8, 9))
    assert load_tuning(other, "3.7.1", tmp_path) is other
    assert load_tuning(DEFAULTS, "3.8.0", tmp_path) is DEFAULTS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_sms": 114}, "with 114 SMs"),
        ({"k_width": None, "colour": 1}, "colour"),
        ({"tiles": [{"bits": 4}]}, "rows"),
        ({"tiles": [{"bits": 4, "rows": 16, "block_n": 64}]}, "num_warps"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = save_tuning(TUNED, "3.7.1", tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InvalidTuning, match=message) as caught:
        load_tuning(DEFAULTS, "3.7.1", tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    tuned_file(tmp_path, TUNED.gpu, "3.7.1").write_text("{")
    with pytest.raises(InvalidTuning, match="lowbit tune"):
        load_tuning(DEFAULTS, "3.7.1", tmp_path)


def test_rows_go_to_the_smallest_block_that_holds_them() -> None:
    assert [row_block(n) for n in (1, 16, 17, 64, 65, 128, 500)] == [16, 16, 32, 64, 64, 64, 64]
