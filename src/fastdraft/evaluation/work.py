"""The work of an evaluation, each result kept in a file of its own as soon as it is done: a killed one repeats at most one.

conversations/TASK.json       prompts of every turn, with the target's own earlier answers
generations/TASK-T.parquet    the target's own texts
replay/DRAFT-TASK-T.npz, exact/TASK-T-kK.json, latency.json    what the drafts would do, and did, with them
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdraft.console import Console, Progress
from fastdraft.data.filters import is_looping
from fastdraft.data.rows import SyntheticRow, read_rows, write_rows
from fastdraft.decoding.latency import Latency, measure_latency
from fastdraft.decoding.replay import accept_probabilities, counts_of_accepts
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.errors import TargetError
from fastdraft.evaluation.prompts import EncodedTask, add_turns, derive_seed, refuse_faults, write_turns
from fastdraft.evaluation.results import GreedyCase, GreedyCheck, nearest_k
from fastdraft.evaluation.rows import Setting
from fastdraft.functional.acceptance import TOTALS, CountsTable, counts_table, tidy
from fastdraft.functional.generation import Engine, Sampling
from fastdraft.functional.intervals import Groups, group_numbers
from fastdraft.functional.positions import counts_by_bucket
from fastdraft.functional.same_text import Judge, compare_texts
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.run_folder import StageFolder

LoadModel = Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated, and how."""

    tasks: list[EncodedTask]
    temperatures: list[float]
    num_speculative_tokens: list[int]
    exact_num_speculative_tokens: list[int]
    exact_prompts: int
    top_k: int = 0
    top_p: float = 1.0
    draft_temperature: float | None = None
    seed: int = 0
    given: Mapping[tuple[str, float], list[SyntheticRow]] | None = None
    """By task and temperature, texts that nobody has to write; not every task has every temperature."""

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.top_k, self.top_p)

    @property
    def settings(self) -> list[tuple[EncodedTask, float]]:
        """Every task at every temperature, or at those of `given`."""
        everything = [(task, temperature) for task in self.tasks for temperature in self.temperatures]
        return [(task, t) for task, t in everything if self.given is None or (task.name, t) in self.given]

    def num_texts(self, task: EncodedTask, temperature: float) -> int:
        """One for each prompt, or those given."""
        return len(self.given[task.name, temperature] if self.given is not None else task.prompt_ids)


@dataclass(frozen=True)
class Replayed:
    """What replay found over some texts."""

    by_k: NDArray[np.float64]
    """Counts, [K, texts, columns of `counts_to_array` for the largest K]: of a smaller K the last columns are zero."""
    by_position: NDArray[np.float64]
    """At the headline K, [texts, buckets of positions, columns]."""


@dataclass(frozen=True)
class ExactRuns:
    """Real runs of one task, temperature and K."""

    counts: list[list[float]]
    response_ids: list[list[int]]
    accepted: list[list[bool]]

    @property
    def table(self) -> CountsTable:
        return np.array(self.counts, dtype=np.float64)


