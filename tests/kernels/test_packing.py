from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowbit.kernels.packing import (
    PackedWeight,
    concatenate,
    dequantize,
    dequantize_inputs,
    pack_codes,
    pack_zeros,
    select_outputs,
    unpack_codes,
    unpack_zeros,
)
from tiny import random_packed_weight

ALL_BITS = (2, 3, 4, 8)


def stream_words(column: list[int], bits: int) -> list[int]:
    """One column's codes as a little-endian bit stream, through Python's integers."""
    stream = sum(code << (bits * i) for i, code in enumerate(column))
    num_words = -(-len(column) * bits // 32)
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(num_words)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@given(
    bits=st.sampled_from(ALL_BITS),
    rows=st.integers(1, 131),
    columns=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_packed_words_are_the_bit_stream_and_come_back(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    packed = pack_codes(codes, bits)
    expected = [stream_words(codes[:, n].tolist(), bits) for n in range(columns)]
    assert packed.t().tolist() == expected
    assert torch.equal(unpack_codes(packed, bits, rows).long(), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_zero_points_round_trip_along_n(bits: int) -> None:
    zeros = torch.randint(0, 1 << bits, (3, 37), dtype=torch.uint8)
    packed = pack_zeros(zeros, bits)
    assert packed.shape == (3, -(-37 * bits // 32))
    assert torch.equal(unpack_zeros(packed, bits, 37), zeros)


def test_symmetric_words_are_the_published_ones() -> None:
    # GPTQ v1 stores the middle code minus one; the words stand in every GPTQ checkpoint.
    assert pack_zeros(torch.full((1, 8), 7), 4).item() == 0x77777777
    three_bit = pack_zeros(torch.full((1, 32), 3), 3).long() & 0xFFFFFFFF
    assert [hex(word) for word in three_bit[0].tolist()] == [
        "0xdb6db6db",
        "0xb6db6db6",
        "0x6db6db6d",
    ]


def test_codes_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 15\] for 4 bits"):
        pack_codes(torch.tensor([[16]]), 4)
    with pytest.raises(ValueError, match=r"bits is 5"):
        pack_codes(torch.tensor([[1]]), 5)


def test_wrong_number_of_words_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"2 packed rows cannot hold 17 codes of 4 bits; expected 3"
    ):
        unpack_codes(torch.zeros(2, 3, dtype=torch.int32), 4, 17)


def test_dequantize_follows_the_formula_with_a_short_last_group() -> None:
    codes = torch.tensor([[0, 15], [8, 7], [3, 9]])
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.float16)
    zeros = torch.tensor([[8, 7], [0, 15]], dtype=torch.uint8)
    weight = PackedWeight(
        bits=4,
        group_size=2,
        in_features=3,
        out_features=2,
        qweight=pack_codes(codes, 4),
        scales=scales,
        zeros=zeros,
    )
    expected = torch.tensor([[-4.0, 0.0, 3.0], [16.0, 0.0, -1.5]])
    assert torch.equal(dequantize(weight), expected)


def test_dequantize_undoes_the_input_permutation() -> None:
    plain = random_packed_weight(128, 8, group_size=32)
    permutation = torch.randperm(128)
    permuted = dequantize(replace(plain, input_permutation=permutation))
    x = torch.randn(5, 128, dtype=torch.float64)
    expected = x[:, permutation] @ dequantize(plain).double().T
    torch.testing.assert_close(x @ permuted.double().T, expected)


def test_concatenate_stacks_outputs_and_refuses_what_differs() -> None:
    first, second = random_packed_weight(128, 24), random_packed_weight(128, 40)
    second = replace(second, bias=torch.randn(40))
    both = concatenate([first, second])
    assert torch.equal(dequantize(both), torch.cat([dequantize(first), dequantize(second)]))
    assert both.bias is not None
    assert torch.equal(both.bias, torch.cat([torch.zeros(24), second.bias]))
    with pytest.raises(ValueError, match="cannot share one matrix"):
        concatenate([first, random_packed_weight(128, 24, group_size=32)])


@pytest.mark.parametrize("bits", ALL_BITS)
def test_selected_outputs_and_inputs_are_those_of_the_whole(bits: int) -> None:
    weight = random_packed_weight(100, 24, bits=bits, group_size=32, sym=False)
    whole = dequantize(weight)
    outputs, inputs = torch.tensor([23, 0, 5, 5]), torch.tensor([99, 0, 10, 21, 32, 42])
    assert torch.equal(dequantize(select_outputs(weight, outputs)), whole[outputs])
    assert torch.equal(dequantize_inputs(weight, inputs), whole.t()[inputs])
    permuted = replace(weight, input_permutation=torch.randperm(100), bias=torch.randn(24))
    some = select_outputs(permuted, outputs)
    assert torch.equal(dequantize(some), dequantize(permuted)[outputs])
    assert some.bias is not None and torch.equal(some.bias, permuted.bias[outputs])
    with pytest.raises(ValueError, match="input permutation has no rows"):
        dequantize_inputs(permuted, inputs)
