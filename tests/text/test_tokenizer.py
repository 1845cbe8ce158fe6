from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from byte_tokenizer import BOS, EOS, byte_tokenizer
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import ChatMessage, InvalidRequest

HELLO = ChatMessage(role="user", content="Hello")


def test_it_reads_a_models_folder(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("né") == list("né".encode())
    assert tokenizer.decode([*"né".encode(), EOS]) == "né"
    assert tokenizer.max_characters_per_token == len("<bos>")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        Tokenizer.from_folder(tmp_path / "nowhere")


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no tokenizer can be read from {tmp_path}"):
        Tokenizer.from_folder(tmp_path)


def test_truncation_in_the_models_files_is_not_followed() -> None:
    pretrained = byte_tokenizer()
    pretrained.backend_tokenizer.enable_truncation(3)
    pretrained.backend_tokenizer.enable_padding(length=8)
    assert Tokenizer(pretrained).encode("Hello") == list(b"Hello")


def test_a_chat_is_laid_out_by_the_template() -> None:
    messages = [HELLO, ChatMessage(role="assistant", content="Hi"), HELLO]
    text = b"[user] Hello\n", b"[assistant] Hi\n", b"[user] Hello\n"
    expected = [token for line in text for token in (BOS, *line)]
    assert Tokenizer(byte_tokenizer()).encode_chat(messages) == [*expected, *b"[assistant] "]


def test_a_model_without_a_template_takes_no_chat() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(byte_tokenizer(chat_template=None)).encode_chat([HELLO])


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidRequest, match="refused by the model's template: not this"):
        Tokenizer(byte_tokenizer()).encode_chat([ChatMessage(role="user", content="refuse me")])


def test_special_tokens_are_no_text() -> None:
    detokenizer = Tokenizer(byte_tokenizer()).detokenizer()
    assert [detokenizer.push(token) for token in (BOS, ord("a"), EOS)] == ["", "a", ""]
    assert detokenizer.finish() == ""


def test_threads_may_share_it() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    texts = [f"text {i} " * 500 for i in range(32)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [list(text.encode()) for text in texts]
