"""What the gRPC layer alone can do: an engine that has every token at once.

    python tests/benchmarks/rpc.py [--streams 64] [--tokens 2000] [--open 1000] [--cancelled 20000]

The server runs in a process of its own with a byte-level tokenizer of the tokenizers library and
everything else of a real one; the callers run here. For the figures of memory its tokenizer is one
of plain Python: importing transformers, and PyTorch with it, takes 240 MB, which is not gRPC's.
Prints its setup, a table and one JSON line last. Bars: 60,000 tokens/s to 64 streams on 2 cores;
1.5 ms added to TTFT (median, one caller); 1,000 open streams within 300 MB; after 20,000 cancelled
streams within 5 % of the memory before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from lowbit.proto import generation_pb2 as pb
from lowbit.server.config import EngineConfig, ServerConfig
from lowbit.server.types import EngineFailed, FinishReason, StepStats, TokenOutput

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]

METHOD = "/lowbit.v1.GenerationService/GenerateStream"
REPLY = b"The quick brown fox jumps over the lazy dog. "


class InstantEngine:
    """Every token is there at once. A request for one token more than it has never ends."""

    max_model_len = 1 << 20
    vocab_size = 320
    eos_token_ids = frozenset({257})
    is_healthy = True
    last_step = StepStats(
        num_running=0,
        num_waiting=0,
        kv_cache_usage_ratio=0.0,
        num_prompt_tokens=0,
        num_generation_tokens=0,
        num_preemptions=0,
    )
    endless = 1 << 19

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def begin_drain(self) -> None: ...

    def end_sample(self, request_id: str, index: int) -> None: ...

    async def wait_failed(self) -> EngineFailed:
        await asyncio.Event().wait()
        raise AssertionError

    async def generate(
        self, request_id: str, prompt: Sequence[int], params: Any, *_: Any
    ) -> AsyncGenerator[TokenOutput, None]:
        for i in range(params.max_tokens - 1):
            yield TokenOutput(request_id=request_id, token_id=REPLY[i % len(REPLY)], logprob=-0.5)
            if params.max_tokens == self.endless:
                await asyncio.Event().wait()
            if i % 16 == 15:  # as a real engine's thread would
                await asyncio.sleep(0)
        yield TokenOutput(request_id=request_id, token_id=65, finish_reason=FinishReason.LENGTH)


def codec(kind: str) -> Any:
    if kind == "plain":
        from serving import ByteCodec

        return ByteCodec()
    from byte_tokenizer import byte_tokenizer
    from lowbit.server.text.tokenizer import Tokenizer

    return Tokenizer(byte_tokenizer())


def serve(kind: str) -> None:
    from lowbit.server.metrics import Metrics
    from lowbit.server.rpc.deployment import Loaded
    from lowbit.server.rpc.server import GenerationServer
    from lowbit.server.rpc.server import serve as serve_until_signal
    from lowbit.server.types import ModelInfo

    config = ServerConfig(
        port=0, metrics_port=0, max_concurrent_streams=4096, engine=EngineConfig(max_num_seqs=512)
    )

    async def load() -> Loaded:
        model = ModelInfo(name="instant")
        return Loaded(engine=InstantEngine(), tokenizer=codec(kind), model=model)

    def report(server: GenerationServer) -> None:
        print(server.port, flush=True)

    asyncio.run(serve_until_signal(config, Metrics(), load, warm_up=False, on_started=report))


@contextmanager
def server_process(kind: str) -> Iterator[tuple[str, int]]:
    """Its address and its process id."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", kind], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{process.stdout.readline().strip()}", process.pid
        finally:
            process.terminate()


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def stub(channel: grpc.aio.Channel) -> Any:
    return channel.unary_stream(
        METHOD,
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )


def request(num_tokens: int) -> pb.GenerateRequest:
    params = pb.SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    return pb.GenerateRequest(text="Hi", sampling=params)


