"""Evaluation tasks: named prompts of the package or of the user's JSONL files, as text and as token ids.

task = load_task(FileTask(kind="file", path="questions.jsonl")); task.prompts[0].text
task = encode_task(config, chat, context_length, console); task.prompt_ids
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastdraft.console import Console
from fastdraft.data.chat import ChatTemplate, Conversation, Prompt
from fastdraft.data.prompts import FIELDS, RowReader, tell_counts
from fastdraft.data.readers import numbered_rows
from fastdraft.decoding.conversations import take_turns
from fastdraft.errors import DataError, TargetError
from fastdraft.functional.generation import Engine, Generation, RenderedPrompt, Sampling
from fastdraft.recipe.evaluation import FileTask, ShippedTask
from fastdraft.recipe.run import resolve_path
from fastdraft.run_folder import digest, file_sha256


@dataclass(frozen=True)
class TaskPrompt:
    """One prompt as text, or a conversation."""

    id: str
    text: str  # of a conversation what the user says first
    reference: str = ""  # somebody's answer, for the reader; no metric uses it
    conversation: Conversation | None = None

    @property
    def prompt(self) -> Prompt:
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
    chat: bool  # whether a text becomes a user message of the chat template, if there is one
    note: str = ""  # which fields of its rows were read and which not


@dataclass(frozen=True)
class EncodedTask:
    """A task's prompts as token ids."""

    name: str
    prompt_names: list[str]
    prompt_ids: list[list[int]]
    max_new_tokens: int
    skipped: dict[str, int] = field(default_factory=dict)  # prompts that are not asked, by reason
    conversations: list[tuple[str, Conversation]] = field(default_factory=list)  # by name, for `add_turns`
    groups: list[int] = field(default_factory=list)  # of each prompt, equal for turns of one conversation

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())


