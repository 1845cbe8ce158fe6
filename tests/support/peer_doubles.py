"""What a peer's process may do, importable from another process."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection


def send_two(connection: Connection) -> None:
    for each in ("one", "two", None):
        connection.send(each)


def leave(connection: Connection) -> None:
    os._exit(1)


def hang(connection: Connection) -> None:
    time.sleep(600)
