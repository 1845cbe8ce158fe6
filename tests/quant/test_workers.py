from __future__ import annotations

import threading
import time

import pytest
import torch
from lowbit.quant.workers import Workers


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    with Workers(count) as workers:
        assert workers.map(lambda item: item**2, range(10)) == [i**2 for i in range(10)]
        assert workers.map(lambda item: item, []) == []


def test_a_place_in_the_list_is_always_the_same_threads() -> None:
    with Workers(3) as workers:
        first = workers.map(lambda _: threading.get_ident(), range(7))
        assert workers.map(lambda _: threading.get_ident(), range(7)) == first
    assert len(set(first)) == 3
    assert first[:3] == first[3:6]


def test_the_cores_are_shared_out() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with Workers(2) as workers:
            assert workers.map(lambda _: torch.get_num_threads(), range(4)) == [2] * 4
            assert torch.get_num_threads() == 4
            seen: list[int] = []
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            assert seen == [4]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_are_off(count: int) -> None:
    with Workers(count) as workers:
        assert workers.map(lambda _: torch.is_inference_mode_enabled(), range(2)) == [True] * 2
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("count", [1, 2])
def test_the_first_error_comes_out_when_nobody_works_any_more(count: int) -> None:
    begun, ended = [], []

    def work(item: int) -> None:
        begun.append(item)
        if item in (1, 2):
            raise ValueError(f"of {item}")
        time.sleep(0.02)
        ended.append(item)

    with Workers(count) as workers:
        with pytest.raises(ValueError, match="of 1"):
            workers.map(work, range(100))
        assert sorted({*begun} - {*ended}) in ([1], [1, 2])
        assert len(begun) < 50
        assert workers.map(str, [7]) == ["7"]
