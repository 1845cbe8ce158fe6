"""What a well-formed request gets, over a real socket."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections.abc import Sequence
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from lowbit.proto import generation_pb2 as pb
from lowbit.proto import generation_pb2_grpc as pb_grpc
from lowbit.server.client import AsyncClient
from lowbit.server.text.detokenizer import Detokenizer
from lowbit.server.types import ChatMessage, FinishReason
from prometheus_client.parser import text_string_to_metric_families
from serving import EOS, ByteCodec, RecitingRunner, Rig, make_rig, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

REPLY = [*b"Hello, world!", EOS]


async def test_unary(client: AsyncClient) -> None:
    generation = await client.generate("Hi", request_id="mine")
    assert generation.request_id == "mine"
    assert generation.text == "Hello, world!"
    assert [token.id for token in generation.tokens] == REPLY
    assert all(token.logprob == -0.5 for token in generation.tokens)
    assert generation.finish_reason is FinishReason.STOP
    assert generation.usage.prompt_tokens == 2
    assert generation.usage.completion_tokens == len(REPLY)
    timings = generation.timings
    assert 0 < timings.time_to_first_token_seconds <= timings.duration_seconds < 5
    queue, prefill = timings.queue_seconds, timings.prefill_seconds
    assert queue is not None and prefill is not None and queue >= 0 and prefill > 0
    assert queue + prefill <= timings.time_to_first_token_seconds
    total = timings.time_to_first_token_seconds + timings.decode_seconds
    assert total == pytest.approx(timings.duration_seconds)


async def test_a_stream_brings_deltas_and_the_costs_once(client: AsyncClient) -> None:
    deltas = [delta async for delta in client.stream("Hi")]
    assert "".join(delta.text for delta in deltas) == "Hello, world!"
    assert [token.id for delta in deltas for token in delta.tokens] == REPLY
    assert all(delta.tokens for delta in deltas)
    assert len({delta.request_id for delta in deltas}) == 1
    *before, last = deltas
    assert last.finish_reason is FinishReason.STOP
    assert last.stop_match == EOS
    assert last.usage is not None and last.timings is not None
    assert all(each.finish_reason is each.usage is each.timings is None for each in before)


async def test_a_token_is_sent_as_soon_as_it_is_made() -> None:
    runner = RecitingRunner(gated=True)
    async with running(make_rig(runner)) as rig, AsyncClient(rig.address) as client:
        stream = client.stream("Hi")
        for character in "Hello":
            runner.allow(1)
            delta = await asyncio.wait_for(anext(stream), 5)
            assert (delta.text, len(delta.tokens)) == (character, 1)
        await stream.aclose()


async def test_what_a_slow_step_allows_is_told_by_the_interval() -> None:
    runner = RecitingRunner(gated=True)
    async with running(make_rig(runner)) as rig, AsyncClient(rig.address) as client:
        stream = client.stream("Hi", stream_interval=4)
        texts = []
        for num_steps in (1, 4, 4):  # the first token never waits
            runner.allow(num_steps)
            texts.append((await asyncio.wait_for(anext(stream), 5)).text)
        assert texts == ["H", "ello", ", wo"]
        runner.open()
        assert "".join([delta.text async for delta in stream]) == "rld!"


async def test_tokens_say_their_own_text(client: AsyncClient) -> None:
    generation = await client.generate("Hi")
    assert [token.text for token in generation.tokens] == [*"Hello, world!", "<eos>"]
    assert generation.completions[0].stop_match == EOS
    assert (await client.generate("Hi", stop=["world"])).completions[0].stop_match == "world"


async def test_the_prompt_comes_back_where_it_is_asked_for(client: AsyncClient) -> None:
    generation = await client.generate("Hi", echo=True)
    assert [(token.id, token.text) for token in generation.prompt_tokens] == [(72, "H"), (105, "i")]
    first, *rest = [delta async for delta in client.stream([1, 72, 105], echo=True)]
    assert [token.id for token in first.prompt_tokens] == [1, 72, 105]
    assert not any(delta.prompt_tokens for delta in rest)


async def test_a_prompt_is_cut_to_its_end_where_it_may(client: AsyncClient) -> None:
    generation = await client.generate("Hello", truncate_prompt_tokens=2, echo=True)
    assert "".join(token.text for token in generation.prompt_tokens) == "lo"
    assert generation.usage.prompt_tokens == 2


async def test_a_special_token_in_a_prompt_is_text_unless_asked_for(client: AsyncClient) -> None:
    assert (await client.generate("<bos>")).usage.prompt_tokens == len("<bos>")
    parsed = await client.generate("<bos>Hi", parse_special_tokens=True)
    assert parsed.usage.prompt_tokens == 3


async def test_the_server_makes_request_ids(client: AsyncClient) -> None:
    first, second = await asyncio.gather(client.generate("a"), client.generate("a"))
    assert first.request_id and first.request_id != second.request_id


async def test_max_tokens(client: AsyncClient) -> None:
    generation = await client.generate("Hi", max_tokens=5)
    assert generation.text == "Hello"
    assert generation.finish_reason is FinishReason.LENGTH
    assert generation.usage.completion_tokens == 5


async def test_token_ids(client: AsyncClient) -> None:
    generation = await client.generate([7, 8, 9])
    assert generation.text == "Hello, world!"
    assert generation.usage.prompt_tokens == 3


async def test_chat(client: AsyncClient) -> None:
    messages = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hi"),
    ]
    generation = await client.generate(messages)
    layout = "[system] Be brief.\n[user] Hi\n[assistant] "
    assert generation.text == "Hello, world!"
    assert generation.usage.prompt_tokens == len(layout) + len(messages)  # each has a <bos>


async def test_a_completion_goes_on_where_its_prompt_ends_and_an_answer_does_not() -> None:
    class Codec(ByteCodec):
        contexts: ClassVar[list[Sequence[int]]] = []

        def detokenizer(
            self, stop: Sequence[str] = (), context: Sequence[int] = (), **options: Any
        ) -> Detokenizer:
            self.contexts.append(context)
            return super().detokenizer(stop, context, **options)

    async with (
        running(make_rig(tokenizer=Codec())) as rig,
        AsyncClient(rig.address) as client,
    ):
        await client.generate("Hi")
        await client.generate([72, 105])
        await client.generate([ChatMessage(role="user", content="Hi")])
    assert Codec.contexts == [[72, 105], [72, 105], ()]


async def test_a_stop_string_is_not_part_of_the_text(client: AsyncClient, rig: Rig) -> None:
    deltas = [delta async for delta in client.stream("Hi", stop=["lo, w", "never"])]
    assert "".join(delta.text for delta in deltas) == "Hel"
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.completion_tokens == len("Hello, w")
    await rig.wait_blocks_free()


async def test_held_back_text_comes_at_the_end(client: AsyncClient) -> None:
    generation = await client.generate("Hi", stop=["world!!"])
    assert generation.text == "Hello, world!"


async def test_a_stop_token_ends_and_is_not_part_of_the_text(client: AsyncClient) -> None:
    generation = await client.generate("Hi", stop_token_ids=[ord(",")])
    assert generation.text == "Hello"
    assert generation.tokens[-1].id == ord(",")
    assert generation.finish_reason is FinishReason.STOP


async def test_the_end_of_sequence_can_be_ignored(client: AsyncClient) -> None:
    generation = await client.generate("Hi", ignore_eos=True, max_tokens=16)
    assert generation.finish_reason is FinishReason.LENGTH
    assert [token.id for token in generation.tokens[-3:]] == [EOS, EOS, EOS]
    assert generation.text == "Hello, world!"


async def test_many_at_once(client: AsyncClient) -> None:
    generations = await asyncio.gather(*(client.generate(f"{i}") for i in range(100)))
    assert {generation.text for generation in generations} == {"Hello, world!"}


async def test_the_generated_stub_of_blocking_grpc(rig: Rig) -> None:
    def call() -> tuple[pb.GenerateResponse, list[pb.GenerateResponse]]:
        with grpc.insecure_channel(rig.address) as channel:
            stub = pb_grpc.GenerationServiceStub(channel)
            request = pb.GenerateRequest(text="Hi", sampling=pb.SamplingParams(max_tokens=4))
            return stub.Generate(request), list(stub.GenerateStream(request))

    whole, parts = await asyncio.to_thread(call)
    (output,) = whole.outputs
    assert output.text == "".join(part.outputs[0].text for part in parts) == "Hell"
    assert [(token.id, token.text) for token in output.tokens] == [(ord(c), c) for c in "Hell"]
    assert output.finish_reason == pb.FINISH_REASON_LENGTH
    assert parts[-1].outputs[0].finish_reason == pb.FINISH_REASON_LENGTH
    assert not parts[0].HasField("usage")


async def test_a_client_that_knows_nothing_but_reflection(rig: Rig) -> None:
    """What grpcurl does: the service's messages are built from what the server tells of itself."""

    def call() -> dict[str, Any]:
        with grpc.insecure_channel(rig.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            services = database.get_services()
            name = next(each for each in services if each.endswith("GenerationService"))
            pool = descriptor_pool.DescriptorPool(database)
            method = pool.FindServiceByName(name).methods_by_name["Generate"]
            request = json_format.Parse(
                '{"text": "Hi", "sampling": {"maxTokens": 4}}',
                message_factory.GetMessageClass(method.input_type)(),
            )
            response = channel.unary_unary(
                f"/{name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(
                    method.output_type
                ).FromString,
            )(request)
            return dict(json.loads(json_format.MessageToJson(response, descriptor_pool=pool)))

    answer = await asyncio.to_thread(call)
    (output,) = answer["outputs"]
    assert output["text"] == "Hell"
    assert output["finishReason"] == "FINISH_REASON_LENGTH"


