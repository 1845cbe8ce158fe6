"""What a step does on a GPU, as far as it can be seen without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import DEVICE, fake_gpu, move_to_gpu
from families import save_family
from launches import Launch
from lowbit.kernels import triton_linear
from lowbit.kernels.interface import ForwardBatch
from lowbit.kernels.triton_backend import TritonBackend
from lowbit.server.engine import sampler
from lowbit.server.engine.graph_runner import DecodeGraphs
from lowbit.server.engine.model_runner import ModelRunner
from lowbit.server.engine.scheduler import SchedulerOutput
from lowbit.server.engine.sequence import Sequence
from lowbit.server.model.decoder import Decoder
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams
from recorders import EagerRecorder
from tiny import TinyModel
from torch import Tensor

pytestmark = pytest.mark.skipif(
    not triton_linear.interpreted, reason="there is a GPU, where the rest of the tests see it"
)
BLOCK_SIZE = 16
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KV_DTYPES = DTYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FAMILIES = ("gemma3", "gpt2", "llama 3", "mistral", "opt", "phi3 with longrope", "qwen2", "qwen3")


def check(launches: list[Launch], at_least: int) -> None:
    """All on the GPU, on grids that CUDA takes: 2 ** 31 - 1, then 65,535 twice."""
    assert len(launches) >= at_least
    for launch in launches:
        assert {tensor.device for tensor in launch.tensors} == {DEVICE}, launch.name
        assert 0 < launch.grid[0] < 1 << 31, launch
        assert all(0 < size < 1 << 16 for size in launch.grid[1:]), launch


def record_a_step(decoder: Decoder) -> Tensor:
    """Logits of a decode step, launched as it is recorded."""
    config = decoder.config
    shape = (config.num_layers, 9, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    graphs = DecodeGraphs(
        decoder,
        decoder.backend.allocate_kv_cache(*shape),
        EagerRecorder(),
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        max_blocks=4,
        spare_block=8,
    )
    logits: list[Tensor] = []
    plain = decoder.forward
    decoder.forward = lambda *inputs: logits.append(plain(*inputs)) or logits[-1]  # type: ignore
    graphs.record([8], max_bytes=1 << 40)
    assert graphs.buckets == [8]
    return logits[-1]


def prefill(decoder: Decoder, num_tokens: int) -> Tensor:
    """Logits of a prompt's last token, launched one by one."""
    config = decoder.config
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    shape = (config.num_layers, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    ids = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
    batch = ForwardBatch(
        query_start=torch.zeros(2, dtype=torch.int32, device=DEVICE),
        context_lens=torch.zeros(1, dtype=torch.int32, device=DEVICE),
        block_tables=torch.zeros(1, num_blocks, dtype=torch.int32, device=DEVICE),
        slot_mapping=ids,
        block_size=BLOCK_SIZE,
    )
    return decoder.forward(ids, ids, batch, decoder.backend.allocate_kv_cache(*shape), ids[:1])


def check_a_step(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_gpu(monkeypatch) as launches:
        move_to_gpu(decoder)
        for logits, num_rows in ((record_a_step(decoder), 8), (prefill(decoder, 100), 1)):
            assert logits.shape == (num_rows, decoder.config.vocab_size)
            assert logits.dtype == torch.float32
            assert logits.device == DEVICE
    check(launches, at_least=5 * decoder.config.num_layers)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_step_mixes_no_devices_and_asks_the_gpu_for_nothing(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, dtype: str, kv_dtype: str
) -> None:
    backend = TritonBackend(torch.device("cpu"), DTYPES[dtype], KV_DTYPES[kv_dtype])
    check_a_step(load_decoder(tiny_model.folder, backend), monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_any_family_does_not_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    backend = TritonBackend(torch.device("cpu"), torch.bfloat16)
    decoder = load_decoder(save_family(tmp_path / "model", family), backend)
    check_a_step(decoder, monkeypatch)


def test_a_grid_holds_as_many_tokens_as_anyone_asks_for(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = load_decoder(tiny_model.folder, TritonBackend(torch.device("cpu")))
    with fake_gpu(monkeypatch) as launches:
        move_to_gpu(decoder)
        prefill(decoder, 70_000)
    check(launches, at_least=10)


def test_a_kernel_serves_every_number_of_rows_of_a_block(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a server would compile for minutes before it serves, once for 1 row, once for 2, ..."""
    decoder = load_decoder(tiny_model.folder, TritonBackend(torch.device("cpu")))
    with fake_gpu(monkeypatch) as launches:
        move_to_gpu(decoder)
        for num_tokens in (1, 2, 8, 16, 17, 32, 33, 64, 100, 192):
            prefill(decoder, num_tokens)
    kernels = {launch.kernel for launch in launches if launch.name == "_gemm_kernel"}
    # Blocks of 16, 32 and 64 rows; layers whose inputs fill the last step of a loop, or do not.
    assert len(kernels) == 3 * 2


# Two of each: tensors of one number are real ones in that mode.
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
    {"temperature": 0.7, "min_p": 0.1},
    {"temperature": 0, "top_logprobs": 3},
)


def sequences_that_decode() -> list[Sequence]:
    return [
        Sequence(
            request_id=str(i),
            token_ids=list(range(20 + i)),
            num_prompt_tokens=10,
            max_tokens=50,
            params=SamplingParams(**kind),
            stop_token_ids=frozenset(),
            seed=i,
            block_table=[2 * i, 2 * i + 1],
            num_cached_tokens=19 + i,
            num_scheduled_tokens=1,
        )
        for i, kind in enumerate(KINDS)
    ]


def test_a_step_follows_another_without_asking_the_gpu_for_anything(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the numbers that the host uploads to those that it will download."""
    decoder = load_decoder(tiny_model.folder, TritonBackend(torch.device("cpu")))
    downloads: list[Tensor] = []
    monkeypatch.setattr(sampler, "Download", downloads.append)
    sequences = sequences_that_decode()
    with fake_gpu(monkeypatch) as launches:
        move_to_gpu(decoder)
        runner = ModelRunner(decoder, 2 * len(KINDS), BLOCK_SIZE)
        step = runner.launch(SchedulerOutput(sequences, 0))
        for left_over in (5, 4):
            for sequence in sequences[:left_over]:
                sequence.token_ids += [0] * sequence.num_pending_tokens  # the last one is known now
                sequence.num_cached_tokens += 1
                sequence.num_pending_tokens = 1
            following = SchedulerOutput(
                sequences[:left_over], 0, blocks_to_clear=[8, 9], block_copies=[(1, 6), (2, 5)]
            )
            step = runner.launch(following, step)
            assert step.tokens_of(sequences[:left_over]).device == DEVICE
    assert [len(each) for each in downloads] == [5, 5, 4]
    assert {each.device for each in downloads} == {DEVICE}
    check(launches, at_least=3 * 5 * decoder.config.num_layers)
