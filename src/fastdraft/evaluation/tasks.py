"""Evaluation tasks: prompts under one name, of the package or from a JSONL file of the user's.

task = load_task(FileTask(kind="file", path="questions.jsonl")); task.prompts[0].text
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdraft.data.chat import Conversation, Prompt, read_conversation
from fastdraft.data.readers import read_jsonl
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
    prompts: dict[str, TaskPrompt] = {}
    for number, row in read_jsonl(path):
        prompt = _prompt(f"{path}: line {number}", str(row.get("id", number)), row)
        if prompt.id in prompts:
            raise DataError(f"{path}: id {prompt.id!r} twice; ids must be unique within a task", "rename one")
        prompts[prompt.id] = prompt
    if not prompts:
        raise DataError(
            f"{path}: no prompt; a task needs at least one", 'add lines such as {"prompt": "..."}'
        )
    return list(prompts.values())


def _prompt(where: str, name: str, row: Mapping[str, Any]) -> TaskPrompt:
    reference = row["reference"] if isinstance(row.get("reference"), str) else ""
    found, rule = "", "each line needs a non-empty string there"
    if "messages" in row:
        talk = read_conversation(row["messages"], where)
        prompt = TaskPrompt(name, talk.users[0] if talk and talk.users else "", reference, talk)
        if not prompt.text:
            found = "nothing that a user says" if talk else "tools, pictures or a late system message"
            rule = "`messages` must be text between a user and an assistant"
    else:
        prompt = TaskPrompt(name, row["prompt"] if isinstance(row.get("prompt"), str) else "", reference)
        found = "" if prompt.text else "no text under 'prompt'"
    try:
        prompt.everything.encode()
    except UnicodeEncodeError:  # as JSON's "\\ud83d" alone, which no tokenizer takes
        found, rule = "half a character", "texts must be whole"
    if found:
        raise DataError(f"{where}: {found}; {rule}", "mend or delete the line")
    return prompt
