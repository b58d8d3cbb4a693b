"""What a user and a system say in a conversation: all that the target needs to write its own side of it.

Decides which shapes of `messages` are understood (OpenAI's role and content, ShareGPT's from and value), that logged answers are
passed over, since the target gives its own at every turn, that tools, pictures and late system messages cannot be asked, and that
half of a surrogate pair, which no tokenizer takes, is read as U+FFFD.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdraft.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_RULE = "each message needs a `role` and a `content`"
_REMEDY = "mend or delete the line"


@dataclass(frozen=True)
class Conversation:
    """What is said to the target; its own answers are not part of it."""

    users: tuple[str, ...]
    """The user's words, turn by turn; empty where the log has none."""
    system: str = ""

    @property
    def text(self) -> str:
        """Everything said, one paragraph each."""
        return "\n\n".join(part for part in (self.system, *self.users) if part)


Prompt = str | Conversation
"""Text as it stands, or a conversation."""


_HALF = re.compile("[\ud800-\udfff]")


def whole_characters(value: Any) -> Any:
    """A JSON value whose texts hold whole characters only: JSON may write half of a surrogate pair, as in "\\ud83d"."""
    if isinstance(value, str):
        return value if value.isascii() else _HALF.sub("\ufffd", value)
    if isinstance(value, list):
        return [whole_characters(item) for item in value]
    return (
        {name: whole_characters(item) for name, item in value.items()} if isinstance(value, dict) else value
    )


def read_conversation(value: object, where: str) -> Conversation | None:
    """The conversation in a row's `messages`.

    Messages of the user that follow each other are one turn; what the assistant says before the first one is left out.

    Args:
        value: The list as it was logged.
        where: The file and line, for errors.

    Returns:
        None for what cannot be asked again: tool calls, other things than text, a system message after the beginning, other roles.

    Raises:
        DataError: when this is no list of messages.
    """
    if not isinstance(value, list):
        raise DataError(
            where,
            f"a {type(value).__name__}",
            "must be text or a list of messages",
            "set `field` to the one that holds them",
        )
    system: list[str] = []
    users: list[str] = []
    joined = False
    for message in value:
        role, content = _message(message, where)
        if content is None or role not in ROLES or (ROLES[role] == "system" and users):
            return None
        if ROLES[role] == "system":
            system.append(content)
        elif ROLES[role] == "assistant":
            joined = False
        elif content.strip():
            users[-1:] = [f"{users[-1]}\n\n{content}"] if joined else [*users[-1:], content]
            joined = True
    return Conversation(tuple(users), "\n\n".join(part for part in system if part.strip()))


def _message(message: object, where: str) -> tuple[str, str | None]:
    """Role and text; no text for what is more than text."""
    if not isinstance(message, Mapping):
        raise DataError(where, "a message that is no object", _RULE, _REMEDY)
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        raise DataError(where, "a message without a role", _RULE, _REMEDY)
    if message.get("tool_calls") or message.get("function_call"):
        return role, None
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        return role, "".join(text for text in texts if isinstance(text, str)) if all(
            isinstance(text, str) for text in texts
        ) else None
    if content is None and ROLES.get(role) == "assistant":
        return role, ""
    if not isinstance(content, str):
        raise DataError(where, f"a message of '{role[:20]}' without text", _RULE, _REMEDY)
    return role, content
