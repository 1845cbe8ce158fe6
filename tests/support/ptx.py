"""Runs the few PTX instructions that the kernels' inline assembly uses, where there is no GPU.

One thread, 32-bit registers; what each does: NVIDIA's PTX ISA. Unknown instructions raise.
"""

from __future__ import annotations

import torch


def run(code: str, word: int) -> tuple[int, int]:
    """The outputs $0 and $1 of code whose input is $2."""
    registers = {"$2": word}
    statements = [part.strip() for part in code.strip("{ }").split(";") if part.strip()]
    for statement in statements:
        operation, _, operands = statement.partition(" ")
        if operation == ".reg":
            continue
        target, *names = (name.strip() for name in operands.split(","))
        values = [registers[name] if name in registers else int(name, 0) for name in names]
        registers[target] = OPERATIONS[operation](*values) & 0xFFFFFFFF
    return registers["$0"], registers["$1"]


def prmt(a: int, b: int, selector: int) -> int:
    chosen = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    picks = [selector >> 4 * i & 0xF for i in range(4)]
    assert all(pick < 8 for pick in picks)
    return int.from_bytes(bytes(chosen[pick] for pick in picks), "little")


def lop3(a: int, b: int, c: int, table: int) -> int:
    """Bit by bit, of the table's 8 bits the one that a, b and c number."""
    bits = ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) for i in range(32))
    return sum((table >> bit & 1) << i for i, bit in enumerate(bits))


def halves(word: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([word], dtype=torch.uint32).view(torch.int32).view(dtype).double()


def joined(values: torch.Tensor, dtype: torch.dtype) -> int:
    return int(values.to(dtype).view(torch.int32).item()) & 0xFFFFFFFF


def sub_f16x2(a: int, b: int) -> int:
    return joined(halves(a, torch.float16) - halves(b, torch.float16), torch.float16)


def fma_bf16x2(a: int, b: int, c: int) -> int:
    x, y, z = (halves(word, torch.bfloat16) for word in (a, b, c))
    return joined(x * y + z, torch.bfloat16)


OPERATIONS = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
    "sub.f16x2": sub_f16x2,
    "fma.rn.bf16x2": fma_bf16x2,
}
