"""Priority classes and fair shares, in a simulation of the real scheduler in virtual time."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count

import pytest
from lowbit.server.config import EngineConfig
from lowbit.server.types import Priority
from simulation import Arrival, Simulation

CONFIG = EngineConfig(
    max_num_seqs=32, max_queued_requests=100_000, max_queued_tokens=1 << 30, max_queue_seconds=0.0
)


def poisson(
    rng: random.Random, numbers: count[int], rate: float, seconds: float, **settings: object
) -> list[Arrival]:
    """Prompts of 50 to 500 tokens, completions of 20 to 200."""
    arrivals, now = [], rng.expovariate(rate)
    while now < seconds:
        arrivals.append(
            Arrival(now, next(numbers), rng.randint(50, 500), rng.randint(20, 200), **settings)
        )
        now += rng.expovariate(rate)
    return arrivals


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def ttfts(simulation: Simulation, arrivals: list[Arrival]) -> list[float]:
    return [simulation.ttft[arrival.number] for arrival in arrivals]


def flood_of(
    numbers: count[int], rng: random.Random, prompt: tuple[int, int], completion: tuple[int, int]
) -> list[Arrival]:
    """300 requests a second for ten seconds, from second 20 on."""
    return [
        Arrival(
            20 + i / 300, next(numbers), rng.randint(*prompt), rng.randint(*completion), "flood"
        )
        for i in range(3000)
    ]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ((10, 60), (20, 60)),
        ((50, 500), (20, 200)),
        ((1000, 4000), (20, 200)),
        ((50, 500), (500, 1500)),
    ],
    ids=["short", "like the quiet one", "long prompts", "long completions"],
)
@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_a_flood_hardly_moves_another_tenants_ttft(
    prompt: tuple[int, int], completion: tuple[int, int], rate: float
) -> None:
    rng, numbers = random.Random(1), count()
    quiet = poisson(rng, numbers, rate, seconds=60.0, tenant="quiet")
    flood = flood_of(numbers, rng, prompt, completion)
    alone, beside = Simulation(CONFIG), Simulation(CONFIG)
    alone.run(quiet)
    beside.run(quiet + flood, until=65.0)
    waits = [beside.ttft.get(arrival.number, 60.0) for arrival in flood]
    assert sum(wait > 5 for wait in waits) > 1000  # it did flood
    before, after = p95(ttfts(alone, quiet)), p95(ttfts(beside, quiet))
    print(f"p95 TTFT {before * 1e3:.0f} ms alone, {after * 1e3:.0f} ms beside the flood")
    assert after < 1.5 * before


def test_a_higher_class_hardly_notices_a_lower_one() -> None:
    rng, numbers = random.Random(2), count()
    high = poisson(rng, numbers, 4.0, 60.0, priority=Priority.HIGH)
    low = [
        replace(each, tenant="", priority=Priority.LOW)
        for each in flood_of(numbers, rng, (50, 2000), (20, 500))
    ]
    alone, beside = Simulation(CONFIG), Simulation(CONFIG)
    alone.run(high)
    beside.run(high + low, until=65.0)
    assert p95(ttfts(beside, high)) < 1.5 * p95(ttfts(alone, high))


def test_shares_follow_the_weights() -> None:
    rng, numbers = random.Random(3), count()
    arrivals = [
        Arrival(0, next(numbers), rng.randint(50, 500), rng.randint(20, 200), tenant, weight)
        for tenant, weight in (("heavy", 3.0), ("light", 1.0))
        for _ in range(2000)
    ]
    simulation = Simulation(CONFIG)
    simulation.run(arrivals, until=60.0)
    assert 2.5 < simulation.tokens["heavy"] / simulation.tokens["light"] < 3.5


def test_everybody_is_served_in_the_end() -> None:
    """Thousands of requests, few blocks: preempted, but never for ever."""
    rng, numbers = random.Random(4), count()
    arrivals = [
        each
        for priority in Priority
        for tenant in ("a", "b", "c")
        for each in poisson(rng, numbers, 10.0, 40.0, tenant=tenant, priority=priority)
    ]
    simulation = Simulation(CONFIG, num_blocks=400)
    simulation.run(arrivals)
    assert len(simulation.finished) == len(arrivals) > 3000
    assert simulation.num_preemptions > 0


def test_a_tenant_that_was_idle_has_earned_no_more_than_a_burst() -> None:
    numbers = count()
    busy = [Arrival(0, next(numbers), 100, 100, "busy") for _ in range(2000)]
    late = [Arrival(30, next(numbers), 100, 100, "late") for _ in range(2000)]
    simulation = Simulation(CONFIG)
    simulation.run(busy + late, until=30.0)
    before = dict(simulation.tokens)
    simulation = Simulation(CONFIG)
    simulation.run(busy + late, until=60.0)
    gained = simulation.tokens["busy"] - before["busy"]
    assert 0.8 < simulation.tokens["late"] / gained < 1.25
