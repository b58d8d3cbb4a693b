"""Which loss aligns a draft best? Trains align once with each, from one checkpoint, on one run's text, at equal tokens; then replays.

Takes a finished run (its pre-trained draft, the target's responses, the texts that evaluate wrote), which is only read. For each
loss it runs the stage align with the run's own settings but for the objective and the budget, and replays the draft over the run's
evaluation texts: acceptance rate and block efficiency of each task, with 95 % bootstrap intervals over prompts, and the difference
to cross-entropy on the same prompts drawn together. `start` is the draft before alignment. Work that stands is not done again: the
same command goes on after a kill, and takes in more losses later. Writes OUT/losses.md and OUT/losses.json.

    python benchmarks/losses_compared.py runs/starter --out runs/losses --tokens 400k
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fastdraft.console import Console, format_count, format_seconds
from fastdraft.data.rows import SyntheticRow, read_rows
from fastdraft.evaluation.work import replay_texts
from fastdraft.functional.acceptance import tidy
from fastdraft.functional.intervals import difference_interval, ratio_interval
from fastdraft.modeling.drafts import load_draft
from fastdraft.recipe.base import parse_count
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.recipe.training import TokenLossName
from fastdraft.run_folder import RunFolder, StageFolder, read_json, write_atomic, write_json
from fastdraft.stages import align
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

START, BASE, POOLED = "start", "ce", "all tasks"
LOSSES = (BASE, *get_args(TokenLossName))
RATES = {"acceptance_rate": (2, 1), "block_efficiency": (4, 0)}
"""Name -> columns of `counts_to_array`: part, whole."""
TOLD = (
    "tokens",
    "trained_tokens",
    "steps",
    "best_step",
    "seconds",
    "train_loss",
    "validation_loss",
    "validation_block_efficiency",
)
"""Of align's manifest."""
Table = NDArray[np.float64]
Place = tuple[str, float]
"""Task, temperature."""


@dataclass(frozen=True)
class Branch(RunFolder):
    """A run that borrows every stage but align from the run in `source`, and writes nothing there."""

    source: Path

    def folder(self, name: str) -> StageFolder:
        return StageFolder((self.root if name == "align" else self.source) / name)


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and where it is kept."""

    run: Path
    out: Path
    tokens: int
    source: str
    num_speculative_tokens: int
    prompts: int
    threads: int
    overrides: tuple[str, ...] = ()

    def context(self, loss: str, console: Console) -> StageContext:
        """The run's recipe with this loss and budget, in a branch of the run."""
        objective = (
            {"kind": "sequence_kd"}
            if loss in (START, BASE)
            else {"kind": "token_kd", "loss": loss, "source": self.source}
        )
        own = [f"align.tokens={self.tokens}", f"align.objective={json.dumps(objective)}", *self.overrides]
        recipe: Recipe = load_recipe(
            str(self.run / "recipe.yaml"), [*own, *([f"run.threads={self.threads}"] if self.threads else [])]
        )
        branch = Branch(self.out / loss, self.run)
        return StageContext(branch, recipe.run, Target(recipe.target), recipe.sections(), console)

    def texts(self) -> dict[Place, list[SyntheticRow]]:
        """What the target wrote for the evaluation, by task and temperature."""
        found = {}
        for path in sorted((self.run / "evaluate/generations").glob("*.parquet")):
            task, _, temperature = path.stem.rpartition("-")
            found[task, float(temperature)] = read_rows(path)[: self.prompts or None]
        if not found:
            raise SystemExit(f"{self.run}: no evaluation texts: run its stage evaluate first")
        return found


def train(comparison: Comparison, loss: str, console: Console) -> Path:
    """The aligned draft's folder; finished work is left alone."""
    context = comparison.context(loss, console)
    artifact, config = context.folder("align"), context.section("align")
    if loss == START:
        return align.start(context)[0]
    artifact.begin(align.fingerprint(config, context))
    if not artifact.is_complete():
        align.run(config, context)
    return artifact.path / "checkpoint"


