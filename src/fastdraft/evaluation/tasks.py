"""Evaluation tasks: prompts under one name, of the package or from a JSONL file of the user's.

task = load_task(FileTask(kind="file", path="questions.jsonl")); task.prompts[0].text
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.data.chat import Conversation, Prompt, read_conversation
from fastdraft.errors import DataError
from fastdraft.recipe.evaluation import FileTask, ShippedTask
from fastdraft.recipe.run import resolve_path
from fastdraft.run_folder import file_sha256


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


@dataclass(frozen=True)
class Task:
    """Prompts under one name."""

    name: str
    prompts: list[TaskPrompt]
    chat: bool
    """Whether each prompt is a user message of the chat template (when the tokenizer has one) or bare text."""


def load_task(config: ShippedTask | FileTask) -> Task:
    """Reads a task's prompts; a smaller number of them is an even spread over the file, not its beginning."""
    everything = read_prompts(resolve_path(config.path, f"task '{config.name}'"))
    count = min(config.prompts, len(everything))
    return Task(config.name, [everything[i * len(everything) // count] for i in range(count)], config.chat)


def describe_task(config: ShippedTask | FileTask) -> dict[str, Any]:
    """What results depend on, for fingerprints: the settings and the content of the file."""
    path = resolve_path(config.path, f"task '{config.name}'")
    if not path.is_file():
        raise DataError(f"{path}: no such file; the task file must exist", "correct the path")
    return {**config.model_dump(), "sha256": file_sha256(path)}


def read_prompts(path: Path) -> list[TaskPrompt]:
    """All prompts of a JSONL file in order; blank lines are passed over, a missing `id` is the line number.

    A bad line stops the run with its number: an evaluation on part of a file could not be compared.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; the task file must exist and be readable", "correct the path"
        ) from None
    prompts: dict[str, TaskPrompt] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _prompt(f"{path}: line {number}", number, line)
        if prompt.id in prompts:
            raise DataError(f"{path}: id {prompt.id!r} twice; ids must be unique within a task", "rename one")
        prompts[prompt.id] = prompt
    if not prompts:
        raise DataError(
            f"{path}: no prompt; a task needs at least one", 'add lines such as {"prompt": "..."}'
        )
    return list(prompts.values())


def _prompt(where: str, number: int, line: bytes) -> TaskPrompt:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(
            row, ensure_ascii=False
        ).encode()  # refuses half a character, as in "\\ud83d", which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: not JSON ({error}); each line must be one JSON object in UTF-8",
            "mend or delete the line",
        ) from None
    talk = None
    if isinstance(row, dict) and "messages" in row:
        talk = read_conversation(row["messages"], where)
        if talk is None or not talk.users:
            found = "nothing that a user says" if talk else "tools, pictures or a late system message"
            raise DataError(
                f"{where}: {found}; `messages` must be text between a user and an assistant",
                "mend or delete the line",
            )
    elif not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise DataError(
            f"{where}: no text under 'prompt'; each line needs a non-empty string there",
            "add it or delete the line",
        )
    reference = row.get("reference")
    return TaskPrompt(
        str(row.get("id", number)),
        talk.users[0] if talk else row["prompt"],
        reference if isinstance(reference, str) else "",
        talk,
    )
