"""Sockets: what a connection may do, and where the server listens."""

from __future__ import annotations

import socket

import grpc.aio

from ..config import ServerConfig
from ..types import CannotListen


def server_options(config: ServerConfig) -> list[tuple[str, int]]:
    """The channel arguments of the server's connections."""
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_send_message_bytes),
        # Two servers on one port would share its calls at random.
        ("grpc.so_reuseport", 0),
        # Clients ping through long silent calls; by default gRPC closes on them for that.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Finds clients that vanished without a word: their requests hold memory.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def bind(server: grpc.aio.Server, host: str, port: int) -> int:
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
