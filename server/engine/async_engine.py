"""The one thread boundary: asyncio on this side, the engine's own thread on the other.

Commands travel through one inbox and are obeyed between steps; a step's outputs come back in one
callback on the event loop. Nothing else is shared. A watchdog looks at how long a step has taken.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from ..types import (
    DEFAULT_SCHEDULING,
    DeadlineExceeded,
    Draining,
    EngineFailed,
    FinishReason,
    InvalidRequest,
    LowbitError,
    QueueTimeout,
    SamplingParams,
    SchedulingParams,
    StepStats,
    TokenConstraint,
    TokenOutput,
)
from .engine import LLMEngine
from .sequence import Sequence

logger = logging.getLogger(__name__)


_STDERR = 2
_IDLE_SECONDS = 1.0  # after which the engine checks that nothing is lost
_TOO_LATE: dict[FinishReason, type[LowbitError]] = {
    FinishReason.DEADLINE: DeadlineExceeded,
    FinishReason.QUEUE_TIMEOUT: QueueTimeout,
}


@dataclass(slots=True, eq=False)
class _Request:
    """The way back from the engine's thread. Both fields belong to the event loop."""

    alive: set[int]  # samples that have no finish reason yet
    news: asyncio.Queue[TokenOutput | LowbitError] = field(default_factory=asyncio.Queue)


@dataclass(frozen=True, slots=True)
class _Add:
    sequence: Sequence
    request: _Request


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    index: int | None = None  # None: all samples


class _Stop:
    pass


_Command = _Add | _Abort | _Stop


