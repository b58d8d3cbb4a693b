"""Texts of the target that stand already: held-out rows of synthesize, or logs. A source of them is a task.

texts = GivenTexts(); texts.take(rows, context_length=4096); texts.rows["log", 0.6]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.logs import read_transcripts
from fastdraft.data.rows import SyntheticRow, ids_hash, read_columns, unit_paths, validation_keys
from fastdraft.decoding.replay import alike_places
from fastdraft.errors import DataError
from fastdraft.evaluation.tasks import EncodedTask
from fastdraft.functional.generation import Sampling
from fastdraft.modeling.vocabulary import Vocabulary
from fastdraft.recipe.evaluation import LoggedTexts
from fastdraft.run_folder import StageFolder

# Gives texts the log-probs of a model.
Score = Callable[[list[SyntheticRow], Sampling], list[SyntheticRow]]


@dataclass
class GivenTexts:
    """Rows by task and temperature, and how many were left out by reason."""

    rows: dict[tuple[str, float], list[SyntheticRow]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)

    def take(
        self,
        rows: Iterable[SyntheticRow],
        *,
        context_length: int,
        trained: Collection[str] = (),
        score: Score | None = None,
        greedy_draft: bool = False,
    ) -> None:
        """Sorts in the rows that serve; all others are counted.

        `trained` are hashes of prompts that the draft was trained on; `score` replaces log-probs by a
        model's; a greedy draft needs none.
        """
        seen: set[tuple[str, float, int, float]] = set()
        fitting: list[SyntheticRow] = []
        for row in rows:
            key = (row.row_id, row.temperature, row.top_k, row.top_p)
            if len(row.prompt_ids) + len(row.response_ids) > context_length:
                self.left_out["too_long"] += 1
            elif not row.response_ids:
                self.left_out["empty"] += 1
            elif ids_hash(row.prompt_ids) in trained:
                self.left_out["trained_on"] += 1
            elif key in seen:
                self.left_out["duplicate"] += 1
            else:
                fitting.append(row)
            seen.add(key)
        for row in _scored(fitting, score) if score else fitting:
            if row.is_replayable or greedy_draft:
                self.rows.setdefault((row.source, row.temperature), []).append(row)
            else:
                self.left_out["no_logprobs"] += 1
        self.rows = dict(sorted(self.rows.items()))
        if not self.rows:
            raise DataError(
                f"evaluate.texts: {self.told or 'no text at all'}; at least one text must serve",
                "set logprobs to processed (the server's) or target (by its weights); greedy text needs none",
            )

    def tasks(self) -> list[EncodedTask]:
        """Every source as a task, whatever the temperatures."""
        by_name: dict[str, list[SyntheticRow]] = {}
        for (name, _), rows in self.rows.items():
            by_name.setdefault(name, []).extend(rows)
        found = []
        for name, rows in by_name.items():
            names, longest = [row.row_id for row in rows], max(len(row.response_ids) for row in rows)
            found.append(EncodedTask(name, names, [row.prompt_ids for row in rows], longest))
        return found

    @property
    def told(self) -> str:
        """What was left out, for the user; empty for nothing."""
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))


def trained_prompts(synthesize: StageFolder) -> frozenset[str]:
    """Hashes of the prompts, those of later turns too, whose answers the draft was aligned on."""
    rows: list[tuple[str, str]] = []  # rows of a conversation share the key of its first turn
    for path in unit_paths(synthesize):
        columns = read_columns(path, ["prompt_key", "prompt_ids"])
        rows += zip(columns["prompt_key"], map(ids_hash, columns["prompt_ids"]), strict=True)
    held_out = validation_keys([key for key, _ in rows])
    return frozenset(own for key, own in rows if key not in held_out)


def logged_rows(
    log: LoggedTexts, chat: ChatTemplate, vocabulary: Vocabulary, seed: int, left_out: Counter[str]
) -> tuple[list[SyntheticRow], str]:
    """A log's answers as rows, and what the user should know of how they were read; those of no use are
    counted in `left_out`.
    """
    read = read_transcripts(log, chat, vocabulary, seed, shuffled=False)
    left_out.update({reason: count for reason, count in read.refused.items() if count})
    rows = []
    for transcript in read.rows:
        if transcript.generation.fault:
            left_out[transcript.generation.fault] += 1
        else:
            row = SyntheticRow.of(transcript.generation, log.name, transcript.sampling)
            rows.append(replace(row, prompt_key=transcript.key or row.prompt_key))
    return rows, read.note


def _scored(rows: list[SyntheticRow], score: Score) -> list[SyntheticRow]:
    """The same rows with a model's log-probs, in order."""
    found = list(rows)
    for places in alike_places((row.temperature, row.top_k, row.top_p) for row in rows):
        first = rows[places[0]]
        sampling = Sampling(first.temperature, first.top_k, first.top_p)
        for place, row in zip(places, score([rows[i] for i in places], sampling), strict=True):
            found[place] = row
    return found
