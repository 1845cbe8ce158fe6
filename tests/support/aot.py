"""Compiles the Triton kernels for GPUs that are not there, and reads the machine code.

Run as a script, without TRITON_INTERPRET: takes a compute capability, prints one JSON line per
kernel and configuration. Registers, stack and shared memory are `cuobjdump -res-usage`'s, the
instructions those of `cuobjdump -sass`; both tools ship in the Triton wheel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
import triton.language as tl
from lowbit.kernels import triton_attention as attention
from lowbit.kernels import triton_elementwise as elementwise
from lowbit.kernels import triton_linear as linear
from lowbit.kernels import triton_rope as rope
from lowbit.kernels.rotation import rotation_size
from lowbit.kernels.tuning import GpuTuning, default_tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
NAMES = {tl.float16: "fp16", tl.bfloat16: "bf16"}
ATTENTION_POINTERS = {
    **dict.fromkeys(("block_tables", "query_start", "context_lens"), "i32"),
    **dict.fromkeys(("partial", "weights", "cos", "sin", "lse"), "fp32"),
    **dict.fromkeys(("key_scales", "value_scales"), "fp32"),
    "slots": "i64",
}
CACHES = {"int8": "i8", "fp8": "fp8e4nv"}
# What a wave of calls looks like; 16 divides those that a real call's would.
SIZES = ("num_inputs", "padded_inputs", "num_outputs", "pairs_stride", "x_stride")
STRIDES = ("q_stride", "qkv_stride", "stride_block", "stride_token", "stride_head")
STRIDES += ("scale_stride_block", "scale_stride_head")
ODD_SIZES = ("num_rows", "blocks_per_part", "first_output", "slice_outputs", "table_stride")
ODD_SIZES += ("num_sequences", "num_heads", "num_kv_heads", "num_parts")


@dataclass(frozen=True)
class Compiled:
    """One kernel in one configuration, as machine code."""

    name: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]  # by their full name, as cuobjdump prints it
    loop: dict[str, int]  # those of the longest loop
    loop_per_weight: float  # per weight and thread


def compile_kernel(
    name: str,
    kernel: Any,
    capability: int,
    pointers: dict[str, str],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    weights_per_step: int = 0,
) -> Compiled:
    """Raises whatever the compiler raises."""
    names = kernel.arg_names
    even = (*SIZES, *STRIDES, "num_features")
    types = dict.fromkeys((*even, *ODD_SIZES), "i32") | {"eps": "fp32", "scale": "fp32"}
    types |= {pointer: f"*{dtype}" for pointer, dtype in pointers.items()}
    source = ASTSource(
        kernel,
        signature={n: "constexpr" if n in constants else types[n] for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(names)
            if n in pointers or n in even
        },
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
            ).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    instructions = instructions_of(code)
    loop = longest_loop(code, instructions)
    per_thread = weights_per_step / (num_warps * 32)
    return Compiled(
        name=name,
        capability=capability,
        registers=int(registers),
        stack_bytes=int(stack),
        shared_bytes=built.metadata.shared,
        instructions=dict(Counter(op for _, op in instructions)),
        loop=dict(Counter(loop)),
        loop_per_weight=round(len(loop) / per_thread, 2) if weights_per_step else 0.0,
    )


def instructions_of(code: str) -> list[tuple[int, str]]:
    """Address and name of every instruction."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.M)
    return [(int(address, 16), op) for address, op in found]


def longest_loop(code: str, instructions: list[tuple[int, str]]) -> list[str]:
    """Instructions between a branch and what it jumps back to."""
    jumps = re.findall(r"/\*([0-9a-f]{4,})\*/[^;]*\bBRA\b[^;]*?0x([0-9a-f]+)", code)
    spans = [(int(to, 16), int(at, 16)) for at, to in jumps]
    first, last = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    return [op for address, op in instructions if first <= address <= last]


