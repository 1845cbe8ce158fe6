"""Sockets: what a connection may do, how it is secured, and where the server listens."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import grpc
import grpc.aio

from ..config import InvalidConfig, ServerConfig
from ..types import CannotListen

logger = logging.getLogger(__name__)

UNIX_PREFIX = "unix:"


def server_options(config: ServerConfig) -> list[tuple[str, int]]:
    """The channel arguments of the server's connections."""
    options = [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_send_message_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        # Two servers on one port would share its calls at random.
        ("grpc.so_reuseport", int(config.reuse_port)),
        # Clients ping through long silent calls; by default gRPC closes on them for that.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
        # Finds clients that vanished without a word: their requests hold memory.
        ("grpc.keepalive_time_ms", _milliseconds(config.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", _milliseconds(config.keepalive_timeout_seconds)),
        # Without it gRPC (1.85) waits for a minute whatever keepalive_timeout says.
        ("grpc.http2.ping_timeout_ms", _milliseconds(config.keepalive_timeout_seconds)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.server_handshake_timeout_ms", _milliseconds(config.handshake_timeout_seconds)),
    ]
    if config.max_connection_age_seconds:
        options += [
            ("grpc.max_connection_age_ms", _milliseconds(config.max_connection_age_seconds)),
            (
                "grpc.max_connection_age_grace_ms",
                _milliseconds(config.max_connection_age_grace_seconds),
            ),
        ]
    return options


def address_of(host: str, port: int) -> str:
    """As clients write it."""
    if host.startswith(UNIX_PREFIX):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def compression(config: ServerConfig) -> grpc.Compression:
    return grpc.Compression.Gzip if config.compression == "gzip" else grpc.Compression.NoCompression


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


class _Certificates:
    """PEM files that are read again when one of them changes. Bad ones change nothing."""

    def __init__(self, config: ServerConfig) -> None:
        self._certificate = Path(config.tls_certificate)
        self._key = Path(config.tls_key)
        self._client_ca = Path(config.tls_client_ca) if config.tls_client_ca else None
        self._versions = self._stat()
        self.initial = self._read()

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """What every new handshake asks for; None where nothing changed."""
        try:
            versions = self._stat()
            if versions == self._versions:
                return None
            certificates = self._read()
        except (OSError, ValueError) as error:
            logger.error("the TLS certificate stays as it was: %s", error)
            return None
        self._versions = versions
        logger.info("read %s again", self._certificate)
        return certificates

    def _stat(self) -> list[tuple[int, int, int]]:
        paths = [self._certificate, self._key, *([self._client_ca] if self._client_ca else [])]
        statuses = [path.stat() for path in paths]
        return [(each.st_mtime_ns, each.st_size, each.st_ino) for each in statuses]

    def _read(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._certificate.read_bytes())],
            root_certificates=self._client_ca.read_bytes() if self._client_ca else None,
        )


def credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """None without TLS. Raises InvalidConfig for files that cannot be read."""
    if not config.tls_certificate:
        return None
    try:
        certificates = _Certificates(config)
    except OSError as error:
        raise InvalidConfig(f"tls_certificate, tls_key or tls_client_ca: {error}") from error
    return grpc.dynamic_ssl_server_credentials(
        certificates.initial,
        certificates.changed,  # type: ignore[arg-type]  # None is documented
        require_client_authentication=bool(config.tls_client_ca),
    )


def bind(
    server: grpc.aio.Server, host: str, port: int, secure: grpc.ServerCredentials | None
) -> int:
    """The port bound; 0 for a Unix socket. Raises CannotListen."""
    if host.startswith(UNIX_PREFIX):
        return _bind_unix(server, host)
    address = address_of(host, port)
    try:
        _try_to_bind(host, port)
        if secure is not None:
            return server.add_secure_port(address, secure)
        return server.add_insecure_port(address)
    except OSError as error:
        raise CannotListen(f"cannot listen on {address}: {error.strerror}") from error
    except RuntimeError as error:
        raise CannotListen(f"cannot listen on {address}: {error}") from error


def _bind_unix(server: grpc.aio.Server, address: str) -> int:
    """Who may open the file may call: no TLS."""
    path = Path(address.removeprefix(UNIX_PREFIX))
    if path.exists() and not path.is_socket():
        raise CannotListen(f"cannot listen on {address}: there is a file that is no socket")
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise CannotListen(f"cannot listen on {address}: {error}") from error
    return 0


def _try_to_bind(host: str, port: int) -> None:
    """Raises OSError with the reason, which gRPC writes to stderr and does not tell its caller."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)
