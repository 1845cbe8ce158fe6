"""A whole server without a model: the real engine over a runner that recites."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from contextlib import asynccontextmanager
from dataclasses import dataclass
from unittest.mock import patch

from lowbit.server.config import ServerConfig
from lowbit.server.engine.async_engine import AsyncEngine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, Sequence, SequenceResult
from lowbit.server.metrics import Metrics
from lowbit.server.rpc import server as server_module
from lowbit.server.rpc.deployment import Loaded, TextCodec
from lowbit.server.rpc.server import GenerationServer
from lowbit.server.text.detokenizer import Detokenizer
from lowbit.server.types import (
    ChatMessage,
    InvalidRequest,
    ModelInfo,
    SamplingParams,
    TokenConstraint,
    TokenLogprob,
)
from prometheus_client import CollectorRegistry
from runners import BlockingRunner

EOS, VOCAB_SIZE = 257, 320


class ByteCodec:
    """One token per byte, whose id is the byte; no special tokens, no template."""

    max_characters_per_token = 1
    has_chat_template = True

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        return list(text.encode())

    def encode_chat(self, messages: SequenceOf[ChatMessage]) -> list[int]:
        return self.encode("".join(f"[{each.role}] {each.content}\n" for each in messages))

    def decode(self, token_ids: SequenceOf[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(each for each in token_ids if each < 256).decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id])

    def detokenizer(
        self,
        stop: SequenceOf[str] = (),
        context: SequenceOf[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> Detokenizer:
        return Detokenizer(
            self.decode,
            special_token_ids=frozenset({EOS}),
            stop=stop,
            min_tokens=min_tokens,
            include_stop=include_stop,
        )

    def constraint(
        self, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> TokenConstraint:
        raise InvalidRequest("this codec prescribes no form")


class RecitingRunner(BlockingRunner):
    """Answers every prompt with the same bytes, then the end of the sequence.

    A gated one takes the steps that it is allowed, and waits inside the next.
    """

    def __init__(
        self,
        reply: bytes = b"Hello, world!",
        *,
        endless: bool = False,
        step_seconds: float = 0.0,
        gated: bool = False,
    ) -> None:
        self.reply = reply
        self.endless = endless
        self.step_seconds = step_seconds
        self.fails = False
        self.num_steps = 0
        self._gated = gated
        self._permits = threading.Semaphore(0)

    def allow(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        """Wait no more."""
        self._gated = False
        self._permits.release()

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        if self._gated:
            self._permits.acquire()
        self.num_steps += 1
        time.sleep(self.step_seconds)
        if self.fails:
            raise RuntimeError("no such luck")
        return [
            SequenceResult((SampledToken(self._token(s), -0.5),))
            for s in output.sequences
            if s.yields_token
        ]

    def _token(self, sequence: Sequence) -> int:
        position = sequence.num_completion_tokens
        if position >= len(self.reply) and not self.endless:
            return EOS
        return self.reply[position % len(self.reply)]


class PromptScoringRunner(RecitingRunner):
    """Holds every token of a prompt, and each of the first ids beside it, to be as likely."""

    LOGPROB = -0.25

    def execute(self, output: SchedulerOutput) -> list[SequenceResult]:
        for sequence in output.sequences:
            number = sequence.params.prompt_logprobs
            if number is not None and sequence.yields_token and not sequence.prompt_logprobs:
                top = tuple((token_id, self.LOGPROB) for token_id in range(number))
                sequence.prompt_logprobs = [
                    TokenLogprob(token_id=each, logprob=self.LOGPROB, top=top, rank=1)
                    for each in sequence.token_ids[1 : sequence.num_prompt_tokens]
                ]
        return super().execute(output)


@dataclass
class Rig:
    """A server and the parts that tests look at."""

    config: ServerConfig
    server: GenerationServer
    engine: AsyncEngine
    llm: LLMEngine
    runner: RecitingRunner
    metrics: Metrics
    loaded: Loaded

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def ended(self, finish_reason: str) -> float:
        """How many requests ended so."""
        return self._sample("requests_total", finish_reason=finish_reason)

    def _sample(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"lowbit_{name}", labels)
        assert value is not None
        return value

    async def wait_ended(self, finish_reason: str, number: int) -> None:
        """Raises TimeoutError."""
        async with asyncio.timeout(5):
            while self.ended(finish_reason) < number:
                await asyncio.sleep(0.001)

    async def wait_blocks_free(self) -> None:
        """Raises TimeoutError when blocks stay used although nobody waits for a token."""
        async with asyncio.timeout(5):
            while self.llm.has_work or self._sample("requests_running") > 0:
                await asyncio.sleep(0.001)
        assert self.llm.scheduler.block_manager.usage_ratio == 0
        self.llm.scheduler.check_integrity()


def make_rig(
    runner: RecitingRunner | None = None,
    *,
    num_blocks: int = 64,
    max_model_len: int = 512,
    tokenizer: TextCodec | None = None,
    config: ServerConfig | None = None,
    folder: str = "",
) -> Rig:
    config = config or ServerConfig(port=0, metrics_port=0)
    runner = runner or RecitingRunner()
    metrics = Metrics(CollectorRegistry())
    llm = LLMEngine(
        runner,
        config.engine,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({EOS}),
    )
    engine = AsyncEngine(llm, on_step=metrics.observe_step)
    tokenizer = tokenizer or ByteCodec()
    loaded = Loaded(
        engine=engine, tokenizer=tokenizer, model=ModelInfo(name="recital", folder=folder)
    )
    server = GenerationServer(config, metrics)
    return Rig(config, server, engine, llm, runner, metrics, loaded)


class NoMetricsServer:
    """In place of prometheus_client's, which takes half a second to close."""

    port = 0

    def __init__(self, host: str, port: int, registry: CollectorRegistry) -> None:
        pass

    def close(self) -> None:
        pass


@asynccontextmanager
async def running(rig: Rig, *, with_metrics: bool = False) -> AsyncIterator[Rig]:
    metrics_server = server_module.start_metrics_server if with_metrics else NoMetricsServer
    try:
        with patch.object(server_module, "start_metrics_server", metrics_server):
            await rig.server.start()
        await rig.server.open(rig.loaded)
        yield rig
    finally:
        rig.runner.open()
        await rig.server.stop()
