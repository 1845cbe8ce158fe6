"""What Prometheus sees. Knows steps and requests by their numbers only."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Literal, Self, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from .types import CannotListen, StepStats

RequestEnd = Literal[
    "stop",
    "length",
    "cancelled",
    "deadline",
    "error",
    "invalid",
    "queue_full",
    "queue_timeout",
    "quota_exceeded",
    "denied",
    "stalled",
    "starting",
    "draining",
]
"""How a request ended: finished, cut short, or refused."""

# fmt: off
_TIME_TO_FIRST_TOKEN_BUCKETS: Final = (
    .001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160,
    640, 2560,
)
# A small quantized model takes 5 to 8 ms per token on one GPU, so the steps below 10 ms matter.
_INTER_TOKEN_LATENCY_BUCKETS: Final = (
    .001, .002, .003, .004, .005, .0075, .01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1,
    2.5, 5, 7.5, 10, 20, 40, 80,
)
_REQUEST_DURATION_BUCKETS: Final = (
    .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
# fmt: on


class Metrics:
    """The server's metrics, in the caller's registry or one of their own. Threads may share it."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._create_engine_metrics(self.registry)
        self._create_request_metrics(self.registry)

    def observe_step(self, stats: StepStats) -> None:
        """Take in one engine step."""
        self.requests_running.set(stats.num_running)
        self.requests_waiting.set(stats.num_waiting)
        self.kv_cache_usage_ratio.set(stats.kv_cache_usage_ratio)
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.generation_tokens.inc(stats.num_generation_tokens)
        self.preemptions.inc(stats.num_preemptions)
        self.prefix_cache_queries.inc(stats.num_prefix_queried_tokens)
        self.prefix_cache_hits.inc(stats.num_prefix_hit_tokens)
        self.draft_tokens.inc(stats.num_draft_tokens)
        self.accepted_draft_tokens.inc(stats.num_accepted_draft_tokens)

    def observe_request(self) -> RequestObserver:
        """A request has arrived: tell the observer of its tokens and its end."""
        return RequestObserver(self)

    def _create_engine_metrics(self, registry: CollectorRegistry) -> None:
        self.requests_running = Gauge(
            "lowbit_requests_running", "Requests that hold KV-cache blocks.", registry=registry
        )
        self.requests_waiting = Gauge(
            "lowbit_requests_waiting", "Requests in the queue.", registry=registry
        )
        self.kv_cache_usage_ratio = Gauge(
            "lowbit_kv_cache_usage_ratio",
            "Used KV-cache blocks over all blocks, 0 to 1.",
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "lowbit_prompt_tokens_total", "Prompt tokens computed.", registry=registry
        )
        self.generation_tokens = Counter(
            "lowbit_generation_tokens_total", "Completion tokens made.", registry=registry
        )
        self.preemptions = Counter(
            "lowbit_preemptions_total",
            "Times that a sequence gave its KV-cache blocks up for another one.",
            registry=registry,
        )
        self.prefix_cache_queries = Counter(
            "lowbit_prefix_cache_queried_tokens_total",
            "Tokens of the sequences admitted, those admitted again included.",
            registry=registry,
        )
        self.prefix_cache_hits = Counter(
            "lowbit_prefix_cache_hit_tokens_total",
            "Of the queried tokens, those that were found in the prefix cache.",
            registry=registry,
        )
        self.draft_tokens = Counter(
            "lowbit_draft_tokens_total", "Guessed tokens that were verified.", registry=registry
        )
        self.accepted_draft_tokens = Counter(
            "lowbit_accepted_draft_tokens_total",
            "Of the guessed tokens, those that stood.",
            registry=registry,
        )

    def _create_request_metrics(self, registry: CollectorRegistry) -> None:
        self.time_to_first_token = Histogram(
            "lowbit_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_TIME_TO_FIRST_TOKEN_BUCKETS,
            registry=registry,
        )
        self.inter_token_latency = Histogram(
            "lowbit_inter_token_latency_seconds",
            "Between two tokens of one request.",
            buckets=_INTER_TOKEN_LATENCY_BUCKETS,
            registry=registry,
        )
        self.request_duration = Histogram(
            "lowbit_request_duration_seconds",
            "From a request's arrival to its last token, of requests that ran to their end.",
            buckets=_REQUEST_DURATION_BUCKETS,
            registry=registry,
        )
        self.requests = Counter(
            "lowbit_requests_total",
            "Requests by how they ended: finished, cut short or refused.",
            ["finish_reason"],
            registry=registry,
        )
        for end in get_args(RequestEnd):
            self.requests.labels(end)  # at 0, so that a rate exists before the first one


class RequestObserver:
    """Times one request, on this process's monotonic clock. Made by `Metrics.observe_request`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.monotonic()
        self._first_token: float | None = None
        self._last_token = self._arrival
        self._ended = False

    @property
    def time_to_first_token_seconds(self) -> float:
        """0 before the first token."""
        return 0.0 if self._first_token is None else self._first_token - self._arrival

    @property
    def duration_seconds(self) -> float:
        """From the arrival to the last token so far."""
        return self._last_token - self._arrival

    @property
    def elapsed_seconds(self) -> float:
        """From the arrival until now."""
        return time.monotonic() - self._arrival

    def token(self) -> None:
        """The engine delivered a token."""
        now = time.monotonic()
        if self._first_token is None:
            self._first_token = now
            self._metrics.time_to_first_token.observe(now - self._arrival)
        else:
            self._metrics.inter_token_latency.observe(now - self._last_token)
        self._last_token = now

    def end(self, end: RequestEnd) -> None:
        """The request is over. Call exactly once."""
        assert not self._ended
        self._ended = True
        self._metrics.requests.labels(end).inc()
        if end in ("stop", "length"):
            self._metrics.request_duration.observe(self.duration_seconds)


class MetricsServer:
    """Serves a registry at /metrics on a thread of its own. Close it, or use it in a `with`."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise CannotListen(
                f"cannot serve metrics on {host}:{port}: {error.strerror}"
            ) from error
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def start_metrics_server(host: str, port: int, registry: CollectorRegistry) -> MetricsServer:
    """Listen on host:port, 0 for a free port. Raises CannotListen."""
    return MetricsServer(host, port, registry)
