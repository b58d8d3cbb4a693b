"""An evaluation task's prompts as token ids: those that fit the context, and a prompt for every turn of its conversations.

task = encode_task(config, tokenizer, context_length, console)
task = add_turns(task, write_turns(task, tokenizer, engine, room, seed), console)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.console import Console
from fastdraft.data.chat import Conversation, dialogue_format, prompt_ids
from fastdraft.decoding.conversations import take_turns
from fastdraft.errors import DataError, TargetError
from fastdraft.evaluation.tasks import load_task
from fastdraft.functional.generation import Engine, Generation, RenderedPrompt, Sampling
from fastdraft.recipe.evaluation import FileTask, ShippedTask
from fastdraft.run_folder import digest

_SHORTEN = "shorten the prompts or lower max_new_tokens"


@dataclass(frozen=True)
class EncodedTask:
    """A task's prompts as token ids."""

    name: str
    prompt_names: list[str]
    prompt_ids: list[list[int]]
    max_new_tokens: int
    num_skipped: int = 0
    """Prompts left out because they do not fit the context."""
    conversations: list[tuple[str, Conversation]] = field(default_factory=list)
    """Name and words of those whose turns are still to be made prompts, by `add_turns`."""
    groups: list[int] = field(default_factory=list)
    """One number for each prompt, equal for turns of one conversation; empty where there is no conversation."""


def derive_seed(*parts: object) -> int:
    """A seed that follows from its parts alone, so that the order of work does not matter."""
    return int(digest(list(parts)), 16) % 2**31


def encode_task(
    config: ShippedTask | FileTask, tokenizer: PreTrainedTokenizerBase, context_length: int, console: Console
) -> EncodedTask:
    """A task's prompts that fit the context together with a whole answer; those left out are told."""
    task = load_task(config)
    talks = [(prompt.id, prompt.conversation) for prompt in task.prompts if prompt.conversation]
    encoded = [
        (prompt.id, prompt_ids(tokenizer, prompt.text, task.chat))
        for prompt in task.prompts
        if not prompt.conversation
    ]
    room = context_length - config.max_new_tokens
    fitting = [(name, ids) for name, ids in encoded if 0 < len(ids) <= room]
    if not fitting and not talks:
        raise DataError(
            f"task '{task.name}': none of {len(encoded)} prompts has 1 to {room} tokens; a prompt and "
            f"{config.max_new_tokens} new tokens must fit the context of {context_length}",
            _SHORTEN,
        )
    skipped = len(encoded) - len(fitting)
    if skipped:
        console.warn(
            f"{task.name}: {skipped} of {len(encoded)} prompts skipped: empty or longer than the context of "
            f"{context_length} less {config.max_new_tokens} new tokens"
        )
    names, ids = [name for name, _ in fitting], [ids for _, ids in fitting]
    return EncodedTask(task.name, names, ids, config.max_new_tokens, skipped, talks)


def write_turns(
    task: EncodedTask, tokenizer: PreTrainedTokenizerBase, engine: Callable[[], Engine], room: int, seed: int
) -> dict[str, Any]:
    """The prompts of every turn of a task's conversations, as JSON for `add_turns`.

    The target's own earlier answers stand in them, greedy whatever the temperatures: so every temperature, every draft and
    every real run reads the same prompts.
    """
    talks = [talk for _, talk in task.conversations]
    form = dialogue_format(tokenizer, talks)

    def ask(number: int, prompts: list[list[int]]) -> list[Generation]:
        seed_of_turn = derive_seed(seed, task.name, "turn", number)
        written = engine().generate(prompts, Sampling(0.0), task.max_new_tokens, seed_of_turn)
        refuse_faults(task.name, written)  # else what a server left out once would be left out for good
        return written

    found = take_turns(form, talks, ask, room=room, last_answers=False)
    turns = []
    for turn in sorted(found.turns, key=lambda turn: (turn.conversation, turn.number)):
        name, ids = task.conversations[turn.conversation][0], turn.prompt_ids
        name = f"{name}#{turn.number + 1}" if turn.number else name
        messages = ids.messages if isinstance(ids, RenderedPrompt) else None  # for servers that want them
        turns.append(
            {"conversation": turn.conversation, "name": name, "prompt_ids": ids, "messages": messages}
        )
    return {"turns": turns, "too_long": found.too_long, "ended": found.ended, "note": form.note}


def add_turns(task: EncodedTask, kept: dict[str, Any], console: Console) -> EncodedTask:
    """The task with a prompt for every turn behind its other prompts; those left out are told."""
    turns, too_long, ended = kept["turns"], kept["too_long"], kept["ended"]
    if not turns and not task.prompt_ids:
        raise DataError(
            f"task '{task.name}': none of {too_long} turns fits; a turn's prompt and {task.max_new_tokens} new tokens "
            "must fit the context",
            _SHORTEN,
        )
    if kept["note"]:
        console.say(f"{task.name}: {kept['note']}")
    if too_long or ended:
        console.warn(
            f"{task.name}: {too_long + ended} of {too_long + ended + len(turns)} turns left out: {too_long} do not "
            f"fit the context, {ended} stand behind an answer that is empty, loops or is still thinking"
        )
    single = len(task.prompt_ids)
    ids = [
        RenderedPrompt(turn["prompt_ids"], turn["messages"]) if turn["messages"] else turn["prompt_ids"]
        for turn in turns
    ]
    return replace(
        task,
        groups=[*range(single), *(single + turn["conversation"] for turn in turns)],
        prompt_names=[*task.prompt_names, *(turn["name"] for turn in turns)],
        prompt_ids=[*task.prompt_ids, *ids],
        num_skipped=task.num_skipped + too_long + ended,
    )


def refuse_faults(task: str, written: list[Generation]) -> None:
    """Raises TargetError when a served target's answers to a task are not whole."""
    faults = [generation.fault for generation in written if generation.fault]
    if faults:
        raise TargetError(
            f"task '{task}': {len(faults)} of {len(written)} answers: {faults[0]}; every prompt needs the target's own tokens",
            "use a server that gives token ids (vLLM, llama.cpp, SGLang), or evaluate.texts with kind synthesize",
        )
