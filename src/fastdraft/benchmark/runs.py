"""The runs of one pair of exports: single passes, tasks with and without proposers in turn, time, memory.

Every result is a file in the stage's `units/`: a killed benchmark repeats at most one of them, no repeat is
ever made of runs from two processes, and models are loaded only where something is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fastdraft.benchmark.memory import measure_memory
from fastdraft.benchmark.plan import ALONE, BenchmarkPlan, Measurement, WeightsOfPair
from fastdraft.benchmark.replayed import Accepts, replayed_counts
from fastdraft.benchmark.rows import BreakdownRow, MemoryRow, PassesRow
from fastdraft.evaluation.tasks import derive_seed
from fastdraft.functional.acceptance import counts_to_array
from fastdraft.functional.generation import Sampling
from fastdraft.functional.same_text import compare_texts
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes.runtime import LoadedPair, Proposer, Runtime, TimedText

_PREFIX_TOKENS = 128
_WARM_UP_TOKENS = 8
_BREAKDOWN_TASKS = 4
_MEMORY_TOKENS = 64


@dataclass(frozen=True)
class Measured:
    """A measurement and what its files hold."""

    work: Measurement
    counts: dict[str, Any]  # texts, counts and comparisons of every label
    repeats: list[dict[str, Any]]  # times of every label, by repeat
    replayed: dict[str, Any] = field(default_factory=dict)  # by label what replay predicts (replayed.py)


def unit_names(work: Measurement, repeats: int) -> list[str]:
    """The files of a measurement, in the order in which they are made."""
    parts = ["counts", *(f"repeat-{number}" for number in range(1, repeats + 1))]
    return [f"units/{work.name}.{part}.json" for part in parts]


@dataclass
class PairRuns:
    """All runs of a pair of exports."""

    plan: BenchmarkPlan
    weights: WeightsOfPair
    target: Path
    draft: Path
    runtime: Runtime
    folder: StageFolder
    # Called with planned tokens and the measurement's name, when every label has answered a batch; may raise.
    on_batch: Callable[[int, str], None] = lambda tokens, name: None
    # Of the draft, for replay; nothing is replayed without.
    accepts: Accepts = lambda rows: None
    _warm: set[str] = field(default_factory=set)

    @cached_property
    def loaded(self) -> LoadedPair:
        return self.runtime.open(self.target, self.draft)

    def unload(self) -> None:
        self.__dict__.pop("loaded", None)

    def measure(self, work: Measurement) -> Measured:
        """Makes what is missing of a measurement.

        All labels (the target alone, then each proposer) answer a prompt before the next one comes, every
        second repeat from the other end, so that a slow spell of the machine, a warm cache or a falling clock
        hits all alike. Before that an untimed run with exact counts warms up, and gives counts and texts.
        """
        first, *rest = unit_names(work, self.plan.repeats)
        counts = self.folder.keep(first, partial(self._counted, work))
        repeats = [self.folder.keep(name, partial(self._timed, work, n)) for n, name in enumerate(rest)]
        replay = partial(replayed_counts, work, counts["texts"], self.runtime, self.accepts)
        return Measured(work, counts, repeats, self.folder.keep(f"units/{work.name}.replayed.json", replay))

    def _answers(
        self,
        work: Measurement,
        label: str,
        places: Sequence[int],
        *,
        exact: bool = False,
        tokens: int = 2**31,
    ) -> list[TimedText]:
        seed = derive_seed(work.seed, work.name, places[0])
        prompts = [work.prompts.prompts[place][1] for place in places]
        asked = (prompts, Sampling(work.temperature), min(tokens, work.prompts.max_new_tokens), seed)
        return self.loaded.write(*asked, work.labels[label], exact_counts=exact)

    def _counted(self, work: Measurement) -> dict[str, Any]:
        """Texts, counts and comparisons of every label, untimed."""
        self._warm.add(work.name)
        answers: dict[str, list[TimedText]] = {label: [] for label in work.labels}
        for places in work.batches:
            for label in work.labels:
                answers[label] += self._answers(work, label, places, exact=True)
            self._tell(work, places)
        ids = {
            label: [list(map(int, text.response_ids)) for text in texts] for label, texts in answers.items()
        }
        # Null for a text without a round: one that ended at its first token, or of the target alone.
        counts = {
            label: [counts_to_array(text.counts).tolist() if text.rounds else None for text in texts]
            for label, texts in answers.items()
        }
        greedy, proposed = work.temperature == 0, [str(proposer) for proposer in work.proposers]
        differences = {
            name: self._differences(work, ids[ALONE], ids[name]) if greedy else None for name in proposed
        }
        return {
            "prompt_tokens": [len(prompt) for _, prompt in work.prompts.prompts],
            "texts": {label: {"response_ids": ids[label], "counts": counts[label]} for label in work.labels},
            "lossless": dict.fromkeys(proposed, greedy or self.runtime.lossless_sampling),
            "differences": differences,
        }

    def _differences(
        self, work: Measurement, own: list[list[int]], others: list[list[int]]
    ) -> list[dict[str, Any]]:
        """Where texts leave the target's own, each with how near the two tokens are under the target."""
        found = []
        for (name, prompt), alone, with_draft in zip(work.prompts.prompts, own, others, strict=True):
            mismatch = compare_texts(prompt, alone, with_draft, self.loaded.gap)
            if mismatch:
                found.append({"prompt": name, "token": mismatch.place, "logprob_gap": mismatch.gap})
        return found

    def _timed(self, work: Measurement, number: int) -> dict[str, Any]:
        """One repeat: batch by batch, every label in turn."""
        if work.name not in self._warm:  # a process that goes on with timing
            for label in work.labels:
                self._answers(work, label, work.batches[0], tokens=_WARM_UP_TOKENS)
            self._warm.add(work.name)
        order = list(work.labels) if number % 2 == 0 else list(work.labels)[::-1]
        runs: dict[str, list[dict[str, Any]]] = {label: [] for label in work.labels}
        for places in work.batches:
            for label in order:
                texts = self._answers(work, label, places)
                times = {
                    "seconds": max(text.seconds for text in texts),
                    "num_tokens": [len(text.response_ids) for text in texts],
                    "text_seconds": [text.seconds for text in texts],
                    "first_token_seconds": [text.first_token_seconds for text in texts],
                }
                runs[label].append(times)
            self._tell(work, places)
        return {"order": order, "runs": runs}

    def _tell(self, work: Measurement, places: Sequence[int]) -> None:
        self.on_batch(len(places) * work.prompts.max_new_tokens * len(work.labels), work.name)

    def passes(self) -> list[PassesRow]:
        """Single passes behind the usual prefix; of the deployed pair also behind the swept ones."""
        prefixes, ks = {_PREFIX_TOKENS}, {each.num_speculative_tokens for each in self.plan.proposers}
        widths = sorted({1, *(k + 1 for k in ks)})
        texts = sorted({1, *(each.concurrency for each in self.plan.swept)}) if self.runtime.serves else [1]
        if self.weights == self.plan.weights[0]:
            prefixes |= {prompts.value for prompts in self.plan.swept if prompts.part == "prompt_tokens"}

        def make(prefix: int) -> dict[str, Any] | None:
            found = self.runtime.measure_passes(self.target, self.draft, widths, prefix, texts)
            if found is None:
                return None
            return {
                "prefix_tokens": found.prefix_tokens,
                "draft_seconds": found.draft_seconds,
                "draft_seconds_more": found.draft_seconds_more,
                "target_seconds": found.target_seconds,
                "device": self.runtime.device,
                "draft_device": self.runtime.draft_device or self.runtime.device,
                "draft_seconds_by_texts": found.draft_seconds_by_texts,
            }

        rows = [self._row("latency", f"{n}", PassesRow, partial(make, n)) for n in sorted(prefixes)]
        return [row for row in rows if row is not None]

    def time_spent(self, k: int) -> BreakdownRow | None:
        """Where the time of real runs goes, of a prompt of each task; None where a runtime does not tell."""

        def make() -> dict[str, Any] | None:
            chosen = [(p.prompts[0][1], p.max_new_tokens) for p in self.plan.tasks[:_BREAKDOWN_TASKS]]
            found = [self.loaded.time_spent(ids, tokens, k) for ids, tokens in chosen]
            spent = [(each.target_seconds, each.draft_seconds, each.total_seconds) for each in found if each]
            if not spent:
                return None
            target, draft, total = (round(sum(column), 6) for column in zip(*spent, strict=True))
            return {
                "num_speculative_tokens": k,
                "target_seconds": target,
                "draft_seconds": draft,
                "other_seconds": round(max(0.0, total - target - draft), 6),
                "total_seconds": total,
            }

        row: BreakdownRow | None = self._row("breakdown", f"k{k}", BreakdownRow, make)
        return row

    def peaks(self, k: int) -> MemoryRow:
        """Peak bytes of the target alone and with the draft, each for one prompt of the first task."""
        first = self.plan.tasks[0]
        answer = first.prompts[0][1], min(_MEMORY_TOKENS, first.max_new_tokens)
        peak = partial(measure_memory, self.runtime, self.target, self.draft, *answer)

        def make() -> dict[str, Any]:
            return {"alone_bytes": peak(), "with_draft_bytes": peak(Proposer("draft", k))}

        row: MemoryRow = self._row("memory", f"k{k}", MemoryRow, make)
        return row

    def _row(self, what: str, which: str, kind: Any, make: Callable[[], dict[str, Any] | None]) -> Any:
        """A row of this pair; `make` gives its other fields, or None for none."""
        name = f"units/{self.plan.runtime}-{what}-{'-'.join(self.weights)}-{which}.json"
        value, names = self.folder.keep(name, make), ("runtime", "target_weights", "draft_weights")
        pair = dict(zip(names, (self.plan.runtime, *self.weights), strict=True))
        return value and kind.from_json(pair | value)