def linear_kernels(capability: int) -> list[Compiled]:
    """The linear kernels in their default configurations."""
    tuning = default_tuning("none", 1, divmod(capability, 10))
    built = []
    groups = ((128, False), (32, True), (64, True))  # group size, asym
    for bits, dtype, (group, asym) in product((2, 3, 4, 8), NAMES, groups):
        for rows in (1, 16, 32, 64, 0):
            if (rows != 16 or group == 64) and not (bits == 4 and dtype == tl.float16):
                continue
            built.append(linear_kernel(capability, tuning, bits, dtype, group, asym, rows))
    return built


def linear_kernel(
    capability: int, tuning: GpuTuning, bits: int, dtype: Any, group: int, asym: bool, rows: int
) -> Compiled:
    """`rows` 1 is the gemv kernel, 0 the one that dequantizes."""
    constants = linear.tile_constants(bits, group, tuning.k_width, asym, False, dtype, ptx=True)
    pointers = {
        **dict.fromkeys(("x", "bias", "residual", "y", "w"), NAMES[dtype]),
        **dict.fromkeys(("plane", "high_plane", "scales", "zeros"), "i32"),
    }
    kernel, tier = {1: (linear._gemv_kernel, "gemv"), 0: (linear._dequantize_kernel, "deq")}.get(
        rows, (linear._gemm_kernel, f"gemm{rows}")
    )
    tile = tuning.tile(bits, rows)
    if rows:
        pointers["y"] = "fp32"
        constants |= {"BLOCK_K": linear.BLOCK_K, "EVEN_K": True, "SPLIT": True}
        constants |= {"HAS_BIAS": False, "HAS_RESIDUAL": False, "STAGES": tile.num_stages}
    if rows > 1:
        constants["BLOCK_M"] = rows
    constants["BLOCK_N"] = tile.block_n if rows else linear.DEQUANTIZE_N
    return compile_kernel(
        f"{tier} W{bits}g{group} {'asym' if asym else 'sym'} {NAMES[dtype]}",
        kernel,
        capability,
        {name: dtype for name, dtype in pointers.items() if name in kernel.arg_names},
        constants,
        tile.num_warps if rows else 4,
        tile.num_stages if rows else 3,
        constants["BLOCK_N"] * linear.BLOCK_K if rows else 0,
    )


@dataclass(frozen=True)
class Attention:
    """What attention kernels are compiled for."""

    head_dim: int
    group: int
    block_size: int = 16
    dtype: str = "fp16"
    cache: str = "fp16"
    window: int = 0
    soft_cap: float = 0.0
    has_lse: bool = False

    @property
    def name(self) -> str:
        kinds = [self.dtype] if self.cache == self.dtype else [self.dtype, self.cache]
        kinds += ["window"] * (self.window > 0) + ["cap"] * (self.soft_cap > 0)
        return f"D{self.head_dim} group {self.group} block {self.block_size} {' '.join(kinds)}"


ATTENTIONS = (
    Attention(64, 1),
    Attention(80, 4, 32),
    Attention(96, 16, has_lse=True),
    Attention(128, 8, 64),
    Attention(256, 2),
    Attention(128, 8, dtype="bf16", cache="bf16"),
    Attention(256, 2, dtype="bf16", cache="bf16", window=4096, soft_cap=50.0),
    Attention(64, 3, cache="int8"),
    Attention(128, 8, cache="int8"),
    Attention(256, 1, cache="int8", window=4096, soft_cap=50.0, has_lse=True),
    Attention(128, 8, cache="fp8"),
    Attention(256, 2, dtype="bf16", cache="fp8", window=4096, soft_cap=50.0),
)
# Whose keys are rotated in blocks.
ROTATED = (Attention(80, 4, cache="int8"), Attention(96, 1, dtype="bf16", cache="int8"))


def attention_kernels(capability: int) -> list[Compiled]:
    built = []
    for case in ATTENTIONS:
        if case.cache != "fp8" or capability >= 89:
            built += [attention_kernel(capability, case, tier) for tier in ("prefill", "decode")]
    for case in (ATTENTIONS[1], ATTENTIONS[9]):
        built.append(attention_kernel(capability, case, "combine"))
    for case in (ATTENTIONS[1], ATTENTIONS[3], *ATTENTIONS[7:10], *ROTATED):
        built.append(attention_kernel(capability, case, "rope"))
    return built


