"""VllmEngine: by its own messages, and through the smg gateway and OpenAI's client if installed."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import io
import shutil
import socket
import subprocess
import sysconfig
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from byte_tokenizer import byte_tokenizer
from grpc import StatusCode
from lowbit.server.config import ServerConfig
from lowbit.server.text.tokenizer import Tokenizer
from serving import EOS, PromptScoringRunner, RecitingRunner, Rig, make_rig, running
from smg_grpc_proto import vllm_engine_pb2 as vllm
from smg_grpc_proto.generated import common_pb2 as common

REPLY = [*b"Hello, world!", EOS]
CONFIG = ServerConfig(port=0, metrics_port=0, vllm_engine=True)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer(byte_tokenizer())
    async with running(make_rig(config=CONFIG, tokenizer=tokenizer, folder=str(tmp_path))) as rig:
        yield rig
        await rig.wait_blocks_free()
        assert rig.ended("error") == 0


async def generate(rig: Rig, request: Any) -> list[Any]:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        call = channel.unary_stream(
            "/vllm.grpc.engine.VllmEngine/Generate",
            request_serializer=vllm.GenerateRequest.SerializeToString,
            response_deserializer=vllm.GenerateResponse.FromString,
        )(request)
        return [response async for response in call]


def request(*, stream: bool, **sampling: Any) -> Any:
    return vllm.GenerateRequest(
        request_id="mine",
        tokenized=vllm.TokenizedInput(original_text="Hi", input_ids=b"Hi"),
        sampling_params=vllm.SamplingParams(**sampling),
        stream=stream,
    )


async def test_a_stream_has_new_tokens_and_then_all(rig: Rig) -> None:
    *chunks, last = await generate(rig, request(stream=True))
    assert [token for each in chunks for token in each.chunk.token_ids] == REPLY
    assert list(last.complete.output_ids) == REPLY
    assert last.complete.finish_reason == "stop"
    assert (last.complete.prompt_tokens, last.complete.completion_tokens) == (2, len(REPLY))
    assert last.complete.WhichOneof("matched_stop") is None  # an end of sequence is no match


async def test_without_a_stream_there_is_one_message(rig: Rig) -> None:
    (last,) = await generate(rig, request(stream=False, max_tokens=5))
    assert bytes(last.complete.output_ids) == b"Hello"
    assert last.complete.finish_reason == "length"


async def test_what_ended_it(rig: Rig) -> None:
    *_, last = await generate(rig, request(stream=True, stop=["wor"]))
    assert last.complete.matched_stop_str == "wor"
    *_, last = await generate(rig, request(stream=True, stop_token_ids=[ord(",")]))
    assert last.complete.matched_token_id == ord(",")


@pytest.mark.parametrize("field", ["mm_inputs", "kv_transfer_params"])
async def test_what_is_not_supported_is_refused_by_name(rig: Rig, field: str) -> None:
    message = request(stream=True)
    getattr(message, field).SetInParent()
    with pytest.raises(grpc.aio.AioRpcError, match=f"{field} is set") as caught:
        await generate(rig, message)
    assert caught.value.code() is StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(
    ("sampling", "text"),
    [
        ({"logit_bias": {-1: 1.0}}, "logit_bias is out of range"),
        ({"top_k": 2**32 - 1}, "top_k is out of range"),
        ({"max_tokens": 2**31}, "max_tokens is out of range"),
        ({"seed": -1}, "seed is -1"),
        ({"logprobs": -1}, "top_logprobs is -1"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_numbers_out_of_range(rig: Rig, sampling: dict[str, Any], text: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
        await generate(rig, request(stream=True, **sampling))
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT


async def test_bytes_that_are_no_request(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        for data, text in (
            (b"\x12\x03\x0a\x01\xff", "tokenized.original_text is not valid UTF-8"),
            (b"\x12\x50", "the 2 bytes of the request are not a vllm.grpc.engine.GenerateRequest"),
        ):
            with pytest.raises(grpc.aio.AioRpcError, match=text) as caught:
                await channel.unary_stream("/vllm.grpc.engine.VllmEngine/Generate")(data).read()
            assert caught.value.code() is StatusCode.INVALID_ARGUMENT


async def test_logprobs_of_the_prompt_come_with_the_first_chunk_and_the_end(tmp_path: Path) -> None:
    runner = PromptScoringRunner()
    async with running(make_rig(runner, config=CONFIG)) as rig:
        first, *chunks, last = await generate(rig, request(stream=True, prompt_logprobs=2))
        for scores in (first.chunk.input_logprobs, last.complete.input_logprobs):
            assert list(scores.token_ids) == list(b"Hi")
            assert not scores.token_logprobs[0].HasField("value")
            assert scores.token_logprobs[1].value == runner.LOGPROB
            assert [list(each.token_ids) for each in scores.top_logprobs] == [[], [0, 1]]
        assert not any(each.chunk.HasField("input_logprobs") for each in chunks)


async def test_what_the_operator_asks(rig: Rig) -> None:
    engine = "/vllm.grpc.engine.VllmEngine"
    async with grpc.aio.insecure_channel(rig.address) as channel:

        async def ask(method: str, message: Any, kind: Any) -> Any:
            return kind.FromString(
                await channel.unary_unary(f"{engine}/{method}")(message.SerializeToString())
            )

        health = await ask("HealthCheck", vllm.HealthCheckRequest(), vllm.HealthCheckResponse)
        assert health.healthy
        model = await ask("GetModelInfo", vllm.GetModelInfoRequest(), vllm.GetModelInfoResponse)
        assert (model.served_model_name, model.max_context_length) == ("recital", 512)
        assert list(model.eos_token_ids) == [EOS]
        loads = await ask("GetLoads", vllm.GetLoadsRequest(), vllm.GetLoadsResponse)
        assert (loads.loads[0].num_running_reqs, loads.dp_rank_count) == (0, 1)
        info = await ask("GetServerInfo", vllm.GetServerInfoRequest(), vllm.GetServerInfoResponse)
        assert info.server_type == "lowbit" and info.active_requests == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"{engine}/Embed")(b"")
        assert caught.value.code() is StatusCode.UNIMPLEMENTED


async def test_abort_ends_a_request_with_what_it_has() -> None:
    runner = RecitingRunner(endless=True, step_seconds=0.001)
    async with running(make_rig(runner, config=CONFIG)) as rig:
        call = asyncio.create_task(generate(rig, request(stream=False, max_tokens=500)))
        while runner.num_steps < 3:
            await asyncio.sleep(0.001)
        async with grpc.aio.insecure_channel(rig.address) as channel:
            abort = channel.unary_unary("/vllm.grpc.engine.VllmEngine/Abort")
            for _ in range(2):  # again, or too late, is no error
                await abort(vllm.AbortRequest(request_ids=["mine", "x"]).SerializeToString())
        (last,) = await call
        assert last.complete.finish_reason == "abort"
        await rig.wait_blocks_free()


async def test_the_tokenizer_comes_as_a_zip(rig: Rig) -> None:
    async with grpc.aio.insecure_channel(rig.address) as channel:
        call = channel.unary_stream(
            "/vllm.grpc.engine.VllmEngine/GetTokenizer",
            response_deserializer=common.GetTokenizerChunk.FromString,
        )(b"")
        chunks = [chunk async for chunk in call]
    data = b"".join(chunk.data for chunk in chunks)
    assert hashlib.sha256(data).hexdigest() == chunks[-1].sha256
    with zipfile.ZipFile(io.BytesIO(data)) as files:
        assert {"tokenizer.json", "tokenizer_config.json"} <= set(files.namelist())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        return int(reserved.getsockname()[1])


async def test_the_gateway_with_openais_client_in_front(rig: Rig, tmp_path: Path) -> None:
    gateway = shutil.which("smg", path=sysconfig.get_path("scripts"))
    if gateway is None or importlib.util.find_spec("openai") is None:
        pytest.skip("smg or openai is not installed")
    from openai import AsyncOpenAI, OpenAIError

    port = free_port()
    run = [gateway, "launch", "--worker-urls", f"grpc://{rig.address}", "--port", str(port)]
    run += ["--prometheus-port", str(free_port())]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(run, stdout=log, stderr=subprocess.STDOUT)
    try:
        client = AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        messages: Any = [{"role": "user", "content": "Hi"}]
        deadline = asyncio.get_running_loop().time() + 60
        while True:
            try:
                whole = await client.chat.completions.create(model="recital", messages=messages)
                break
            except OpenAIError:  # until the gateway has found the worker and its tokenizer
                if asyncio.get_running_loop().time() > deadline or process.poll() is not None:
                    raise AssertionError((tmp_path / "log").read_text()[-3000:]) from None
                await asyncio.sleep(0.3)
        assert whole.choices[0].message.content == "Hello, world!"
        assert whole.choices[0].finish_reason == "stop"
        stream = await client.chat.completions.create(
            model="recital", messages=messages, stream=True, max_tokens=5
        )
        text = [each.choices[0].delta.content or "" async for each in stream if each.choices]
        assert "".join(text) == "Hello"
        await client.close()
    finally:
        process.kill()  # it would keep its port for 5 seconds more
        await asyncio.to_thread(process.wait)


async def test_a_server_that_loads_has_no_tokenizer_yet() -> None:
    rig = make_rig(config=CONFIG)
    await rig.server.start()
    try:
        async with grpc.aio.insecure_channel(rig.address) as channel:
            call = channel.unary_stream("/vllm.grpc.engine.VllmEngine/GetTokenizer")(b"")
            with pytest.raises(grpc.aio.AioRpcError, match="loading its model") as caught:
                await call.read()
            assert caught.value.code() is StatusCode.UNAVAILABLE
    finally:
        await rig.server.stop()
