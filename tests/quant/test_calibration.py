from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from families import save_family
from lowbit.quant.calibration import (
    HELD_OUT_TOPICS,
    MAX_TEXT_BYTES,
    MIN_TOKENS,
    SAMPLED_AT_ONCE,
    calibration_batches,
    check_vocabulary,
    conversation_opening,
    read_documents,
    reference_text,
    render,
    sample_batches,
    token_batches,
)
from lowbit.quant.errors import CalibrationError
from lowbit.quant.evaluate import load_reference
from lowbit.quant.source import load_source
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "".join(f"{i:06d} " for i in range(1000))  # 7000 bytes, every window different


def batches(text: str = TEXT, **changes: int) -> torch.Tensor:
    settings = {"num_sequences": 4, "sequence_length": 100, "seed": 0, **changes}
    return token_batches(byte_tokenizer(), text, **settings)


def test_windows_are_disjoint_pieces_of_the_text() -> None:
    windows = batches(num_sequences=50)
    assert windows.shape == (50, 100) and windows.dtype == torch.int64
    starts = [TEXT.index(bytes(window).decode()) for window in windows.tolist()]
    assert len(set(starts)) == 50
    assert all(start % 100 == 0 for start in starts)
    assert starts != sorted(starts)


def test_a_seed_decides() -> None:
    assert torch.equal(batches(), batches())
    assert not torch.equal(batches(), batches(seed=1))


def test_a_short_text_gives_what_it_has() -> None:
    assert batches(num_sequences=1000).shape == (70, 100)
    assert batches(sequence_length=5000).shape == (1, 5000)
    assert batches(sequence_length=50_000).shape == (1, 7000)


def test_windows_start_as_the_tokenizer_starts_a_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    windows = token_batches(tokenizer, TEXT, num_sequences=3, sequence_length=100, seed=0)
    assert windows.shape == (3, 100)
    assert windows[:, 0].tolist() == [256] * 3
    assert not (windows[:, 1:] == 256).any()


@pytest.mark.parametrize("length", [0, 1, MIN_TOKENS - 1])
def test_too_little_text(length: int) -> None:
    with pytest.raises(CalibrationError, match=f"{length} tokens; at least {MIN_TOKENS}"):
        batches("x" * length)


@pytest.mark.parametrize("change", [{"sequence_length": 0}, {"num_sequences": 0}])
def test_settings_out_of_range(change: dict[str, int]) -> None:
    (name,) = change
    with pytest.raises(CalibrationError, match=f"{name} is 0"):
        batches(**change)


# a user's file


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("häuser\n" * 3, encoding="utf-8")
    assert read_documents(path) == ["häuser\n" * 3]


def test_a_long_file_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a" + "ä".encode() * (MAX_TEXT_BYTES // 2 + 100))
    (text,) = read_documents(path)
    assert isinstance(text, str)
    assert len(text.encode()) == MAX_TEXT_BYTES - 1
    assert set(text) == {"a", "ä"}


def json_lines(path: Path, *documents: Any) -> Path:
    lines = [json.dumps(document, ensure_ascii=False) for document in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


NEITHER = 'has neither a "text" nor "messages" with role and content'
HELLO = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "häuser"}]


def test_lines_of_texts_and_conversations(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "mixed.jsonl", {"text": "one\ntwo", "id": 3}, {"messages": HELLO})
    path.write_text("\n  \n" + path.read_text())
    assert read_documents(path) == ["one\ntwo", HELLO]


def test_a_line_break_of_unicode_ends_no_line(tmp_path: Path) -> None:
    """JSON allows these characters inside a string."""
    text = "a\u2028b\u2029c\u0085d"
    assert read_documents(json_lines(tmp_path / "text.jsonl", {"text": text})) == [text]


def test_only_the_name_makes_a_file_json(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "data.json", {"text": "one"})
    assert read_documents(path) == ['{"text": "one"}\n']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 'no'}", "is not JSON"),
        ('{"text": "cut', "is not JSON"),
        ('"text"', NEITHER),
        ("[]", NEITHER),
        ('{"text": 5}', NEITHER),
        ('{"messages": []}', NEITHER),
        ('{"messages": ["hi"]}', NEITHER),
        ('{"messages": [{"role": "user"}]}', NEITHER),
        ('{"messages": [{"role": "user", "content": ["hi"]}]}', NEITHER),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    with pytest.raises(CalibrationError) as caught:
        read_documents(path)
    assert str(caught.value) == f"{path}: line 3 {message}"


