"""The running server: its sockets, its health, its signals and its end."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc.aio

from ..config import ServerConfig, is_local
from ..metrics import Metrics, MetricsServer, start_metrics_server
from ..types import SamplingParams
from . import control, generation, health, kserve, model, vllm_engine
from .admission import Admission
from .auth import KeyInterceptor
from .calls import AbortOutcome, Calls
from .control import ControlServicer
from .deployment import Deployment, Engine, Loaded
from .generation import GenerationServicer
from .health import HealthServicer
from .kserve import InferenceServicer
from .listen import UNIX_PREFIX, address_of, bind, compression, credentials, server_options
from .model import ModelServicer
from .reflection import add_reflection
from .requests import RequestServer
from .tenants import KeyRing
from .vllm_engine import VllmEngineServicer

logger = logging.getLogger(__name__)

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
_LOOPBACK: Final = "127.0.0.1"
_HEALTH_CHECK_SECONDS: Final = 1.0
# For the statuses of requests that the engine has just ended to reach their callers.
_GOODBYE_SECONDS: Final = 1.0
_SERVICES: Final = (
    generation.SERVICE_NAME,
    model.SERVICE_NAME,
    control.SERVICE_NAME,
    kserve.SERVICE_NAME,
    vllm_engine.SERVICE_NAME,
)


class GenerationServer:
    """Start it, open it, then drain or stop it; once each, on one event loop."""

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self.port = 0  # set by start
        self.metrics_port = 0  # set by start
        self.control_port = 0  # set by start, where there is a control_host
        self._config = config
        self._metrics = metrics
        self._deployment = Deployment()
        self._calls = Calls(config.engine.max_num_seqs + config.engine.max_queued_requests)
        self._health = HealthServicer(("", *_SERVICES))
        self._hurry = asyncio.Event()
        self._keys = KeyRing(Path(config.api_keys)) if config.api_keys else None
        self._grpc_server: grpc.aio.Server | None = None
        self._control_server: grpc.aio.Server | None = None
        self._metrics_server: MetricsServer | None = None
        self._health_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen, and answer that the server is starting. Raises CannotListen.

        Call `stop` also after a failure.
        """
        config = self._config
        self._grpc_server = self._create_grpc_server()
        self.port = bind(self._grpc_server, config.host, config.port, credentials(config))
        self._metrics_server = start_metrics_server(
            self._metrics_host, config.metrics_port, self._metrics.registry
        )
        self.metrics_port = self._metrics_server.port
        if config.control_host:
            self._control_server = self._create_control_server()
            self.control_port = bind(
                self._control_server, config.control_host, config.control_port, None
            )
            await self._control_server.start()
        await self._grpc_server.start()

    async def open(self, loaded: Loaded, *, warm_up: bool = False) -> None:
        """Start the engine, let it generate once if it is to warm up, and serve."""
        await loaded.engine.start()
        if warm_up:
            await _warm_up(loaded.engine)
        self._deployment.open(loaded)
        self._health.set_serving(True)
        self._health_task = asyncio.create_task(self._follow_engine_health(loaded.engine))

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return address_of(self._config.host, self.port)

    @property
    def metrics_address(self) -> str:
        """Where Prometheus reaches it."""
        return address_of(self._metrics_host, self.metrics_port)

    @property
    def _metrics_host(self) -> str:
        return _LOOPBACK if self._config.host.startswith(UNIX_PREFIX) else self._config.host

    @property
    def num_requests(self) -> int:
        """Calls that are being served."""
        return self._calls.num_requests

    def abort(self, request_id: str) -> AbortOutcome:
        """End a request within one step; one that is not running is left alone."""
        return self._calls.abort(request_id)

    async def pause(self) -> None:
        """Report NOT_SERVING, and take requests for as long as load balancers may need to see."""
        self._report_not_serving()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._hurry.wait(), self._config.drain_pause_seconds)

    async def drain(self, grace_seconds: float | None = None) -> int:
        """Refuse new requests; return when the running ones are done or their grace is over.

        Returns how many are not done.
        """
        self._report_not_serving()
        self._deployment.begin_drain()
        idle = asyncio.create_task(self._calls.wait_idle())
        hurry = asyncio.create_task(self._hurry.wait())
        done, _ = await asyncio.wait(
            {idle, hurry},
            timeout=self._config.drain_grace_seconds if grace_seconds is None else grace_seconds,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if idle not in done:
            logger.warning("drained but for %d requests", self._calls.num_requests)
        idle.cancel()
        hurry.cancel()
        return self._calls.num_requests

    def hurry(self) -> None:
        """Let a drain, running or to come, end now."""
        self._hurry.set()

    async def stop(self) -> None:
        """End what is left: unfinished requests get UNAVAILABLE."""
        self._report_not_serving()
        await self._deployment.close()
        if self._grpc_server is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._calls.wait_idle(), _GOODBYE_SECONDS)
            await self._grpc_server.stop(None)
        if self._control_server is not None:
            await self._control_server.stop(None)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        logger.info("stopped")

    def _create_grpc_server(self) -> grpc.aio.Server:
        config, deployment, calls = self._config, self._deployment, self._calls
        server = grpc.aio.server(
            interceptors=self._interceptors(),
            options=server_options(config),
            compression=compression(config),
        )
        services = [generation.SERVICE_NAME, model.SERVICE_NAME]
        requests = RequestServer(config, deployment, calls, self._metrics, Admission(self._keys))
        handlers = [
            GenerationServicer(deployment, requests).handler(),
            ModelServicer(config, deployment, calls).handler(),
        ]
        if config.kserve:
            services.append(kserve.SERVICE_NAME)
            handlers.append(InferenceServicer(deployment, requests).handler())
        if config.vllm_engine:
            services.append(vllm_engine.SERVICE_NAME)
            handlers.append(VllmEngineServicer(deployment, requests, calls).handler())
        if self._serves_control_here():
            services.append(control.SERVICE_NAME)
            handlers.append(ControlServicer(calls, self.drain).handler())
        server.add_generic_rpc_handlers(handlers)
        self._add_health(server, services)
        return server

    def _create_control_server(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=server_options(self._config))
        server.add_generic_rpc_handlers((ControlServicer(self._calls, self.drain).handler(),))
        self._add_health(server, [control.SERVICE_NAME])
        return server

    def _add_health(self, server: grpc.aio.Server, services: list[str]) -> None:
        server.add_generic_rpc_handlers((self._health.handler(),))
        if self._config.reflection:
            add_reflection(server, (*services, health.SERVICE_NAME))

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        if self._keys is None:
            return []
        return [KeyInterceptor(self._keys, health_needs_key=self._config.health_needs_key)]

    def _serves_control_here(self) -> bool:
        """Not where strangers could reach it: it needs keys, or an address of this machine."""
        config = self._config
        return not config.control_host and (bool(config.api_keys) or is_local(config.host))

    async def _follow_engine_health(self, engine: Engine) -> None:
        while True:
            await asyncio.sleep(_HEALTH_CHECK_SECONDS)
            self._health.set_serving(engine.is_healthy)

    def _report_not_serving(self) -> None:
        if self._health_task is not None:
            self._health_task.cancel()
        self._health.set_serving(False)


