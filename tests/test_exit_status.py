"""A server whose engine is beyond help says so and ends, for its supervisor to start it again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from lowbit.server.client import Client
from tiny import TinyModel

SCRIPT = Path(__file__).parent / "support" / "serve_broken.py"
ENGINE_FAILED = 70


@contextmanager
def broken_server(checkpoint: Path, how: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), str(checkpoint), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
    ) as process:
        try:
            assert process.stdout is not None
            found = None
            while found is None:
                line = process.stdout.readline()
                assert line, process.stderr and process.stderr.read()
                found = re.search(r" on (\S+:\d+);", line)
            yield process, found[1]
        finally:
            process.kill()


def refused(client: Client) -> str:
    with pytest.raises(grpc.RpcError) as failure:
        client.generate([7, 1, 2], max_tokens=4)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    return failure.value.details()


def test_two_failing_steps_in_a_row_end_the_server(tiny_model: TinyModel) -> None:
    with broken_server(tiny_model.folder, "raise") as (process, address):
        with Client(address) as client:
            client.wait_until_serving()
            refused(client)
            assert client.generate([5, 6], max_tokens=4, ignore_eos=True).usage is not None
            refused(client)
            refused(client)
        _, log = process.communicate(timeout=30)
        assert process.returncode == ENGINE_FAILED
        assert "prompt 3 completion 0" in log  # what was scheduled


def test_a_step_that_hangs_ends_the_server(tiny_model: TinyModel) -> None:
    with broken_server(tiny_model.folder, "hang") as (process, address):
        with Client(address) as client:
            client.wait_until_serving()
            assert "more than 3 s" in refused(client)
        _, log = process.communicate(timeout=30)
        assert process.returncode == ENGINE_FAILED
        assert "prompt 3 completion 0" in log
        assert "serve_broken.py" in log  # where it hangs
