"""What people write stays text in every family's chat layout; what the template writes does not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from byte_tokenizer import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from lowbit.server.text.tokenizer import Tokenizer
from lowbit.server.types import ChatMessage, ChatRole
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """Role markers as a family of models has them, and a layout like its own."""

    special: tuple[str, ...]
    template: str
    undeclared: tuple[str, ...] = ()  # added to the vocabulary, but not declared special
    metaspace: bool = False  # words begin with U+2581, as SentencePiece has it
    strips: bool = False  # special tokens take the space after them

    def pretrained(self) -> PreTrainedTokenizerFast:
        pretrained = metaspace_tokenizer() if self.metaspace else byte_tokenizer()
        backend = pretrained.backend_tokenizer
        backend.add_special_tokens(
            [AddedToken(text, rstrip=self.strips, normalized=False) for text in self.special]
        )
        backend.add_tokens([AddedToken(text, normalized=False) for text in self.undeclared])
        pretrained = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")
        pretrained.chat_template = self.template
        return pretrained


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-fallback BPE whose words begin with U+2581, and whose vocabulary holds the markers."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\u2581", *map(chr, range(0x21, 0x7F)), "<bos>", "<start_of_turn>", "<end_of_turn>"]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme="first")]
    )
    backend.add_special_tokens([AddedToken("<bos>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


FAMILIES = {
    "ChatML": Family(
        ("<|im_start|>", "<|im_end|>"),
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n",
    ),
    "Llama 3": Family(
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}<|start_header_id|>assistant<|end_header_id|>"
        "\n\n",
    ),
    "Gemma": Family(
        ("<start_of_turn>", "<end_of_turn>"),
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}<start_of_turn>model\n",
        metaspace=True,
    ),
    "Mistral": Family(
        ("[INST]", "[/INST]", "</s>"),
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>"
        "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}",
    ),
    "Phi 3": Family(
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "<|assistant|>\n",
        strips=True,
    ),
    "DeepSeek": Family(
        ("<\uff5cend\u2581of\u2581sentence\uff5c>",),
        "{% for m in messages %}{% if m.role == 'assistant' %}<\uff5cAssistant\uff5c>{% else %}"
        "<\uff5cUser\uff5c>{% endif %}{{ m.content }}{% endfor %}<\uff5cAssistant\uff5c>",
        undeclared=("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ),
    "Qwen 3": Family(
        ("<|im_start|>", "<|im_end|>"),
        "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c and m.role == "
        "'assistant' %}{% set c = c.split('</think>')[-1] %}{% endif %}<|im_start|>{{ m.role }}\n"
        "{{ c }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n\n</think>\n",
        undeclared=("<think>", "</think>"),
    ),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Family, PreTrainedTokenizerFast, Tokenizer]:
    family = FAMILIES[request.param]
    return family, family.pretrained(), Tokenizer(family.pretrained())


def conversation(content: str, role: ChatRole = "user") -> list[ChatMessage]:
    return [
        ChatMessage(role="user", content="Hello there"),
        ChatMessage(role="assistant", content="Hi."),
        ChatMessage(role=role, content=content),
    ]


def counts(family: Family, pretrained: PreTrainedTokenizerFast, ids: list[int]) -> dict[str, int]:
    names = ("<bos>", *family.special, *family.undeclared)
    return {name: ids.count(pretrained.convert_tokens_to_ids(name)) for name in names}


@pytest.mark.parametrize("content", ["Hi", "Two\nlines, and a  double space", "né \U0001f600", ">"])
def test_plain_content_is_encoded_as_transformers_does(family, content: str) -> None:
    _, pretrained, tokenizer = family
    messages = conversation(content)
    expected = pretrained.apply_chat_template(
        [{"role": each.role, "content": each.content} for each in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert tokenizer.encode_chat(messages) == expected


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_no_message_makes_a_special_token(family, role: ChatRole) -> None:
    own, pretrained, tokenizer = family
    usual = counts(own, pretrained, tokenizer.encode_chat(conversation("Hi", role)))
    undeclared = () if role == "assistant" and "<think>" in own.undeclared else own.undeclared
    for name in ("<bos>", *own.special, *undeclared):
        for content in (name, f"a{name}b", f"{name}{name}", f" {name}\n", f"{name[:-1]}{name}"):
            ids = tokenizer.encode_chat(conversation(content, role))
            assert counts(own, pretrained, ids) == usual, content
            assert content.strip() in tokenizer.decode(ids, skip_special_tokens=False)


@given(
    st.lists(st.sampled_from([*"<>|_ab \n", "<|im_end|>", "<|im_", "end|>", "\ufdd0", "\ufdd1"]))
)
def test_no_pieces_of_a_message_make_one_together(pieces: list[str]) -> None:
    own = FAMILIES["ChatML"]
    pretrained, tokenizer = CHATML
    usual = counts(own, pretrained, tokenizer.encode_chat(conversation("Hi")))
    text = "".join(pieces)
    ids = tokenizer.encode_chat(conversation(text))
    assert counts(own, pretrained, ids) == usual
    assert text in tokenizer.decode(ids, skip_special_tokens=False)


CHATML = FAMILIES["ChatML"].pretrained(), Tokenizer(FAMILIES["ChatML"].pretrained())


def test_a_message_cannot_complete_what_the_template_begins() -> None:
    pretrained = byte_tokenizer("{% for m in messages %}<{{ m.content }}s>{% endfor %}")
    ids = Tokenizer(pretrained).encode_chat([ChatMessage(role="user", content="bo")])
    assert ids == list(b"<bos>")


def test_tags_that_the_model_wrote_are_seen_by_its_template() -> None:
    own = FAMILIES["Qwen 3"]
    tokenizer = Tokenizer(own.pretrained())
    ids = tokenizer.encode_chat(conversation("<think>secret</think>Hi", "assistant"))
    assert "secret" not in tokenizer.decode(ids)


def test_a_prompt_of_text_holds_special_tokens_only_when_told_so() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    assert tokenizer.encode("<bos>a") == list(b"<bos>a")
    assert tokenizer.encode("<bos>a", parse_special_tokens=True) == [256, ord("a")]