async def test_reflection_lists_the_services(rig: Rig) -> None:
    def list_services() -> set[str]:
        with grpc.insecure_channel(rig.address) as channel:
            return set(ProtoReflectionDescriptorDatabase(channel).get_services())

    assert await asyncio.to_thread(list_services) == {
        "lowbit.v1.GenerationService",
        "lowbit.v1.ModelService",
        "lowbit.v1.ControlService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }


async def test_what_prometheus_sees(client: AsyncClient, rig: Rig) -> None:
    def scrape() -> dict[tuple[str, str], float]:
        url = f"http://127.0.0.1:{rig.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as response:
            families = text_string_to_metric_families(response.read().decode())
        return {
            (each.name.removeprefix("lowbit_"), each.labels.get("finish_reason", "")): each.value
            for family in families
            for each in family.samples
        }

    await rig.wait_blocks_free()
    before = await asyncio.to_thread(scrape)
    await client.generate("Hi")
    await client.generate("Hi", max_tokens=3)
    await rig.wait_blocks_free()
    after = await asyncio.to_thread(scrape)
    grown = {key: after[key] - before[key] for key in before}
    assert grown["prompt_tokens_total", ""] == 4
    assert grown["generation_tokens_total", ""] == 14 + 3
    assert grown["requests_total", "stop"] == grown["requests_total", "length"] == 1
    assert grown["time_to_first_token_seconds_count", ""] == 2
    assert grown["inter_token_latency_seconds_count", ""] == 13 + 2
    assert grown["request_duration_seconds_count", ""] == 2
    assert after["kv_cache_usage_ratio", ""] == 0


async def test_several_samples_of_one_prompt(client: AsyncClient, rig: Rig) -> None:
    generation = await client.generate("Hi", n=3, stop=["wor"])
    assert [each.text for each in generation.completions] == ["Hello, "] * 3
    assert {each.stop_match for each in generation.completions} == {"wor"}
    assert generation.usage.completion_tokens == 3 * len("Hello, wor")
    deltas = [delta async for delta in client.stream("Hi", n=2)]
    for index in range(2):
        own = [delta for delta in deltas if delta.index == index]
        assert "".join(delta.text for delta in own) == "Hello, world!"
        assert own[-1].finish_reason is FinishReason.STOP
    assert [delta.usage is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    await rig.wait_blocks_free()


async def test_a_stop_string_in_the_text_when_asked_for(client: AsyncClient) -> None:
    generation = await client.generate("Hi", stop=["lo, w"], include_stop=True)
    assert generation.text == "Hello, w"
