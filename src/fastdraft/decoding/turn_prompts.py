"""Prompts of the later turns of an evaluation's conversations, with the target's own earlier answers in them.

Decides that these earlier answers are greedy, whatever the temperatures: so every temperature, every draft and every real run reads the
same prompts, and their figures can be compared; and that a task's prompts are kept in `conversations/TASK.json` as soon as they
are written, so that a resumed run reads the very same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.console import Console
from fastdraft.data.chat import dialogue_format
from fastdraft.decoding.conversations import take_turns
from fastdraft.decoding.evaluation import derive_seed
from fastdraft.decoding.workbench import EncodedTask, Plan, refuse_faults
from fastdraft.errors import DataError, FastDraftError
from fastdraft.functional.generation import Engine, Generation, RenderedPrompt, Sampling
from fastdraft.run_folder import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MakeEngine = Callable[[Callable[[int], None]], Engine]
"""Makes an engine, given what it is to call after each batch with the number of answers."""


def opened_once(make_engine: MakeEngine) -> MakeEngine:
    """The same engine for whoever asks, since opening one may load a model or put a server to the proof; the last one hears of batches."""
    opened: list[Engine] = []
    hearing: list[Callable[[int], None]] = []

    def tell(count: int) -> None:
        hearing[-1](count)

    def make(on_batch: Callable[[int], None]) -> Engine:
        hearing.append(on_batch)
        if not opened:
            opened.append(make_engine(tell))
        return opened[0]

    return make


def with_turns(
    plan: Plan,
    make_engine: MakeEngine,
    *,
    folder: Path,
    console: Console,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
) -> Plan:
    """The plan with a prompt for every turn of its tasks' conversations behind their other prompts.

    Args:
        plan: As encoded; tasks without conversations stay as they are.
        make_engine: Called only where a task's prompts are not kept yet.
        folder: Of the evaluation.
        console: Shows the progress and hears of Ctrl-C.
        tokenizer: The target's.
        context_length: Of target and draft.

    Raises:
        DataError: when no prompt of a task fits the context. TargetError: when the template cannot render a conversation,
            or a served target's answers are not whole.
        FastDraftError: when kept prompts are damaged.
    """
    missing = [task for task in plan.tasks if task.conversations and not _path(folder, task).exists()]
    if missing:
        total = sum(len(talk.users) - 1 for task in missing for _, talk in task.conversations)
        with console.progress("earlier turns", total, "answers") as progress:

            def on_batch(count: int) -> None:
                progress.advance(count)
                console.stop.check(folder)

            engine = make_engine(on_batch)
            for task in missing:
                write_json(
                    _path(folder, task),
                    _take(task, tokenizer, engine, context_length - task.max_new_tokens, plan.seed),
                )
    return replace(
        plan, tasks=[_read(task, folder, console) if task.conversations else task for task in plan.tasks]
    )


def _path(folder: Path, task: EncodedTask) -> Path:
    return folder / "conversations" / f"{task.name}.json"


def _take(
    task: EncodedTask, tokenizer: PreTrainedTokenizerBase, engine: Engine, room: int, seed: int
) -> dict[str, Any]:
    """The prompts of every turn as they are kept."""
    talks = [talk for _, talk in task.conversations]
    form = dialogue_format(tokenizer, talks)

    def ask(number: int, prompts: list[list[int]]) -> list[Generation]:
        written = engine.generate(
            prompts, Sampling(0.0), task.max_new_tokens, derive_seed(seed, task.name, "turn", number)
        )
        refuse_faults(task.name, written)  # else what a server left out once would be left out for good
        return written

    found = take_turns(form, talks, ask, room=room, last_answers=False)
    turns = [
        {"name": _name(task.conversations[turn.conversation][0], turn.number), **_kept(turn.prompt_ids)}
        for turn in sorted(found.turns, key=lambda turn: (turn.conversation, turn.number))
    ]
    return {"turns": turns, "too_long": found.too_long, "ended": found.ended, "note": form.note}


def _kept(prompt: list[int]) -> dict[str, Any]:
    """With the messages, for servers that want them."""
    return {
        "prompt_ids": prompt,
        **({"messages": prompt.messages} if isinstance(prompt, RenderedPrompt) else {}),
    }


def _as_kept(turn: Mapping[str, Any]) -> list[int]:
    ids = [int(token) for token in turn["prompt_ids"]]
    messages = [
        {"role": str(message["role"]), "content": str(message["content"])}
        for message in turn.get("messages", ())
    ]
    return RenderedPrompt(ids, messages) if messages else ids


def _name(conversation: str, number: int) -> str:
    return conversation if number == 0 else f"{conversation}#{number + 1}"


def _groups(task: EncodedTask, names: Sequence[str]) -> list[int]:
    """A number for each text, and one for all turns of a conversation."""
    first = len(task.prompt_ids)
    of = {
        _name(name, turn): first + place
        for place, (name, talk) in enumerate(task.conversations)
        for turn in range(len(talk.users))
    }
    return [*range(first), *(of[name] for name in names)]


def _read(task: EncodedTask, folder: Path, console: Console) -> EncodedTask:
    kept = read_json(_path(folder, task))
    try:
        names = [str(turn["name"]) for turn in kept["turns"]]
        prompts = [_as_kept(turn) for turn in kept["turns"]]
        groups = _groups(task, names)
        too_long, ended, note = int(kept["too_long"]), int(kept["ended"]), str(kept["note"])
    except (KeyError, TypeError, ValueError):
        remedy = "delete this file and run the same command again"
        raise FastDraftError(
            _path(folder, task), "damaged", "must hold the prompts of every turn", remedy
        ) from None
    if not prompts and not task.prompt_ids:
        rule = f"a turn's prompt and {task.max_new_tokens} new tokens must fit the context"
        raise DataError(
            f"task '{task.name}'",
            f"none of {too_long} turns fits",
            rule,
            "shorten the prompts or lower max_new_tokens",
        )
    if note:
        console.say(f"{task.name}: {note}")
    if too_long or ended:
        why = f"{too_long} do not fit the context, {ended} stand behind an answer that is empty, loops or is still thinking"
        console.warn(
            f"{task.name}: {too_long + ended} of {too_long + ended + len(prompts)} turns left out: {why}"
        )
    return replace(
        task,
        groups=groups,
        prompt_names=[*task.prompt_names, *names],
        prompt_ids=[*task.prompt_ids, *prompts],
        num_skipped=task.num_skipped + too_long + ended,
    )