def load_task(config: ShippedTask | FileTask) -> Task:
    """Reads a task's prompts; a smaller number of them is an even spread over the file, not its beginning.

    A bad line stops the run with its number: an evaluation on part of a file could not be compared.
    """
    path = resolve_path(config.path, f"task '{config.name}'")
    found, reader = dict[str, TaskPrompt](), RowReader(["messages", *FIELDS])
    for number, where, row in numbered_rows(path):
        prompt = _read_prompt(where, str(row.get("id", number)), row, reader)
        if prompt.id in found:
            raise DataError(f"{path}: id {prompt.id!r} twice; ids must be unique within a task", "rename one")
        found[prompt.id] = prompt
    if not found:
        raise DataError(f"{path}: no prompt; a task needs at least one", 'add lines like {"prompt": "..."}')
    prompts, count = list(found.values()), min(config.prompts, len(found))
    chosen = [prompts[i * len(prompts) // count] for i in range(count)]
    return Task(config.name, chosen, config.chat, reader.note(known=("id", "reference")))


def _read_prompt(where: str, name: str, row: Mapping[str, Any], reader: RowReader) -> TaskPrompt:
    reference = row["reference"] if isinstance(row.get("reference"), str) else ""
    said, why = reader.prompt(row, where)
    if isinstance(said, str):
        prompt, found = TaskPrompt(name, said, reference), "an empty prompt"
    else:
        prompt = TaskPrompt(name, said.users[0] if said.users else "", reference, said)
        found = "nothing that a user says"
    try:
        prompt.everything.encode()
    except UnicodeEncodeError:  # as JSON's "\\ud83d" alone, which no tokenizer takes
        raise DataError(f"{where}: half a character; texts must be whole", "mend the line") from None
    if not prompt.text:
        rule = "must be a text, or messages of text between a user and an assistant"
        raise DataError(f"{where}: {why or found}; {rule}", "mend or delete the line")
    return prompt


def describe_task(config: ShippedTask | FileTask) -> dict[str, Any]:
    """What results depend on, for fingerprints: the settings and the content of the file."""
    path = resolve_path(config.path, f"task '{config.name}'")
    if not path.is_file():
        raise DataError(f"{path}: no such file; the task file must exist", "correct the path")
    return {**config.model_dump(), "sha256": file_sha256(path)}


def derive_seed(*parts: object) -> int:
    """A seed that follows from its parts alone, so that the order of work does not matter."""
    return int(digest(list(parts)), 16) % 2**31


def encode_task(
    config: ShippedTask | FileTask, chat: ChatTemplate, context_length: int, console: Console
) -> EncodedTask:
    """A task's prompts that fit the context together with a whole answer; those left out are told."""
    task, new = load_task(config), config.max_new_tokens
    talks = [(prompt.id, prompt.conversation) for prompt in task.prompts if prompt.conversation]
    texts = [prompt for prompt in task.prompts if not prompt.conversation]
    encoded = {prompt.id: chat.prompt_ids(prompt.text, chat=task.chat) for prompt in texts}
    fitting = {name: ids for name, ids in encoded.items() if 0 < len(ids) <= context_length - new}
    empty = sum(not ids for ids in encoded.values())
    skipped = {"empty": empty, "too_long": len(encoded) - len(fitting) - empty}
    if told := tell_counts(skipped):
        room = f"the context of {context_length} less {new} new tokens"
        console.warn(f"{task.name}: of {len(encoded)} prompts skipped: {told} (for {room})")
    if task.note:
        console.say(f"{task.name}: {task.note}")
    return EncodedTask(task.name, list(fitting), list(fitting.values()), new, skipped, talks)


def write_turns(
    task: EncodedTask, chat: ChatTemplate, engine: Callable[[], Engine], room: int, seed: int
) -> dict[str, Any]:
    """The prompts of every turn of a task's conversations, as JSON for `add_turns`.

    The target's own earlier answers stand in them, always greedy ones: all runs read the same prompts.
    """
    talks = [talk for _, talk in task.conversations]
    note = chat.note(talks)

    def ask(number: int, prompts: list[list[int]]) -> list[Generation]:
        seed_of_turn = derive_seed(seed, task.name, "turn", number)
        written = engine().generate(prompts, Sampling(0.0), task.max_new_tokens, seed_of_turn)
        refuse_faults(task.name, written)  # else what a server left out once would be left out for good
        return written

    found = take_turns(chat, talks, ask, room=room, last_answers=False)
    turns = []
    for turn in sorted(found.turns, key=lambda turn: (turn.conversation, turn.number)):
        name = task.conversations[turn.conversation][0] + (f"#{turn.number + 1}" if turn.number else "")
        told = {"conversation": turn.conversation, "name": name, "prompt_ids": turn.prompt_ids}
        # For servers that want them.
        told |= {key: getattr(turn.prompt_ids, key, None) for key in ("messages", "arguments")}
        turns.append(told)
    return {"turns": turns, "too_long": found.too_long, "ended": found.ended, "note": note}


def add_turns(task: EncodedTask, kept: dict[str, Any], console: Console) -> EncodedTask:
    """The task with a prompt for every turn behind its other prompts; those left out are told."""
    turns, too_long, ended = kept["turns"], kept["too_long"], kept["ended"]
    skipped, single = too_long + ended, len(task.prompt_ids)
    if kept["note"]:
        console.say(f"{task.name}: {kept['note']}")
    if skipped:
        why = f"{too_long} do not fit the context, {ended} follow an empty, looping or unfinished answer"
        console.warn(f"{task.name}: {skipped} of {skipped + len(turns)} turns left out: {why}")
    ids = [
        RenderedPrompt(t["prompt_ids"], t["messages"], t.get("arguments"))
        if t["messages"]
        else t["prompt_ids"]
        for t in turns
    ]
    return replace(
        task,
        groups=[*range(single), *(single + turn["conversation"] for turn in turns)],
        prompt_names=[*task.prompt_names, *(turn["name"] for turn in turns)],
        prompt_ids=[*task.prompt_ids, *ids],
        skipped={**task.skipped, "turn_too_long": too_long, "conversation_ended": ended},
    )


def refuse_faults(task: str, written: list[Generation]) -> None:
    """A served target's answers to a task must be whole."""
    faults = [generation.fault for generation in written if generation.fault]
    if faults:
        found = f"{len(faults)} of {len(written)} answers: {faults[0]}"
        raise TargetError(
            f"task '{task}': {found}; each needs the target's own tokens",
            "use a server that gives token ids (vLLM, llama.cpp, SGLang), or evaluate.texts=synthesize",
        )
