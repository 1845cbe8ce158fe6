"""The whole engine on a tiny random model, against transformers and against itself."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from engines import make_engine, prompt
from lowbit.kernels.interface import load_backend
from lowbit.server.engine.engine import LLMEngine
from lowbit.server.types import FinishReason, InvalidRequest, SamplingParams, TokenOutput
from tiny import TinyModel


def run(engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]) -> dict:
    for request_id, (tokens, params) in requests.items():
        engine.add(engine.new_sequence(request_id, tokens, params))
    received: dict[str, list[int]] = {request_id: [] for request_id in requests}
    preemptions = 0
    while engine.has_work:
        for output in engine.step():
            received[output.request_id].append(output.token_id)
        preemptions += engine.last_step.num_preemptions
    received["preemptions"] = preemptions
    engine.scheduler.check_integrity()
    return received


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
REQUESTS = {f"r{i}": (prompt(11 + 7 * i, seed=i), GREEDY) for i in range(8)}


def test_greedy_tokens_are_those_of_transformers(tiny_model: TinyModel) -> None:
    tokens, _ = REQUESTS["r3"]
    expected = tiny_model.oracle.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )[0, len(tokens) :].tolist()
    received = run(make_engine(tiny_model, "float32"), {"r3": (tokens, GREEDY)})
    assert received["r3"] == expected


def test_the_triton_backend_serves_the_same_tokens(tiny_model: TinyModel) -> None:
    """On a GPU, or in Triton's interpreter: in a crowd, prompts in chunks."""
    short = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    requests = {name: (REQUESTS[name][0], short) for name in ("r0", "r2")}
    expected = run(make_engine(tiny_model, "float32"), requests)
    engine = make_engine(
        tiny_model,
        backend=load_backend("triton"),
        max_num_seqs=3,
        max_num_batched_tokens=13,
    )
    assert run(engine, requests) == expected


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_greedy_tokens_are_the_same_alone_in_a_crowd_and_after_preemption(
    tiny_model: TinyModel, kv_cache_dtype: str
) -> None:
    make = functools.partial(make_engine, tiny_model, "bfloat16", kv_cache_dtype)
    alone = {}
    for request_id, request in REQUESTS.items():
        alone |= run(make(), {request_id: request})
    crowd = run(make(), REQUESTS)
    chunked = run(make(max_num_seqs=8, max_num_batched_tokens=13), REQUESTS)
    starved = run(make(num_blocks=9), REQUESTS)
    assert crowd["preemptions"] == 0
    assert starved["preemptions"] > 0
    for request_id in REQUESTS:
        assert crowd[request_id] == alone[request_id]
        assert chunked[request_id] == alone[request_id]
        assert starved[request_id] == alone[request_id]


def test_seeded_samples_do_not_depend_on_the_batch(tiny_model: TinyModel) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=7, max_tokens=30, ignore_eos=True)
    request = {"mine": (prompt(20, seed=5), params)}
    alone = run(make_engine(tiny_model), request)
    strangers = {
        f"s{i}": (prompt(9 + i, seed=50 + i), SamplingParams(max_tokens=30)) for i in range(6)
    }
    crowd = run(make_engine(tiny_model, num_blocks=10), {**strangers, **request})
    assert crowd["preemptions"] > 0
    assert crowd["mine"] == alone["mine"]
    other = SamplingParams(temperature=1.0, top_p=0.95, seed=8, max_tokens=30, ignore_eos=True)
    assert (
        run(make_engine(tiny_model), {"mine": (prompt(20, seed=5), other)})["mine"] != alone["mine"]
    )


