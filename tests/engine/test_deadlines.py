"""Deadlines that cannot be met are refused on arrival, and no others: in virtual time."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from lowbit.server.config import EngineConfig
from lowbit.server.types import Priority
from simulation import Arrival, Simulation

CONFIG = EngineConfig(
    max_num_seqs=32, max_queued_requests=100_000, max_queued_tokens=1 << 30, max_queue_seconds=0.0
)
FIRST = Arrival(0.0, 1, 4000, 1)  # shows how fast full steps are


def crowd(max_tokens: int, num_shared_tokens: int = 0, **settings: object) -> list[Arrival]:
    """300 prompts of 350 to 650 tokens within a second: about 10 s of work."""
    rng = random.Random(3)
    return [
        Arrival(
            10 + rng.random(),
            number,
            rng.randint(350, 650),
            max_tokens,
            num_shared_tokens=num_shared_tokens,
            **settings,
        )
        for number in range(2, 302)
    ]


def run(arrivals: list[Arrival]) -> Simulation:
    simulation = Simulation(CONFIG)
    simulation.run([FIRST, *arrivals])
    return simulation


def with_deadline(arrivals: list[Arrival], seconds: float) -> list[Arrival]:
    return [replace(each, deadline_seconds=seconds) for each in arrivals]


@pytest.mark.parametrize("num_shared_tokens", [0, 40, 349])
@pytest.mark.parametrize("max_tokens", [1, 50])
@pytest.mark.parametrize("seconds", [0.02, 1.0, 4.0])
def test_who_is_refused_would_have_been_late(
    max_tokens: int, num_shared_tokens: int, seconds: float
) -> None:
    arrivals = crowd(max_tokens, num_shared_tokens)
    free, bound = run(arrivals), run(with_deadline(arrivals, seconds))
    assert bound.refused or num_shared_tokens > 0
    for number in bound.refused:
        assert free.ttft[number] > seconds


def test_where_nothing_is_shared_hardly_any_late_one_is_accepted() -> None:
    arrivals = crowd(max_tokens=1)
    free, bound = run(arrivals), run(with_deadline(arrivals, 4.0))
    late_by_itself = sum(seconds > 4 for seconds in free.ttft.values())
    assert late_by_itself > 100 and bound.refused
    assert len(bound.late) < 0.1 * len(bound.refused)


def test_who_goes_first_does_not_wait_for_the_others() -> None:
    low = crowd(max_tokens=1, priority=Priority.LOW)
    other = crowd(max_tokens=1, tenant="other")
    urgent = Arrival(11.1, 1000, 100, 1, priority=Priority.HIGH, deadline_seconds=0.2)
    guest = Arrival(11.1, 1000, 100, 1, tenant="guest", deadline_seconds=0.2)
    for arrivals in ([*low, urgent], [*other, guest]):
        assert 1000 not in run(arrivals).refused


def test_nothing_is_refused_by_a_guess() -> None:
    """Before a full step nobody knows how fast those are."""
    simulation = Simulation(CONFIG)
    small = [Arrival(i / 10, i, 5, 3) for i in range(10)]
    late = Arrival(2.0, 10, 400, 50, deadline_seconds=0.001)
    simulation.run([*small, late])
    assert simulation.refused == set() and simulation.late == {10}
