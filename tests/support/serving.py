"""A whole server without a model: the real engine over a runner that recites."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from lowbit.server.config import ServerConfig
from lowbit.server.engine.async_engine import AsyncEngine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import SampledToken, Sequence
from lowbit.server.metrics import Metrics
from lowbit.server.rpc.server import GenerationServer
from lowbit.server.text.tokenizer import Tokenizer
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

BOS, EOS, VOCAB_SIZE = 256, 257, 320
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content == 'refuse me' %}{{ raise_exception('not this') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, whose id is the byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {byte: chr(byte) for byte in shown}
    alphabet |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    backend = Backend(models.BPE({letter: byte for byte, letter in alphabet.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<bos>"), AddedToken("<eos>")])
    pretrained = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )
    pretrained.chat_template = chat_template
    return pretrained


class RecitingRunner:
    """Answers every prompt with the same bytes, then the end of the sequence."""

    def __init__(
        self, reply: bytes = b"Hello, world!", *, endless: bool = False, step_seconds: float = 0.0
    ) -> None:
        self.reply = reply
        self.endless = endless
        self.step_seconds = step_seconds
        self.fails = False
        self.num_steps = 0

    def execute(self, output: SchedulerOutput) -> list[SampledToken]:
        self.num_steps += 1
        time.sleep(self.step_seconds)
        if self.fails:
            raise RuntimeError("no such luck")
        return [SampledToken(self._token(s), -0.5) for s in output.sequences if s.yields_token]

    def _token(self, sequence: Sequence) -> int:
        position = sequence.num_completion_tokens
        if position >= len(self.reply) and not self.endless:
            return EOS
        return self.reply[position % len(self.reply)]


@dataclass
class Rig:
    """A server and the parts that tests look at."""

    server: GenerationServer
    engine: AsyncEngine
    llm: LLMEngine
    runner: RecitingRunner
    metrics: Metrics

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def ended(self, finish_reason: str) -> float:
        """How many requests ended so."""
        value = self.metrics.registry.get_sample_value(
            "lowbit_requests_total", {"finish_reason": finish_reason}
        )
        assert value is not None
        return value

    async def wait_blocks_free(self) -> None:
        """Raises TimeoutError when blocks stay used although nobody waits for a token."""
        async with asyncio.timeout(5):
            while self.llm.scheduler.block_manager.usage_ratio or self.llm.has_work:
                await asyncio.sleep(0.001)
        self.llm.scheduler.check_integrity()


def make_rig(
    runner: RecitingRunner | None = None,
    *,
    num_blocks: int = 64,
    max_model_len: int = 512,
    chat_template: str | None = CHAT_TEMPLATE,
    config: ServerConfig | None = None,
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
    tokenizer = Tokenizer(byte_tokenizer(chat_template))
    return Rig(GenerationServer(config, engine, tokenizer, metrics), engine, llm, runner, metrics)


@asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[Rig]:
    try:
        await rig.server.start()
        yield rig
    finally:
        await rig.server.stop()
