"""The work of an evaluation, each result kept in a file when it is done: a killed one repeats at most one.

conversations/TASK.json, generations/TASK-T.parquet    prompts of every turn; the target's own texts
replay/DRAFT-TASK-T.npz, exact/TASK-T-kK.json, latency.json    what the drafts would do, and did, with them
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fastdraft.console import Console, Progress
from fastdraft.data.chat import ChatTemplate
from fastdraft.data.rows import SyntheticRow, read_rows, write_rows
from fastdraft.decoding.latency import Latency, measure_latency
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.reader import Readable
from fastdraft.decoding.replay import accept_probabilities, counts_of_accepts
from fastdraft.decoding.speculative import SpeculativeDecoder, SpeculativeResult
from fastdraft.errors import DataError, TargetError
from fastdraft.evaluation.results import nearest_k
from fastdraft.evaluation.tasks import EncodedTask, add_turns, derive_seed, refuse_faults, write_turns
from fastdraft.functional.acceptance import TOTALS, counts_table
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.functional.lookup import Lookups, look_up, lookup_counts
from fastdraft.functional.positions import counts_by_bucket
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.evaluation import EvaluateConfig
from fastdraft.run_folder import StageFolder, read_json
from fastdraft.workers import Job, Workers

LoadModel = Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class Setting:
    """What one row is about; `method` is exact or replay."""

    checkpoint: str
    task: str
    method: str
    temperature: float
    num_speculative_tokens: int


@dataclass(frozen=True)
class Replayed:
    """What replay found over some texts, as counts in the columns of `counts_to_array`."""

    by_k: NDArray[np.float64]  # [K, texts, columns of the largest K]: of a smaller K the last are zero
    by_position: NDArray[np.float64]  # at the headline K, [texts, buckets of positions, columns]
    behind_lookup: NDArray[np.float64]  # where prompt lookup finds nothing: see `lookup_counts`


@dataclass(frozen=True)
class ExactRuns:
    """Real runs of one task, temperature and K; a line, an answer and its flags for each prompt."""

    counts: list[list[float]]
    response_ids: list[list[int]]
    accepted: list[list[str]]  # by which proposer, empty for the target's own
    target_ids: list[list[int]] = field(
        default_factory=list
    )  # greedy, where an engine wrote the tasks' texts
    # For each prompt the rounds of lookup, and the tokens that the draft read only after them.
    num_lookups: list[int] = field(default_factory=list)
    num_caught_up: list[int] = field(default_factory=list)


class TextWorker:
    """Writes the texts of tasks and replays them; opens engine and drafts when they are asked for."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        drafts: Mapping[str, LoadModel],
        vocabulary: Vocabulary,
        chat: ChatTemplate,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        self._open_engine, self._drafts, self._vocabulary = open_engine, drafts, vocabulary
        self._chat, self._on_batch = chat, on_batch

    @cached_property
    def engine(self) -> Engine:
        """Opened at the first question: it may load a model or convert one."""
        return self._open_engine()

    def turns(self, task: EncodedTask, room: int, seed: int) -> dict[str, Any]:
        """See `write_turns`."""
        return write_turns(task, self._chat, lambda: self.engine, room, seed)

    def write(self, *asked: Any) -> list[Generation]:
        """As an engine's `generate`."""
        return self.engine.generate(*asked)

    def replay(
        self, draft: str, rows: list[SyntheticRow], ks: Sequence[int], temperature: float | None
    ) -> Replayed:
        """Of one draft; the engine is let go before, with its model."""
        self.__dict__.pop("engine", None)
        return replay_texts(self._drafts[draft](), rows, ks, self._vocabulary, temperature, self._on_batch)