def replay(comparison: Comparison, loss: str, folder: Path, console: Console) -> dict[Place, Table]:
    """Expected counts of every prompt; each task and temperature is kept in a file of its own."""
    vocabulary, texts = comparison.context(loss, console).target.vocabulary, comparison.texts()
    draft, k, kept = load_draft(folder), comparison.num_speculative_tokens, StageFolder(comparison.out / loss)

    def write(path: Path, table: Table) -> None:
        with open(path, "wb") as file:
            np.save(file, table, allow_pickle=False)

    tables = {}
    with console.progress(f"replay {loss}", len(texts), "tasks") as progress:
        for (task, temperature), rows in texts.items():
            tables[task, temperature] = kept.keep(
                f"replay/{task}-{temperature:g}-k{k}-n{len(rows)}.npy",
                lambda rows=rows: replay_texts(draft, rows, [k], vocabulary).by_k[0],  # type: ignore[misc]
                read=np.load,
                write=write,
            )
            progress.advance()
            console.stop.check(comparison.out)
    return tables


def with_pooled(tables: dict[Place, Table]) -> dict[Place, Table]:
    """The tables and, for each temperature, all prompts of all tasks together."""
    temperatures = sorted({temperature for _, temperature in tables})
    pooled = {
        (POOLED, t): np.concatenate([table for place, table in tables.items() if place[1] == t])
        for t in temperatures
    }
    return {**tables, **pooled}


def rows_of(
    loss: str, tables: dict[Place, Table], base: dict[Place, Table] | None, seed: int = 0
) -> list[dict[str, Any]]:
    """One row for each task and temperature: both rates with intervals, and their paired differences to cross-entropy."""
    rows = []
    for (task, temperature), table in tables.items():
        row: dict[str, Any] = {
            "loss": loss,
            "task": task,
            "temperature": temperature,
            "num_prompts": len(table),
        }
        for name, columns in RATES.items():
            part, whole = (table[:, column] for column in columns)
            low, high = ratio_interval(part, whole, seed)
            row |= {
                name: tidy(part.sum() / whole.sum()),
                f"{name}_low": tidy(low),
                f"{name}_high": tidy(high),
            }
            if base is not None:
                other = base[task, temperature]
                before = other[:, columns[0]], other[:, columns[1]]
                low, high = difference_interval(before, (part, whole), seed)
                change = part.sum() / whole.sum() - before[0].sum() / before[1].sum()
                row |= {
                    f"{name}_change": tidy(change),
                    f"{name}_change_low": tidy(low),
                    f"{name}_change_high": tidy(high),
                }
        rows.append(row)
    return rows


def page(report: dict[str, Any]) -> str:
    """The tables as Markdown: one for each rate and temperature, losses down, tasks across."""
    settings, rows = report["settings"], report["rows"]
    parts = [
        f"Each loss trained on {format_count(settings['tokens'])} tokens of synthetic text from the same checkpoint (the target's "
        f"distribution: {settings['source']}); replay at K = {settings['num_speculative_tokens']}, 95 % bootstrap intervals over "
        f"prompts. Bold: the paired interval of the difference to `{BASE}` excludes 0."
    ]
    for temperature in sorted({row["temperature"] for row in rows}):
        for name in RATES:
            chosen = [row for row in rows if row["temperature"] == temperature]
            tasks = list(dict.fromkeys(row["task"] for row in chosen))
            cells = {(row["loss"], row["task"]): _cell(row, name) for row in chosen}
            head = f"| loss | {' | '.join(tasks)} | change over all |\n|{'---|' * (len(tasks) + 2)}"
            lines = [
                f"| {loss} | {' | '.join(cells[loss, task] for task in tasks)} | {_change(chosen, loss, name)} |"
                for loss in dict.fromkeys(row["loss"] for row in chosen)
            ]
            parts.append(
                f"## {name.replace('_', ' ').capitalize()}, temperature {temperature:g}\n\n"
                + "\n".join([head, *lines])
            )
    trained = [
        f"| {loss} | {format_count(found['tokens'])} | {found['best_step']} of {found['steps']} | {format_seconds(found['seconds'])} |"
        for loss, found in report["training"].items()
    ]
    parts.append(
        "## Training\n\n" + "\n".join(["| loss | tokens | best step | time |\n|---|---|---|---|", *trained])
    )
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any], name: str) -> str:
    digits = 3 if name == "acceptance_rate" else 2
    text = f"{row[name]:.{digits}f}"
    text = f"**{text}**" if _is_sure(row, name) else text
    return f"{text} [{row[f'{name}_low']:.{digits}f}, {row[f'{name}_high']:.{digits}f}]"


