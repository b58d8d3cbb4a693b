"""Texts of the target that stand already, as an evaluation takes them: held-out rows of synthesize, or logs.

Decides which of them serve (they fit every context; their log-probs are known, unless the draft proposes greedily, for which
none are needed; the draft was not trained on their prompts), that all others are counted, and that a source is a task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fastdraft.data.rows import SyntheticRow, ids_hash, read_all, read_columns, unit_paths, validation_keys
from fastdraft.data.transcripts import read_transcripts
from fastdraft.decoding.evaluation import as_row
from fastdraft.errors import DataError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.data import TranscriptLog
from fastdraft.recipe.evaluation import HeldOutTexts, LoggedTexts
from fastdraft.run_folder import StageFolder
from fastdraft.stages.context import StageContext

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.modeling.vocabulary import Vocabulary

Score = Callable[[list[Generation], Sampling], list[Generation]]
"""Gives texts the log-probs of a model."""


@dataclass
class StandingTexts:
    """Rows by task and temperature, and how many were left out by reason."""

    rows: dict[tuple[str, float], list[SyntheticRow]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, reason: str) -> None:
        """Counts one text that does not serve."""
        self.left_out[reason] = self.left_out.get(reason, 0) + 1

    @property
    def tasks(self) -> dict[str, list[SyntheticRow]]:
        """All rows of each task."""
        found: dict[str, list[SyntheticRow]] = {}
        for (task, _), rows in self.rows.items():
            found.setdefault(task, []).extend(rows)
        return found


def gather(
    texts: HeldOutTexts | LoggedTexts,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    *,
    greedy_draft: bool,
) -> StandingTexts:
    """The texts that a recipe names, sorted by task and temperature; tells which were left out.

    Args:
        texts: The recipe's `evaluate.texts`.
        context: Of the stage.
        tokenizer: The target's.
        context_length: Tokens that target and drafts can read.
        greedy_draft: The draft proposes its likeliest token, so that no log-prob is needed.

    Raises:
        FastDraftError: when held-out rows are wanted and synthesize has not finished.
        DataError: when no text serves.
    """

    found, trained = StandingTexts(), frozenset[str]()
    if isinstance(texts, HeldOutTexts):
        rows = list(read_all(context.require("synthesize"), "validation"))
    else:
        rows = logged_rows(texts, tokenizer, context.target.vocabulary, context.settings.seed, found)
        if context.has("synthesize") and context.folder("synthesize").is_complete():
            trained = trained_prompts(context.folder("synthesize"))
    score = _score(context) if texts.logprobs == "target" else None
    take(rows, found, context_length=context_length, trained=trained, score=score, greedy_draft=greedy_draft)
    if found.left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found.left_out.items()))
        hint = (
            "; sampled answers without log-probs count with evaluate.draft_temperature: 0"
            if "no_logprobs" in found.left_out
            else ""
        )
        context.console.say(f"texts left out: {reasons}{hint}")
    return found


def _score(context: StageContext) -> Score:
    """Gives texts the log-probs of the target's weights."""
    from functools import partial

    from fastdraft.decoding.scoring import score
    from fastdraft.modeling.drafts import pick_device

    return partial(score, context.target.model(pick_device(context.settings.device)))


def trained_prompts(synthesize: StageFolder) -> frozenset[str]:
    """Hashes of the prompts, those of later turns too, whose answers the draft was aligned on."""
    rows: list[
        tuple[str, str]
    ] = []  # key, and the prompt's own hash: rows of a conversation share the key of its first turn
    for path in unit_paths(synthesize):
        columns = read_columns(path, ["prompt_key", "prompt_ids"])
        rows += zip(columns["prompt_key"], map(ids_hash, columns["prompt_ids"]), strict=True)
    held_out = validation_keys([key for key, _ in rows])
    return frozenset(own for key, own in rows if key not in held_out)


def logged_rows(
    log: TranscriptLog,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    seed: int,
    texts: StandingTexts,
) -> list[SyntheticRow]:
    """A log's answers as rows; those of no use are counted in `texts`."""
    read = read_transcripts(log, tokenizer, vocabulary, seed, shuffled=False)
    for reason, count in read.refused.items():
        for _ in range(count):
            texts.leave_out(reason)
    rows = []
    for transcript in read.rows:
        if transcript.generation.fault:
            texts.leave_out(transcript.generation.fault)
        else:
            row = as_row(transcript.generation, transcript.sampling, log.name)
            rows.append(replace(row, prompt_key=transcript.key or row.prompt_key))
    return rows


def take(
    rows: Iterable[SyntheticRow],
    texts: StandingTexts,
    *,
    context_length: int,
    trained: Collection[str] = (),
    score: Score | None = None,
    greedy_draft: bool = False,
) -> StandingTexts:
    """Sorts the rows that serve into `texts`.

    Args:
        rows: In the order in which they are to be replayed.
        texts: Filled and returned.
        context_length: Tokens that target and drafts can read.
        trained: Hashes of prompts that the draft was trained on.
        score: Gives the rows a model's log-probs in place of their own.
        greedy_draft: The draft proposes its likeliest token, so that no log-prob is needed.

    Raises:
        DataError: when no row serves.
    """
    seen: set[tuple[str, float, int, float]] = set()
    fitting = []
    for row in rows:
        too_long = len(row.prompt_ids) + len(row.response_ids) > context_length
        reason = (
            "too_long"
            if too_long
            else "empty"
            if not row.response_ids
            else "trained_on"
            if ids_hash(row.prompt_ids) in trained
            else ""
        )
        key = (row.row_id, row.temperature, row.top_k, row.top_p)
        reason = reason or ("duplicate" if key in seen else "")
        seen.add(key)
        if reason:
            texts.leave_out(reason)
        else:
            fitting.append(row)
    for row in _scored(fitting, score) if score else fitting:
        if row.is_replayable or greedy_draft:
            texts.rows.setdefault((row.source, row.temperature), []).append(row)
        else:
            texts.leave_out("no_logprobs")
    texts.rows = dict(sorted(texts.rows.items(), key=lambda item: item[0]))
    if not texts.rows:
        found = (
            ", ".join(f"{count} {reason}" for reason, count in sorted(texts.left_out.items()))
            or "no text at all"
        )
        rule = "at least one text must serve"
        remedy = "log-probs come from the server (logprobs: processed) or from the weights (target); greedy text needs none"
        raise DataError("evaluate.texts", found, rule, remedy)
    return texts


def _scored(rows: list[SyntheticRow], score: Score) -> list[SyntheticRow]:
    """The same rows with a model's log-probs, in order."""
    found = list(rows)
    alike: dict[Sampling, list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(Sampling(row.temperature, row.top_k, row.top_p), []).append(place)
    for sampling, places in alike.items():
        texts = [
            Generation(
                rows[i].prompt_ids,
                rows[i].response_ids,
                rows[i].logprobs,
                "stop" if rows[i].finish_reason == "stop" else "length",
            )
            for i in places
        ]
        for place, scored in zip(places, score(texts, sampling), strict=True):
            found[place] = replace(rows[place], logprobs=scored.logprobs)
    return found