@dataclass
class EvaluationWork:
    """Does what is asked for and is not kept yet: `take_turns` and `write_texts` first, then the rest."""

    config: EvaluateConfig
    tasks: list[EncodedTask]
    seed: int
    folder: StageFolder
    console: Console
    vocabulary: Vocabulary
    target: LoadModel | None  # None where nothing is decoded or timed here
    given: Mapping[tuple[str, float], list[SyntheticRow]] | None = None  # texts that nobody has to write
    # Opens target and draft for exact runs; None where nothing is decoded here.
    open_pair: Callable[[], tuple[Readable, Readable]] | None = None
    precision: str = "exact"  # in which they run: the name of a dtype, or exact
    by_engine: bool = False  # whether something else than `target` writes
    texts: dict[tuple[str, float], list[SyntheticRow]] = field(default_factory=dict)  # by task, temperature
    workers: Workers = field(init=False)  # each with a `TextWorker`; given before anything is written
    _shown: Progress | None = None

    @property
    def settings(self) -> list[tuple[EncodedTask, float]]:
        """Every task at every temperature, or at those of `given`."""
        if self.given is None:
            return [(task, temperature) for task in self.tasks for temperature in self.config.temperatures]
        by_name = {task.name: task for task in self.tasks}
        return [(by_name[name], temperature) for name, temperature in self.given]

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.config.top_k, self.config.top_p)

    def advance(self, count: int = 1) -> None:
        """Hears of texts that are finished."""
        if self._shown:
            self._shown.advance(count)
        self.console.stop.check(self.folder.path)

    def _keep_all(
        self, title: str, unit: str, jobs: Mapping[str, tuple[int, Callable[[], Any]]], **form: Any
    ) -> list[Any]:
        """Keeps these results, given by name with their size; says nothing where all stand already."""
        total = sum(size for size, _ in jobs.values())
        done = sum(size for name, (size, _) in jobs.items() if self.folder.has(name))
        following = self.console.progress(title, total, unit, done)
        with following if done < total else contextlib.nullcontext() as self._shown:
            return [self.folder.keep(name, make, **form) for name, (_, make) in jobs.items()]

    def _by_workers(self, asked: Mapping[str, tuple[int, Job]]) -> dict[str, tuple[int, Callable[[], Any]]]:
        """Jobs for `_keep_all`; those of them that are missing are begun ahead."""

        def make(name: str) -> Any:
            size, job = asked[name]
            found = self.workers.take(
                job, (job for file, (_, job) in asked.items() if not self.folder.has(file))
            )
            if self.workers.count:  # who works elsewhere does not tell how far it is
                self.advance(size)
            return found

        return {name: (size, partial(make, name)) for name, (size, _) in asked.items()}

    def take_turns(self, context_length: int) -> None:
        """Makes prompts of every turn of the tasks' conversations; no task may be without a prompt."""
        jobs, talking = {}, [task for task in self.tasks if task.conversations]
        for task in talking:
            room, size = (
                context_length - task.max_new_tokens,
                sum(len(t.users) - 1 for _, t in task.conversations),
            )
            job = Job(("turns", task.name), "turns", partial(_these, task, room, self.seed))
            jobs[f"conversations/{task.name}.json"] = size, job
        found = self._keep_all("earlier turns", "answers", self._by_workers(jobs))
        kept = dict(zip((t.name for t in talking), found, strict=True))
        self.tasks = [add_turns(t, kept[t.name], self.console) if t.name in kept else t for t in self.tasks]
        for task in self.tasks:
            if not task.prompt_ids:
                rule = f"fits the context of {context_length} less {task.max_new_tokens} new tokens"
                message = f"task '{task.name}': none of {task.num_skipped} prompts {rule}"
                raise DataError(message, "shorten the prompts or lower max_new_tokens")

    def write_texts(self) -> None:
        """The target answers every prompt at every temperature."""
        places = {f"generations/{task.name}-{t:g}.parquet": (task, t) for task, t in self.settings}
        jobs: dict[str, tuple[int, Callable[[], Any]]]
        if self.given is not None:
            jobs = {name: (0, partial(self.given.get, (task.name, t))) for name, (task, t) in places.items()}
        else:
            asked = {n: (len(task.prompt_ids), self._writing(task, t)) for n, (task, t) in places.items()}
            jobs = {
                name: (size, partial(self._rows, *places[name], write))
                for name, (size, write) in self._by_workers(asked).items()
            }
        found = self._keep_all("target writes", "texts", jobs, read=read_rows, write=write_rows)
        self.texts = {(task.name, t): rows for (task, t), rows in zip(self.settings, found, strict=True)}

    def _writing(self, task: EncodedTask, temperature: float) -> Job:
        seed, sampling = derive_seed(self.seed, task.name, temperature), self.sampling(temperature)
        asked = partial(_these, task.prompt_ids, sampling, task.max_new_tokens, seed)
        return Job(("write", task.name, temperature), "write", asked)

    def _rows(
        self, task: EncodedTask, temperature: float, write: Callable[[], list[Generation]]
    ) -> list[SyntheticRow]:
        """What was written, as rows that replay can use."""
        written, sampling = write(), self.sampling(temperature)
        refuse_faults(task.name, written)
        unknown = sum(len(generation.logprobs) != len(generation.response_ids) for generation in written)
        if unknown and temperature > 0 and self.config.draft_temperature != 0:
            rule = "replay of sampled text needs them"
            raise TargetError(
                f"task '{task.name}': {unknown} of {len(written)} answers without log-probs; {rule}",
                "set synthesize.engine.logprobs to processed or target, evaluate.temperatures=[0], or "
                "evaluate.draft_temperature=0",
            )
        if any(not math.isfinite(value) for generation in written for value in generation.logprobs):
            found = f"target.model: logits that are not finite on task '{task.name}'"
            raise TargetError(found, "set target.dtype to bf16 or fp32")
        return [SyntheticRow.of(generation, task.name, sampling) for generation in written]

    def replay(self, drafts: Iterable[str]) -> dict[tuple[str, str, float], Replayed]:
        """By draft, task and temperature; a draft is loaded only if something of it is missing."""
        places = [(name, *setting) for name in drafts for setting in self.texts]
        how, jobs = (self.config.num_speculative_tokens, self.config.draft_temperature), {}
        for name, task, t in places:
            rows = self.texts[task, t]
            file = f"replay/{name}-{task}-{t:g}.npz"
            jobs[file] = len(rows), Job(("replay", file), "replay", partial(_these, name, rows, *how))
        read = self._by_workers(jobs)
        found = self._keep_all("replay", "texts", read, read=_read_replayed, write=_write_replayed)
        return dict(zip(places, found, strict=True))

    @cached_property
    def pair(self) -> tuple[Readable, Readable]:
        """What decodes for real; asked for where something is missing or differs."""
        assert self.open_pair is not None
        return self.open_pair()

    def exact(self, name: str, proposer: ProposerKind = "draft") -> dict[Setting, ExactRuns]:
        """Real speculative decoding of the first prompts of each task with one draft, lookup or both."""
        exact, jobs, places = self.config.exact, {}, []
        wanted = exact.num_speculative_tokens if self.open_pair is not None and exact.prompts else []
        for task, t, k in ((*setting, k) for setting in self.settings for k in wanted):
            prompts = task.prompt_ids[: exact.prompts]
            make = partial(self._exact, task, prompts, t, k, proposer)
            kind = "" if proposer == "draft" else f"-{proposer}"
            jobs[f"exact/{task.name}-{t:g}-k{k}{kind}.json"] = len(prompts), make
            places.append(Setting(name, task.name, "exact", t, k))
        title = f"exact runs, {proposer}"
        found = self._keep_all(title, "texts", jobs, read=lambda path: ExactRuns(**read_json(path)))
        return dict(zip(places, found, strict=True))

    def _exact(
        self, task: EncodedTask, prompts: list[list[int]], temperature: float, k: int, proposer: ProposerKind
    ) -> dict[str, Any]:
        own = self.config.draft_temperature
        decoder = SpeculativeDecoder(*self.pair, self.vocabulary, k, own, proposer=proposer)
        seed, sampling = derive_seed(self.seed, task.name, temperature, k), self.sampling(temperature)
        runs = exact_runs(decoder, prompts, sampling, task.max_new_tokens, seed, self.advance)
        alone: list[SpeculativeResult] = []
        if self.by_engine and temperature == 0:  # another runtime and precision breaks ties another way
            nothing = SpeculativeDecoder(self.pair[0], None, self.vocabulary, 0, proposer=None)
            alone = exact_runs(nothing, prompts, sampling, task.max_new_tokens, seed)
        return {
            "target_ids": [each.generation.response_ids for each in alone],
            "counts": counts_table([run.counts for run in runs]).tolist(),
            "response_ids": [run.generation.response_ids for run in runs],
            "accepted": [run.accepted for run in runs],
            "num_lookups": [sum(r.proposer == "lookup" for r in run.rounds) for run in runs],
            "num_caught_up": [run.num_caught_up for run in runs],
        }

    def latency(self, draft: LoadModel) -> Latency | None:
        """Seconds of single passes, measured once for this evaluation; None without the target."""
        target, widths = self.target, [k + 1 for k in self.config.num_speculative_tokens]
        if target is None:
            return None
        self.__dict__.pop("pair", None)  # before another copy of the target is loaded
        found = self.folder.keep("latency.json", lambda: measure_latency(target(), draft(), widths).to_json())
        return Latency.from_json(found)