def _is_sure(row: dict[str, Any], name: str) -> bool:
    low, high = row.get(f"{name}_change_low"), row.get(f"{name}_change_high")
    return low is not None and high is not None and (low > 0 or high < 0)


def _change(rows: Sequence[dict[str, Any]], loss: str, name: str) -> str:
    row = next(row for row in rows if row["loss"] == loss and row["task"] == POOLED)
    if row.get(f"{name}_change") is None or loss == BASE:
        return "-"
    return (
        f"{row[f'{name}_change']:+.3f} [{row[f'{name}_change_low']:+.3f}, {row[f'{name}_change_high']:+.3f}]"
    )


def compare(comparison: Comparison, losses: Sequence[str], console: Console) -> dict[str, Any]:
    """Everything that `losses.json` holds; written anew after each loss, so that a killed comparison shows what it has."""
    tables: dict[str, dict[Place, Table]] = {}
    training: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {}
    for number, loss in enumerate(losses, 1):
        begin = time.monotonic()
        console.say(f"{loss} ({number} of {len(losses)})")
        tables[loss] = with_pooled(replay(comparison, loss, train(comparison, loss, console), console))
        if loss != START:
            manifest = comparison.context(loss, console).folder("align").manifest()
            training[loss] = {name: manifest[name] for name in TOLD}
        rows = [row for name, table in tables.items() for row in rows_of(name, table, tables.get(BASE))]
        settings = {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(comparison).items()
        }
        report = {"schema": 1, "settings": settings, "training": training, "rows": rows}
        write_json(comparison.out / "losses.json", report)
        write_atomic(comparison.out / "losses.md", page(report))
        console.say(f"{loss}: {format_seconds(time.monotonic() - begin)}")
    return report


def check_settings(comparison: Comparison) -> None:
    """Results of other settings are not mixed in."""
    path = comparison.out / "losses.json"
    if path.exists():
        before = read_json(path)["settings"]
        wanted = json.loads(
            json.dumps({name: str(v) if isinstance(v, Path) else v for name, v in vars(comparison).items()})
        )
        changed = [
            f"{name} ({before.get(name)} -> {value})"
            for name, value in wanted.items()
            if before.get(name) != value
        ]
        if changed:
            raise SystemExit(
                f"{comparison.out}: holds a comparison with other settings: {'; '.join(changed)}; use another --out"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run, only read")
    parser.add_argument("--out", type=Path, required=True, help="folder of the comparison")
    parser.add_argument(
        "--tokens",
        type=parse_count,
        default=400_000,
        help="input tokens of synthetic text for each loss (400k)",
    )
    parser.add_argument(
        "--losses",
        nargs="+",
        choices=LOSSES,
        default=list(LOSSES),
        help="default: all; ce always comes first",
    )
    parser.add_argument(
        "--source", choices=("target", "stored"), default="target", help="of the target's distributions"
    )
    parser.add_argument("--k", type=int, default=3, help="num_speculative_tokens of the replay")
    parser.add_argument("--prompts", type=int, default=0, help="of each task, from the front; 0: all")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the run's own")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="recipe overrides, such as align.pretraining_share=0",
    )
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    comparison = Comparison(
        given.run,
        given.out,
        given.tokens,
        given.source,
        given.k,
        given.prompts,
        given.threads,
        tuple(given.set),
    )
    console = Console(quiet=given.quiet)
    losses = [START, BASE, *(loss for loss in given.losses if loss != BASE)]
    with console.stop.listen(), RunFolder(comparison.out).lock():
        check_settings(comparison)
        print(page(compare(comparison, losses, console)))


if __name__ == "__main__":
    main()
