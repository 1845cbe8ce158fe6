"""Every Triton kernel compiled for GPUs that need not be there; the machine code looked at.

Prints a table (pytest -s). A kernel that spills registers, asks for more shared memory than the
chip has, or has lost its 16-byte loads or its tensor-core instructions fails.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

AOT = Path(__file__).parents[1] / "support" / "aot.py"
# Largest shared memory of a block in bytes: CUDA C Programming Guide, "Technical Specifications
# per Compute Capability".
SHARED_BYTES = {
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}  # elsewhere HMMA
# Where dequantized weights go from registers into the tensor core, by way of no memory.
FROM_REGISTERS = (80, 86, 89, 90, 120)
LOADS = ("LDGSTS.E.BYPASS.128", "LDGSTS.E.128", "LDG.E.128")


@pytest.fixture(scope="module")
def compiled() -> dict[int, list[dict[str, Any]]]:
    """Kernels by compute capability; two compilers at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SHARED_BYTES, pool.map(compile_for, SHARED_BYTES), strict=True))


def compile_for(capability: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, AOT, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def count(kernel: dict[str, Any], *names: str) -> int:
    return sum(n for op, n in kernel["instructions"].items() if op.startswith(names))


def describe(kernel: dict[str, Any]) -> str:
    return (
        f"sm_{kernel['capability']:<4}{kernel['name']:<50}"
        f"{kernel['registers']:>4} registers {kernel['stack_bytes']:>3} B spilled "
        f"{kernel['shared_bytes']:>7} B shared {count(kernel, *LOADS):>3} 16-byte loads "
        f"{count(kernel, 'HGMMA', 'HMMA', 'UTCHMMA'):>3} tensor-core "
        f"{kernel['loop_per_weight']:>5} instructions/weight"
    )


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_to_what_makes_them_fast(
    compiled: dict[int, list[dict[str, Any]]], capability: int
) -> None:
    kernels = compiled[capability]
    print("", *map(describe, kernels), sep="\n")
    assert len(kernels) > 25
    for kernel in kernels:
        assert kernel["stack_bytes"] == 0, describe(kernel)
        assert count(kernel, "STL", "LDL") == 0, describe(kernel)
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], describe(kernel)
        if kernel["name"].startswith("rope"):  # a warp's lanes rotate a head among themselves
            assert kernel["shared_bytes"] == 0, describe(kernel)
        if kernel["name"].startswith(("gem", "prefill", "decode")):
            assert count(kernel, *LOADS) > 0, describe(kernel)
        if kernel["name"].startswith(("gemm", "prefill", "decode")):
            names = ("HMMA", "HGMMA", "UTCHMMA")
            assert count(kernel, *names) > 0, describe(kernel)
        if kernel["name"].startswith("gemm"):
            assert count(kernel, TENSOR_CORE.get(capability, "HMMA")) > 0, describe(kernel)
        if kernel["name"].startswith("gemm") and capability in FROM_REGISTERS:
            assert not any(op.startswith("STS") for op in kernel["loop"]), describe(kernel)