class EvaluationWork:
    """Does what a plan asks for and is not kept yet.

    Args:
        plan: `take_turns` puts the prompts of conversations into it.
        folder: Keeps every result.
        console: Shows the progress and hears of Ctrl-C.
        vocabulary: Shared by target and drafts.
        target: None where texts stand already and nothing is decoded or timed.
        open_engine: Makes what writes the tasks' texts, given what it is to call with the number of answers after each batch.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        folder: StageFolder,
        console: Console,
        vocabulary: Vocabulary,
        target: PreTrainedModel | None,
        open_engine: Callable[[Callable[[int], None]], Engine],
    ) -> None:
        self.plan, self.folder, self.console = plan, folder, console
        self.vocabulary, self.target, self._open_engine = vocabulary, target, open_engine
        self._shown: Progress | None = None

    @cached_property
    def engine(self) -> Engine:
        """Opened at the first question: it may load a model or convert one."""
        return self._open_engine(self._advance)

    def _advance(self, count: int = 1) -> None:
        if self._shown:
            self._shown.advance(count)
        self.console.stop.check(self.folder.path)

    @contextlib.contextmanager
    def _progress(self, title: str, unit: str, sizes: Mapping[str, int]) -> Iterator[None]:
        """Follows the making of these results; says nothing where all are kept already."""
        if all(map(self.folder.has, sizes)):
            yield
            return
        done = sum(size for name, size in sizes.items() if self.folder.has(name))
        with self.console.progress(title, sum(sizes.values()), unit, done) as self._shown:
            yield

    def take_turns(self, tokenizer: PreTrainedTokenizerBase, context_length: int) -> None:
        """Makes prompts of every turn of the tasks' conversations."""
        talking = {f"conversations/{task.name}.json": task for task in self.plan.tasks if task.conversations}
        sizes = {n: sum(len(talk.users) - 1 for _, talk in task.conversations) for n, task in talking.items()}
        with self._progress("earlier turns", "answers", sizes):
            for name, task in talking.items():
                room = context_length - task.max_new_tokens
                ask = partial(write_turns, task, tokenizer, lambda: self.engine, room, self.plan.seed)
                complete = add_turns(task, self.folder.keep(name, ask), self.console)
                tasks = [complete if each is task else each for each in self.plan.tasks]
                self.plan = replace(self.plan, tasks=tasks)

    def write_texts(self) -> None:
        """The target answers every prompt at every temperature; then the engine is let go, with the model that it may hold."""
        asked = self.plan.settings if self.plan.given is None else []
        sizes = {_texts_name(task, t): len(task.prompt_ids) for task, t in asked}
        with self._progress("target writes", "texts", sizes):
            for task, temperature in self.plan.settings:
                self.texts(task, temperature)
        self.__dict__.pop("engine", None)

    def texts(self, task: EncodedTask, temperature: float) -> list[SyntheticRow]:
        """The target's own texts."""
        make = partial(self._write_texts, task, temperature)
        return self.folder.keep(_texts_name(task, temperature), make, read=read_rows, write=write_rows)

    def _write_texts(self, task: EncodedTask, temperature: float) -> list[SyntheticRow]:
        if self.plan.given is not None:
            return self.plan.given[task.name, temperature]
        sampling, seed = self.plan.sampling(temperature), derive_seed(self.plan.seed, task.name, temperature)
        written = self.engine.generate(task.prompt_ids, sampling, task.max_new_tokens, seed)
        refuse_faults(task.name, written)
        unknown = sum(len(generation.logprobs) != len(generation.response_ids) for generation in written)
        if unknown and temperature > 0 and self.plan.draft_temperature != 0:
            raise TargetError(
                f"task '{task.name}': {unknown} of {len(written)} answers without log-probs; replay of sampled text "
                "needs that of every token under the sampled distribution",
                "set synthesize.engine.logprobs to processed or target, evaluate.temperatures=[0], or "
                "evaluate.draft_temperature=0",
            )
        if any(not math.isfinite(value) for generation in written for value in generation.logprobs):
            found = f"logits that are not finite on task '{task.name}'"
            raise TargetError(f"target.model: {found}", "set target.dtype to bf16 or fp32")
        return [SyntheticRow.of(generation, task.name, sampling) for generation in written]

    def replay(self, drafts: Mapping[str, LoadModel]) -> dict[tuple[str, str, float], Replayed]:
        """By draft, task and temperature; a draft is loaded only if something of it is missing, and should be remembered."""
        jobs = [(name, task, t) for name in drafts for task, t in self.plan.settings]
        names = [f"replay/{name}-{task.name}-{t:g}.npz" for name, task, t in jobs]
        sizes = dict(zip(names, (self.plan.num_texts(task, t) for _, task, t in jobs), strict=True))
        found = {}
        with self._progress("replay", "texts", sizes):
            for file, (name, task, t) in zip(names, jobs, strict=True):
                make = partial(self._replay, drafts[name], task, t)
                kept = self.folder.keep(file, make, read=_read_replayed, write=_write_replayed)
                found[name, task.name, t] = kept
        return found

    def _replay(self, draft: LoadModel, task: EncodedTask, temperature: float) -> Replayed:
        rows, ks = self.texts(task, temperature), self.plan.num_speculative_tokens
        return replay_texts(draft(), rows, ks, self.vocabulary, self.plan.draft_temperature, self._advance)

    def tables(self, replayed: Mapping[tuple[str, str, float], Replayed]) -> dict[Setting, CountsTable]:
        """Replayed counts by everything that a row is about."""
        return {
            Setting(name, task, "replay", temperature, k): table[:, : TOTALS + k]
            for (name, task, temperature), found in replayed.items()
            for k, table in zip(self.plan.num_speculative_tokens, found.by_k, strict=True)
        }

    def exact(self, name: str, draft: LoadModel) -> dict[Setting, ExactRuns]:
        """Real speculative decoding of the first prompts of each task with one draft."""
        ks = self.plan.exact_num_speculative_tokens if self.plan.exact_prompts else []
        jobs = {Setting(name, task.name, "exact", t, k): task for task, t in self.plan.settings for k in ks}
        names = {s: f"exact/{s.task}-{s.temperature:g}-k{s.num_speculative_tokens}.json" for s in jobs}
        sizes = {names[s]: min(len(task.prompt_ids), self.plan.exact_prompts) for s, task in jobs.items()}
        found = {}
        with self._progress("exact runs", "texts", sizes):
            for setting, task in jobs.items():
                make = partial(self._exact, setting, task, draft)
                found[setting] = ExactRuns(**self.folder.keep(names[setting], make))
        return found

    def _exact(self, setting: Setting, task: EncodedTask, draft: LoadModel) -> dict[str, Any]:
        k, temperature = setting.num_speculative_tokens, setting.temperature
        assert self.target is not None
        decoder = SpeculativeDecoder(self.target, draft(), self.vocabulary, k, self.plan.draft_temperature)
        seed = derive_seed(self.plan.seed, task.name, temperature, k)
        prompts, sampling = task.prompt_ids[: self.plan.exact_prompts], self.plan.sampling(temperature)
        runs = exact_runs(decoder, prompts, sampling, task.max_new_tokens, seed, self._advance)
        return {
            "counts": counts_table([run.counts for run in runs]).tolist(),
            "response_ids": [run.generation.response_ids for run in runs],
            "accepted": [run.accepted for run in runs],
        }

    def latency(self, draft: LoadModel) -> Latency:
        """Seconds of single passes, measured once for this evaluation."""

        def measure() -> dict[str, Any]:
            assert self.target is not None
            widths = [k + 1 for k in self.plan.num_speculative_tokens]
            return measure_latency(self.target, draft(), widths).to_json()

        return Latency.from_json(self.folder.keep("latency.json", measure))

    def marks(self) -> tuple[dict[tuple[str, float], Groups], dict[tuple[str, float], NDArray[np.bool_]]]:
        """By task and temperature: which texts a bootstrap draws together (turns of a conversation, answers to one prompt), and which loop."""
        groups, looping = {}, {}
        for task, temperature in self.plan.settings:
            rows, place = self.texts(task, temperature), (task.name, temperature)
            groups[place] = group_numbers(task.groups or [row.prompt_key for row in rows])
            looping[place] = looping_flags([row.response_ids for row in rows])
        return groups, looping

    def greedy_check(self, exact: Mapping[Setting, ExactRuns]) -> GreedyCheck:
        """Compares every greedy exact text with the target's own, token by token."""
        own = {
            task.name: (task.prompt_names, self.texts(task, t)) for task, t in self.plan.settings if t == 0
        }
        texts, cases = 0, list[GreedyCase]()
        for setting, runs in exact.items():
            if setting.temperature != 0:
                continue
            assert self.target is not None
            judge, precision = next_token_judge(self.target), str(self.target.dtype).removeprefix("torch.")
            for name, row, ids in zip(*own[setting.task], runs.response_ids, strict=False):
                texts += 1
                found = compare_texts(row.prompt_ids, row.response_ids, ids, judge)
                if found:
                    case = GreedyCase(
                        task=setting.task,
                        prompt=name,
                        num_speculative_tokens=setting.num_speculative_tokens,
                        token=found.place,
                        logprob_gap=None if found.gap is None else tidy(found.gap),
                        near_tie=found.is_near_tie(precision),
                    )
                    cases.append(case)
        near_ties = sum(case.near_tie for case in cases)
        return GreedyCheck(texts=texts, different=len(cases), near_ties=near_ties, cases=cases)


