"""Which start gives the most acceptance for its minutes? Designs and aligns once with each; then replays.

    python benchmarks/starts_compared.py runs/smollm2 --out runs/starts --minutes 10 \\
        --start 'random={draft: {kind: shape, hidden_size: 192, num_layers: 2, intermediate_size: 576}}' \\
        --start 'pruned={draft: {kind: pruned, layers: 3}, vocabulary: {kind: frequent, size: 8k}}'

Takes a finished run (its rows, the texts that evaluate wrote), which is only read. Each start is a section
`design` of a recipe; its draft is trained on the run's rows for so many minutes by the speed of its own steps,
measured first, and replayed over the run's evaluation texts. The first row, `run`, is the run's own draft, with
the minutes that its training took; the differences of the others to it are paired, with 95 % bootstrap
intervals over prompts. The same command goes on after a kill. Writes OUT/starts.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from losses_compared import POOLED, Branch, Tables, compare, options, read_texts, replay, row_of
from machine import table

from fastdraft.commands.recipe_for import training_speed
from fastdraft.console import Console
from fastdraft.modeling.drafts import set_threads
from fastdraft.pipeline import make_context
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder, StageFolder, write_json
from fastdraft.stages import align, design
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

BASE = "run"


def main() -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="of training, for each start (10)")
    add("--start", action="append", required=True, metavar="NAME=DESIGN", help="a section design, as YAML")
    compare(parser.parse_args(), "starts.json", "start", compare_starts)


def compare_starts(given: argparse.Namespace, path: Path, settings: dict[str, str], console: Console) -> None:
    starts = {name: yaml.safe_load(text) for name, _, text in (one.partition("=") for one in given.start)}
    texts = read_texts(given.run / "evaluate/generations", given.prompts or None)
    facts: dict[str, dict[str, Any]] = {}
    found: dict[str, Tables] = {}
    for name in (BASE, *starts):
        console.say(name)
        if name == BASE:
            recipe = load_recipe(str(given.run / "recipe.yaml"))
            context = StageContext(
                RunFolder(given.run), recipe.run, Target(recipe.target), recipe.sections(), console
            )
        else:
            context = train(given, name, starts[name], console)
        facts[name] = told(context)
        found[name] = replay(given, name, context.folder("align").path / "checkpoint", texts, context)
        rows = [row_of(start, at, one[at], found[BASE][at]) for start, one in found.items() for at in one]
        write_json(path, {"schema": 1, "settings": settings, "starts": starts, "facts": facts, "rows": rows})
    show(rows, facts)


def train(given: argparse.Namespace, name: str, section: dict[str, Any], console: Console) -> StageContext:
    """Designs and aligns in a branch of the run: as many tokens as the minutes hold, by its own speed."""
    kept = StageFolder(given.out / name)
    base = [f"design={json.dumps(section)}", "pretrain=", "continue_pretrain=", *given.set]
    base += [f"run.threads={given.threads}"] if given.threads else []

    def context(*more: str) -> StageContext:
        recipe = load_recipe(str(given.run / "recipe.yaml"), [*base, *more])
        made = make_context(recipe, console)
        return StageContext(
            Branch(given.out / name, given.run, ("design", "align")),
            recipe.run,
            made.target,
            made.sections,
            console,
        )

    first = context()
    set_threads(first.settings.threads)
    designed = design.plan(first.section("design"), first.target)
    speed = kept.keep("speed.json", lambda: training_speed(designed, first.section("align")))
    branch = context(f"align.tokens={max(10_000, int(given.minutes * 60 * speed))}")
    for stage, module in (("design", design), ("align", align)):
        folder, config = branch.folder(stage), branch.section(stage)
        folder.begin(module.fingerprint(config, branch))  # type: ignore[attr-defined]
        if not folder.is_complete():
            module.run(config, branch)  # type: ignore[attr-defined]
    return branch


def told(context: StageContext) -> dict[str, Any]:
    """What a draft reads for a token, and the minutes and tokens of its training."""
    shape = Target.at(context.folder("design").path / "draft").architecture
    stages = [name for name in ("pretrain", "continue_pretrain", "align") if context.has(name)]
    trained = [context.folder(name).manifest() for name in stages]
    return {
        "read_parameters": shape.read_parameters,
        "tokens": sum(one["tokens"] for one in trained),
        "minutes": sum(one["seconds"] for one in trained) / 60,
    }


def show(rows: list[dict[str, Any]], facts: dict[str, dict[str, Any]]) -> None:
    cells = []
    for row in rows:
        fact = facts[row["loss"]]
        if row["task"] == POOLED or row["temperature"] == 0:
            ends = [row[f"block_efficiency_change{end}"] for end in ("", "_low", "_high")]
            read, place = f"{fact['read_parameters'] / 1e6:.1f} M", f"{row['task']}, {row['temperature']:g}"
            cells.append([row["loss"], read, f"{fact['minutes']:.0f} min", f"{fact['tokens'] / 1e6:.2f} M"])
            cells[-1] += [place, f"{row['block_efficiency']:.2f}", "{:+.2f} [{:+.2f}, {:+.2f}]".format(*ends)]
    columns = ["start", "read", "training", "tokens", "task, temperature", "tokens per pass", "change"]
    print(table(columns, cells))


if __name__ == "__main__":
    main()