def _these(*arguments: Any) -> tuple[Any, ...]:
    return arguments


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
    by_position = counts_by_bucket(accepts, [len(row.prompt_ids) for row in rows], nearest_k(ks))
    return Replayed(by_k, by_position, lookup_counts(looked_up(rows, ks), ks, accepts))


def looked_up(rows: Sequence[SyntheticRow], num_speculative_tokens: Sequence[int]) -> list[Lookups]:
    """What prompt lookup finds in every row, at the largest K."""
    return [look_up(row.prompt_ids, row.response_ids, max(num_speculative_tokens)) for row in rows]


def exact_runs(
    decoder: SpeculativeDecoder,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    max_new_tokens: int,
    seed: int,
    on_prompt: Callable[[int], None] = lambda count: None,
) -> list[SpeculativeResult]:
    """Real speculative decoding of each prompt, one after the other, each from a seed of its own."""
    results = []
    for index, prompt in enumerate(prompts):
        results.append(decoder.generate(prompt, sampling, max_new_tokens, derive_seed(seed, index)))
        on_prompt(1)
    return results


def _write_replayed(path: Path, found: Replayed) -> None:
    with open(path, "wb") as file:  # given a path, numpy would change its ending
        np.savez(file, **vars(found))


def _read_replayed(path: Path) -> Replayed:
    with np.load(path, allow_pickle=False) as arrays:
        return Replayed(**arrays)
