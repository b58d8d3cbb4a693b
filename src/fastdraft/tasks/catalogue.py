"""The evaluation tasks: the four that ship with the package, by name, and any JSONL file of the user's.

Decides what a task is (named prompts, asked bare or inside the chat template), that code and text prompts are bare
while instructions and summaries go through the template as in the FastDraft paper, and that a smaller number of prompts
is an even spread over the file, not its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastdraft.recipe.base import Config, names_a_device
from fastdraft.recipe.run import SHIPPED, resolve_path
from fastdraft.run_folder import file_sha256
from fastdraft.tasks.files import TaskPrompt, read_prompts

NAME_CHARS = 100
"""Most characters of a task's name, which is part of names of files."""
CHAT_BY_NAME = {"code": False, "summarization": True, "text": False, "instructions": True}


class _Task(Config):
    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=NAME_CHARS)
    """How results call the task; the default is its kind, for files the file's name."""
    prompts: int = Field(default=100, ge=1)
    """At most this many prompts, spread evenly over the file."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Length at which an answer is cut."""


class ShippedTask(_Task):
    """A task that ships with the package."""

    kind: Literal["code", "summarization", "text", "instructions"]
    """code: HumanEval headers; summarization: public-domain prose; text: openings from books; instructions: held-out instructions."""

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, value: Any) -> Any:
        return (
            {**value, "name": value.get("name") or value.get("kind", "")}
            if isinstance(value, dict)
            else value
        )

    @property
    def chat(self) -> bool:
        return CHAT_BY_NAME[self.kind]

    @property
    def path(self) -> str:
        return f"{SHIPPED}tasks/{self.kind}.jsonl"


class FileTask(_Task):
    """Prompts of the user's own."""

    kind: Literal["file"]
    """A JSONL file."""
    path: str = Field(min_length=1)
    """JSONL with `prompt` (text) or `messages` (a conversation) and, if wanted, `id` and `reference` in each line. Of a conversation every
    turn is a prompt, with the target's own greedy answers before it."""
    chat: bool = False
    """Puts each text into the target's chat template as a user message; conversations always go through it, if there is one."""

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.get("name") and isinstance(value.get("path"), str):
            stem = "".join(
                c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in Path(value["path"]).stem
            ).lstrip("._-")
            return {**value, "name": stem[:NAME_CHARS] or "file"}
        return value


TaskConfig = Annotated[ShippedTask | FileTask, Field(discriminator="kind")]
"""One entry of `evaluate.tasks`, told apart by `kind`."""


def refuse_equal_names(tasks: Sequence[ShippedTask | FileTask]) -> None:
    """Raises:
    ValueError: for two tasks of one name, capitals aside, or a name that Windows keeps for a device: each names files.
    """
    seen: set[str] = set()
    for task in tasks:
        if task.name.casefold() in seen:
            raise ValueError(
                f"two tasks are called '{task.name}' (capitals aside); give one a name of its own"
            )
        if names_a_device(task.name):
            raise ValueError(
                f"a task cannot be called '{task.name}', which Windows keeps for a device; give it another name"
            )
        seen.add(task.name.casefold())


@dataclass(frozen=True)
class Task:
    """Prompts under one name."""

    name: str
    prompts: list[TaskPrompt]
    chat: bool
    """Whether each prompt is a user message of the chat template (when the tokenizer has one) or bare text."""


def load_task(config: ShippedTask | FileTask) -> Task:
    """Reads a task's prompts.

    Raises:
        DataError: when the file is missing, empty or damaged, naming the line.
    """
    everything = read_prompts(resolve_path(config.path, f"task '{config.name}'"))
    count = min(config.prompts, len(everything))
    return Task(config.name, [everything[i * len(everything) // count] for i in range(count)], config.chat)


def describe_task(config: ShippedTask | FileTask) -> dict[str, Any]:
    """What results depend on, for fingerprints: the settings and the content of the file.

    Raises:
        DataError: when the file is missing.
    """
    path = resolve_path(config.path, f"task '{config.name}'")
    if not path.is_file():
        read_prompts(path)
    return {**config.model_dump(), "sha256": file_sha256(path)}