def test_long_json_lines_are_cut_between_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    line = json.dumps({"text": "x" * (1 << 20)}) + "\n"
    path.write_text(line * 9)
    documents = read_documents(path)
    assert documents == ["x" * (1 << 20)] * (MAX_TEXT_BYTES // len(line))
    assert 0 < len(documents) < 9


@pytest.mark.parametrize("name", ["text", "text.jsonl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" \n\t ", "holds no text"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"good text\n" * 1000 + b"\x80", "not UTF-8 text"),
        (b"\x93NUMPY\n\xff" * (MAX_TEXT_BYTES // 8 + 1), "not UTF-8 text"),
    ],
    ids=["empty", "blank", "binary", "one bad byte", "long and binary"],
)
def test_a_file_without_text(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        read_documents(path)
    assert str(caught.value) == f"{path}: {message}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nothing: cannot be read \(No such file"):
        read_documents(tmp_path / "nothing")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_documents(tmp_path)


def test_documents_become_one_text() -> None:
    tokenizer = byte_tokenizer()
    spoken = "<bos>[user] hi\n<bos>[assistant] häuser\n"
    assert render(["one", HELLO, "two"], tokenizer) == f"one\n\n{spoken}\n\ntwo"


@pytest.mark.parametrize(
    ("template", "content", "reason"),
    [("default", "refuse me", "not this"), (None, "hi", "chat_template is not set")],
)
def test_messages_that_the_chat_template_refuses(
    template: str | None, content: str, reason: str
) -> None:
    tokenizer = byte_tokenizer() if template else byte_tokenizer(None)
    with pytest.raises(CalibrationError, match="does not take the calibration messages") as caught:
        render([[{"role": "user", "content": content}]], tokenizer)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


# the built-in text


def test_the_reference_text_is_long_and_seeded() -> None:
    assert len(reference_text()) > 300_000
    assert reference_text() == reference_text(0) != reference_text(1)


def paragraphs(text: str) -> set[str]:
    """Those that say something: not "See also:" or "New in version 3.9."."""
    return {part.strip() for part in text.split("\n\n") if len(part.strip()) >= 20}


def test_the_held_out_text_is_never_calibrated_on() -> None:
    kept, held_out = reference_text(), reference_text(held_out=True)
    assert len(held_out) > 50_000
    assert all(topics[name] in held_out for name in HELD_OUT_TOPICS)
    assert not paragraphs(held_out) & paragraphs(kept)
    assert len(kept) + len(held_out) + 2 == len("\n\n".join(topics.values()))


def test_a_conversation_opens_as_the_chat_template_says() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(conversation_opening(tokenizer)) == "<bos>[user] "
    for template in (None, "{{ raise_exception('never') }}", "nothing of yours"):
        assert conversation_opening(byte_tokenizer(template)) == [256]
    without = byte_tokenizer(None)
    without.bos_token = None
    assert conversation_opening(without) == []


@pytest.fixture(scope="module")
def model(tiny_source: Path) -> LlamaForCausalLM:
    return load_reference(load_source(str(tiny_source)))


def draw(model: LlamaForCausalLM, **changes: int) -> torch.Tensor:
    settings = {"num_sequences": 4, "sequence_length": 40, "seed": 0, **changes}
    return sample_batches(model, [256, 91], **settings)


def test_drawn_texts_follow_the_models_distribution(model: LlamaForCausalLM) -> None:
    """The same draws without a cache, each from the whole text before it."""
    length = 4 * 40 // SAMPLED_AT_ONCE
    generator = torch.Generator().manual_seed(0)
    texts = torch.tensor([[256, 91]] * SAMPLED_AT_ONCE)
    with torch.inference_mode():
        while texts.shape[1] < length:
            probabilities = torch.softmax(model(texts).logits[:, -1], -1)
            step = torch.multinomial(probabilities, 1, generator=generator)
            texts = torch.cat([texts, step], 1)
    assert torch.equal(draw(model), texts.view(4, 40))


def test_draws_have_a_seed_and_any_shape(model: LlamaForCausalLM) -> None:
    assert torch.equal(draw(model), draw(model))
    assert not torch.equal(draw(model), draw(model, seed=1))
    for shape in ((1, 40), (3, 41), (40, 8)):
        drawn = draw(model, num_sequences=shape[0], sequence_length=shape[1])
        assert drawn.shape == shape
        assert drawn.flatten()[:2].tolist() == [256, 91]


# what a run is calibrated on


def run_batches(folder: Path, text: str | None = None, **changes: Any) -> torch.Tensor:
    settings = {"num_sequences": 6, "sequence_length": 128, "seed": 0, "max_model_bytes": 1 << 30}
    return calibration_batches(load_source(str(folder)), text, **{**settings, **changes})


def reference_batches(folder: Path, count: int, seed: int = 0) -> torch.Tensor:
    tokenizer, text = load_source(str(folder)).tokenizer, reference_text(seed)
    return token_batches(tokenizer, text, num_sequences=count, sequence_length=128, seed=seed)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_default_mixes_the_reference_with_conversations(
    tiny_source: Path, model: LlamaForCausalLM, count: int, seed: int
) -> None:
    found = run_batches(tiny_source, num_sequences=count, seed=seed)
    read = reference_batches(tiny_source, count - count // 2, seed)
    assert found.shape == (count, 128)
    assert torch.equal(found[: len(read)], read)
    if count // 2:
        tokenizer = byte_tokenizer()
        opening = conversation_opening(tokenizer)
        assert tokenizer.decode(opening) == "<bos>[user] "
        drawn = sample_batches(
            model, opening, num_sequences=count // 2, sequence_length=128, seed=seed
        )
        assert torch.equal(found[len(read) :], drawn)


def test_a_users_text_is_not_mixed(tiny_source: Path) -> None:
    found = run_batches(tiny_source, "All of it. " * 300)
    assert found.shape == (6, 128)
    assert set(found.flatten().tolist()) == set(b"All of it. ")


def test_a_model_too_large_to_draw_reads_the_reference_alone(tiny_source: Path) -> None:
    tensors = load_file(tiny_source / "model.safetensors").values()
    needed = 4 * sum(tensor.numel() for tensor in tensors)
    expected = reference_batches(tiny_source, 6)
    assert torch.equal(run_batches(tiny_source, max_model_bytes=needed - 1), expected)
    assert not torch.equal(run_batches(tiny_source, max_model_bytes=needed), expected)


def test_an_encoder_reads_the_reference_alone(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "bert")
    assert torch.equal(run_batches(folder), reference_batches(folder, 6))


def test_without_any_opening_the_reference_stands_alone(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    source.tokenizer.chat_template = None
    source.tokenizer.bos_token = None
    settings = {"num_sequences": 6, "sequence_length": 128, "seed": 0}
    found = calibration_batches(source, None, max_model_bytes=1 << 30, **settings)
    assert torch.equal(found, reference_batches(tiny_source, 6))


def test_a_vocabulary_ends_where_the_model_says(tiny_source: Path) -> None:
    source = load_source(str(tiny_source))
    check_vocabulary(source, torch.tensor([[0, 319]]))
    with pytest.raises(CalibrationError) as caught:
        check_vocabulary(source, torch.tensor([[0, 320], [5, 1]]))
    assert str(caught.value) == (
        f"{tiny_source}: its tokenizer makes token 320; the model's vocabulary ends at 319"
    )


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, save_source: Callable[..., LlamaForCausalLM]
) -> None:
    save_source(tmp_path, vocab_size=100, bos_token_id=1, eos_token_id=2)
    with pytest.raises(CalibrationError, match=r"makes token \d+; .* vocabulary ends at 99"):
        run_batches(tmp_path)


def test_an_opening_that_the_model_does_not_know_is_refused(
    tmp_path: Path, save_source: Callable[..., LlamaForCausalLM]
) -> None:
    """The text fits; the chat template's <bos>, token 256, does not."""
    save_source(tmp_path, vocab_size=256, bos_token_id=1, eos_token_id=2)
    run_batches(tmp_path, "All of it. " * 300)
    with pytest.raises(CalibrationError, match="token 256; the model's vocabulary ends at 255"):
        run_batches(tmp_path)
