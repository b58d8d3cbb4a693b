"""What a benchmark measures, before anything is loaded: its prompts, and every measurement by name.

The tasks run with every K on every pair of weights. The sweeps (prompt length, answer length, texts at a time) run one factor at a time, on
the first pair, at the best K alone, on one prompt of each task in turn: they show how costs change, which depends on lengths, not on words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdraft.data.chat import first_prompt_ids
from fastdraft.errors import DataError
from fastdraft.evaluation.tasks import load_task

ALONE = "alone"
NamedPrompt = tuple[str, list[int]]
WeightsOfPair = tuple[str, str]
"""The target's and the draft's."""


@dataclass(frozen=True)
class BenchmarkTask:
    """A task's prompts as token ids, and its texts to make prompts longer with."""

    name: str
    prompts: list[NamedPrompt]
    texts: list[list[int]]
    """Prompt and reference of each, without special tokens."""
    max_new_tokens: int
    later_turns: int = 0
    """Of its conversations: they need the target's own answers before them, and are not measured."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are measured together."""

    task: str
    """The task's name, or `mixed`."""
    prompts: list[NamedPrompt]
    max_new_tokens: int
    left_out: list[str] = field(default_factory=list)
    """What was left out and why, in words."""
    part: str = "tasks"
    """`tasks`, or the factor that is swept: prompt_tokens, max_new_tokens, concurrency."""
    value: int = 0
    """Of the swept factor."""
    concurrency: int = 1


@dataclass(frozen=True)
class Measurement:
    """Prompts on which a target alone and with its draft are timed in turn."""

    prompts: PromptSet
    weights: WeightsOfPair
    temperature: float
    num_speculative_tokens: list[int]
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        p = self.prompts
        swept = f"-{p.value}-k{self.num_speculative_tokens[0]}" if p.value else ""
        return f"{p.part}-{p.task}-{'-'.join(self.weights)}-t{self.temperature:g}{swept}"

    @property
    def labels(self) -> dict[str, int]:
        """Name -> K of all that answer in turn, the target alone (0) first."""
        return {ALONE: 0, **{f"k{k}": k for k in self.num_speculative_tokens}}

    @property
    def batches(self) -> list[range]:
        """Places of the prompts that are asked together."""
        count, size = len(self.prompts.prompts), self.prompts.concurrency
        return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]

    @property
    def planned_tokens(self) -> int:
        """Most tokens that one repeat writes."""
        return len(self.prompts.prompts) * self.prompts.max_new_tokens * len(self.labels)


@dataclass(frozen=True)
class BenchmarkPlan:
    """All measurements of a benchmark."""

    tasks: list[PromptSet]
    swept: list[PromptSet]
    weights: list[WeightsOfPair]
    """Of every pair; the first is the deployed one."""
    temperatures: list[float]
    num_speculative_tokens: list[int]
    repeats: int
    seed: int
    left_out: list[str]
    """What does not fit, in words."""

    def of_tasks(self, weights: WeightsOfPair) -> list[Measurement]:
        """Every task at every temperature on one pair."""
        return [
            Measurement(prompts, weights, temperature, self.num_speculative_tokens, self.seed)
            for prompts in self.tasks
            for temperature in self.temperatures
        ]

    def of_sweeps(self, k: int) -> list[Measurement]:
        """Every value of every factor on the deployed pair, at the lowest temperature."""
        lowest = min(self.temperatures)
        return [Measurement(prompts, self.weights[0], lowest, [k], self.seed) for prompts in self.swept]

    def everything(self, k: int) -> list[Measurement]:
        """All, the sweeps at K."""
        return [work for weights in self.weights for work in self.of_tasks(weights)] + self.of_sweeps(k)


