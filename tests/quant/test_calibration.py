from __future__ import annotations

from pathlib import Path

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from lowbit.quant.calibration import (
    MAX_TEXT_BYTES,
    MIN_TOKENS,
    SAMPLED_AT_ONCE,
    conversation_opening,
    read_text,
    reference_text,
    sample_batches,
    token_batches,
)
from lowbit.quant.errors import CalibrationError
from lowbit.quant.evaluate import load_reference
from lowbit.quant.source import load_source
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM

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


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("häuser\n" * 3, encoding="utf-8")
    assert read_text(path) == "häuser\n" * 3


def test_a_long_file_is_cut_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"a" + "ä".encode() * (MAX_TEXT_BYTES // 2 + 100))
    text = read_text(path)
    assert len(text.encode()) == MAX_TEXT_BYTES - 1
    assert set(text) == {"a", "ä"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no text"), (b" \n\t ", "holds no text"), (b"\xff\xfe\x00", "not UTF-8 text")],
)
def test_a_file_without_text(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"nothing: cannot be read \(No such file"):
        read_text(tmp_path / "nothing")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_text(tmp_path)


def test_the_reference_text_is_long_and_seeded() -> None:
    assert len(reference_text()) > 400_000
    assert reference_text() == reference_text(0) != reference_text(1)


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
