"""The one thread boundary: asyncio on this side, the engine's own thread on the other.

Commands travel through one inbox and are obeyed between steps; a step's outputs come back in one
callback on the event loop. Nothing else is shared.
"""

from __future__ import annotations

import asyncio
import logging
import queue
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ..types import (
    DEFAULT_SCHEDULING,
    Draining,
    EngineFailed,
    InvalidRequest,
    LowbitError,
    SamplingParams,
    SchedulingParams,
    StepStats,
    TokenConstraint,
    TokenOutput,
)
from .engine import LLMEngine
from .sequence import Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Add:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class _Stop:
    pass


_Command = _Add | _Abort | _Stop
_News = TokenOutput | LowbitError


def engine_thread() -> ThreadPoolExecutor:
    """The one thread that computes: load the model on it, then hand it to an AsyncEngine.

    OpenMP keeps a pool of workers for every thread that ever computed. With two pools there are
    more workers than cores, they sleep between operations instead of spinning, and a decode step
    of the 135M model takes 23 ms instead of 10 (2 cores).
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowbit-engine")


class AsyncEngine:
    """Many concurrent requests over one LLMEngine, which steps on `thread`.

    `on_step` is called on that thread after every step.
    """

    def __init__(
        self,
        engine: LLMEngine,
        on_step: Callable[[StepStats], None] | None = None,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.vocab_size
        self.eos_token_ids = engine.eos_token_ids
        self._engine = engine
        self._on_step = on_step
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._requests: dict[str, asyncio.Queue[_News]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._thread = thread or engine_thread()
        self._running: Future[None] | None = None
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_healthy(self) -> bool:
        return self._running is not None and not self._ended

    async def start(self) -> None:
        """Start the engine thread. Call once, on the loop that will use the engine."""
        assert self._running is None
        self._loop = asyncio.get_running_loop()
        self._running = self._thread.submit(self._run)

    async def stop(self) -> None:
        """End the engine thread after its current step; unfinished requests get Draining."""
        self._draining = True
        if self._running is not None:
            self._inbox.put(_Stop())
            await asyncio.wrap_future(self._running)
        self._thread.shutdown(wait=False)

    def begin_drain(self) -> None:
        """Refuse new requests with Draining; the running ones go on."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return when no request is left."""
        await self._idle.wait()

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: SequenceOf[int],
        params: SamplingParams,
        scheduling: SchedulingParams = DEFAULT_SCHEDULING,
        constraint: TokenConstraint | None = None,
    ) -> AsyncGenerator[TokenOutput, None]:
        """One TokenOutput per token; the last one has a finish reason.

        `constraint` follows what `params` prescribes of the completion's form; it is the engine's
        from now on.

        Closing the generator aborts the request within one step. Raises InvalidRequest, QueueFull,
        Draining or EngineFailed before the first output; EngineFailed also later.
        """
        if self._draining:
            raise Draining("the server is shutting down; it takes no new requests")
        if not self.is_healthy:
            raise EngineFailed("the engine is not running")
        if request_id in self._requests:
            raise InvalidRequest(f"request_id is {request_id!r}; it is already in use")
        sequence = self._engine.new_sequence(
            request_id, prompt_token_ids, params, scheduling, constraint
        )
        news: asyncio.Queue[_News] = asyncio.Queue()
        self._requests[request_id] = news
        self._idle.clear()
        self._inbox.put(_Add(sequence))
        finished = False
        try:
            while not finished:
                item = await news.get()
                if isinstance(item, LowbitError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            del self._requests[request_id]
            if not finished:
                self._inbox.put(_Abort(request_id))
            if not self._requests:
                self._idle.set()

    # Everything below runs on the engine thread, but for _deliver.

    def _run(self) -> None:
        reason: LowbitError = Draining("the server stopped before the request was finished")
        try:
            while self._obey_commands():
                if self._engine.has_work:
                    self._step()
        except Exception:
            logger.exception("the engine thread died")
            reason = EngineFailed("the engine thread died")
        finally:
            self._call_loop(self._fail_all, reason)

    def _step(self) -> None:
        news = self._engine.step()
        self._report()  # first: who has the tokens finds them counted
        if news:
            self._call_loop(self._deliver, [(output.request_id, output) for output in news])

    def _report(self) -> None:
        if self._on_step is not None:
            self._on_step(self._engine.last_step)

    def _obey_commands(self) -> bool:
        """Empty the inbox, waiting for a first command when there is nothing else to do."""
        while True:
            try:
                command = self._inbox.get(block=not self._engine.has_work)
            except queue.Empty:
                return True
            if isinstance(command, _Stop):
                return False
            self._obey(command)

    def _obey(self, command: _Add | _Abort) -> None:
        if isinstance(command, _Abort):
            self._engine.abort(command.request_id)
            self._report()
            return
        try:
            self._engine.add(command.sequence)
        except LowbitError as refusal:
            self._call_loop(self._deliver, [(command.sequence.request_id, refusal)])

    def _call_loop(self, callback: Callable[..., None], argument: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, argument)

    def _deliver(self, items: list[tuple[str, _News]]) -> None:
        for request_id, item in items:
            if request_id in self._requests:  # else its caller has gone
                self._requests[request_id].put_nowait(item)

    def _fail_all(self, reason: LowbitError) -> None:
        # Set on the loop, where requests arrive: none can slip in after this and wait for ever.
        self._ended = True
        for news in self._requests.values():
            news.put_nowait(reason)
