from __future__ import annotations

import pytest
import torch
from lowbit.quant.products import compute_with, project, project_in_fp32, resolve_precision
from torch import Tensor, nn


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(hidden: Tensor, linear: nn.Linear) -> Tensor:
    return hidden.double() @ linear.weight.double().t() + linear.bias.double()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_precision_that_is_named_is_taken(name: str) -> None:
    assert resolve_precision(name, 4) == resolve_precision(name, 8) == name


def test_at_8_bits_nothing_is_rounded() -> None:
    capable = torch.cpu.get_capabilities()
    fast = capable.get("avx512_bf16") or capable.get("amx_bf16")
    assert resolve_precision("auto", 4) == ("bfloat16" if fast else "float32")
    assert resolve_precision("auto", 8) == "float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_weight_is_multiplied_in_fp32(dtype: torch.dtype) -> None:
    linear, hidden = nn.Linear(72, 40).requires_grad_(False), seeded(2, 9, 72, seed=1)
    linear.weight.data = linear.weight.data.to(dtype)
    compute_with(project_in_fp32, linear)
    torch.testing.assert_close(linear(hidden).double(), exact(hidden, linear), rtol=1e-5, atol=1e-5)


def test_a_weight_may_change_its_dtype_between_two_passes() -> None:
    linear, hidden = nn.Linear(72, 40).requires_grad_(False), seeded(2, 9, 72, seed=2)
    compute_with(project, linear)
    torch.testing.assert_close(linear(hidden).double(), exact(hidden, linear), rtol=1e-5, atol=1e-5)
    linear.weight = nn.Parameter(linear.weight.to(torch.bfloat16), requires_grad=False)
    rounded = exact(hidden.to(torch.bfloat16), linear)
    found = linear(hidden)
    assert found.dtype == torch.float32
    # One rounding of a sum that was added up in fp32.
    torch.testing.assert_close(found.double(), rounded, rtol=2**-8, atol=1e-2)
