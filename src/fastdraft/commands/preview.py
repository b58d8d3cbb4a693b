"""Shows synthetic rows as text: what the target was asked, and in colour the tokens that the draft is trained on.

Decides that the rows are spread evenly over what was written, and that without a terminal the trained part stands between
marks instead of in colour. Boundaries are those of the rows' own token ids, the very ones that training uses.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdraft.artifacts import Artifact, RunDirectory
from fastdraft.console import Console
from fastdraft.data.responses import SyntheticRow, read_columns, read_rows, unit_paths
from fastdraft.errors import ArtifactError, RecipeError
from fastdraft.recipe import load_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DIM, _GREEN, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"
_MARKS = ("[[", "]]")


def run(run: Path, count: int = 5, console: Console | None = None) -> None:
    """Prints `count` rows of a run to stdout; a run that is still writing shows what it has.

    Args:
        run: The run's folder.
        count: Rows to show.
        console: Where news go.

    Raises:
        ArtifactError: when the folder is no run's, or the run has no synthetic rows yet.
        RecipeError: when `count` is below 1.
    """
    if count < 1:
        raise RecipeError("--count", count, "must be at least 1", "for example --count 5")
    from fastdraft.modeling.loading import load_tokenizer

    if not (run / "recipe.yaml").is_file():
        raise ArtifactError(run, "has no recipe.yaml", "must be the folder of a run", "give a folder such as runs/demo")
    artifact = RunDirectory(run).artifact("synthesize")
    rows = spread_rows(artifact, count)
    target = load_recipe(str(run / "recipe.yaml")).target
    tokenizer = load_tokenizer(target.location, target.revision, target.trust_remote_code)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    (console or Console(quiet=True)).say("trained tokens are " + ("green" if colour else f"between {_MARKS[0]} and {_MARKS[1]}"))
    for row in rows:
        print(format_row(row, tokenizer, colour))


def spread_rows(artifact: Artifact, count: int) -> list[SyntheticRow]:
    """Up to `count` rows at even distances over all units.

    Raises:
        ArtifactError: when there is no row.
    """
    paths = unit_paths(artifact)
    sizes = [len(read_columns(path, ["row_id"])["row_id"]) for path in paths]
    total = sum(sizes)
    if not total:
        raise ArtifactError(
            artifact.path, "no synthetic rows", "the synthesize stage must have written some", "run `fastdraft synthesize RECIPE`"
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
    """One row as text, special tokens written out."""
    facts = f"{row.source}, temperature {row.temperature:g}, {row.finish_reason}, {len(row.prompt_ids)} + {len(row.response_ids)} tokens"
    prompt, response = _text(tokenizer, row.prompt_ids), _text(tokenizer, row.response_ids)
    if colour:
        return f"--- {facts}\n{_DIM}{prompt}{_RESET}{_GREEN}{response}{_RESET}\n"
    return f"--- {facts}\n{prompt}{_MARKS[0]}{response}{_MARKS[1]}\n"


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))