def attention_kernel(capability: int, case: Attention, tier: str) -> Compiled:
    padded = attention.triton.next_power_of_2(case.head_dim)
    scaled = case.cache in CACHES
    tile = attention.tile_keys(case.head_dim, "prefill" if tier == "prefill" else "decode", scaled)
    parts = {"PART": 128, "MAX_PARTS": 32}
    group = attention.triton.next_power_of_2(case.group)
    rotated = rotation_size(case.head_dim) if case.cache == "int8" else 1
    kernel, warps, constants = {
        "prefill": (
            attention._prefill_kernel,
            attention.prefill_warps(case.head_dim, scaled),
            {"PADDED_GROUP": group, "QUERIES": 64 // group},
        ),
        "decode": (attention._decode_kernel, 4, {"ROWS": 16, **parts}),
        "combine": (
            attention._combine_kernel,
            1,
            {"CHUNK": attention.combined_parts(padded), **parts},
        ),
        "rope": (
            rope._rope_and_store_kernel,
            1,
            {
                "ROTARY_HALF": case.head_dim // 2,
                "LARGEST": 127.0 if scaled else 0.0,
                "ROTATION_STAGES": rotated.bit_length() - 1,
            },
        ),
    }[tier]
    constants |= {
        "HEAD_DIM": case.head_dim,
        "PADDED_DIM": padded,
        "BLOCK_SIZE": case.block_size,
        "TILE": tile,
        "STAGES": attention.stages(scaled),
        "GROUP": case.group,
        "WINDOW": case.window,
        "SOFT_CAP": case.soft_cap,
        "SCALED": scaled,
        "HAS_LSE": case.has_lse,
        "PTX": True,
        "scale_stride_token": 1 if scaled else 0,
    }
    pointers = ATTENTION_POINTERS | dict.fromkeys(("q", "out", "qkv", "queries"), case.dtype)
    pointers |= dict.fromkeys(("keys", "values"), CACHES.get(case.cache, case.cache))
    return compile_kernel(
        f"{tier} {case.name}",
        kernel,
        capability,
        {name: dtype for name, dtype in pointers.items() if name in kernel.arg_names},
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        warps,
        3,
    )


def other_kernels(capability: int) -> list[Compiled]:
    kernels = {
        "rms_norm": (elementwise._rms_norm_kernel, {"BLOCK": 4096, "PERMUTED": True}),
        **{
            f"{activation}_mul": (
                elementwise._activate_mul_kernel,
                {"BLOCK": 1024, "PERMUTED": True, "ACTIVATION": activation, "PARTS": 1},
            )
            for activation in ("silu", "gelu", "gelu_tanh")
        },
        "silu_mul of parts": (
            elementwise._activate_mul_kernel,
            {"BLOCK": 1024, "PERMUTED": False, "ACTIVATION": "silu", "PARTS": 8},
        ),
        "reduce": (
            linear._reduce_kernel,
            {"PARTS": 8, "BLOCK": 1024, "HAS_BIAS": True, "HAS_RESIDUAL": True},
        ),
    }
    return [
        other_kernel(capability, f"{name} {dtype}", kernel, constants, dtype)
        for name, (kernel, constants) in kernels.items()
        for dtype in NAMES.values()
        if dtype == "fp16" or name in ("rms_norm", "silu_mul", "reduce")
    ]


def other_kernel(
    capability: int, name: str, kernel: Any, constants: dict[str, Any], dtype: str
) -> Compiled:
    pointers = dict.fromkeys(("x", "weight", "y", "gate_up", "bias", "residual"), dtype)
    pointers |= {"permutation": "i32", "planes": "fp32"}
    if constants.get("PARTS", 1) > 1:
        pointers["gate_up"] = "fp32"
    return compile_kernel(
        name,
        kernel,
        capability,
        {n: kind for n, kind in pointers.items() if n in kernel.arg_names},
        constants,
        num_warps=4,
        num_stages=3,
    )


if __name__ == "__main__":
    capability = int(sys.argv[1])
    for compiled in [
        *linear_kernels(capability),
        *attention_kernels(capability),
        *other_kernels(capability),
    ]:
        print(json.dumps(asdict(compiled)), flush=True)
