"""A server in a process of its own, ended the way an operator ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lowbit.server.client import Client

SCRIPT = Path(__file__).parents[1] / "support" / "serve_reciting.py"


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    address: str

    def allow_steps(self, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n" * number)
        self.process.stdin.flush()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_not_serving(self) -> None:
        with grpc.insecure_channel(self.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            for response in watch:
                if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                    break

    def assert_clean_exit(self) -> None:
        _, errors = self.process.communicate(timeout=10)
        assert "Traceback" not in errors
        assert self.process.returncode == 0


@contextmanager
def server_process(kind: str) -> Iterator[ServerProcess]:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    ) as process:
        try:
            assert process.stdout is not None
            port = process.stdout.readline().strip()
            assert port, process.communicate()[1]
            yield ServerProcess(process, f"127.0.0.1:{port}")
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(number: signal.Signals) -> None:
    with server_process("gated") as server, Client(server.address, max_attempts=1) as client:
        server.allow_steps(1)
        stream = client.stream("Hi")
        text = next(stream).text
        server.send(number)
        server.wait_not_serving()
        with pytest.raises(grpc.RpcError, match="shutting down") as caught:
            client.generate("Hi")
        assert caught.value.code() is StatusCode.UNAVAILABLE
        server.allow_steps(20)
        assert text + "".join(delta.text for delta in stream) == "Hello, world!"
        server.assert_clean_exit()


def test_load_balancers_get_a_pause_to_look_elsewhere() -> None:
    with server_process("pausing") as server, Client(server.address, max_attempts=1) as client:
        server.allow_steps(20)
        began = time.monotonic()
        server.send(signal.SIGTERM)
        server.wait_not_serving()
        assert client.generate("Hi").text == "Hello, world!"
        server.assert_clean_exit()
        assert time.monotonic() - began >= 1.0


def test_a_second_signal_ends_the_pause() -> None:
    with server_process("pausing for long") as server:
        server.send(signal.SIGTERM)
        server.wait_not_serving()
        server.send(signal.SIGTERM)
        server.assert_clean_exit()


def test_a_second_signal_ends_at_once() -> None:
    with server_process("endless") as server, Client(server.address, max_attempts=1) as client:
        stream = client.stream("Hi", max_tokens=500)
        next(stream)
        server.send(signal.SIGTERM)
        server.wait_not_serving()
        next(stream)
        server.send(signal.SIGTERM)
        with pytest.raises(grpc.RpcError, match="stopped before") as caught:
            list(stream)
        assert caught.value.code() is StatusCode.UNAVAILABLE
        server.assert_clean_exit()


def test_an_idle_server_ends_on_the_first_signal() -> None:
    with server_process("gated") as server:
        server.send(signal.SIGTERM)
        server.assert_clean_exit()
