"""One request's parts on their way from the engine to a caller that may read slowly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from ...proto import generation_pb2 as pb
from ..types import EngineFailed, TokenOutput
from .completion import Completion, Part
from .errors import ClientStalled

# Of tokens and candidates, before they take so long that a thread must do it: about 5 ms.
_MAX_ENTRIES_AT_ONCE: Final = 4096

Send = Callable[[pb.GenerateResponse], Awaitable[None]]


class PartStream:
    """Reads the engine while a part is being sent: what piles up meanwhile makes one part.

    A caller that reads slowly so costs few messages, and one that does not read at all holds
    `max_buffered_tokens` at most, and that for `stall_seconds` at most.
    """

    def __init__(
        self,
        completion: Completion,
        send: Send,
        *,
        interval: int | None,
        max_buffered_tokens: int,
        stall_seconds: float,
    ) -> None:
        self.has_sent = False
        self._completion = completion
        self._send = send
        self._interval = interval  # in tokens; None sends all at the end
        self._max_buffered_tokens = max_buffered_tokens
        self._stall_seconds = stall_seconds
        self._due = asyncio.Event()
        self._has_room = asyncio.Event()
        self._error: Exception | None = None
        self._reading: asyncio.Task[None] | None = None

    async def run(self, outputs: AsyncGenerator[TokenOutput, None]) -> None:
        """Send everything. Raises what the engine raises, and ClientStalled."""
        self._reading = asyncio.create_task(self._read(outputs))
        try:
            while True:
                await self._due.wait()
                self._due.clear()
                # Both before the flush: while it waits for the caller, more may come.
                error, is_last = self._error, self._completion.end is not None
                await self._flush()
                if error is not None:
                    raise error
                if is_last:
                    return
        finally:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    def abort(self) -> None:
        """End the request with what was made so far."""
        if self._completion.end is None:
            self._completion.cancel()
            self._due.set()

    async def _read(self, outputs: AsyncGenerator[TokenOutput, None]) -> None:
        try:
            async with aclosing(outputs):
                await self._gather(outputs)
        except Exception as error:
            self._error = error
        self._due.set()

    async def _gather(self, outputs: AsyncGenerator[TokenOutput, None]) -> None:
        completion = self._completion
        async for output in outputs:
            if completion.end is not None:
                return
            completion.add(output)
            if completion.end is not None:
                return
            if self._interval is None:
                continue
            if completion.num_pending_tokens >= self._interval or not self.has_sent:
                self._due.set()
            if completion.num_pending_tokens >= self._max_buffered_tokens:
                self._has_room.clear()
                await self._has_room.wait()
        raise EngineFailed("the engine gave no finish reason")

    async def _flush(self) -> None:
        completion = self._completion
        if completion.num_pending_tokens == 0 and completion.end is None:
            return
        part = completion.take()
        self._has_room.set()
        message = await _build(part)
        try:
            async with asyncio.timeout(self._stall_seconds):
                await self._send(message)
        except TimeoutError:
            raise ClientStalled(
                f"the caller read nothing for {self._stall_seconds:g} seconds"
            ) from None
        self.has_sent = True


async def _build(part: Part) -> pb.GenerateResponse:
    if part.num_entries <= _MAX_ENTRIES_AT_ONCE:
        return part.build()
    return await asyncio.to_thread(part.build)