def test_a_stop_token_ends_the_sequence_and_is_reported(tiny_model: TinyModel) -> None:
    tokens, _ = REQUESTS["r0"]
    free = run(make_engine(tiny_model), {"r": (tokens, GREEDY)})["r"]
    stop = free[10]
    engine = make_engine(tiny_model)
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=(stop,), ignore_eos=True)
    engine.add(engine.new_sequence("r", tokens, params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [o.token_id for o in outputs] == free[: free.index(stop) + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_logprobs_are_the_models_own(tiny_model: TinyModel) -> None:
    tokens, _ = REQUESTS["r1"]
    engine = make_engine(tiny_model, "float32")
    params = SamplingParams(temperature=0.7, top_k=20, seed=1, max_tokens=12, ignore_eos=True)
    engine.add(engine.new_sequence("r", tokens, params))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    sampled = [output.token_id for output in outputs]
    with torch.inference_mode():
        logits = tiny_model.oracle(torch.tensor([tokens + sampled])).logits[0]
    expected = logits.log_softmax(-1)[len(tokens) - 1 : -1].gather(
        1, torch.tensor(sampled)[:, None]
    )
    actual = torch.tensor([output.logprob for output in outputs])
    torch.testing.assert_close(actual, expected[:, 0], atol=1e-3, rtol=1e-3)


def outputs_of(
    engine: LLMEngine, requests: dict[str, tuple[list[int], SamplingParams]]
) -> dict[str, list[TokenOutput]]:
    for request_id, (tokens, params) in requests.items():
        engine.add(engine.new_sequence(request_id, tokens, params))
    outputs: dict[str, list[TokenOutput]] = {request_id: [] for request_id in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    engine.scheduler.check_integrity()
    return outputs


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_seqs": 4, "max_num_batched_tokens": 13}, {"num_blocks": 9}],
    ids=["whole", "in chunks", "preempted"],
)
def test_prompt_logprobs_are_those_of_transformers(
    tiny_model: TinyModel, settings: dict[str, int]
) -> None:
    params = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=3, top_logprobs=2
    )
    requests = {f"r{i}": (prompt(30 + i, seed=i), params) for i in range(4)}
    for request_id, outputs in outputs_of(
        make_engine(tiny_model, "float32", **settings), requests
    ).items():
        tokens = requests[request_id][0] + [output.token_id for output in outputs]
        with torch.inference_mode():
            expected = tiny_model.oracle(torch.tensor([tokens])).logits[0].log_softmax(-1)
        reported = [*outputs[0].prompt_logprobs, *(output.token for output in outputs)]
        assert [each.token_id for each in reported] == tokens[1:]
        for row, each in enumerate(reported):
            number = 3 if row + 1 < len(requests[request_id][0]) else 2
            assert each.logprob == pytest.approx(expected[row, tokens[row + 1]].item(), abs=1e-3)
            likelier = expected[row] > expected[row, tokens[row + 1]] + 1e-3
            not_less = expected[row] >= expected[row, tokens[row + 1]] - 1e-3
            assert each.rank is not None
            assert likelier.sum() < each.rank <= not_less.sum()
            best = expected[row].topk(number)
            assert [pair[0] for pair in each.top] == best.indices.tolist()
            assert [pair[1] for pair in each.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert not any(output.prompt_logprobs for output in outputs[1:])


def test_min_tokens_keeps_the_end_away(tiny_model: TinyModel) -> None:
    tokens, _ = REQUESTS["r0"]
    free = run(make_engine(tiny_model), {"r": (tokens, GREEDY)})["r"]
    stops = tuple(set(free[:12]))
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=stops, min_tokens=9)
    (outputs,) = outputs_of(make_engine(tiny_model), {"r": (tokens, params)}).values()
    chosen = [output.token_id for output in outputs]
    assert len(chosen) >= 10
    assert not set(chosen[:9]) & set(stops)


def test_a_sequence_whose_logits_are_not_finite_fails_alone(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model)
    expected = run(make_engine(tiny_model), REQUESTS)
    forward = engine.runner.model.forward

    def poisoned(*arguments: Any) -> torch.Tensor:
        logits = forward(*arguments)
        if len(logits) == len(REQUESTS):
            logits[3] = torch.nan
        return logits

    engine.runner.model.forward = poisoned
    outputs = outputs_of(engine, REQUESTS)
    failed = outputs.pop("r3")[-1]
    assert (failed.finish_reason, failed.token_id) == (FinishReason.ERROR, None)
    assert failed.error == "the model's logits are not finite numbers"
    for request_id, received in outputs.items():
        assert [output.token_id for output in received] == expected[request_id]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {320: 1.0}}, r"logit_bias holds token id 320; ids must lie in \[0, 320\)"),
        ({"allowed_token_ids": (7, 999)}, "allowed_token_ids holds token id 999"),
        ({"min_tokens": 300}, r"min_tokens is 300; here it must be at most 256 \(max_tokens\)"),
        (
            {"allowed_token_ids": (257, 9), "stop_token_ids": (9,), "min_tokens": 1},
            "allowed_token_ids holds only tokens that stop; min_tokens is 1",
        ),
        ({"regex": "a+"}, "regex is set; this engine was given no constraint"),
    ],
)
def test_what_no_completion_could_satisfy_is_refused(
    tiny_model: TinyModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_engine(tiny_model).new_sequence("r", [1, 2, 3], SamplingParams(**settings))
