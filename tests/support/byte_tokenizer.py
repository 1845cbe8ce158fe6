"""A byte-level tokenizer, built in milliseconds: the id of a byte's token is the byte."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOS, EOS = 256, 257

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content == 'refuse me' %}{{ raise_exception('not this') }}{% endif -%}
<bos>[{{ message.role }}] {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}[assistant] {% endif %}"""


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    alphabet |= {chr(256 + i): byte for i, byte in enumerate(hidden)}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<bos>"), AddedToken("<eos>")])
    pretrained = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>"
    )
    pretrained.chat_template = chat_template
    return pretrained
