"""Decode graphs with the recording replaced by the call itself: all of it but torch.cuda.graph."""

from __future__ import annotations

import logging

import pytest
import torch
from engines import make_engine, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from lowbit.kernels.cpu import CpuBackend
from lowbit.kernels.interface import ForwardBatch
from lowbit.server.engine.graph_runner import DecodeGraphs, DecodeRow, batch_buckets
from lowbit.server.model.decoder import Decoder
from lowbit.server.model.loader import load_decoder
from lowbit.server.types import SamplingParams
from recorders import EagerRecorder
from tiny import TinyModel
from torch import Tensor

BLOCK_SIZE = 4
NUM_BLOCKS = 40  # and the spare one
MAX_BLOCKS = 8


@pytest.fixture(scope="module")
def decoder(tiny_model: TinyModel) -> Decoder:
    return load_decoder(tiny_model.folder, CpuBackend())


def graphs_of(decoder: Decoder, recorder: EagerRecorder, max_num_seqs: int = 6) -> DecodeGraphs:
    config = decoder.config
    caches = decoder.backend.allocate_kv_cache(
        config.num_layers, NUM_BLOCKS + 1, BLOCK_SIZE, config.num_kv_heads, config.head_dim
    )
    generator = torch.Generator().manual_seed(0)
    for cache in caches:
        for tensor in (cache.keys, cache.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return DecodeGraphs(
        decoder,
        caches,
        recorder,
        block_size=BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_blocks=MAX_BLOCKS,
        spare_block=NUM_BLOCKS,
    )


@st.composite
def decode_rows(draw: st.DrawFn) -> list[DecodeRow]:
    """Up to six sequences over blocks of their own."""
    blocks = draw(st.permutations(range(NUM_BLOCKS)))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        table = [blocks.pop() for _ in range(draw(st.integers(1, 6)))]
        position = draw(st.integers(0, len(table) * BLOCK_SIZE - 1))
        rows.append(
            DecodeRow(token_id=draw(st.integers(0, 255)), position=position, block_table=table)
        )
    return rows


def plain_step(decoder: Decoder, graphs: DecodeGraphs, rows: list[DecodeRow]) -> Tensor:
    width = max(len(row.block_table) for row in rows)
    tables = [r.block_table + r.block_table[-1:] * (width - len(r.block_table)) for r in rows]
    slots = [
        row.block_table[row.position // BLOCK_SIZE] * BLOCK_SIZE + row.position % BLOCK_SIZE
        for row in rows
    ]
    positions = torch.tensor([row.position for row in rows])
    batch = ForwardBatch(
        query_start=torch.arange(len(rows) + 1, dtype=torch.int32),
        context_lens=(positions + 1).to(torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slot_mapping=torch.tensor(slots),
        block_size=BLOCK_SIZE,
    )
    ids = torch.tensor([row.token_id for row in rows])
    with torch.inference_mode():
        return decoder.forward(ids, positions, batch, graphs.caches, torch.arange(len(rows)))


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(decode_rows(), min_size=1, max_size=4))
def test_replays_are_plain_steps(decoder: Decoder, steps: list[list[DecodeRow]]) -> None:
    """Logits and the whole cache, after buffers have held other steps' rows and tables."""
    recorder = EagerRecorder()
    recorded, plain = graphs_of(decoder, recorder), graphs_of(decoder, EagerRecorder())
    recorded.record([1, 2, 4, 6], 1 << 30)
    for rows in steps:
        logits = recorded.run(rows)
        assert logits is not None
        assert torch.equal(logits, plain_step(decoder, plain, rows))
        for ours, theirs in zip(recorded.caches, plain.caches, strict=True):
            assert torch.equal(ours.keys[:NUM_BLOCKS], theirs.keys[:NUM_BLOCKS])
            assert torch.equal(ours.values[:NUM_BLOCKS], theirs.values[:NUM_BLOCKS])
    assert recorder.num_replays == len(steps)


def test_recording_writes_to_the_spare_block_alone(decoder: Decoder) -> None:
    graphs, untouched = (graphs_of(decoder, EagerRecorder()) for _ in range(2))
    graphs.record([1, 6], 1 << 30)
    for ours, theirs in zip(graphs.caches, untouched.caches, strict=True):
        assert torch.equal(ours.keys[:NUM_BLOCKS], theirs.keys[:NUM_BLOCKS])
        assert not torch.equal(ours.keys[NUM_BLOCKS], theirs.keys[NUM_BLOCKS])


def test_the_smallest_bucket_that_holds_the_rows(decoder: Decoder) -> None:
    graphs = graphs_of(decoder, EagerRecorder())
    graphs.record([2, 4], 1 << 30)
    assert [graphs.bucket_of(n) for n in (1, 2, 3, 4, 5)] == [2, 2, 4, 4, None]
    rows = [DecodeRow(token_id=1, position=0, block_table=[i]) for i in range(5)]
    assert graphs.run(rows) is None
    assert graphs_of(decoder, EagerRecorder()).run(rows[:1]) is None  # nothing was recorded


def test_all_buckets_share_one_place_for_logits(decoder: Decoder) -> None:
    """Or the many that there are would hold more memory than the model's activations."""
    graphs = graphs_of(decoder, EagerRecorder())
    graphs.record([1, 2, 4, 6], 1 << 30)
    rows = [DecodeRow(token_id=1, position=0, block_table=[i]) for i in range(6)]
    places = set()
    for number in (1, 2, 4, 6):
        logits = graphs.run(rows[:number])
        assert logits is not None
        places.add(logits.data_ptr())
    assert len(places) == 1


def test_buckets_beyond_the_memory_budget_are_left_out(
    decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = graphs_of(decoder, EagerRecorder(bytes_of_row=100))
    with caplog.at_level(logging.WARNING):
        graphs.record([1, 2, 4, 6], 400)
    assert graphs.buckets == [1, 2, 4]
    assert [record.message for record in caplog.records] == [
        "no CUDA graph for 6 sequences: cuda_graph_memory_bytes is 400"
    ]


def test_a_bucket_that_finds_no_memory_is_left_out(decoder: Decoder) -> None:
    recorder = EagerRecorder()
    recorder.too_large = 4
    graphs = graphs_of(decoder, recorder)
    graphs.record([1, 2, 4, 6], 1 << 30)
    assert graphs.buckets == [1, 2]


@pytest.mark.parametrize("drafts", [0, 4])
def test_an_engine_gives_the_same_tokens_with_graphs(tiny_model: TinyModel, drafts: int) -> None:
    """Prompts in chunks beside decodes, more sequences than places, drafts: some steps replay."""
    recorder = EagerRecorder()
    found = []
    for recorded in (False, True):
        engine = make_engine(
            tiny_model, max_num_seqs=5, max_num_batched_tokens=24, max_draft_tokens=drafts
        )
        if recorded:
            engine.runner.record_graphs(
                recorder, max_num_seqs=5, max_model_len=512, max_bytes=1 << 30
            )
        for i in range(9):
            params = SamplingParams(
                temperature=i % 2, seed=i, max_tokens=10 + i, top_logprobs=i % 3, ignore_eos=True
            )
            engine.add(engine.new_sequence(str(i), prompt(3 + 7 * i, i), params))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        found.append(sorted((o.request_id, o.token_id, o.logprob, o.top_logprobs) for o in outputs))
    assert found[0] == found[1]
    assert recorder.num_replays > 5


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 64, 100, 256, 1000])
def test_few_rows_are_padding(most: int) -> None:
    buckets = batch_buckets(most)
    assert buckets[-1] == most
    assert buckets == sorted(set(buckets))
    for num_seqs in range(1, most + 1):
        padded = min(each for each in buckets if each >= num_seqs)
        assert padded - num_seqs <= max(3, 7, 0.25 * num_seqs)
    assert len(buckets) <= 50
