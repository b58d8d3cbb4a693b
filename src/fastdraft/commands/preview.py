"""Shows rows as text, in colour the tokens that the draft is trained on: what the target wrote, or align's batches.

Decides that the rows are spread evenly over what was written, that without a terminal the trained part stands between
marks instead of in colour, and that a row without trained tokens is an error. Boundaries are those of the rows' own token ids, the
very ones that training uses.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fastdraft.commands.preview_batches import BatchRow, align_rows
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, read_columns, read_rows, unit_paths
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder, StageFolder
from fastdraft.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIM, _GREEN, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"
_MARKS = ("[[", "]]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters of a text that would move the cursor or change the colours of a terminal; they are written out."""


def run(
    run: Path,
    count: int = 5,
    console: Console | None = None,
    stage: Literal["synthesize", "align"] = "synthesize",
) -> None:
    """Prints `count` rows of a run to stdout; a run that is still writing shows what it has.

    Args:
        run: The run's folder.
        count: Rows to show.
        stage: synthesize shows what the target wrote, align the rows of its training batches as the draft reads them.
        console: Where news go.

    Raises:
        FastDraftError: when the folder is no run's, or the run has no synthetic rows yet.
        RecipeError: when `count` is below 1. FastDraftError: when a row has no trained token.
    """
    if count < 1:
        raise RecipeError("--count", count, "must be at least 1", "for example --count 5")

    if not (run / "recipe.yaml").is_file():
        raise FastDraftError(
            run, "has no recipe.yaml", "must be the folder of a run", "give a folder such as runs/demo"
        )
    console, recipe = console or Console(quiet=True), load_recipe(str(run / "recipe.yaml"))
    written = spread_rows(RunFolder(run).folder("synthesize"), count)
    batched = align_rows(run, recipe, count, console) if stage == "align" else []
    tokenizer = Target(recipe.target).tokenizer
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    console.say("trained tokens are " + ("green" if colour else f"between {_MARKS[0]} and {_MARKS[1]}"))
    shown = [format_batch_row(row, tokenizer, colour) for row in batched] or [
        format_row(row, tokenizer, colour) for row in written
    ]
    for text in shown:
        print(text)


def spread_rows(artifact: StageFolder, count: int) -> list[SyntheticRow]:
    """Up to `count` rows at even distances over all units.

    Raises:
        FastDraftError: when there is no row.
    """
    paths = unit_paths(artifact)
    sizes = [len(read_columns(path, ["row_id"])["row_id"]) for path in paths]
    total = sum(sizes)
    if not total:
        raise FastDraftError(
            artifact.path,
            "no synthetic rows",
            "the synthesize stage must have written some",
            "run `fastdraft synthesize RECIPE`",
        )
    wanted = [i * total // min(count, total) for i in range(min(count, total))]
    found: list[SyntheticRow] = []
    start = 0
    for path, size in zip(paths, sizes, strict=True):
        places = [place - start for place in wanted if start <= place < start + size]
        if places:
            rows = read_rows(path)
            found += [rows[place] for place in places]
        start += size
    return found


def format_row(row: SyntheticRow, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """One row as text, special tokens written out.

    Raises:
        FastDraftError: when it has no trained token.
    """
    facts = f"{row.source}, temperature {row.temperature:g}, {row.finish_reason}, {len(row.prompt_ids)} + {len(row.response_ids)} tokens"
    if not row.response_ids:
        raise FastDraftError(
            f"row {row.row_id}", "0 % trained tokens", "every row must have a response", "redo synthesize"
        )
    trained = [False] * len(row.prompt_ids) + [True] * len(row.response_ids)
    return _coloured(facts, [*row.prompt_ids, *row.response_ids], trained, tokenizer, colour)


def format_batch_row(row: BatchRow, tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    """One row of a batch as text, special tokens written out."""
    return _coloured(row.about, row.token_ids, row.trained, tokenizer, colour)


def _coloured(
    facts: str, ids: Sequence[int], trained: Sequence[bool], tokenizer: PreTrainedTokenizerBase, colour: bool
) -> str:
    """Neighbours of the same kind are decoded together."""
    before, after = (_GREEN, _RESET) if colour else _MARKS
    parts = [f"--- {facts}, {sum(trained)} of {len(ids)} tokens trained ({sum(trained) / len(ids):.0%})\n"]
    for is_trained, places in itertools.groupby(range(len(ids)), key=trained.__getitem__):
        text = _text(tokenizer, [ids[place] for place in places])
        parts.append(f"{before}{text}{after}" if is_trained else f"{_DIM}{text}{_RESET}" if colour else text)
    return "".join(parts) + "\n"


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False))
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
