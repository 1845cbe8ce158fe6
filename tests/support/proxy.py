"""A wire between clients and a server that counts what passes, and can be cut without a word."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

SETTINGS, PING, GOAWAY = 4, 6, 7  # RFC 9113, section 6
_ACKNOWLEDGED = 1
_PREFACE_BYTES, _HEADER_BYTES = 24, 9


@dataclass
class Proxy:
    """One TCP port in front of another. Counts HTTP/2 frames by type, acknowledgements apart."""

    port: int = 0
    num_connections: int = 0
    up: Counter[int] = field(default_factory=Counter)  # to the server
    down: Counter[int] = field(default_factory=Counter)
    num_bytes_down: int = 0
    is_cut: bool = False  # nothing passes any more, and both sides' connections stay open

    async def pass_up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            writer.write(await reader.readexactly(_PREFACE_BYTES))
            while True:
                await self._pass_frame(reader, writer, self.up)

    async def pass_down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.num_bytes_down += await self._pass_frame(reader, writer, self.down)

    async def _pass_frame(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counts: Counter[int]
    ) -> int:
        header = await reader.readexactly(_HEADER_BYTES)
        payload = await reader.readexactly(int.from_bytes(header[:3]))
        if self.is_cut:
            return 0
        kind, flags = header[3:5]
        if not (kind in (SETTINGS, PING) and flags & _ACKNOWLEDGED):
            counts[kind] += 1
        writer.write(header + payload)
        await writer.drain()
        return len(header) + len(payload)


@asynccontextmanager
async def proxy(to_port: int) -> AsyncIterator[Proxy]:
    wire = Proxy()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire.num_connections += 1
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", to_port)
        ways = {
            asyncio.create_task(wire.pass_up(reader, server_writer)),
            asyncio.create_task(wire.pass_down(server_reader, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            writer.close()
            server_writer.close()

    listener = await asyncio.start_server(connect, "127.0.0.1", 0)
    wire.port = listener.sockets[0].getsockname()[1]
    try:
        yield wire
    finally:
        listener.close()
