"""Shows rows as text, trained tokens in colour: what the target wrote, or align's own batches.

`fastdraft preview runs/demo`. A token counts as trained where the batch holds it as a label.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, read_columns, read_rows, unit_paths
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder, StageFolder
from fastdraft.stages.align import training_batches
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.training.batches import Batch, BatchSource

_DIM, _GREEN, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"
# Characters of a text that would move the cursor or change the colours of a terminal; they are written out.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class PreviewRow:
    """One row as the draft reads it."""

    about: str
    token_ids: list[int]
    trained: list[bool]  # for each of these, whether it is a label


def run(
    run: Path,
    count: int = 5,
    console: Console | None = None,
    stage: Literal["synthesize", "align"] = "synthesize",
) -> None:
    """Prints `count` rows of a run to stdout; a run that is still writing shows what it has."""
    if count < 1:
        raise RecipeError(f"--count: {count}; must be at least 1", "for example --count 5")
    if not (run / "recipe.yaml").is_file():
        raise RecipeError(f"{run}: no recipe.yaml; must be the folder of a run", "give one such as runs/demo")
    console, recipe = console or Console(quiet=True), load_recipe(str(run / "recipe.yaml"))
    context = StageContext(RunFolder(run), recipe.run, Target(recipe.target), recipe.sections(), console)
    if stage == "align":
        rows = list(spread_batch_rows(training_batches(context.section("align"), context), count))
    else:
        rows = [preview_row(row) for row in spread_rows(context.folder("synthesize"), count)]
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    console.say("trained tokens are " + ("green" if colour else "between [[ and ]]"))
    for row in rows:
        print(format_row(row, context.target.tokenizer, colour))


def spread_rows(folder: StageFolder, count: int) -> list[SyntheticRow]:
    """Up to `count` rows at even distances over all units."""
    ends, paths = [0], unit_paths(folder)
    for path in paths:
        ends.append(ends[-1] + len(read_columns(path, ["row_id"])["row_id"]))
    total = ends[-1]
    if not total:
        raise FastDraftError(f"{folder.path}: no synthetic rows", "run `fastdraft synthesize RECIPE` first")
    wanted = [i * total // min(count, total) for i in range(min(count, total))]
    found: list[SyntheticRow] = []
    for path, start, end in zip(paths, ends, ends[1:], strict=False):
        if places := [place - start for place in wanted if start <= place < end]:
            rows = read_rows(path)
            found += [rows[place] for place in places]
    return found


def preview_row(row: SyntheticRow) -> PreviewRow:
    """A row that the target wrote."""
    prompt, response = row.prompt_ids, row.response_ids
    drawn = f"{row.source}, temperature {row.temperature:g}, {row.finish_reason}"
    about = f"{drawn}, {len(prompt)} + {len(response)} tokens"
    return PreviewRow(about, [*prompt, *response], [False] * len(prompt) + [True] * len(response))


def spread_batch_rows(source: BatchSource, count: int) -> Iterator[PreviewRow]:
    """One row each of up to `count` steps at even distances; the last is a packed one where there are any."""
    count = min(count, source.steps)
    steps = [i * source.steps // count for i in range(count)]
    packed = next((step for step in range(source.steps) if source.is_packed(step)), None)
    if count > 1 and packed is not None and not any(map(source.is_packed, steps)):
        steps[-1] = packed
    for number, step in enumerate(steps):
        rows = [(batch, place) for batch in source.batches(step) for place in range(len(batch.input_ids))]
        chosen = number * 7 % len(rows)  # not always the longest, which stands first
        kind = "pre-training mixture" if source.is_packed(step) else "responses"
        about = f"step {step + 1} of {source.steps}, row {chosen + 1} of {len(rows)}, {kind}"
        yield batch_row(*rows[chosen], about)


def batch_row(batch: Batch, place: int, about: str) -> PreviewRow:
    """Row `place` of a micro-batch: its inputs without padding, then the last token, only predicted."""
    length = batch.input_ids.shape[1]
    inputs = batch.input_ids[place].tolist()
    index = batch.index.tolist() if batch.index is not None else range(batch.input_ids.numel())
    pairs = zip(index, batch.labels.tolist(), strict=True)
    labels = {at % length: label for at, label in pairs if at // length == place}
    last = max(labels, default=length - 1)  # padding stands behind the last label
    ids = [*inputs[: last + 1], *([labels[last]] if labels else [])]
    return PreviewRow(about, ids, [at - 1 in labels for at in range(len(ids))])


def format_row(row: PreviewRow, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """One row as text, special tokens written out; neighbours of the same kind are decoded together."""
    trained, before, after = sum(row.trained), *((_GREEN, _RESET) if colour else ("[[", "]]"))
    if not trained:
        fix = "look at the rows with `fastdraft preview RUN`, then redo synthesize"
        raise FastDraftError(f"{row.about}: 0 % trained tokens; every row must have some", fix)
    share = f"{trained} of {len(row.token_ids)} tokens trained ({trained / len(row.token_ids):.0%})"
    parts = [f"--- {row.about}, {share}\n"]
    for is_trained, places in itertools.groupby(range(len(row.token_ids)), key=row.trained.__getitem__):
        ids = [row.token_ids[place] for place in places]
        text = str(tokenizer.decode(ids, skip_special_tokens=False))
        text = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
        parts.append(f"{before}{text}{after}" if is_trained else f"{_DIM}{text}{_RESET}" if colour else text)
    return "".join(parts) + "\n"
