"""Task files: JSONL, one prompt or conversation a line.

Decides the format (`prompt` or `messages`, optionally `id` and `reference`), and that a damaged line stops the run with its number
instead of being skipped: an evaluation on part of a file is not comparable.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fastdraft.data.chat import Conversation, Prompt, read_conversation
from fastdraft.errors import DataError


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt as text, or a conversation."""

    id: str
    text: str
    """Of a conversation what the user says first."""
    reference: str = ""
    """A human's or another model's answer, for the reader; no metric uses it."""
    conversation: Conversation | None = None

    @property
    def prompt(self) -> Prompt:
        """The conversation, or the text."""
        return self.conversation or self.text

    @property
    def everything(self) -> str:
        """All words, for searches."""
        return f"{self.conversation.text if self.conversation else self.text}{self.reference}"


def read_prompts(path: Path) -> list[TaskPrompt]:
    """All prompts of a JSONL file in order; blank lines are passed over, a missing `id` is the line number.

    Raises:
        DataError: when the file is missing, not UTF-8, has no prompt, a bad line, or the same id twice.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(
            path,
            error.strerror or "unreadable",
            "the task file must exist and be readable",
            "correct the path",
        ) from None
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise DataError(path, "no prompt", "a task needs at least one", 'add lines such as {"prompt": "..."}')
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(path, f"id {prompt.id!r} twice", "ids must be unique within a task", "rename one")
        seen.add(prompt.id)
    return prompts


def _prompt(path: Path, number: int, line: bytes) -> TaskPrompt:
    where = f"{path} line {number}"
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            where,
            f"not JSON ({error})",
            "each line must be one JSON object in UTF-8",
            "mend or delete the line",
        ) from None
    if isinstance(row, dict) and "messages" in row:
        return _conversation(str(row.get("id", number)), row, where)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise DataError(
            where,
            "no text under 'prompt'",
            "each line needs a non-empty string under 'prompt'",
            "add it or delete the line",
        )
    reference = row.get("reference")
    return TaskPrompt(
        str(row.get("id", number)), row["prompt"], reference if isinstance(reference, str) else ""
    )


def _conversation(name: str, row: dict[str, object], where: str) -> TaskPrompt:
    talk = read_conversation(row["messages"], where)
    if talk is None or not talk.users:
        found = "nothing that a user says" if talk else "tools, pictures or a late system message"
        raise DataError(
            where, found, "`messages` must be text between a user and an assistant", "mend or delete the line"
        )
    reference = row.get("reference")
    return TaskPrompt(name, talk.users[0], reference if isinstance(reference, str) else "", talk)
