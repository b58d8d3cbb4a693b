"""Which loss aligns a draft best? Aligns once with each, at equal tokens, from one checkpoint; then replays.

    python benchmarks/losses_compared.py runs/starter --out runs/losses --tokens 400k

Takes a finished run (its pre-trained draft, the target's responses, the texts that evaluate wrote), which is
only read. For each loss it runs the stage align with the run's own settings but for the objective and the
budget, and replays the draft over the run's evaluation texts: both rates of each task with 95 % bootstrap
intervals over prompts, and the paired difference to cross-entropy. `start` is the draft before alignment. The
same command goes on after a kill. Writes OUT/losses.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from machine import table
from numpy.typing import NDArray

from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, read_rows
from fastdraft.evaluation.work import replay_texts
from fastdraft.functional.intervals import difference_interval, ratio_interval
from fastdraft.modeling.drafts import load_draft
from fastdraft.recipe.base import parse_count
from fastdraft.recipe.recipe import load_recipe
from fastdraft.recipe.training import TokenLossName
from fastdraft.run_folder import RunFolder, StageFolder, read_json, write_json
from fastdraft.stages import align
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

START, BASE, POOLED = "start", "ce", "all tasks"
LOSSES = (BASE, *get_args(TokenLossName))
RATES = {"acceptance_rate": (2, 1), "block_efficiency": (4, 0)}  # columns of `counts_to_array`: part, whole
TOLD = ("tokens", "trained_tokens", "steps", "best_step", "seconds", "train_loss", "validation_loss")
Place = tuple[str, float]
"""Task, temperature."""
Tables = dict[Place, NDArray[np.float64]]
"""Expected counts of every prompt."""


@dataclass(frozen=True)
class Branch(RunFolder):
    """A run that borrows all stages but its `own` from the run in `source`, and writes nothing there."""

    source: Path
    own: tuple[str, ...] = ("align",)

    def folder(self, name: str) -> StageFolder:
        return StageFolder((self.root if name in self.own else self.source) / name)


def options(description: str | None) -> argparse.ArgumentParser:
    """What every comparison is given."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    add = parser.add_argument
    add("run", type=Path, help="folder of a finished run, only read")
    add("--out", type=Path, required=True, help="folder of the comparison")
    add("--k", type=int, default=3, help="num_speculative_tokens of the replay")
    add("--prompts", type=int, default=0, help="of each task, from the front; 0: all")
    add("--threads", type=int, default=0, help="CPU threads; 0: the run's own")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="recipe overrides, such as align's rates")
    return parser


def compare(given: argparse.Namespace, name: str, contenders: str, work: Callable[..., None]) -> None:
    """`work(given, path, settings, console)` in OUT, which holds the comparison of these settings alone.

    More `contenders` may come later. `work` writes the file anew after each, so that a killed comparison
    shows what it has.
    """
    console, path = Console(), given.out / name
    settings = {key: str(value) for key, value in vars(given).items() if key not in (contenders, "out")}
    with console.stop.listen(), RunFolder(given.out).lock():
        if path.exists() and read_json(path)["settings"] != settings:
            raise SystemExit(f"{path}: holds a comparison with other settings; use another --out")
        work(given, path, settings, console)


def main() -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--tokens", type=parse_count, default=400_000, help="of synthetic text for each loss (400k)")
    add("--losses", nargs="+", choices=LOSSES, default=LOSSES, help="default: all; ce always comes first")
    add("--source", choices=("target", "stored"), default="target", help="of the target's distributions")
    compare(parser.parse_args(), "losses.json", "losses", compare_losses)


def compare_losses(given: argparse.Namespace, path: Path, settings: dict[str, str], console: Console) -> None:
    texts = read_texts(given.run / "evaluate/generations", given.prompts or None)
    training: dict[str, dict[str, Any]] = {}
    found: dict[str, Tables] = {}
    for loss in (START, BASE, *(loss for loss in given.losses if loss != BASE)):
        console.say(loss)
        context = context_of(given, loss, console)
        folder, config = context.folder("align"), context.section("align")
        draft = align.start(context)[0]
        if loss != START:
            folder.begin(align.fingerprint(config, context))
            if not folder.is_complete():
                align.run(config, context)
            draft = folder.path / "checkpoint"
            training[loss] = {name: folder.manifest()[name] for name in TOLD}
        found[loss] = replay(given, loss, draft, texts, context)
        base = found.get(BASE, {})
        rows = [row_of(name, at, one[at], base.get(at)) for name, one in found.items() for at in one]
        write_json(path, {"schema": 1, "settings": settings, "training": training, "rows": rows})
    show(rows)