def make_plan(
    tasks: Sequence[BenchmarkTask],
    *,
    count: int,
    context_length: int,
    sweep: Mapping[str, Sequence[int]],
    num_speculative_tokens: list[int],
    **settings: Any,
) -> BenchmarkPlan:
    """Chooses the prompts of every measurement: of each task and each sweep the first `count` that fit both models' context.

    `sweep` holds the values by factor; `settings` are further fields of the plan.
    """
    room = context_length - max(num_speculative_tokens) - 1  # exact counts write one round beyond the end
    sets = [task_prompts(task, count, room) for task in tasks]
    usual = min(task.max_new_tokens for task in tasks)
    swept = [prompts_of_length(tasks, count, n, usual, room) for n in sweep["prompt_tokens"]]
    for n in sweep["max_new_tokens"]:
        swept.append(mixed_prompts(tasks, count, n, room, part="max_new_tokens", value=n))
    at_once = sweep["concurrency"]
    # Every value answers the same prompts, in full batches at the largest.
    whole = -(-count // max(at_once)) * max(at_once) if at_once else 0
    for n in at_once:
        swept.append(mixed_prompts(tasks, whole, usual, room, part="concurrency", value=n, concurrency=n))
    return BenchmarkPlan(
        sets,
        [prompts for prompts in swept if prompts.prompts],
        num_speculative_tokens=num_speculative_tokens,
        left_out=list(dict.fromkeys(words for prompts in (*sets, *swept) for words in prompts.left_out)),
        **settings,
    )


def encode(task: Any, tokenizer: PreTrainedTokenizerBase) -> BenchmarkTask:
    """A recipe's task as token ids, of a conversation its first turn; prompts without any are left out."""
    loaded = load_task(task)
    prompts, texts, later_turns = [], [], 0
    for prompt in loaded.prompts:
        ids = first_prompt_ids(tokenizer, prompt.prompt, loaded.chat)
        if ids:
            prompts.append((prompt.id, ids))
            text = tokenizer(f"{prompt.everything}\n\n", add_special_tokens=False, verbose=False)
            texts.append(list(text.input_ids))
            later_turns += len(prompt.conversation.users) - 1 if prompt.conversation else 0
    if not prompts:
        raise DataError(f"task '{task.name}': no prompt has a token", "use another task")
    return BenchmarkTask(task.name, prompts, texts, task.max_new_tokens, later_turns)


def task_prompts(task: BenchmarkTask, count: int, room: int) -> PromptSet:
    """The first `count` prompts of a task for which, with their answers, there is room."""
    fitting = [(name, ids) for name, ids in task.prompts if len(ids) + task.max_new_tokens <= room]
    if not fitting:
        raise DataError(
            f"task '{task.name}': none of {len(task.prompts)} prompts fits; prompt and {task.max_new_tokens} new tokens must fit {room} "
            "positions (the context less one round)",
            "shorten the prompts or lower max_new_tokens",
        )
    left_out, short = [], len(task.prompts) - len(fitting)
    if short and len(fitting) < count:
        left_out.append(f"{task.name}: {short} of {len(task.prompts)} prompts are too long for the context")
    if task.later_turns:
        left_out.append(
            f"{task.name}: {task.later_turns} later turns of conversations; first turns are measured"
        )
    return PromptSet(task.name, fitting[:count], task.max_new_tokens, left_out)


def mixed_prompts(
    tasks: Sequence[BenchmarkTask], count: int, max_new_tokens: int, room: int, **swept: Any
) -> PromptSet:
    """One prompt of each task in turn until there are `count`; when the tasks have fewer that fit, they come again."""
    named = _in_turn([[(f"{task.name}/{name}", ids) for name, ids in task.prompts] for task in tasks])
    fitting = [(name, ids) for name, ids in named if len(ids) + max_new_tokens <= room]
    if not fitting:
        words = f"{max_new_tokens} new tokens: no prompt leaves room for them in the context"
        return PromptSet(_label(tasks), [], max_new_tokens, [words], **swept)
    chosen = [fitting[index % len(fitting)] for index in range(count)]
    return PromptSet(_label(tasks), chosen, max_new_tokens, **swept)


def prompts_of_length(
    tasks: Sequence[BenchmarkTask], count: int, tokens: int, max_new_tokens: int, room: int
) -> PromptSet:
    """Prompts of exactly `tokens` tokens, from each task in turn; those that are longer by themselves are left out."""
    swept: dict[str, Any] = {"part": "prompt_tokens", "value": tokens}
    if tokens + max_new_tokens > room:
        words = f"prompts of {tokens} tokens: they do not fit the context with their answers"
        return PromptSet(_label(tasks), [], max_new_tokens, [words], **swept)
    longer = [_lengthened(task, -(-count // len(tasks)), tokens) for task in tasks]
    left_out = [
        f"prompts of {tokens} tokens: all {len(task.prompts)} of {task.name} are longer"
        for task, found in zip(tasks, longer, strict=True)
        if not found
    ]
    return PromptSet(_label(tasks), _in_turn(longer)[:count], max_new_tokens, left_out, **swept)


def _label(tasks: Sequence[BenchmarkTask]) -> str:
    return tasks[0].name if len(tasks) == 1 else "mixed"


def _in_turn(lists: Sequence[Sequence[NamedPrompt]]) -> list[NamedPrompt]:
    """The first of each, the second of each, ..."""
    return [each for row in zip_longest(*lists) for each in row if each is not None]


def _lengthened(task: BenchmarkTask, count: int, tokens: int) -> list[NamedPrompt]:
    """The first `count` prompts of a task that are no longer than `tokens`, each brought to that length.

    Its end stays: other texts of the task are put in front, behind the ids with which every prompt begins (BOS, a chat template).
    """
    columns = enumerate(zip_longest(*(ids for _, ids in task.prompts)))
    common = next((place for place, column in columns if len(set(column)) > 1), 1)
    begin = common if len(task.prompts) > 1 else 1  # of a single prompt nothing can be told but its first id
    found: list[NamedPrompt] = []
    for index, (name, ids) in enumerate(task.prompts):
        if len(ids) > tokens or len(found) == count:
            continue
        texts = [*task.texts[index + 1 :], *task.texts[:index]] or [task.texts[index]]
        around = [token for text in texts for token in text]
        wanted, kept = tokens - len(ids), min(begin, len(ids) - 1)
        filling = around * (-(-wanted // len(around)))
        found.append((f"{task.name}/{name}", ids[:kept] + filling[len(filling) - wanted :] + ids[kept:]))
    return found
