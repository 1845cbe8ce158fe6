from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from byte_tokenizer import byte_tokenizer
from lowbit.server.client import AsyncClient
from lowbit.server.config import ServerConfig
from lowbit.server.text.tokenizer import Tokenizer
from serving import Rig, make_rig, running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig() -> AsyncIterator[Rig]:
    """One server for a module's tests, which must leave it as it was. No block may be lost."""
    config = ServerConfig(port=0, metrics_port=0, max_message_bytes=1 << 16)
    rig = make_rig(config=config, tokenizer=Tokenizer(byte_tokenizer()))
    async with running(rig, with_metrics=True):
        yield rig
        await rig.wait_blocks_free()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(rig: Rig) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(rig.address) as client:
        yield client
