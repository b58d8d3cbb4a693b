"""Shows what align really trains on: rows of its batches, read back from the tensors that go through the draft.

Decides that a token counts as trained only where the batch holds it as a label (nothing is worked out again from prompts and
templates), that the steps shown are spread over the whole training, and that one row of the pre-training mixture is among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft.console import Console
from fastdraft.errors import FastDraftError
from fastdraft.recipe.recipe import Recipe
from fastdraft.run_folder import RunFolder
from fastdraft.stages.context import StageContext

if TYPE_CHECKING:
    from fastdraft.training.batches import Batch, BatchSource


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch as the draft reads it."""

    about: str
    token_ids: list[int]
    """The inputs without padding, and behind them the last token, which is only predicted."""
    trained: list[bool]
    """For each of these, whether it is a label."""


def align_rows(run: Path, recipe: Recipe, count: int, console: Console) -> list[BatchRow]:
    """Up to `count` rows of align's batches.

    Raises:
        RecipeError: when the recipe has no such stage. FastDraftError: when what it builds on has not finished.
        FastDraftError: when a row has no trained token.
    """
    from fastdraft.stages.align import training_batches

    context = StageContext(RunFolder(run), recipe.run, recipe.target, recipe.sections(), console)
    source = training_batches(context.section("align"), context)
    return list(spread_batch_rows(source, count))


def spread_batch_rows(source: BatchSource, count: int) -> Iterator[BatchRow]:
    """One row each of up to `count` steps at even distances; the last is a packed one where there are any.

    Raises:
        FastDraftError: when a row has no trained token.
    """
    count = min(count, source.steps)
    steps = [i * source.steps // count for i in range(count)]
    packed = next((step for step in range(source.steps) if source.is_packed(step)), None)
    if count > 1 and packed is not None and not any(map(source.is_packed, steps)):
        steps[-1] = packed
    for number, step in enumerate(steps):
        batches = source.batches(step)
        rows = [(batch, place) for batch in batches for place in range(len(batch.input_ids))]
        chosen = number * 7 % len(rows)  # not always the longest, which stands first
        kind = "pre-training mixture" if source.is_packed(step) else "responses"
        yield batch_row(
            *rows[chosen], f"step {step + 1} of {source.steps}, row {chosen + 1} of {len(rows)}, {kind}"
        )


def batch_row(batch: Batch, place: int, about: str) -> BatchRow:
    """Row `place` of a micro-batch.

    Raises:
        FastDraftError: when it has no trained token.
    """
    length = batch.input_ids.shape[1]
    inputs = batch.input_ids[place].tolist()
    everywhere = range(batch.input_ids.numel())
    index = batch.index.tolist() if batch.index is not None else everywhere
    labels = {
        at % length: label
        for at, label in zip(index, batch.labels.tolist(), strict=True)
        if at // length == place
    }
    if not labels:
        rule = "every row must have trained tokens"
        raise FastDraftError(
            about,
            "0 % trained tokens",
            rule,
            "look at the rows with `fastdraft preview RUN`, then redo synthesize",
        )
    last = max(labels)  # padding stands behind the last label
    return BatchRow(about, [*inputs[: last + 1], labels[last]], [at - 1 in labels for at in range(last + 2)])