async def count_tokens(generate: Any, num_tokens: int) -> tuple[int, int]:
    """Of one stream: tokens and messages."""
    tokens = messages = 0
    async for part in generate(request(num_tokens)):
        messages += 1
        tokens += len(part.outputs[0].tokens)
    assert tokens == num_tokens
    return tokens, messages


async def throughput(address: str, num_streams: int, num_tokens: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(address) as channel:
        generate = stub(channel)
        await count_tokens(generate, 100)
        began = time.perf_counter()
        counts = await asyncio.gather(
            *(count_tokens(generate, num_tokens) for _ in range(num_streams))
        )
        seconds = time.perf_counter() - began
    tokens, messages = (sum(each) for each in zip(*counts, strict=True))
    return {"tokens_per_second": tokens / seconds, "tokens_per_message": tokens / messages}


async def added_ttft(address: str, repeats: int = 500) -> dict[str, float]:
    times = []
    async with grpc.aio.insecure_channel(address) as channel:
        generate = stub(channel)
        for _ in range(repeats + 50):
            began = time.perf_counter()
            call = generate(request(2))
            await call.read()
            times.append(time.perf_counter() - began)
            while await call.read() is not grpc.aio.EOF:
                pass
    measured = sorted(times[50:])
    return {
        "ttft_p50_ms": statistics.median(measured) * 1e3,
        "ttft_p99_ms": measured[int(0.99 * len(measured))] * 1e3,
    }


async def open_streams(address: str, pid: int, number: int) -> dict[str, float]:
    before = resident_bytes(pid)
    async with grpc.aio.insecure_channel(address) as channel:
        generate = stub(channel)
        calls = [generate(request(InstantEngine.endless)) for _ in range(number)]
        for call in calls:
            await call.read()
        held = resident_bytes(pid)
        for call in calls:
            call.cancel()
    return {"memory_idle_mb": before / 1e6, "memory_open_mb": held / 1e6}


async def cancelled_streams(address: str, pid: int, number: int) -> dict[str, float]:
    async def cancel_some(channel: grpc.aio.Channel, count: int) -> None:
        generate = stub(channel)
        for _ in range(0, count, 100):
            calls = [generate(request(InstantEngine.endless)) for _ in range(100)]
            await asyncio.gather(*(call.read() for call in calls))
            for call in calls:
                call.cancel()

    async with grpc.aio.insecure_channel(address) as channel:
        # What is allocated once: the ids that Abort remembers, and what malloc keeps of a crowd.
        await cancel_some(channel, 5000)
        await asyncio.sleep(1)
        before = resident_bytes(pid)
        await cancel_some(channel, number)
        await asyncio.sleep(1)
    after = resident_bytes(pid)
    return {
        "memory_before_cancels_mb": before / 1e6,
        "memory_after_cancels_mb": after / 1e6,
        "memory_growth_percent": 100 * (after - before) / before,
    }


BARS = {
    "tokens_per_second": "at least 60,000",
    "ttft_p50_ms": "below 1.5",
    "memory_open_mb": "below 300",
    "memory_growth_percent": "within 5",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--open", type=int, default=1000)
    parser.add_argument("--cancelled", type=int, default=20_000)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    from quantizers import commit, processor

    setup = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "grpc": grpc.__version__,
        "commit": commit(),
        **{name: getattr(arguments, name) for name in ("streams", "tokens", "open", "cancelled")},
    }
    print(json.dumps(setup, indent=1))
    figures: dict[str, float] = {}
    with server_process("tokenizers") as (address, _):
        figures |= asyncio.run(added_ttft(address))
        figures |= asyncio.run(throughput(address, arguments.streams, arguments.tokens))
    with server_process("plain") as (address, pid):
        figures |= asyncio.run(open_streams(address, pid, arguments.open))
    with server_process("plain") as (address, pid):
        figures |= asyncio.run(cancelled_streams(address, pid, arguments.cancelled))
    for name, value in figures.items():
        print(f"{name:28} {value:12,.2f}  {BARS.get(name, '')}")
    print(json.dumps({**setup, **figures}))


if __name__ == "__main__":
    main()
