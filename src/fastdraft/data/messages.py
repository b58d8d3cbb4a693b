"""Messages of conversations in every shape that logs and data sets write them in, as roles and text.

`read_messages` reads a list of them, `message_text` what one of them says. Whoever reads a conversation
decides what of it is of use: the text of thinking, calls and pictures is never part of a message's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from fastdraft.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
Beyond = Literal["", "tools", "media", "refusal", "thinking", "no_text"]

_NAMES: dict[Role, str] = {
    "system": "system developer",
    "user": "user human prompter",
    "assistant": "assistant gpt model bot ai llm chatbot chatgpt bing bard claude gemini",
    "tool": "tool function observation ipython function_call function_response tool_call tool_response",
}
ROLES = {name: role for role, names in _NAMES.items() for name in names.split()}
_ROLE_KEYS, _TEXT_KEYS = ("role", "from", "speaker"), ("content", "value", "text")
# What a message holds beside its text. OpenAI's keys, vLLM's, SGLang's, OpenRouter's, LiteLLM's, Ollama's.
_KEYS: dict[str, Beyond] = dict.fromkeys(("tool_calls", "function_call"), "tools")
_KEYS |= dict.fromkeys(("images", "audio"), "media")
_KEYS["refusal"] = "refusal"
_KEYS |= dict.fromkeys(
    ("reasoning_content", "reasoning", "thinking", "reasoning_details", "thinking_blocks"), "thinking"
)
BESIDE_TEXT = tuple(_KEYS)
# Kinds of parts: OpenAI's, Anthropic's; every other is a picture, a sound or a file.
_PARTS: dict[str, Beyond] = dict.fromkeys(("text", "input_text", "output_text"), "")
_PARTS |= dict.fromkeys(("thinking", "redacted_thinking", "reasoning"), "thinking")
_PARTS["refusal"] = "refusal"
_PARTS |= dict.fromkeys(("tool_use", "tool_result", "server_tool_use", "function_call"), "tools")
_ORDER: tuple[Beyond, ...] = ("tools", "media", "refusal", "thinking")  # the first that holds is told


@dataclass(frozen=True)
class Message:
    """One message as it was written."""

    role: Role
    text: str  # empty for an assistant that said nothing (`no_text`)
    beyond: Beyond = ""  # why it is more than its text, or less
    name: str = ""  # one that nobody knows, taken as the assistant's

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        return {"role": self.role, "content": self.text}


def read_messages(value: object, where: str) -> list[Message] | str:
    """The messages of a conversation, or in a few words why they cannot be used: names that nobody knows.

    `value` is a list of {role, content}, {from, value} or {speaker, text}, or one such dict of lists. `where`
    names file and line in the error that a damaged message raises.
    """
    told = [_as_mapping(message, where) for message in _as_list(value, where)]
    names = [_first(message, _ROLE_KEYS) for message in told]
    if not all(isinstance(name, str) for name in names):
        raise _damaged(where, "a message without role")
    names = [name.strip().lower() for name in names]
    roles = _roles(names)
    if isinstance(roles, str):
        return roles
    messages = []
    for role, message, name in zip(roles, told, names, strict=True):
        text, beyond = message_text(message)
        if role == "tool":
            text, beyond = text or "", "tools"
        if text is None and (role != "assistant" or beyond == ""):
            raise _damaged(where, f"a message of the {role} without text")
        messages.append(Message(role, text or "", beyond, "" if name in ROLES else name))
    return messages


def message_text(message: Mapping[str, Any]) -> tuple[str | None, Beyond]:
    """What a message says and why that is not all of it; no text where its content is no text or parts."""
    content, found = _first(message, _TEXT_KEYS), {kind for key, kind in _KEYS.items() if message.get(key)}
    if isinstance(content, list):
        texts = []
        for part in ({"text": part} if isinstance(part, str) else part for part in content):
            kind = (
                _PARTS.get(str(part.get("type") or "text"), "media") if isinstance(part, Mapping) else "media"
            )
            if kind == "" and isinstance(part.get("text"), str):
                texts.append(part["text"])
            else:
                found.add(kind or "media")
        content = "".join(texts)
    beyond: Beyond = next((kind for kind in _ORDER if kind in found), "")
    if content is None:
        return None, beyond or "no_text"
    return (content, beyond) if isinstance(content, str) else (None, beyond)


def from_json(value: Any) -> Any:
    """A text that is a JSON list of messages, as columns of text hold them, as that list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        shapes = ({"role", "content"}, {"from", "value"})
        messages = [isinstance(m, dict) and any(shape <= m.keys() for shape in shapes) for m in found]
        return found if messages and all(messages) else value
    return value


def _roles(names: Sequence[str]) -> list[Role] | str:
    """Each message's role. A name that is not in the table is the assistant's, where all answers bear it."""
    roles = [ROLES.get(name, "") for name in names]
    unknown = {name for name, role in zip(names, roles, strict=True) if not role}
    around = [(roles[i - 1] if i else "", *roles[i + 1 : i + 2]) for i, role in enumerate(roles) if not role]
    alternates = all(set(neighbours) == {"user"} for neighbours in around)
    if unknown and (len(unknown) > 1 or "assistant" in roles or not alternates):
        return f"role {' and '.join(repr(name[:40]) for name in sorted(unknown)[:3])}"
    return [cast(Role, role or "assistant") for role in roles]


def _as_list(value: object, where: str) -> Sequence[object]:
    """A dict of lists, as `datasets` gives a sequence of structs, as a list of dicts."""
    if isinstance(value, Mapping):
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        if columns and len(set(map(len, columns.values()))) == 1:
            return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, list):
        return value
    found = f"{where}: a {type(value).__name__}; must be text or a list of messages"
    raise DataError(found, "set `field` to the one that holds them")


def _as_mapping(message: object, where: str) -> Mapping[str, Any]:
    if isinstance(message, Mapping):
        return message
    raise _damaged(where, f"a {type(message).__name__} instead of a message")


def _first(message: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What stands under the first of the keys: Arrow writes rows of two shapes with nulls for the other's."""
    return next((message[key] for key in keys if message.get(key) is not None), None)


def _damaged(where: str, found: str) -> DataError:
    return DataError(f"{where}: {found}; each needs a `role` and a `content`", "correct or delete the line")
