"""Documents of every kind as stored tokens: plain text, prompts with responses, chats."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from lowrank_train.config.data import DataConfig
from lowrank_train.data.documents import Document, Example
from lowrank_train.data.tokenizer import bos_ids, encode, plain_ids
from lowrank_train.text.chat import Chat, check_template, encode_chat
from lowrank_train.text.labels import starting, unlabelled

__all__ = ["Encoder"]


@dataclass(frozen=True)
class Encoder:
    """Makes tokens of documents, as the ``data`` section of a configuration says.

    Raises:
        UserError: a BOS token is wanted and there is none; chats, and the tokenizer has no chat template.
    """

    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    seen: Counter[str] = field(default_factory=Counter)
    """"split": documents of plain text in which the name of a special token was split."""

    def __post_init__(self) -> None:
        if self.config.messages_key is not None:
            check_template(self.tokenizer, self.config.tokenizer)
        bos_ids(self.tokenizer, self.config.add_bos)

    @property
    def adds_bos(self) -> bool | None:
        """Whether documents begin with the BOS token; None for chats, of which the template decides."""
        return None if self.config.messages_key is not None else bool(bos_ids(self.tokenizer, self.config.add_bos))

    def __call__(self, documents: Sequence[Document]) -> list[list[int]]:
        """Stored tokens of documents of one kind.

        The first token of each is marked as the start of a document, if documents are kept apart.
        """
        made = self._encoded(documents)
        if not self.config.separates:
            return made
        return [[*map(starting, tokens[:1]), *tokens[1:]] for tokens in made]

    def _encoded(self, documents: Sequence[Document]) -> list[list[int]]:
        special, bos = self.config.reads_special_tokens, self.config.add_bos
        chats = [document for document in documents if isinstance(document, Chat)]
        if chats:
            return [encode_chat(self.tokenizer, chat) for chat in chats]
        examples = [document for document in documents if isinstance(document, Example)]
        if examples:
            first = bos_ids(self.tokenizer, bos)
            prompts = plain_ids(self.tokenizer, [example.prompt for example in examples], special)
            responses = [example.response for example in examples]
            learned = encode(self.tokenizer, responses, special_tokens=special, bos=False)
            return [
                [*map(unlabelled, [*first, *prompt]), *response]
                for prompt, response in zip(prompts, learned, strict=True)
            ]
        texts = [document for document in documents if isinstance(document, str)]
        if not special:
            self.seen["split"] += sum(self._names.search(text) is not None for text in texts)
        return encode(self.tokenizer, texts, special_tokens=special, bos=bos)

    @cached_property
    def _names(self) -> re.Pattern[str]:
        names = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
