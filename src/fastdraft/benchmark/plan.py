"""What a benchmark measures, before anything is loaded: its prompts, and every measurement by name.

The tasks run with every proposer and K on every pair of weights (prompt lookup on the first alone); where the
lengths of lookup and of the draft behind it may differ, both together run once more, each at its best. The
sweeps (prompt length, answer length, texts at a time) run one factor at a time, on the first pair, at the
draft's best K alone, on one prompt of each task in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, zip_longest
from typing import Any

from fastdraft.data.chat import ChatTemplate
from fastdraft.errors import DataError
from fastdraft.evaluation.tasks import load_task
from fastdraft.runtimes.runtime import Proposer

ALONE = "alone"
NamedPrompt = tuple[str, list[int]]
WeightsOfPair = tuple[str, str]  # the target's and the draft's


@dataclass(frozen=True)
class PromptSet:
    """Prompts that are measured together."""

    task: str  # the task's name, or `mixed`
    prompts: list[NamedPrompt]
    max_new_tokens: int
    part: str = "tasks"  # or the factor that is swept: prompt_tokens, max_new_tokens, concurrency
    value: int = 0  # of the swept factor

    @property
    def concurrency(self) -> int:
        return self.value if self.part == "concurrency" else 1


@dataclass(frozen=True)
class Measurement:
    """Prompts on which a target alone and with each proposer are timed in turn."""

    prompts: PromptSet
    runtime: str
    weights: WeightsOfPair
    temperature: float
    proposers: list[Proposer]
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        p, first = self.prompts, self.proposers[0]
        which = f"-{p.value}-{first}" if p.value else f"-{first}" * (first.num_lookup_tokens is not None)
        return f"{self.runtime}-{p.part}-{p.task}-{'-'.join(self.weights)}-t{self.temperature:g}{which}"

    @property
    def labels(self) -> dict[str, Proposer | None]:
        """By name all that answer in turn, the target alone first."""
        return {ALONE: None, **{str(proposer): proposer for proposer in self.proposers}}

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
    """All measurements of one runtime."""

    tasks: list[PromptSet]
    swept: list[PromptSet]
    left_out: list[str]  # what does not fit, in words
    runtime: str
    weights: list[WeightsOfPair]  # of every pair; the first is the deployed one
    temperatures: list[float]
    proposers: list[Proposer]
    repeats: int
    seed: int

    @property
    def draft_ks(self) -> list[int]:
        """Every K at which the draft alone proposes."""
        return [each.num_speculative_tokens for each in self.proposers if each.kind == "draft"]

    @property
    def apart(self) -> list[int]:
        """Every K of lookup, where its length and that of a draft behind it may differ."""
        found = [each.num_speculative_tokens for each in self.proposers if each.kind == "lookup"]
        return found if self.runtime == "fastdraft" else []

    def of_tasks(self, weights: WeightsOfPair) -> list[Measurement]:
        """Every task at every temperature on one pair; prompt lookup on the deployed one alone."""
        deployed = weights == self.weights[0]
        left_out = {"lookup_draft"} if self.apart else set[str]()
        left_out |= set() if deployed else {"lookup", "lookup_draft"}
        chosen = [each for each in self.proposers if each.kind not in left_out]
        everything = product(self.tasks, self.temperatures)
        return [Measurement(p, self.runtime, weights, t, chosen, self.seed) for p, t in everything]

    def of_sweeps(self, k: int) -> list[Measurement]:
        """Every value of every factor on the deployed pair with its draft, at the lowest temperature."""
        rest = self.runtime, self.weights[0], min(self.temperatures), [Proposer("draft", k)], self.seed
        return [Measurement(prompts, *rest) for prompts in self.swept]

    def of_both(self, k: int, n: int) -> list[Measurement]:
        """Every task on the deployed pair with lookup of `n` tokens, and the draft of K behind it."""
        both, everything = [Proposer("lookup_draft", k, n)], product(self.tasks, self.temperatures)
        return [Measurement(p, self.runtime, self.weights[0], t, both, self.seed) for p, t in everything]

    def everything(self, k: int, n: int = 0) -> list[Measurement]:
        """All, the sweeps at K, both together with lookup of `n` tokens; 0: not apart from the others."""
        of_tasks = [work for weights in self.weights for work in self.of_tasks(weights)]
        return of_tasks + (self.of_both(k, n) if n else []) + self.of_sweeps(k)


def make_plan(
    tasks: Sequence[PromptSet],
    *,
    count: int,
    context_length: int,
    sweep: Mapping[str, Sequence[int]],
    proposers: list[Proposer],
    **settings: Any,
) -> BenchmarkPlan:
    """Chooses of each task and each sweep the first `count` prompts that fit both models' context.

    `sweep` holds the values by factor; `settings` are further fields of the plan.
    """
    # Exact counts write one round beyond the end.
    room = context_length - max(each.num_speculative_tokens for each in proposers) - 1
    left_out: list[str] = []
    chosen = [task_prompts(task, count, room, left_out) for task in tasks]
    usual = min(task.max_new_tokens for task in tasks)
    at_once = sweep["concurrency"]
    # Every number at a time answers the same prompts, in full batches at the largest.
    whole = -(-count // max(at_once)) * max(at_once) if at_once else 0
    swept = [
        *(prompts_of_length(tasks, count, n, usual, room, left_out) for n in sweep["prompt_tokens"]),
        *(mixed_prompts(tasks, count, n, room, "max_new_tokens", n) for n in sweep["max_new_tokens"]),
        *(mixed_prompts(tasks, whole, usual, room, "concurrency", n) for n in at_once),
    ]
    left_out += [
        f"{each.part} {each.value}: no prompt fits the context" for each in swept if not each.prompts
    ]
    return BenchmarkPlan(
        chosen, [prompts for prompts in swept if prompts.prompts], left_out, proposers=proposers, **settings
    )


def encode(task: Any, chat: ChatTemplate) -> PromptSet:
    """A recipe's task as token ids; of a conversation the first turn, for later ones need answers."""
    loaded = load_task(task)
    encoded = [(each.id, chat.prompt_ids(each.prompt, chat=loaded.chat)) for each in loaded.prompts]
    prompts = [(name, ids) for name, ids in encoded if ids]
    if not prompts:
        raise DataError(f"task '{task.name}': no prompt has a token", "use another task")
    return PromptSet(task.name, prompts, task.max_new_tokens)


