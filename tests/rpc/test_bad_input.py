"""Whatever a caller sends gets a status that says what is wrong, and harms nobody else."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc import StatusCode
from lowbit.proto import generation_pb2 as pb
from lowbit.server.client import AsyncClient
from lowbit.server.config import EngineConfig, ServerConfig
from lowbit.server.types import ChatMessage
from serving import RecitingRunner, Rig, make_rig, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

HELLO = ChatMessage(role="user", content="Hello")
REFUSED_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "text is empty; a prompt must have at least 1 token"),
    ({"prompt": []}, "token_ids holds 0 ids; it must hold 1 to 512"),
    ({"prompt": "x" * 512}, "prompt has 512 tokens; max_model_len allows at most 511"),
    ({"prompt": "x" * 3000}, "text has 3000 characters; .* allows at most 2560"),
    ({"prompt": [1] * 512}, "prompt has 512 tokens; max_model_len allows at most 511"),
    ({"prompt": [1] * 513}, "token_ids holds 513 ids; it must hold 1 to 512"),
    ({"prompt": [1, 320]}, r"token id 320; ids must lie in \[0, 320\)"),
    ({"prompt": [1, 2**32 - 1]}, r"token id 4294967295; ids must lie in \[0, 320\)"),
    ({"prompt": [HELLO] * 100}, r"prompt has \d+ tokens; max_model_len allows at most 511"),
    ({"prompt": [HELLO] * 1025}, "chat.messages holds 1025 messages; it may hold at most 1024"),
    ({"prompt": [ChatMessage(role="user", content="refuse me")]}, "template: not this"),
    ({"temperature": -0.5}, r"temperature is -0.5; it must lie in \[0, 100\]"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"top_k": -1}, "top_k is -1; it must be 0"),
    ({"top_p": 0.0}, r"top_p is 0.0; it must lie in \(0, 1\]"),
    ({"min_p": 1.5}, r"min_p is 1.5; it must lie in \[0, 1\]"),
    ({"seed": -1}, "seed is -1"),
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ({"max_tokens": 511}, "max_tokens is 511 after a prompt of 2 tokens; .* at most 510"),
    ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens is 9; .* at most max_tokens \(8\)"),
    ({"presence_penalty": 3.0}, r"presence_penalty is 3.0; it must lie in \[-2, 2\]"),
    ({"frequency_penalty": math.inf}, "frequency_penalty is inf"),
    ({"repetition_penalty": -1.0}, "repetition_penalty is -1.0"),
    ({"logit_bias": {1: 200.0}}, r"logit_bias\[1\] is 200.0; it must lie in \[-100, 100\]"),
    ({"logit_bias": {400: 1.0}}, "logit_bias holds token id 400"),
    ({"allowed_token_ids": [320]}, "allowed_token_ids holds token id 320"),
    ({"top_logprobs": 21}, r"top_logprobs is 21; it must lie in \[0, 20\]"),
    ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
    ({"regex": "a", "json_schema": "{}"}, "json_schema and regex are set; at most one"),
    ({"stop": [""]}, "stop is a string of 0 characters"),
    ({"stop": ["x"] * 17}, "stop is 17 strings; it may hold at most 16"),
    ({"stop_token_ids": [400]}, "stop_token_ids holds token id 400"),
    ({"stop_token_ids": [1] * 65}, "stop_token_ids is 65 ids"),
    ({"request_id": "x" * 129}, "request_id has 129 characters; it may have at most 128"),
    ({"request_id": "a\nb"}, r"request_id is 'a\\nb'; it must be printable ASCII"),
]


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def nobody_else_is_harmed(rig: Rig, client: AsyncClient) -> AsyncIterator[None]:
    yield
    assert rig.ended("error") == rig.ended("cancelled") == 0
    await rig.wait_blocks_free()
    assert (await client.generate("Hi")).text == "Hello, world!"


async def send(rig: Rig, data: bytes, **options: Any) -> tuple[StatusCode, str]:
    """Put bytes on the wire as they are; returns the status and its text."""
    async with grpc.aio.insecure_channel(rig.address, **options) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/lowbit.v1.GenerationService/Generate")(data)
    return caught.value.code(), caught.value.details() or ""


def chat_of_empty_messages(number: int) -> bytes:
    return pb.GenerateRequest(
        chat=pb.Chat(messages=[pb.ChatMessage()] * number)
    ).SerializeToString()


def unknown(number: int) -> bytes:
    """A varint field of this number."""
    return bytes([number << 3, 1])


@pytest.mark.parametrize(("arguments", "text"), REFUSED_ARGUMENTS, ids=lambda v: str(v)[:40])
async def test_what_is_out_of_range(
    client: AsyncClient, rig: Rig, arguments: dict[str, Any], text: str
) -> None:
    invalid = rig.ended("invalid")
    with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
        await client.generate(**{"prompt": "Hi", **arguments})
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT
    assert rig.ended("invalid") == invalid + 1


async def test_a_stream_is_refused_alike(client: AsyncClient) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="temperature is -1") as caught:
        await anext(client.stream("Hi", temperature=-1.0))
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (pb.GenerateRequest(), "prompt is not set; one of text, token_ids and chat must be"),
        (pb.GenerateRequest(chat=pb.Chat()), "chat.messages is empty"),
        (
            pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(content="Hi")])),
            r"chat.messages\[0\].role is 0; it must be one of 1 \(system\)",
        ),
        (
            pb.GenerateRequest(
                chat=pb.Chat(
                    messages=[
                        pb.ChatMessage(role=pb.CHAT_ROLE_USER),
                        pb.ChatMessage(role=7),  # type: ignore[arg-type]
                    ]
                )
            ),
            r"chat.messages\[1\].role is 7",
        ),
    ],
    ids=["no prompt", "no messages", "no role", "unknown role"],
)
async def test_what_the_client_would_not_send(
    rig: Rig, request_: pb.GenerateRequest, text: str
) -> None:
    status, details = await send(rig, request_.SerializeToString())
    assert status is StatusCode.INVALID_ARGUMENT
    assert re.search(text, details)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x12\x05ab\xffcd", "text is not valid UTF-8: byte 0xff at offset 2"),
        (b"\x0a\x02\xc3\x28\x12\x02Hi", "request_id is not valid UTF-8: byte 0xc3 at offset 0"),
        (
            b"\x22\x0c\x0a\x03\x12\x01a\x0a\x05\x08\x02\x12\x01\x80",
            "chat.messages[1].content is not valid UTF-8: byte 0x80 at offset 0",
        ),
        (
            b"\x12\x02Hi\x2a\x07\x3a\x01a\x3a\x02b\xf0",
            "sampling.stop[1] is not valid UTF-8: byte 0xf0 at offset 1",
        ),
        (b"\x12\x50Hi", "the 4 bytes of the request are not a lowbit.v1.GenerateRequest"),
        (b"\xff" * 20, "the 20 bytes of the request are not a lowbit.v1.GenerateRequest"),
    ],
    ids=["text", "request_id", "chat", "stop", "cut short", "noise"],
)
async def test_bytes_that_are_no_request(rig: Rig, data: bytes, text: str) -> None:
    assert await send(rig, data) == (StatusCode.INVALID_ARGUMENT, text)


@pytest.mark.parametrize(
    ("data", "name", "number"),
    [
        (b"\x12\x02Hi" + unknown(15), "lowbit.v1.GenerateRequest", 15),
        (b"\x12\x02Hi\x2a\x02" + unknown(14), "sampling", 14),
        (b"\x22\x06\x0a\x04\x08\x02" + unknown(9), "chat.messages[0]", 9),
        (b"\x12\x02Hi\x2a\x02" + unknown(1), "sampling", 1),  # temperature is no varint
    ],
    ids=["request", "sampling", "message", "other type"],
)
async def test_fields_of_a_newer_client_are_refused(
    rig: Rig, data: bytes, name: str, number: int
) -> None:
    status, details = await send(rig, data)
    assert status is StatusCode.UNIMPLEMENTED
    assert details.startswith(f"{name} holds field number {number}, which this server does not")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x12\x02Hi" + b"\x78\x01" * 20_000, "GenerateRequest holds 40000 bytes of fields"),
        (
            chat_of_empty_messages(20_000) + b"\x2a\x03\x3a\x01\xff",
            "holds text that is not valid UTF-8",
        ),
    ],
    ids=["unknown fields", "text after many messages"],
)
async def test_what_would_take_long_to_look_at_is_told_without_names(
    rig: Rig, data: bytes, text: str
) -> None:
    _, details = await send(rig, data)
    assert text in details


async def test_a_message_over_the_limit(rig: Rig) -> None:
    limit = rig.config.max_message_bytes
    data = pb.GenerateRequest(text="x" * limit).SerializeToString()
    expected = StatusCode.RESOURCE_EXHAUSTED, f"larger than max ({len(data)} vs. {limit})"
    status, details = await send(rig, data)
    assert (status, details[-len(expected[1]) :]) == expected


async def test_a_message_that_grows_over_the_limit(rig: Rig) -> None:
    data = pb.GenerateRequest(text="x" * 50 * rig.config.max_message_bytes).SerializeToString()
    status, _ = await send(rig, data, compression=grpc.Compression.Gzip)
    assert status is StatusCode.RESOURCE_EXHAUSTED


async def test_an_unknown_method(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/lowbit.v1.GenerationService/Regenerate")(b"")
    assert caught.value.code() is StatusCode.UNIMPLEMENTED


async def test_a_prompt_too_long_for_the_cache() -> None:
    async with running(make_rig(num_blocks=2)) as rig, AsyncClient(rig.address) as client:
        with pytest.raises(
            grpc.aio.AioRpcError, match="prompt has 40 tokens; the KV cache allows at most 32"
        ) as caught:
            await client.generate("x" * 40)
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT
        assert (await client.generate("Hi")).text == "Hello, world!"
        await rig.wait_blocks_free()


async def test_a_request_id_in_use(client: AsyncClient) -> None:
    first = client.stream("Hi", request_id="mine", ignore_eos=True, max_tokens=500)
    await anext(first)
    with pytest.raises(grpc.aio.AioRpcError, match="request_id is 'mine'; it is already in use"):
        await client.generate("Hi", request_id="mine")
    async for _ in first:
        pass


async def test_more_requests_than_the_server_holds() -> None:
    engine = EngineConfig(max_num_seqs=1, max_queued_requests=1)
    rig = make_rig(
        RecitingRunner(endless=True, step_seconds=0.001),
        config=ServerConfig(port=0, metrics_port=0, engine=engine),
    )
    async with running(rig), AsyncClient(rig.address, max_attempts=1) as client:
        running_ = client.stream("Hi")
        await anext(running_)
        waiting = asyncio.create_task(client.generate("Hi"))
        while rig.llm.scheduler.num_waiting == 0:
            await asyncio.sleep(0.001)
        with pytest.raises(grpc.aio.AioRpcError, match="the server holds 2 requests") as caught:
            await client.generate("Hi")
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        await running_.aclose()
        assert (await waiting).usage.completion_tokens == 256
        assert rig.ended("queue_full") == 1
        await rig.wait_blocks_free()


async def test_a_failing_step_is_told_by_request_id(caplog: pytest.LogCaptureFixture) -> None:
    rig = make_rig()
    async with running(rig), AsyncClient(rig.address) as client:
        for call in (
            client.generate("Hi", request_id="a"),
            anext(client.stream("Hi", request_id="a")),
        ):
            rig.runner.fails = True
            with pytest.raises(
                grpc.aio.AioRpcError, match="request a failed: the step failed"
            ) as caught:
                await call
            assert caught.value.code() is StatusCode.INTERNAL
            rig.runner.fails = False
            assert (await client.generate("Hi")).text == "Hello, world!"
        assert rig.ended("error") == 2
        await rig.wait_blocks_free()


async def test_what_nobody_expected_is_logged_and_not_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make_rig()

    def explode(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(rig.engine, "generate", explode)
    async with running(rig), AsyncClient(rig.address) as client:
        with pytest.raises(grpc.aio.AioRpcError, match="request b failed unexpectedly") as caught:
            await client.generate("Hi", request_id="b")
    assert caught.value.code() is StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError: secret" in caplog.text
    assert "request b failed" in caplog.text
