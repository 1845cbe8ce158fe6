"""A model's own tokenizer and chat template, read from its folder. Runs no code of the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..types import (
    MAX_CHAT_MESSAGES,
    ChatMessage,
    InvalidRequest,
    SamplingParams,
    TokenConstraint,
)
from .detokenizer import Detokenizer
from .special_tokens import SpecialTokenGuard
from .structured import ConstraintCompiler


class Tokenizer:
    """Text to token ids and back. Threads may share it.

    Encoding a long prompt takes long, and lets other threads run meanwhile.
    """

    def __init__(self, pretrained: PreTrainedTokenizerFast) -> None:
        self._pretrained = pretrained
        # Without transformers' own layer: it computes offsets that nobody needs (three times the
        # time at 4 MiB of text) and costs more than the decoding itself.
        self._backend = pretrained.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        self._special_token_ids = frozenset(
            {token_id for token_id, token in added.items() if token.special}
        )
        self._guard = SpecialTokenGuard(self._backend, pretrained.chat_template)
        self._token_texts: dict[int, str] = {}
        self.max_characters_per_token = max(map(len, self._backend.get_vocab()))
        self._lock = threading.Lock()
        self._compiler: ConstraintCompiler | None = None

    @classmethod
    def from_folder(cls, path: str | Path) -> Self:
        """Raises FileNotFoundError or ValueError for a folder that holds no usable tokenizer."""
        if not Path(path).is_dir():
            raise FileNotFoundError(f"{path} is not a folder; it must hold a model's tokenizer")
        try:
            pretrained = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer can be read from {path}: {error}") from error
        if not isinstance(pretrained, PreTrainedTokenizerFast):
            raise ValueError(
                f"the tokenizer in {path} is a {type(pretrained).__name__}; "
                "only those that the tokenizers library runs are supported"
            )
        return cls(pretrained)

    @property
    def has_chat_template(self) -> bool:
        return self._pretrained.chat_template is not None

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        """The ids of `text`, with the special tokens that the tokenizer adds by itself.

        What looks like a special token in the text is one only if `parse_special_tokens`.
        """
        if parse_special_tokens:
            text = self._guard.admit(text)
        return self._guard.encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The ids of a conversation, up to where the assistant speaks next.

        Only the template makes special tokens: what a message says is text, whatever it looks
        like. Raises InvalidRequest when there is no message, too many of them, no template, or
        when the template refuses them.
        """
        if not 1 <= len(messages) <= MAX_CHAT_MESSAGES:
            raise InvalidRequest(
                f"chat has {len(messages)} messages; it must have 1 to {MAX_CHAT_MESSAGES}"
            )
        if self._pretrained.chat_template is None:
            raise InvalidRequest("chat is set; this model has no chat template, so send text")
        conversation = [
            {
                "role": each.role,
                "content": self._guard.mark(each.content, by_model=each.role == "assistant"),
            }
            for each in messages
        ]
        try:
            text = self._pretrained.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise InvalidRequest(f"chat is refused by the model's template: {error}") from error
        assert isinstance(text, str)
        # The template has written the special tokens already.
        return self._guard.encode(
            self._guard.unmark(self._guard.admit(text)), add_special_tokens=False
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of some tokens, special ones left out."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What a token says by itself. Incomplete characters are U+FFFD; special tokens show."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._backend.decode(
                [token_id], skip_special_tokens=False
            )
        return text

    def detokenizer(
        self,
        stop: Sequence[str] = (),
        context: Sequence[int] = (),
        min_tokens: int = 0,
        include_stop: bool = False,
    ) -> Detokenizer:
        """For one completion; see `Detokenizer` for what the arguments change."""
        return Detokenizer(
            self.decode,
            special_token_ids=self._special_token_ids,
            stop=stop,
            context=context,
            min_tokens=min_tokens,
            include_stop=include_stop,
        )

    def constraint(
        self, params: SamplingParams, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> TokenConstraint:
        """What follows the form that `params` prescribes, for one completion of this model.

        The first call prepares the vocabulary, which takes a second at 49,152 tokens. Raises
        InvalidRequest.
        """
        with self._lock:
            if self._compiler is None:
                self._compiler = ConstraintCompiler(
                    self._backend.to_str(), vocab_size, eos_token_ids
                )
        return self._compiler.compile(params)