def task_prompts(task: PromptSet, count: int, room: int, left_out: list[str]) -> PromptSet:
    """The first `count` prompts of a task for which, with their answers, there is room."""
    fitting = [(name, ids) for name, ids in task.prompts if len(ids) + task.max_new_tokens <= room]
    if not fitting:
        found = f"task '{task.task}': none of {len(task.prompts)} prompts fits {room} positions"
        fix = "shorten the prompts or lower max_new_tokens"
        raise DataError(f"{found} (the context less one round) with {task.max_new_tokens} new tokens", fix)
    if len(fitting) < min(count, len(task.prompts)):
        short = len(task.prompts) - len(fitting)
        left_out.append(f"{task.task}: {short} of {len(task.prompts)} prompts are too long for the context")
    return replace(task, prompts=fitting[:count])


def mixed_prompts(
    tasks: Sequence[PromptSet], count: int, max_new_tokens: int, room: int, part: str, value: int
) -> PromptSet:
    """One prompt of each task in turn until there are `count`; when fewer fit, they come again."""
    named = _in_turn([[(f"{task.task}/{name}", ids) for name, ids in task.prompts] for task in tasks])
    fitting = [(name, ids) for name, ids in named if len(ids) + max_new_tokens <= room]
    chosen = [fitting[index % len(fitting)] for index in range(count if fitting else 0)]
    return PromptSet(_label(tasks), chosen, max_new_tokens, part, value)


def prompts_of_length(
    tasks: Sequence[PromptSet], count: int, tokens: int, max_new_tokens: int, room: int, left_out: list[str]
) -> PromptSet:
    """Prompts of exactly `tokens` tokens, from each task in turn: other prompts are put in front.

    Those that are longer by themselves are left out.
    """
    longer: list[list[NamedPrompt]] = [[] for _ in tasks]
    for task, found in zip(tasks, longer, strict=True):
        for index, (name, ids) in enumerate(task.prompts):
            if len(ids) <= tokens <= room - max_new_tokens and len(found) < -(-count // len(tasks)):
                others = [*task.prompts[index + 1 :], *task.prompts[:index]] or [(name, ids)]
                around = [token for _, other in others for token in other[1:]] or ids
                wanted = tokens - len(ids)
                filling = around * (-(-wanted // len(around)))
                # Behind the first id, which may be BOS.
                longer_ids = ids[:1] + filling[len(filling) - wanted :] + ids[1:]
                found.append((f"{task.task}/{name}", longer_ids))
    if any(longer):
        words = f"prompts of {tokens} tokens: all {{}} of {{}} are longer"
        left = [task for task, found in zip(tasks, longer, strict=True) if not found]
        left_out += [words.format(len(task.prompts), task.task) for task in left]
    chosen = _in_turn(longer)[:count]
    return PromptSet(_label(tasks), chosen, max_new_tokens, "prompt_tokens", tokens)


def _label(tasks: Sequence[PromptSet]) -> str:
    return tasks[0].task if len(tasks) == 1 else "mixed"


def _in_turn(lists: Sequence[Sequence[NamedPrompt]]) -> list[NamedPrompt]:
    """The first of each, the second of each, ..."""
    return [each for row in zip_longest(*lists) for each in row if each is not None]