async def _warm_up(engine: Engine) -> None:
    """Pay for what is set up on first use before anybody waits for it."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    async with aclosing(engine.generate("warm-up", [0], params)) as outputs:
        async for _ in outputs:
            pass


async def serve(
    config: ServerConfig,
    metrics: Metrics,
    load: Callable[[], Awaitable[Loaded]],
    *,
    warm_up: bool = True,
    on_started: Callable[[GenerationServer], None] | None = None,
) -> bool:
    """Listen, load, serve until SIGTERM or Ctrl-C, then drain and return.

    A second signal cuts the drain short. Call it on the main thread's event loop. `on_started`
    hears of the server when it serves, for the ports that it got. Returns whether it came to that:
    a signal while it loads ends it at once. Raises CannotListen, what `load` raises, and
    EngineFailed once the engine is beyond help.
    """
    server = GenerationServer(config, metrics)
    with _stop_signals(on_second=server.hurry) as stop_requested:
        try:
            await server.start()
            logger.info("listening on %s", server.address)
            engine = await _open(server, load, warm_up, stop_requested)
            if engine is None:
                return False
            # To look at all that is loaded, PyTorch too, takes a collection 0.14 seconds each time.
            gc.freeze()
            logger.info("serving, metrics on %d", server.metrics_port)
            if on_started is not None:
                on_started(server)
            await _stop_or_failure(stop_requested, engine)
            await server.pause()
            logger.info("draining for at most %g seconds", config.drain_grace_seconds)
            await server.drain()
            return True
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


async def _open(
    server: GenerationServer,
    load: Callable[[], Awaitable[Loaded]],
    warm_up: bool,
    stop_requested: asyncio.Event,
) -> Engine | None:
    """The engine, or None where the server was told to stop before it opened."""

    async def load_and_open() -> Engine:
        loaded = await load()
        await server.open(loaded, warm_up=warm_up)
        return loaded.engine

    opening = asyncio.create_task(load_and_open())
    stopping = asyncio.create_task(stop_requested.wait())
    await asyncio.wait({opening, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not opening.done():
        opening.cancel()
        return None
    return await opening


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
