"""Fragment order, code by code, against the formula in `FragmentWeight`'s docstring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lowbit.kernels.packing import FragmentWeight, tile_inputs, to_fragments, unpack_codes
from tiny import random_packed_weight

ALL_BITS = (2, 3, 4, 8)


def plane_code(plane: torch.Tensor, bits: int, n: int, k: int, tile: int, k_width: int) -> int:
    """The bits of code (n, k) that a plane holds."""
    inner = k % 16
    if k_width == 2:
        c, t, p = inner // 8, inner % 8 // 2, inner % 2
    else:
        t, c, p = inner // 4, inner % 4 // 2, inner % 2
    r, g = n % 16 // 8, n % 8
    pair = 4 * (k % tile // 16) + 2 * c + r
    per_word = 16 // bits
    word = int(plane[n // 16, k // tile, 4 * g + t, pair // per_word]) & 0xFFFFFFFF
    position = pair % per_word
    if bits == 1:
        position = position // 8 * 8 + 2 * (position % 4) + position // 4 % 2
    return word >> (bits * position + 16 * p) & (1 << bits) - 1


def code_at(weight: FragmentWeight, n: int, k: int) -> int:
    plane_bits = (2, 1) if weight.bits == 3 else (weight.bits,)
    code, lowest = 0, 0
    for plane, bits in zip(weight.planes, plane_bits, strict=True):
        code |= plane_code(plane, bits, n, k, tile_inputs(weight.bits), weight.k_width) << lowest
        lowest += bits
    return code


def pair_value(pairs: torch.Tensor, group: int, n: int) -> int:
    word = int(pairs[group, n // 16, n % 8]) & 0xFFFFFFFF
    return word >> 16 * (n % 16 // 8) & 0xFFFF


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("k_width", [2, 4])
def test_every_code_stands_where_the_docstring_says(bits: int, k_width: int) -> None:
    torch.manual_seed(bits)
    packed = random_packed_weight(200, 70, bits=bits, group_size=48, sym=False)
    weight = to_fragments(packed, k_width)
    codes = unpack_codes(packed.qweight, bits, 200)
    assert weight.padded_in_features == 256
    assert weight.padded_out_features == 128
    for n in range(128):
        for k in range(0, 256, 1 if n % 16 < 2 else 7):
            expected = int(codes[k, n]) if k < 200 and n < 70 else 0
            assert code_at(weight, n, k) == expected


def test_scales_and_zeros_lie_two_outputs_to_a_word_and_padding_is_zero() -> None:
    packed = random_packed_weight(200, 70, group_size=48, sym=False)
    weight = to_fragments(packed, 2)
    assert weight.zeros is not None
    assert weight.scale_dtype == torch.float16
    bits = packed.scales.view(torch.int16)
    for group in range(6):  # 256 padded inputs
        for n in range(128):
            inside = group < 5 and n < 70
            scale = int(bits[group, n]) & 0xFFFF if inside else 0
            zero = int(packed.zeros[group, n]) if inside else 0
            assert pair_value(weight.scales, group, n) == scale
            assert pair_value(weight.zeros, group, n) == zero


def test_centered_zeros_take_no_memory_and_wide_scales_are_rounded() -> None:
    packed = random_packed_weight(128, 64)
    assert to_fragments(packed, 2).zeros is None
    wide = replace(packed, scales=packed.scales.float() * (1 + 2**-20))
    assert torch.equal(to_fragments(wide, 2).scales, to_fragments(packed, 2).scales)
    assert to_fragments(wide, 2, torch.bfloat16).scale_dtype == torch.bfloat16


def test_a_row_of_one_scale_is_one_group() -> None:
    assert to_fragments(random_packed_weight(200, 64, group_size=-1), 4).group_size == 256


def test_what_has_no_fragment_order_is_refused_by_name() -> None:
    weight = random_packed_weight(128, 64)
    with pytest.raises(ValueError, match="k_width is 3"):
        to_fragments(weight, 3)
    with pytest.raises(ValueError, match="group_size is 24"):
        to_fragments(random_packed_weight(128, 64, group_size=24), 2)
    twice = torch.arange(128).clamp(max=126)
    with pytest.raises(ValueError, match="input_permutation must hold every input"):
        to_fragments(replace(weight, input_permutation=twice), 2)
