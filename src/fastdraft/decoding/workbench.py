"""The units of work of an evaluation, each kept in a file of its own as soon as it is done.

Decides what is kept and under which name, so that a killed evaluation repeats at most one unit:
  conversations/TASK.json          prompts of every turn, with the target's own earlier answers
  generations/TASK-T.parquet       the target's own texts
  replay/CHECKPOINT-TASK-T.npy     expected counts, [K, prompts, columns of counts_to_array]
  positions/CHECKPOINT-TASK-T.npy  the same at the headline K, [prompts, buckets, columns] (functional/positions.py)
  exact/TASK-T-kK.json             counts, response ids and accepted flags of real runs
  latency.json                     medians of single passes
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from fastdraft.console import Console
from fastdraft.data.chat import Conversation
from fastdraft.data.rows import SyntheticRow, read_columns, read_rows, write_rows
from fastdraft.decoding.evaluation import as_row, derive_seed, exact_runs, replay_tables
from fastdraft.decoding.figures import CountsTable, Setting, counts_table
from fastdraft.decoding.latency import Latency, measure_latency
from fastdraft.decoding.position_figures import Place, Positions
from fastdraft.decoding.speculative import SpeculativeDecoder
from fastdraft.errors import FastDraftError, TargetError
from fastdraft.functional.acceptance import TOTALS
from fastdraft.functional.generation import Engine, Generation, Sampling
from fastdraft.functional.intervals import Groups, group_numbers
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.run_folder import read_json, write_atomic, write_json


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
    """Name and words of those whose turns are still to be made prompts (decoding/turn_prompts.py)."""
    groups: list[int] = field(default_factory=list)
    """One number for each prompt, equal for turns of one conversation; empty where there is no conversation."""


@dataclass(frozen=True)
class Plan:
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
    only: tuple[tuple[str, float], ...] = ()
    """Tasks and temperatures where not every task has every temperature: texts that stood already."""

    def sampling(self, temperature: float) -> Sampling:
        return Sampling(temperature, self.top_k, self.top_p)

    @property
    def settings(self) -> list[tuple[EncodedTask, float]]:
        """Every task at every temperature, or at those of `only`."""
        everything = [(task, temperature) for task in self.tasks for temperature in self.temperatures]
        return [
            (task, temperature)
            for task, temperature in everything
            if not self.only or (task.name, temperature) in self.only
        ]


@dataclass(frozen=True)
class ExactUnit:
    """Real runs of one task, temperature and K."""

    table: CountsTable
    response_ids: list[list[int]]
    accepted: list[list[bool]]


@dataclass(frozen=True)
class Workbench:
    """A plan, the folder that keeps its units, the target and the shared vocabulary."""

    plan: Plan
    folder: Path
    console: Console
    target: PreTrainedModel | None
    """None where texts stand already and nothing is decoded or timed."""
    vocabulary: Vocabulary

    @property
    def loaded_target(self) -> PreTrainedModel:
        """For the work that cannot do without it.

        Raises:
            AssertionError: without one, which would be a fault in this program.
        """
        assert self.target is not None, "this needs the target's weights"
        return self.target

    def keep_texts(self, rows: Mapping[tuple[str, float], Sequence[SyntheticRow]]) -> None:
        """Takes texts that stand already, by task and temperature, as those that the target would write here."""
        for task, temperature in self.plan.settings:
            if not self.texts_path(task, temperature).exists():
                write_rows(self.texts_path(task, temperature), rows[task.name, temperature])

    def texts_path(self, task: EncodedTask, temperature: float) -> Path:
        return self.folder / "generations" / f"{task.name}-{temperature:g}.parquet"

    def texts(self, task: EncodedTask, temperature: float) -> list[SyntheticRow]:
        """What the target wrote."""
        return read_rows(self.texts_path(task, temperature))

    def _num_texts(self, task: EncodedTask, temperature: float) -> int:
        """One for each prompt; of texts that stood already those of this temperature alone."""
        return (
            len(read_columns(self.texts_path(task, temperature), ["row_id"])["row_id"])
            if self.plan.only
            else len(task.prompt_ids)
        )

    def groups(self) -> dict[tuple[str, float], Groups]:
        """By task and temperature, which of the texts a bootstrap draws together: turns of a conversation, answers to one prompt."""
        return {
            (task.name, t): group_numbers(task.groups or [row.prompt_key for row in self.texts(task, t)])
            for task, t in self.plan.settings
        }

    def write_texts(self, make_engine: Callable[[Callable[[int], None]], Engine]) -> None:
        """The target answers every prompt at every temperature, unless it already has.

        Args:
            make_engine: Makes the engine, given what it is to call after each batch with the number of answers.
        """
        missing = [(task, t) for task, t in self.plan.settings if not self.texts_path(task, t).exists()]
        if not missing:
            return
        total = sum(len(task.prompt_ids) for task, _ in self.plan.settings)
        done = total - sum(len(task.prompt_ids) for task, _ in missing)
        with self.console.progress("target writes", total, "texts", done) as progress:

            def on_batch(count: int) -> None:
                progress.advance(count)
                self.console.stop.check(self.folder)

            engine = make_engine(on_batch)
            for task, temperature in missing:
                progress.note = f"{task.name} {temperature:g}"
                sampling, seed = (
                    self.plan.sampling(temperature),
                    derive_seed(self.plan.seed, task.name, temperature),
                )
                written = engine.generate(task.prompt_ids, sampling, task.max_new_tokens, seed)
                self._refuse_unusable(task, temperature, written)
                if any(not math.isfinite(value) for generation in written for value in generation.logprobs):
                    found = f"logits that are not finite on task '{task.name}'"
                    raise TargetError(
                        "target.model",
                        found,
                        "the target must compute finite numbers",
                        "set target.dtype to bf16 or fp32",
                    )
                write_rows(
                    self.texts_path(task, temperature), [as_row(g, sampling, task.name) for g in written]
                )

    def _refuse_unusable(self, task: EncodedTask, temperature: float, written: Sequence[Generation]) -> None:
        """Raises:
        TargetError: when a served target's answers are not whole, or lack the log-probs that replay needs.
        """
        refuse_faults(task.name, written)
        where, count = f"task '{task.name}'", len(written)
        unknown = sum(len(generation.logprobs) != len(generation.response_ids) for generation in written)
        if unknown and temperature > 0 and self.plan.draft_temperature != 0:
            rule = "replay of sampled text needs the log-prob of every token under the sampled distribution"
            remedy = "set synthesize.engine.logprobs to processed or target, evaluate.temperatures=[0], or evaluate.draft_temperature=0"
            raise TargetError(where, f"{unknown} of {count} answers without log-probs", rule, remedy)

    def replay_all(
        self, load_draft: Mapping[str, Callable[[], PreTrainedModel]]
    ) -> dict[Setting, CountsTable]:
        """Expected counts of every checkpoint; its loader is called only if something of it is missing, and should remember the model."""
        jobs = [
            (checkpoint, task, temperature)
            for checkpoint in load_draft
            for task, temperature in self.plan.settings
        ]
        missing = [
            job
            for job in jobs
            if not (self._replay_path(*job).exists() and self._replay_path(*job, "positions").exists())
        ]
        total, left = (
            sum(self._num_texts(task, temperature) for _, task, temperature in some)
            for some in (jobs, missing)
        )
        ks = self.plan.num_speculative_tokens
        if missing:
            with self.console.progress("replay", total, "texts", total - left) as progress:
                for checkpoint, task, temperature in missing:
                    draft, rows = load_draft[checkpoint](), self.texts(task, temperature)
                    found = replay_tables(
                        draft,
                        rows,
                        ks,
                        self.vocabulary,
                        self.plan.draft_temperature,
                        on_batch=progress.advance,
                    )
                    _write_array(
                        self._replay_path(checkpoint, task, temperature, "positions"), found.by_position
                    )
                    _write_array(
                        self._replay_path(checkpoint, task, temperature),
                        _stacked([found.by_k[k] for k in ks]),
                    )
                    self.console.stop.check(self.folder)
        return {
            Setting(checkpoint, task.name, "replay", temperature, k): table[:, : TOTALS + k]
            for checkpoint, task, temperature in jobs
            for k, table in zip(
                ks, _read_array(self._replay_path(checkpoint, task, temperature)), strict=True
            )
        }

    def positions(self, checkpoints: Iterable[str]) -> dict[Place, Positions]:
        """Counts by position of every checkpoint replayed, task and temperature."""
        places = [
            (checkpoint, task, temperature)
            for checkpoint in checkpoints
            for task, temperature in self.plan.settings
        ]
        return {
            (name, task.name, t): _read_array(self._replay_path(name, task, t, "positions"))
            for name, task, t in places
        }

    def _replay_path(
        self, checkpoint: str, task: EncodedTask, temperature: float, folder: str = "replay"
    ) -> Path:
        return self.folder / folder / f"{checkpoint}-{task.name}-{temperature:g}.npy"

    def exact_all(self, checkpoint: str, draft: Callable[[], PreTrainedModel]) -> dict[Setting, ExactUnit]:
        """Real speculative decoding of the first prompts of each task with one draft."""
        jobs = {
            Setting(checkpoint, task.name, "exact", temperature, k): task
            for task, temperature in self.plan.settings
            for k in self.plan.exact_num_speculative_tokens
            if self.plan.exact_prompts
        }
        sizes = {
            setting: min(len(task.prompt_ids), self.plan.exact_prompts) for setting, task in jobs.items()
        }
        missing = [setting for setting in jobs if not self._exact_path(setting).exists()]
        total, left = sum(sizes.values()), sum(sizes[setting] for setting in missing)
        if missing:
            with self.console.progress("exact runs", total, "texts", total - left) as progress:
                for setting in missing:
                    self._exact_unit(setting, jobs[setting], draft(), progress.advance)
                    self.console.stop.check(self.folder)
        return {setting: _read_exact(self._exact_path(setting)) for setting in jobs}

    def _exact_path(self, setting: Setting) -> Path:
        return (
            self.folder
            / "exact"
            / f"{setting.task}-{setting.temperature:g}-k{setting.num_speculative_tokens}.json"
        )

    def _exact_unit(
        self, setting: Setting, task: EncodedTask, draft: PreTrainedModel, on_prompt: Callable[[int], None]
    ) -> None:
        k, sampling = setting.num_speculative_tokens, self.plan.sampling(setting.temperature)
        decoder = SpeculativeDecoder(
            self.loaded_target, draft, self.vocabulary, k, self.plan.draft_temperature
        )
        seed = derive_seed(self.plan.seed, task.name, setting.temperature, k)
        prompts = task.prompt_ids[: self.plan.exact_prompts]
        results = exact_runs(decoder, prompts, sampling, task.max_new_tokens, seed, on_prompt=on_prompt)
        unit = {
            "counts": counts_table([result.counts for result in results]).tolist(),
            "response_ids": [result.generation.response_ids for result in results],
            "accepted": [[int(flag) for flag in result.accepted] for result in results],
        }
        write_json(self._exact_path(setting), unit)

    def latency(self, draft: Callable[[], PreTrainedModel]) -> Latency:
        """Seconds of single passes, measured once for this evaluation."""
        path = self.folder / "latency.json"
        if not path.exists():
            widths = [k + 1 for k in self.plan.num_speculative_tokens]
            write_json(path, measure_latency(self.loaded_target, draft(), widths).to_json())
        return Latency.from_json(read_json(path))


def refuse_faults(task: str, written: Sequence[Generation]) -> None:
    """Raises:
    TargetError: when a served target's answers to a task are not whole.
    """
    faults = [generation.fault for generation in written if generation.fault]
    if faults:
        found = f"{len(faults)} of {len(written)} answers: {faults[0]}"
        remedy = "use a server that gives token ids (vLLM, llama.cpp, SGLang), or evaluate.texts with kind synthesize"
        raise TargetError(f"task '{task}'", found, "every prompt needs the target's own tokens", remedy)


def _stacked(tables: Sequence[CountsTable]) -> Positions:
    """Tables of different K have different numbers of positions: zeros fill up to the largest K."""
    width = max(table.shape[1] for table in tables)
    return np.stack([np.pad(table, ((0, 0), (0, width - table.shape[1]))) for table in tables])


def _write_array(path: Path, values: Positions) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_atomic(path, buffer.getvalue())


def _read_array(path: Path) -> Positions:
    try:
        values: Positions = np.load(path, allow_pickle=False)
        return values
    except (ValueError, OSError, EOFError) as error:
        found = f"damaged ({str(error)[:60]})"
        raise FastDraftError(
            path, found, "must hold replayed counts", "delete this file and run the same command again"
        ) from None


def _read_exact(path: Path) -> ExactUnit:
    unit = read_json(path)
    try:
        accepted = [[bool(flag) for flag in flags] for flags in unit["accepted"]]
        return ExactUnit(np.array(unit["counts"], dtype=np.float64), unit["response_ids"], accepted)
    except (KeyError, TypeError, ValueError):
        raise FastDraftError(
            path, "damaged", "must hold an exact run", "delete this file and run the same command again"
        ) from None
