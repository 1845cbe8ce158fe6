"""The running server: its sockets, its health, its signals and its end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from ..config import ServerConfig
from ..metrics import Metrics, MetricsServer, start_metrics_server
from ..types import CannotListen
from .health import HealthServicer
from .servicer import SERVICE_NAME, Engine, GenerationServicer, TextCodec

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_HEALTH_CHECK_SECONDS: Final = 1.0
# For the statuses of requests that the engine has just ended to reach their callers.
_GOODBYE_SECONDS: Final = 1.0


class GenerationServer:
    """Start it, then drain or stop it; once each, on one event loop."""

    def __init__(
        self, config: ServerConfig, engine: Engine, tokenizer: TextCodec, metrics: Metrics
    ) -> None:
        self.port = 0  # set by start
        self.metrics_port = 0  # set by start
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._servicer = GenerationServicer(
            engine,
            tokenizer,
            metrics,
            max_requests=config.engine.max_num_seqs + config.engine.max_queued_requests,
        )
        self._health = HealthServicer(("", SERVICE_NAME))
        self._hurry = asyncio.Event()
        self._grpc_server: grpc.aio.Server | None = None
        self._metrics_server: MetricsServer | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind, start the engine, and serve. Raises CannotListen; call `stop` after a failure."""
        config = self._config
        self._grpc_server = self._create_grpc_server()
        self.port = _bind(self._grpc_server, config.host, config.port)
        self._metrics_server = start_metrics_server(
            config.host, config.metrics_port, self._metrics.registry
        )
        self.metrics_port = self._metrics_server.port
        await self._engine.start()
        self._health.set_serving(True)
        self._health_task = asyncio.create_task(self._follow_engine_health())
        await self._grpc_server.start()

    async def drain(self) -> None:
        """Refuse new requests; return when the running ones are done or their grace is over."""
        self._report_not_serving()
        self._engine.begin_drain()
        idle = asyncio.create_task(self._wait_idle())
        hurry = asyncio.create_task(self._hurry.wait())
        done, _ = await asyncio.wait(
            {idle, hurry},
            timeout=self._config.drain_grace_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if idle not in done:
            logger.warning("stopping with %d requests unfinished", self._servicer.num_requests)
        idle.cancel()
        hurry.cancel()

    def hurry(self) -> None:
        """Let a drain, running or to come, end now."""
        self._hurry.set()

    async def stop(self) -> None:
        """End what is left: unfinished requests get UNAVAILABLE."""
        self._report_not_serving()
        await self._engine.stop()
        if self._grpc_server is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._servicer.wait_idle(), _GOODBYE_SECONDS)
            await self._grpc_server.stop(None)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        logger.info("stopped")

    def _create_grpc_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=_server_options(self._config))
        server.add_generic_rpc_handlers((self._servicer.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        reflection.enable_server_reflection(
            (SERVICE_NAME, health_name, reflection.SERVICE_NAME), server
        )
        return server

    async def _wait_idle(self) -> None:
        await self._servicer.wait_idle()
        await self._engine.wait_idle()

    async def _follow_engine_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_CHECK_SECONDS)
            self._health.set_serving(self._engine.is_healthy)

    def _report_not_serving(self) -> None:
        if self._health_task is not None:
            self._health_task.cancel()
        self._health.set_serving(False)


async def serve(
    config: ServerConfig,
    engine: Engine,
    tokenizer: TextCodec,
    metrics: Metrics,
    *,
    on_started: Callable[[GenerationServer], None] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain and return. A second signal cuts the drain short.

    Call it on the main thread's event loop. `on_started` hears of the server when it serves, for
    the ports that it got. Raises CannotListen, and EngineFailed once the engine is beyond help.
    """
    server = GenerationServer(config, engine, tokenizer, metrics)
    with _stop_signals(on_second=server.hurry) as stop_requested:
        try:
            await server.start()
            logger.info(
                "serving on %s:%d, metrics on %d", config.host, server.port, server.metrics_port
            )
            if on_started is not None:
                on_started(server)
            await _stop_or_failure(stop_requested, engine)
            logger.info("draining for at most %g seconds", config.drain_grace_seconds)
            await server.drain()
        finally:
            await server.stop()


async def _stop_or_failure(stop_requested: asyncio.Event, engine: Engine) -> None:
    """Return when a signal asks for the end. Raises EngineFailed when the engine has failed."""
    stop = asyncio.create_task(stop_requested.wait())
    failure = asyncio.create_task(engine.wait_failed())
    try:
        await asyncio.wait({stop, failure}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise failure.result()
    finally:
        stop.cancel()
        failure.cancel()


@contextmanager
def _stop_signals(on_second: Callable[[], None]) -> Iterator[asyncio.Event]:
    """An event that the first signal sets; a third one has its usual, deadly effect."""
    loop = asyncio.get_running_loop()
    requested = asyncio.Event()

    def handle() -> None:
        if requested.is_set():
            restore()
            on_second()
        requested.set()

    def restore() -> None:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)

    for number in _SIGNALS:
        loop.add_signal_handler(number, handle)
    try:
        yield requested
    finally:
        restore()


def _server_options(config: ServerConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # Two servers on one port would share its calls at random.
        ("grpc.so_reuseport", 0),
        # Clients ping through long silent calls; by default gRPC closes on them for that.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Finds clients that vanished without a word: their requests hold memory.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    """The port bound. Raises CannotListen."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        _try_to_bind(host, port)
        return server.add_insecure_port(address)
    except OSError as error:
        raise CannotListen(f"cannot listen on {address}: {error.strerror}") from error
    except RuntimeError as error:
        raise CannotListen(f"cannot listen on {address}: {error}") from error


def _try_to_bind(host: str, port: int) -> None:
    """Raises OSError with the reason, which gRPC writes to stderr and does not tell its caller."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(address)
