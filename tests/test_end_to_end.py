"""The real model: quantized, loaded, served through a real socket, against transformers."""

from __future__ import annotations

import argparse
import collections
import inspect
import json
import re
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from families import save_family
from lowbit.kernels.cpu import CpuBackend
from lowbit.quant.evaluate import load_dequantized
from lowbit.server.client import Client
from lowbit.server.config import EngineConfig
from lowbit.server.engine.build import build_engine
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.model.loader import load_decoder
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import ChatMessage, FinishReason, SamplingParams
from stepping import Prompt, caches_for, run_step
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.slow

LOWBIT = str(Path(sysconfig.get_path("scripts")) / "lowbit")
NUM_TOKENS = 2000
QUESTION = [ChatMessage(role="user", content="What is the capital of France?")]


@pytest.fixture(scope="module")
def oracle(real_checkpoint: Path) -> LlamaForCausalLM:
    return load_dequantized(real_checkpoint)


@pytest.fixture(scope="module")
def text_ids(real_checkpoint: Path) -> list[int]:
    """Text of another kind than the calibration's: source code and its comments."""
    source = inspect.getsource(collections) + inspect.getsource(argparse)
    return Tokenizer.from_folder(real_checkpoint).encode(source)[:NUM_TOKENS]


@pytest.mark.parametrize(
    ("precision", "min_agreement", "max_difference"),
    [("float32", 0.9995, 0.005), ("bfloat16", 0.97, 1.5)],
)
def test_logits_agree_with_transformers(
    real_checkpoint: Path,
    oracle: LlamaForCausalLM,
    text_ids: list[int],
    precision: str,
    min_agreement: float,
    max_difference: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """2,000 tokens of text in chunks, each position's logits against float32 transformers."""
    decoder = load_decoder(real_checkpoint, CpuBackend(precision))
    prompt = Prompt(text_ids, list(range(NUM_TOKENS // 16)))
    caches = caches_for(decoder, len(prompt.blocks))
    with torch.inference_mode():
        expected = oracle(torch.tensor([text_ids])).logits[0]
    for _ in range(0, NUM_TOKENS, 250):
        run_step(decoder, caches, [(prompt, 250)])
    actual = torch.stack(prompt.logits)
    agreement = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    difference = (actual - expected).abs().max().item()
    divergence = torch.nn.functional.kl_div(
        actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    ).item()
    with capsys.disabled():
        print(
            f"\n{precision}: top-1 agreement {agreement:.2%} on {NUM_TOKENS} tokens, largest logit "
            f"difference {difference:.4f} (standard deviation of the logits {expected.std():.2f}), "
            f"KL {divergence:.1e}"
        )
    assert agreement >= min_agreement
    assert difference <= max_difference
    assert divergence <= 5e-3


GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)


def completions(
    engine: LLMEngine, prompts: dict[str, list[int]], params: SamplingParams = GREEDY
) -> dict[str, list[int]]:
    for request_id, prompt in prompts.items():
        engine.add(engine.new_sequence(request_id, prompt, params))
    received: dict[str, list[int]] = {request_id: [] for request_id in prompts}
    received["preemptions"] = []
    while engine.has_work:
        for output in engine.step():
            assert output.token_id is not None
            received[output.request_id].append(output.token_id)
        received["preemptions"] += [1] * engine.last_step.num_preemptions
    return received


def test_greedy_tokens_of_fifty_prompts_are_the_same_as_alone(
    real_checkpoint: Path, text_ids: list[int]
) -> None:
    """In a crowd that comes and goes, in chunks, from the prefix cache, and drafted."""
    decoder = load_decoder(real_checkpoint, CpuBackend("bfloat16"))
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    lengths = [20 + i + (230 if i % 10 == 9 else 0) for i in range(50)]
    prompts = {f"r{i}": text_ids[i * 30 : i * 30 + length] for i, length in enumerate(lengths)}
    alone = build_engine(decoder, EngineConfig(prefix_cache=False))
    expected: dict[str, list[int]] = {}
    for request_id, prompt in prompts.items():
        expected[request_id] = completions(alone, {request_id: prompt}, greedy)[request_id]
    crowds = {
        "crowd": EngineConfig(max_num_seqs=16, max_itl_stretch=0),
        "in small chunks": EngineConfig(
            max_num_seqs=16, max_num_batched_tokens=50, max_itl_stretch=0
        ),
        "with drafts": EngineConfig(max_num_seqs=8, max_itl_stretch=0, max_draft_tokens=8),
    }
    for name, config in crowds.items():
        engine = build_engine(decoder, config)
        assert completions(engine, prompts, greedy) == expected | {"preemptions": []}, name
        if name == "crowd":  # and now from the prefix cache
            assert completions(engine, prompts, greedy) == expected | {"preemptions": []}


def test_greedy_tokens_alone_in_a_crowd_and_after_preemption(
    real_checkpoint: Path, text_ids: list[int]
) -> None:
    decoder = load_decoder(real_checkpoint, CpuBackend("bfloat16"))
    prompts = {f"r{i}": text_ids[i * 150 : i * 150 + 20 + 13 * i] for i in range(8)}
    block_bytes = 16 * 30 * 2 * 3 * 64 * 2
    tight = EngineConfig(kv_cache_memory_bytes=24 * block_bytes)
    crowd = completions(build_engine(decoder, EngineConfig()), prompts)
    starved = completions(build_engine(decoder, tight), prompts)
    assert not crowd["preemptions"]
    assert starved["preemptions"]
    for request_id, prompt in prompts.items():
        alone = completions(build_engine(decoder, EngineConfig()), {request_id: prompt})
        assert crowd[request_id] == alone[request_id]
        assert starved[request_id] == alone[request_id]


def test_seeded_tokens_alone_in_a_crowd_and_with_drafts(
    real_checkpoint: Path, text_ids: list[int]
) -> None:
    decoder = load_decoder(real_checkpoint, CpuBackend("bfloat16"))
    prompts = {f"r{i}": text_ids[i * 90 : i * 90 + 30 + 7 * i] for i in range(6)}
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=32, ignore_eos=True)
    crowd = completions(build_engine(decoder, EngineConfig()), prompts, params)
    drafted = completions(build_engine(decoder, EngineConfig(max_draft_tokens=8)), prompts, params)
    assert drafted == crowd
    for request_id, prompt in prompts.items():
        alone = completions(build_engine(decoder, EngineConfig()), {request_id: prompt}, params)
        assert crowd[request_id] == alone[request_id]


def test_forms_are_followed_with_the_models_own_tokens(real_checkpoint: Path) -> None:
    """Tokens of many characters, some of which reach across the form's parts."""
    tokenizer = Tokenizer.from_folder(real_checkpoint)
    engine = build_engine(
        load_decoder(real_checkpoint, CpuBackend("bfloat16")), EngineConfig(max_draft_tokens=4)
    )
    schema = {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "country": {"enum": ["France", "Italy"]},
            "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
        },
        "required": ["city", "country", "population"],
        "additionalProperties": False,
    }
    texts: list[str] = []
    for form in ({"json_schema": json.dumps(schema)}, {"choice": ("Paris", "Rome", "Lyon")}):
        for seed in range(4):
            params = SamplingParams(seed=seed, max_tokens=80, **form)
            constraint = tokenizer.constraint(params, engine.vocab_size, engine.eos_token_ids)
            prompt = tokenizer.encode_chat(QUESTION)
            engine.add(engine.new_sequence("r", prompt, params, constraint=constraint))
            tokens: list[int | None] = []
            while engine.has_work:
                tokens += [output.token_id for output in engine.step()]
            assert tokens[-1] in engine.eos_token_ids
            texts.append(tokenizer.decode([token for token in tokens if token is not None]))
    for text in texts[:4]:
        found = json.loads(text)
        assert list(found) == ["city", "country", "population"]
        assert len(found["city"]) <= 20 and found["country"] in ("France", "Italy")
        assert 0 <= found["population"] <= 99_999_999
    assert set(texts[4:]) <= {"Paris", "Rome", "Lyon"}


@contextmanager
def serving(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [LOWBIT, "serve", str(checkpoint), "--port", "0", "--metrics-port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r" on (\S+:\d+);", process.stdout.readline())
        assert found is not None
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_server_answers_as_transformers_would_and_ends_cleanly(
    real_checkpoint: Path, oracle: LlamaForCausalLM
) -> None:
    tokenizer = Tokenizer.from_folder(real_checkpoint)
    prompt = tokenizer.encode_chat(QUESTION)
    expected = oracle.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    with serving(real_checkpoint, "--cpu-precision", "float32") as (process, address):
        with Client(address) as client:
            client.wait_until_serving()
            deltas = list(client.stream(QUESTION, temperature=0, max_tokens=40))
            whole = client.generate(QUESTION, temperature=0, max_tokens=40)
            with pytest.raises(grpc.RpcError) as refusal:
                client.generate(QUESTION, temperature=-1)
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "temperature is -1" in refusal.value.details()
        streamed = [token.id for delta in deltas for token in delta.tokens]
        assert streamed == expected
        assert "".join(delta.text for delta in deltas) == whole.text
        assert "Paris" in whole.text
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.prompt_tokens == len(prompt)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_ctrl_c_drains_too(real_checkpoint: Path) -> None:
    with serving(real_checkpoint) as (process, address):
        with Client(address) as client:
            client.wait_until_serving()
            stream = client.stream("Once upon a time", max_tokens=60, ignore_eos=True)
            next(stream)
            process.send_signal(signal.SIGINT)
            rest = list(stream)
        assert rest[-1].finish_reason is FinishReason.LENGTH
        assert process.wait(30) == 0


@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_a_model_of_another_family_is_quantized_and_served(tmp_path: Path, family: str) -> None:
    source, out, text = tmp_path / "source", tmp_path / "w4", tmp_path / "text"
    save_family(source, family)
    text.write_text("The quick brown fox jumps over the lazy dog. " * 50, encoding="utf-8")
    few = ["--num-sequences", "8", "--sequence-length", "64", "--group-size", "32"]
    subprocess.run([LOWBIT, "quantize", source, out, "--calibration", text, *few], check=True)
    prompt = torch.tensor([list(b"What is the capital of France?")])
    expected = load_dequantized(out).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with serving(out, "--cpu-precision", "float32") as (_, address), Client(address) as client:
        client.wait_until_serving()
        deltas = client.stream(
            "What is the capital of France?", temperature=0, max_tokens=40, ignore_eos=True
        )
        streamed = [token.id for delta in deltas for token in delta.tokens]
    assert streamed == expected[0, prompt.shape[1] :].tolist()
