"""The requests that are being served, by id, and which ones have been."""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc.aio

from ..types import InvalidRequest, QueueFull

_MAX_REMEMBERED: Final = 4096


class AbortOutcome(enum.Enum):
    ABORTED = "aborted"
    ALREADY_FINISHED = "already finished"
    NOT_FOUND = "not found"


class Calls:
    """At most `max_requests` at a time; more are refused before they cost anything."""

    def __init__(self, max_requests: int) -> None:
        self.max_requests = max_requests
        self.num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: dict[str, Callable[[], None]] = {}
        self._finished: OrderedDict[str, None] = OrderedDict()

    def enter(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Count a call until its status is sent. Raises QueueFull."""
        self.num_requests += 1
        self._idle.clear()
        # The stubs ask for an instance of a class where any callable will do.
        context.add_done_callback(self._leave)  # type: ignore[arg-type]
        if self.num_requests > self.max_requests:
            raise QueueFull(f"the server holds {self.max_requests} requests, its limit")

    async def wait_idle(self) -> None:
        """Return when no call is left, their statuses sent."""
        await self._idle.wait()

    @contextmanager
    def running(self, request_id: str, abort: Callable[[], None]) -> Iterator[None]:
        """Make a request known for as long as the block lasts. Raises InvalidRequest."""
        if request_id in self._running:
            raise InvalidRequest(f"request_id is {request_id!r}; it is already in use")
        self._running[request_id] = abort
        try:
            yield
        finally:
            del self._running[request_id]
            self._remember(request_id)

    def request_ids(self) -> list[str]:
        """Those that are running."""
        return list(self._running)

    def abort(self, request_id: str) -> AbortOutcome:
        """End a request within one step; one that is not running is left alone."""
        if request_id in self._running:
            self._running[request_id]()
            return AbortOutcome.ABORTED
        if request_id in self._finished:
            return AbortOutcome.ALREADY_FINISHED
        return AbortOutcome.NOT_FOUND

    def _remember(self, request_id: str) -> None:
        self._finished[request_id] = None
        self._finished.move_to_end(request_id)
        if len(self._finished) > _MAX_REMEMBERED:
            self._finished.popitem(last=False)

    def _leave(self, _: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()
