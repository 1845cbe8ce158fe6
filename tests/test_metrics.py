from __future__ import annotations

import socket
import urllib.request
from dataclasses import replace

import pytest
from lowbit.server import metrics as metrics_module
from lowbit.server.metrics import Metrics, start_metrics_server
from lowbit.server.types import CannotListen, StepStats
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

STEP = StepStats(
    num_running=3,
    num_waiting=2,
    kv_cache_usage_ratio=0.25,
    num_prompt_tokens=10,
    num_generation_tokens=3,
    num_preemptions=1,
    num_draft_tokens=8,
    num_accepted_draft_tokens=5,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics_module, "time", clock)
    return clock


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"lowbit_{name}", labels)


def test_gauges_show_the_last_step_and_counters_add_up(metrics: Metrics) -> None:
    metrics.observe_step(STEP)
    metrics.observe_step(replace(STEP, num_running=1, kv_cache_usage_ratio=0.5))
    assert sample(metrics, "requests_running") == 1
    assert sample(metrics, "requests_waiting") == 2
    assert sample(metrics, "kv_cache_usage_ratio") == 0.5
    assert sample(metrics, "prompt_tokens_total") == 20
    assert sample(metrics, "generation_tokens_total") == 6
    assert sample(metrics, "preemptions_total") == 2
    assert sample(metrics, "draft_tokens_total") == 16
    assert sample(metrics, "accepted_draft_tokens_total") == 10


def test_a_request_is_timed_by_its_tokens(metrics: Metrics, clock: Clock) -> None:
    request = metrics.observe_request()
    for pause in (0.05, 0.0035, 0.0015):
        clock.now += pause
        request.token()
    clock.now += 10  # a slow reader is not the server's time
    request.end("length")
    assert request.time_to_first_token_seconds == pytest.approx(0.05)
    assert request.duration_seconds == pytest.approx(0.055)
    assert sample(metrics, "time_to_first_token_seconds_sum") == pytest.approx(0.05)
    assert sample(metrics, "inter_token_latency_seconds_count") == 2
    assert sample(metrics, "inter_token_latency_seconds_bucket", le="0.002") == 1
    assert sample(metrics, "inter_token_latency_seconds_bucket", le="0.004") == 2
    assert sample(metrics, "request_duration_seconds_sum") == pytest.approx(0.055)
    assert sample(metrics, "requests_total", finish_reason="length") == 1


def test_a_request_that_did_not_finish_counts_but_has_no_duration(metrics: Metrics) -> None:
    for end in ("cancelled", "error", "invalid", "queue_full", "draining"):
        metrics.observe_request().end(end)
        assert sample(metrics, "requests_total", finish_reason=end) == 1
    assert sample(metrics, "request_duration_seconds_count") == 0
    assert sample(metrics, "time_to_first_token_seconds_count") == 0


def test_every_finish_reason_is_there_from_the_start(metrics: Metrics) -> None:
    assert sample(metrics, "requests_total", finish_reason="stop") == 0


def test_prometheus_can_scrape_it(metrics: Metrics) -> None:
    metrics.observe_step(STEP)
    with start_metrics_server("127.0.0.1", 0, metrics.registry) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    values = {each.name: each.value for family in families for each in family.samples}
    assert values["lowbit_requests_running"] == 3
    assert values["lowbit_prompt_tokens_total"] == 10
    assert all(name.startswith("lowbit_") and ":" not in name for name in values)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            start_metrics_server("127.0.0.1", port, CollectorRegistry())
