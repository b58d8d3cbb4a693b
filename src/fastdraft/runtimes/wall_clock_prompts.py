"""The prompts that a benchmark measures on: the tasks' own, mixed, or brought to a length.

Decides that a prompt is measured only where it, its answer and one round beyond fit the context; that sweeps of one factor
run on a mixture of the tasks, one prompt of each in turn; that of a conversation the first turn is measured; and how a prompt
is made longer without changing its end: other texts of its task are put in front of it, behind whatever every prompt of the
task begins with (a BOS id, a chat template).
What is left out is told in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fastdraft.data.chat import first_prompt_ids
from fastdraft.errors import DataError
from fastdraft.recipe.evaluation import TaskConfig
from fastdraft.evaluation.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIXED = "mixed"


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are measured together."""

    task: str
    """The task's name, or `mixed`."""
    names: list[str]
    prompt_ids: list[list[int]]
    max_new_tokens: int
    left_out: list[str] = field(default_factory=list)
    """What was left out and why, in words."""


@dataclass(frozen=True)
class EncodedTask:
    """A task's prompts as token ids, and its texts to make prompts longer with."""

    name: str
    names: list[str]
    prompt_ids: list[list[int]]
    texts: list[list[int]]
    """Prompt and reference of each, without special tokens."""
    max_new_tokens: int
    later_turns: int = 0
    """Of its conversations: they need the target's own answers before them, and are not measured."""

    @property
    def begin(self) -> int:
        """Ids with which every prompt begins; of a single prompt nothing can be told but the first."""
        if len(self.prompt_ids) == 1:
            return 1
        first, *others = self.prompt_ids
        return next(
            (
                place
                for place, token in enumerate(first)
                if any(ids[place : place + 1] != [token] for ids in others)
            ),
            len(first),
        )


def encode(task: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> EncodedTask:
    """A task as token ids, of a conversation its first turn; prompts without any are left out.

    Raises:
        DataError: when the task's file is missing or damaged, or no prompt has a token.
    """
    loaded = load_task(task)
    encoded = [(prompt, first_prompt_ids(tokenizer, prompt.prompt, loaded.chat)) for prompt in loaded.prompts]
    encoded = [(prompt, ids) for prompt, ids in encoded if ids]
    if not encoded:
        raise DataError(
            f"task '{task.name}'", "no prompt has a token", "a task needs at least one", "use another task"
        )
    texts = [
        [
            int(token)
            for token in tokenizer(
                f"{prompt.everything}\n\n", add_special_tokens=False, verbose=False
            ).input_ids
        ]
        for prompt, _ in encoded
    ]
    later = sum(len(prompt.conversation.users) - 1 for prompt, _ in encoded if prompt.conversation)
    return EncodedTask(
        task.name,
        [prompt.id for prompt, _ in encoded],
        [ids for _, ids in encoded],
        texts,
        task.max_new_tokens,
        later,
    )


def task_prompts(task: EncodedTask, count: int, room: int) -> PromptSet:
    """The first `count` prompts of a task that fit.

    Args:
        task: Encoded.
        count: Most prompts.
        room: Positions for a prompt and its answer.

    Raises:
        DataError: when none fits.
    """
    fitting = [
        (name, ids)
        for name, ids in zip(task.names, task.prompt_ids, strict=True)
        if len(ids) + task.max_new_tokens <= room
    ]
    if not fitting:
        rule = f"prompt and {task.max_new_tokens} new tokens must fit {room} positions (the context less one round)"
        raise DataError(
            f"task '{task.name}'",
            f"none of {len(task.names)} prompts fits",
            rule,
            "shorten the prompts or lower max_new_tokens",
        )
    short = len(task.names) - len(fitting)
    left_out = (
        [f"{task.name}: {short} of {len(task.names)} prompts are too long for the context"]
        if short and len(fitting) < count
        else []
    )
    if task.later_turns:
        left_out.append(
            f"{task.name}: {task.later_turns} later turns of conversations; first turns are measured"
        )
    chosen = fitting[:count]
    return PromptSet(
        task.name, [name for name, _ in chosen], [ids for _, ids in chosen], task.max_new_tokens, left_out
    )


def mixed_prompts(tasks: Sequence[EncodedTask], count: int, max_new_tokens: int, room: int) -> PromptSet:
    """One prompt of each task in turn until there are `count`; when the tasks have fewer that fit, they come again.

    Returns:
        Empty of prompts when none fits, with the reason in `left_out`.
    """
    fitting = [
        (f"{task.name}/{task.names[index]}", task.prompt_ids[index])
        for index in range(max(len(task.names) for task in tasks))
        for task in tasks
        if index < len(task.names) and len(task.prompt_ids[index]) + max_new_tokens <= room
    ]
    label = tasks[0].name if len(tasks) == 1 else MIXED
    if not fitting:
        return PromptSet(
            label,
            [],
            [],
            max_new_tokens,
            [f"{max_new_tokens} new tokens: no prompt leaves room for them in the context"],
        )
    chosen = [fitting[index % len(fitting)] for index in range(count)]
    return PromptSet(label, [name for name, _ in chosen], [ids for _, ids in chosen], max_new_tokens)


def prompts_of_length(
    tasks: Sequence[EncodedTask], count: int, tokens: int, max_new_tokens: int, room: int
) -> PromptSet:
    """Prompts of exactly `tokens` tokens, from each task in turn; those that are longer by themselves are left out.

    Returns:
        Empty of prompts when the length does not fit, with the reason in `left_out`.
    """
    label = tasks[0].name if len(tasks) == 1 else MIXED
    if tokens + max_new_tokens > room:
        return PromptSet(
            label,
            [],
            [],
            max_new_tokens,
            [f"prompts of {tokens} tokens: they do not fit the context with their answers"],
        )
    per_task = -(-count // len(tasks))
    longer = [_lengthened(task, per_task, tokens) for task in tasks]
    left_out = [
        f"prompts of {tokens} tokens: all {len(task.names)} of {task.name} are longer"
        for task, found in zip(tasks, longer, strict=True)
        if not found
    ]
    chosen = [found[index] for index in range(per_task) for found in longer if index < len(found)][:count]
    return PromptSet(
        label, [name for name, _ in chosen], [ids for _, ids in chosen], max_new_tokens, left_out
    )


def repeated(prompts: PromptSet, count: int) -> PromptSet:
    """The same prompts again and again until there are `count`."""
    places = [index % len(prompts.names) for index in range(count)]
    return replace(
        prompts, names=[prompts.names[i] for i in places], prompt_ids=[prompts.prompt_ids[i] for i in places]
    )


def _lengthened(task: EncodedTask, count: int, tokens: int) -> list[tuple[str, list[int]]]:
    """The first `count` prompts of a task that are no longer than `tokens`, each brought to that length."""
    found: list[tuple[str, list[int]]] = []
    for index, ids in enumerate(task.prompt_ids):
        if len(ids) <= tokens and len(found) < count:
            begin = min(task.begin, len(ids) - 1)
            found.append(
                (
                    f"{task.name}/{task.names[index]}",
                    ids[:begin] + _filling(task, index, tokens - len(ids)) + ids[begin:],
                )
            )
    return found


def _filling(task: EncodedTask, index: int, count: int) -> list[int]:
    """The last `count` tokens of the task's other texts one after the other, of its own where it has no other."""
    others = [*task.texts[index + 1 :], *task.texts[:index]] or [task.texts[index]]
    filling: list[int] = []
    while len(filling) < count:
        filling = [token for text in others for token in text] + filling
    return filling[len(filling) - count :]
