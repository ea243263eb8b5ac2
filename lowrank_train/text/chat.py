"""Chats: messages of a row, and their tokens by the tokenizer's own chat template.

Two layouts are read: ``messages`` (role, content) and ShareGPT's ``conversations`` (from, value). What the assistant
says is learned; everything else (system, user, results of tools, the names of the roles) is an input only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.text.labels import unlabelled
from lowrank_train.text.rows import PLACE

__all__ = ["COLUMNS", "Chat", "chats_of", "check_template", "encode_chat"]

COLUMNS = ("messages", "conversations")
"""Names under which chats are usually found."""

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    **{role: role for role in ("user", "assistant", "system", "tool")},
}
"""Speaker in ShareGPT's layout -> role in a chat template."""

_Message = dict[str, Any]


class Chat(NamedTuple):
    """A conversation."""

    content: str
    """Its messages as JSON: a list of mappings with role and content."""

    @property
    def messages(self) -> list[_Message]:
        """The messages as a chat template takes them."""
        messages: list[_Message] = json.loads(self.content)
        return messages


def chats_of(rows: Iterable[Mapping[str, Any]], column: str, where: str) -> Iterator[Chat]:
    """Yield the chat of each row; rows without messages are left out.

    Args:
        rows: each a mapping of columns.
        column: that holds the messages.
        where: the file or dataset, for messages.

    Raises:
        UserError: a column that holds no messages, or a message without a known role or text.
    """
    for number, row in enumerate(rows):
        place = f"{where}: {row[PLACE]}" if PLACE in row else f"{where}, row {number}"
        found = row.get(column, [])
        if column not in row or not isinstance(found, list | tuple | None):
            got = "nothing" if column not in row else type(found).__name__
            others = ", ".join(name for name in row if name not in (PLACE, column))
            hint = f"; set data.messages_key to one of {others}" if others else ""
            raise UserError(f"{place}: column {column!r} holds {got}; expected a list of messages{hint}")
        messages = [_message(one, f"{place}, column {column!r}") for one in found or []]
        if messages:
            yield Chat(json.dumps(messages, ensure_ascii=False))


def check_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Raise UserError for a tokenizer without a chat template.

    Args:
        tokenizer: that is to encode chats.
        name: of ``data.tokenizer``; None: it was trained on the text.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"data.tokenizer={name} has no chat template, which chats need (data.messages_key): use the tokenizer of a "
            "chat model, or put a chat_template.jinja beside the tokenizer's files"
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """Return the stored tokens of a chat; those that no assistant says are inputs only.

    A template that marks what the assistant says ({% generation %}) tells which tokens are learned. With any other one,
    they are the tokens between the prompt that generation starts from and the end of the turn.

    Raises:
        UserError: the template refuses the messages, or writes earlier turns differently once others follow.
    """
    messages = chat.messages
    if re.search(r"\{%-?\s*generation\s*-?%\}", _template(tokenizer)):
        made = _rendered(
            lambda: tokenizer.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            ),
            chat,
        )
        ids, learned = list(made["input_ids"]), list(made["assistant_masks"])
    else:
        ids = _ids(tokenizer, chat, len(messages), False)
        learned = [0] * len(ids)
        for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
            before = _ids(tokenizer, chat, turn, True) if turn else _prompt_before_any_turn(tokenizer, chat)
            after = _ids(tokenizer, chat, turn + 1, False) if turn + 1 < len(messages) else ids
            for part in (before, after):
                if ids[: len(part)] != part:
                    raise _not_a_prefix(tokenizer, chat, turn)
            learned[len(before) : len(after)] = [1] * (len(after) - len(before))
    return [token if is_learned else unlabelled(token) for token, is_learned in zip(ids, learned, strict=True)]


def _message(found: Any, where: str) -> _Message:
    if not isinstance(found, Mapping):
        raise UserError(f"{where} holds {type(found).__name__} {_short(found)}; expected messages of role and content")
    message = {key: value for key, value in found.items() if value is not None}  # readers fill in absent keys
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in _ROLES:
            raise UserError(f"{where} has a message from {speaker!r}; expected one of {', '.join(_ROLES)}")
        message = {"role": _ROLES[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        raise UserError(f"{where} has a message without a role: {_short(found)}; expected role and content, or from")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else content
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UserError(f"{where} has a message without text: {_short(found)}; expected content (or value) to be text")
    return {**message, "content": content}


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    return str(template.get("default", "")) if isinstance(template, dict) else str(template)


def _ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, turns: int, prompts: bool) -> list[int]:
    """Tokens of the first turns; ``prompts`` adds those that an answer starts after."""
    made = _rendered(
        lambda: tokenizer.apply_chat_template(
            chat.messages[:turns], tokenize=True, return_dict=True, add_generation_prompt=prompts
        ),
        chat,
    )
    return list(made["input_ids"])


def _prompt_before_any_turn(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """Return the prompt of a chat that the assistant opens; templates need not render a chat without messages."""
    without, with_prompt = (_ids(tokenizer, chat, 1, prompts) for prompts in (False, True))
    prompt = with_prompt[len(without) :]
    for end in range(len(prompt), len(without) + 1):
        if without[end - len(prompt) : end] == prompt:
            return without[:end]
    raise _not_a_prefix(tokenizer, chat, 0)


def _rendered(render: Callable[[], Any], chat: Chat) -> Any:
    try:
        return render()
    except Exception as error:  # templates raise whatever they like
        reason = first_line(error)
        raise UserError(f"the tokenizer's chat template refuses the chat {_short(chat.content)}: {reason}") from None


def _not_a_prefix(tokenizer: PreTrainedTokenizerBase, chat: Chat, turn: int) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.name_or_path} writes the turns around turn {turn} of the chat "
        f"{_short(chat.content)} differently when others follow, so that the assistant's tokens cannot be told: mark "
        "them with {% generation %} ... {% endgeneration %} in the template, or give data.prompt_key and "
        "data.response_key"
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
