"""What a benchmark measures, before anything is loaded: every measurement by name.

Decides that the tasks run with every K and threshold on every pair of weights, and that the sweeps (prompt length, answer
length, texts at a time) run one factor at a time, on the first pair, at the best K alone, on one mixture of the tasks'
prompts: they show how costs change, and that depends on lengths and not on what the texts say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastdraft.runtimes.wall_clock_prompts import (
    EncodedTask,
    PromptSet,
    mixed_prompts,
    prompts_of_length,
    task_prompts,
)
from fastdraft.runtimes.wall_clock_runs import Measurement, Setting

SWEPT = ("prompt_tokens", "max_new_tokens", "concurrency")


@dataclass(frozen=True)
class Swept:
    """One value of one factor."""

    part: str
    value: int
    prompts: PromptSet
    concurrency: int = 1


@dataclass(frozen=True)
class Plan:
    """All measurements of a benchmark."""

    tasks: list[PromptSet]
    swept: list[Swept]
    weights: list[tuple[str, str]]
    """Target's and draft's of every pair; the first is the deployed one."""
    temperatures: list[float]
    settings: list[Setting]
    repeats: int
    seed: int
    left_out: list[str]
    """What does not fit, in words."""

    def of_tasks(self, weights: tuple[str, str]) -> list[Measurement]:
        """Every task at every temperature on one pair."""
        return [
            Measurement("tasks", prompts, *weights, temperature, self.settings, self.repeats, self.seed)
            for prompts in self.tasks
            for temperature in self.temperatures
        ]

    def of_sweeps(self, num_speculative_tokens: int) -> list[Measurement]:
        """Every value of every factor on the deployed pair, at the lowest temperature."""
        return [
            Measurement(
                swept.part,
                swept.prompts,
                *self.weights[0],
                min(self.temperatures),
                [Setting(num_speculative_tokens)],
                self.repeats,
                self.seed,
                swept.concurrency,
                swept.value,
            )
            for swept in self.swept
        ]

    @property
    def everything(self) -> list[Measurement]:
        """All measurements, the sweeps at any K: for counting."""
        return [work for weights in self.weights for work in self.of_tasks(weights)] + self.of_sweeps(1)

    @property
    def planned_tokens(self) -> int:
        """Most tokens that all units write."""
        return sum(work.planned_tokens * (1 + work.repeats) for work in self.everything)


def make_plan(
    tasks: Sequence[EncodedTask],
    *,
    count: int,
    context_length: int,
    weights: Sequence[tuple[str, str]],
    temperatures: Sequence[float],
    settings: Sequence[Setting],
    sweep: Mapping[str, Sequence[int]],
    repeats: int,
    seed: int,
) -> Plan:
    """Chooses the prompts of every measurement.

    Args:
        tasks: Encoded.
        count: Prompts of each task, and of each sweep.
        context_length: Positions that both models have.
        weights: Target's and draft's of every pair.
        temperatures: Of the target.
        settings: Every K and threshold.
        sweep: Values by factor (`SWEPT`).
        repeats: Timed runs.
        seed: Of the sampling.

    Raises:
        DataError: when no prompt of a task fits.
    """
    room = context_length - max(setting.num_speculative_tokens for setting in settings) - 1
    sets = [task_prompts(task, count, room) for task in tasks]
    swept = _swept(tasks, sweep, count, room)
    left_out = [words for prompts in (*sets, *(each.prompts for each in swept)) for words in prompts.left_out]
    swept = [each for each in swept if each.prompts.prompt_ids]
    return Plan(
        sets,
        swept,
        list(weights),
        list(temperatures),
        list(settings),
        repeats,
        seed,
        list(dict.fromkeys(left_out)),
    )


def _swept(
    tasks: Sequence[EncodedTask], sweep: Mapping[str, Sequence[int]], count: int, room: int
) -> list[Swept]:
    """Every value of every factor, the others as they usually are."""
    usual = min(task.max_new_tokens for task in tasks)
    found = [
        Swept("prompt_tokens", n, prompts_of_length(tasks, count, n, usual, room))
        for n in sweep["prompt_tokens"]
    ]
    found += [
        Swept("max_new_tokens", n, mixed_prompts(tasks, count, n, room)) for n in sweep["max_new_tokens"]
    ]
    at_once = sweep["concurrency"]
    if at_once:
        whole = -(-count // max(at_once)) * max(
            at_once
        )  # every value answers the same prompts, in full batches at the largest
        found += [Swept("concurrency", n, mixed_prompts(tasks, whole, usual, room), n) for n in at_once]
    return found