def engine_thread() -> ThreadPoolExecutor:
    """The one thread that computes: load the model on it, then hand it to an AsyncEngine.

    OpenMP keeps a pool of workers for every thread that ever computed. With two pools there are
    more workers than cores, they sleep between operations instead of spinning, and a decode step
    of the 135M model takes 23 ms instead of 10 (2 cores).
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="lowbit-engine")


class AsyncEngine:
    """Many concurrent requests over one LLMEngine, which steps on `thread`.

    `on_step` is called on that thread after every step. The engine has failed, for good, when its
    thread dies of a bug or of steps that fail in a row, or when a step outlives
    `step_timeout_seconds`.
    """

    def __init__(
        self,
        engine: LLMEngine,
        on_step: Callable[[StepStats], None] | None = None,
        thread: ThreadPoolExecutor | None = None,
        step_timeout_seconds: float = 300.0,
    ) -> None:
        self.max_model_len = engine.max_model_len
        self.vocab_size = engine.vocab_size
        self.eos_token_ids = engine.eos_token_ids
        self._engine = engine
        self._on_step = on_step
        self._step_timeout_seconds = step_timeout_seconds
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._requests: dict[str, _Request] = {}
        self._senders: dict[str, _Request] = {}  # the engine thread's own view of them
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False
        self._thread = thread or engine_thread()
        self._running: Future[None] | None = None
        self._step_began: float | None = None
        self._stopped = threading.Event()
        self._failure: EngineFailed | None = None
        self._failed = asyncio.Event()
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_healthy(self) -> bool:
        return self._running is not None and not self._ended

    @property
    def last_step(self) -> StepStats:
        """What the last step left behind."""
        return self._engine.last_step

    async def start(self) -> None:
        """Start the engine thread. Call once, on the loop that will use the engine."""
        assert self._running is None
        self._loop = asyncio.get_running_loop()
        self._running = self._thread.submit(self._run)
        threading.Thread(target=self._watch, name="lowbit-watchdog", daemon=True).start()

    async def stop(self) -> None:
        """End the engine thread after its current step; unfinished requests get Draining.

        After a failure this waits for nobody: the thread may hang.
        """
        self._draining = True
        self._stopped.set()
        self._inbox.put(_Stop())
        if self._running is not None and self._failure is None:
            await asyncio.wrap_future(self._running)
        self._thread.shutdown(wait=False)

    async def wait_failed(self) -> EngineFailed:
        """Return when the engine has failed, and why."""
        await self._failed.wait()
        assert self._failure is not None
        return self._failure

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
        """One TokenOutput per token, of all samples; the last one of each has a finish reason.

        `constraint` follows what `params` prescribes of the completion's form; it is the engine's
        from now on.

        Closing the generator aborts the request within one step. Raises InvalidRequest, QueueFull,
        QueueTimeout or Draining before the first output, DeadlineExceeded and EngineFailed at any
        time.
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
        request = _Request(set(range(params.n)))
        self._requests[request_id] = request
        self._idle.clear()
        self._inbox.put(_Add(sequence, request))
        try:
            while request.alive:
                item = await request.news.get()
                if isinstance(item, LowbitError):
                    request.alive.clear()
                    raise item
                if item.finish_reason in _TOO_LATE:
                    request.alive.clear()
                    raise _TOO_LATE[item.finish_reason](item.error)
                if item.index not in request.alive:
                    continue  # made before `end_sample` took effect
                if item.finish_reason is not None:
                    request.alive.remove(item.index)
                yield item
        finally:
            del self._requests[request_id]
            if request.alive:
                self._inbox.put(_Abort(request_id))
            if not self._requests:
                self._idle.set()

    def end_sample(self, request_id: str, index: int) -> None:
        """The caller has enough of one sample: it ends, the request's others go on.

        For the loop that iterates over the request's outputs, between two of them.
        """
        self._requests[request_id].alive.discard(index)
        self._inbox.put(_Abort(request_id, index))

    # Everything below runs on the engine thread, but for _deliver and _end.

    def _run(self) -> None:
        reason: LowbitError = Draining("the server stopped before the request was finished")
        try:
            while self._obey_commands():
                if self._engine.has_work:
                    self._step()
        except Exception as error:
            logger.exception("the engine thread died %s", self._describe_step())
            died = "the engine thread died"
            reason = EngineFailed(f"{died}: {error}" if isinstance(error, LowbitError) else died)
        finally:
            self._call_loop(self._end, reason)

    def _step(self) -> None:
        self._step_began = time.monotonic()
        news = self._engine.step()
        self._step_began = None
        self._report()  # first: who has the tokens finds them counted
        if news:
            self._send(news)

    def _send(self, news: list[TokenOutput]) -> None:
        self._call_loop(
            self._deliver, [(self._senders[output.request_id], output) for output in news]
        )
        for output in news:
            if output.finish_reason is not None:
                self._forget(output.request_id)

    def _forget(self, request_id: str) -> None:
        if request_id not in self._engine.scheduler:
            self._senders.pop(request_id, None)

    def _report(self) -> None:
        if self._on_step is not None:
            self._on_step(self._engine.last_step)

    def _obey_commands(self) -> bool:
        """Empty the inbox, waiting for a first command when there is nothing else to do."""
        while True:
            command = self._next_command()
            if command is None:
                return True
            if isinstance(command, _Stop):
                return False
            self._obey(command)

    def _next_command(self) -> _Command | None:
        """None when there is none and the engine has work."""
        try:
            if self._engine.has_work:
                return self._inbox.get_nowait()
            return self._inbox.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            if self._engine.has_work:
                return None
        self._engine.scheduler.check_integrity()
        return self._inbox.get()

    def _obey(self, command: _Add | _Abort) -> None:
        if isinstance(command, _Abort):
            self._engine.abort(command.request_id, command.index)
            self._forget(command.request_id)
            self._report()
            return
        try:
            self._engine.add(command.sequence)
            self._senders[command.sequence.request_id] = command.request
        except LowbitError as refusal:
            self._call_loop(self._deliver, [(command.request, refusal)])

    def _call_loop(self, callback: Callable[..., None], argument: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback, argument)

    def _deliver(self, items: list[tuple[_Request, TokenOutput | LowbitError]]) -> None:
        for request, item in items:
            request.news.put_nowait(item)

    def _end(self, reason: LowbitError) -> None:
        # Set on the loop, where requests arrive: none can slip in after this and wait for ever.
        if self._ended:
            return
        self._ended = True
        if isinstance(reason, EngineFailed):
            self._failure = reason
            self._failed.set()
        self._stopped.set()
        for request in self._requests.values():
            request.news.put_nowait(reason)

    # The watchdog's thread

    def _watch(self) -> None:
        while not self._stopped.wait(min(1.0, self._step_timeout_seconds / 4)):
            began = self._step_began
            if began is not None and time.monotonic() - began > self._step_timeout_seconds:
                text = f"a step has taken more than {self._step_timeout_seconds:g} s"
                logger.critical("%s %s", text, self._describe_step())
                faulthandler.dump_traceback(_STDERR)
                self._call_loop(self._end, EngineFailed(text))
                return

    def _describe_step(self) -> str:
        step = self._engine.current_step
        return "outside a step" if step is None else f"in a step with {step.describe()}"