def replay_texts(
    draft: PreTrainedModel,
    rows: Sequence[SyntheticRow],
    num_speculative_tokens: Sequence[int],
    vocabulary: Vocabulary,
    draft_temperature: float | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Replayed:
    """The expected counts of every row, by replay, for every K."""
    ks, widest = num_speculative_tokens, TOTALS + max(num_speculative_tokens)
    accepts = accept_probabilities(draft, rows, vocabulary, draft_temperature, on_batch=on_batch)
    counts = counts_of_accepts(accepts, ks)
    by_k = np.zeros((len(ks), len(rows), widest))
    for table, k in zip(by_k, ks, strict=True):
        table[:, : TOTALS + k] = counts_table([by_k[k] for by_k in counts])
    return Replayed(by_k, counts_by_bucket(accepts, [len(row.prompt_ids) for row in rows], nearest_k(ks)))


def exact_runs(
    decoder: SpeculativeDecoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    on_prompt: Callable[[int], None] | None = None,
) -> list[SpeculativeResult]:
    """Real speculative decoding of each prompt, one after the other, each from a seed of its own."""
    results = []
    for index, prompt in enumerate(prompts):
        results.append(decoder.generate(prompt, sampling, max_new_tokens, derive_seed(seed, index)))
        if on_prompt:
            on_prompt(1)
    return results


def next_token_judge(target: PreTrainedModel) -> Judge:
    """Asks the target again, in one pass, how far apart it finds two next tokens: in low precision, batching alone may flip a near-tie."""

    def judge(ids: list[int], first: int, second: int) -> float:
        with torch.inference_mode():
            inputs = torch.tensor([ids], device=target.device)
            logits_V = target(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
        logprobs_V = logits_V.float().log_softmax(-1)
        return float(logprobs_V[first] - logprobs_V[second])

    return judge


def looping_flags(texts: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """For each text, whether it ran into a loop."""
    return np.array([is_looping(ids) for ids in texts], dtype=bool)


def _texts_name(task: EncodedTask, temperature: float) -> str:
    return f"generations/{task.name}-{temperature:g}.parquet"


def _write_replayed(path: Path, found: Replayed) -> None:
    with open(path, "wb") as file:  # given a path, numpy would change its ending
        np.savez(file, **vars(found))


def _read_replayed(path: Path) -> Replayed:
    with np.load(path, allow_pickle=False) as arrays:
        return Replayed(arrays["by_k"], arrays["by_position"])