def context_of(given: argparse.Namespace, loss: str, console: Console) -> StageContext:
    """The run's recipe with this loss and budget, in a branch of the run."""
    kind: dict[str, str] = {"kind": "token_kd", "loss": loss, "source": given.source}
    objective = {"kind": "sequence_kd"} if loss in (START, BASE) else kind
    own = [f"align.tokens={given.tokens}", f"align.objective={json.dumps(objective)}", *given.set]
    own += [f"run.threads={given.threads}"] if given.threads else []
    recipe, branch = load_recipe(str(given.run / "recipe.yaml"), own), Branch(given.out / loss, given.run)
    return StageContext(branch, recipe.run, Target(recipe.target), recipe.sections(), console)


def read_texts(folder: Path, prompts: int | None) -> dict[Place, list[SyntheticRow]]:
    """What the target wrote for the evaluation, by task and temperature."""
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        task, _, temperature = path.stem.rpartition("-")
        found[task, float(temperature)] = read_rows(path)[:prompts]
    if not found:
        raise SystemExit(f"{folder}: no evaluation texts: run the run's stage evaluate first")
    return found


def replay(
    given: argparse.Namespace,
    loss: str,
    folder: Path,
    texts: dict[Place, list[SyntheticRow]],
    context: StageContext,
) -> Tables:
    """The counts of every prompt, by task and temperature, each in a file of its own; and all tasks
    together.
    """
    draft, kept, tables = load_draft(folder), StageFolder(given.out / loss), {}
    for (task, temperature), rows in texts.items():

        def count(rows: list[SyntheticRow] = rows) -> Any:
            return replay_texts(draft, rows, [given.k], context.target.vocabulary).by_k[0].tolist()

        name = f"replay/{task}-{temperature:g}-k{given.k}-n{len(rows)}.json"
        tables[task, temperature] = np.array(kept.keep(name, count))
        context.console.stop.check(given.out)
    for temperature in sorted({place[1] for place in texts}):
        own = [tables[place] for place in texts if place[1] == temperature]
        tables[POOLED, temperature] = np.concatenate(own)
    return tables


def row_of(
    loss: str, place: Place, table: NDArray[np.float64], base: NDArray[np.float64] | None, seed: int = 0
) -> dict[str, Any]:
    """Both rates of a task with intervals, and their paired differences to cross-entropy."""
    row = {"loss": loss, "task": place[0], "temperature": place[1], "num_prompts": len(table)}
    for name, columns in RATES.items():
        part, whole = (table[:, column] for column in columns)
        row[name] = float(part.sum() / whole.sum())
        row[f"{name}_low"], row[f"{name}_high"] = map(float, ratio_interval(part, whole, seed))
        if base is not None:
            before = base[:, columns[0]], base[:, columns[1]]
            low, high = difference_interval(before, (part, whole), seed)
            row[f"{name}_change"] = row[name] - float(before[0].sum() / before[1].sum())
            row |= {f"{name}_change_low": float(low), f"{name}_change_high": float(high)}
    return row


def show(rows: list[dict[str, Any]]) -> None:
    cells = []
    for row in (row for row in rows if row["task"] == POOLED):
        cells.append([row["loss"], f"{row['temperature']:g}"])
        for name in RATES:
            cells[-1].append(
                "{:.3f} [{:.3f}, {:.3f}]".format(*(row[name + end] for end in ("", "_low", "_high")))
            )
            ends = [row.get(f"{name}_change{end}") for end in ("", "_low", "_high")]
            cells[-1].append("-" if None in ends else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends))
    columns = ["acceptance rate", "change", "block efficiency", "change"]
    print(table(["loss", "temperature", *columns], cells))


if __name__ == "__main__":
    main()
