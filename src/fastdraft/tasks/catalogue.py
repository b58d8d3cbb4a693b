"""The evaluation tasks: the four that ship with the package, by name, and any JSONL file of the user's.

Decides what a task is (named prompts, asked bare or inside the chat template), that code and text prompts are bare
while instructions and summaries go through the template as in the FastDraft paper, and that a smaller number of prompts
is an even spread over the file, not its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdraft.recipe.evaluation import FileTask, ShippedTask
from fastdraft.recipe.run import resolve_path
from fastdraft.run_folder import file_sha256
from fastdraft.tasks.files import TaskPrompt, read_prompts


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
