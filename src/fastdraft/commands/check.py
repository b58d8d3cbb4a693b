"""`fastdraft check`: refuses the impossible and forecasts the rest, before anything is trained.

What it looks at, and a run looks at too before its first stage, stands in stages/inputs.py.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from dataclasses import asdict, dataclass

from fastdraft import forecast
from fastdraft.commands.expected import expected
from fastdraft.commands.stage_costs import StageCosts
from fastdraft.commands.verdicts import runtime_verdicts, verdict_table
from fastdraft.console import TABLE_WIDTH, Console, format_count, format_seconds, format_table
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.modeling.drafts import pick_device
from fastdraft.pipeline import make_context, refuse_changes
from fastdraft.recipe.recipe import Recipe
from fastdraft.run_folder import FINGERPRINT
from fastdraft.runtimes.engines import choose_engine
from fastdraft.stages import design
from fastdraft.stages.context import StageContext
from fastdraft.stages.inputs import check_lengths, try_inputs


@dataclass(frozen=True)
class StageForecast:
    """What one stage is expected to take."""

    stage: str
    state: str  # new, unfinished or done
    tokens: int
    seconds: float
    disk_bytes: float
    memory_bytes: float


def run(recipe: Recipe, console: Console, as_json: bool = False) -> None:
    """Checks everything; prints the forecast on stdout: a table (none when quiet), or one JSON object."""
    context, device = make_context(recipe, console), str(pick_device(recipe.run.device))
    if recipe.design is None:
        raise RecipeError(
            "design: missing: a forecast needs the draft's shape", "add `design:` to the recipe"
        )
    root = recipe.run.root
    place = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        found = "cannot be written" if place.is_dir() else "is a file"
        raise FastDraftError(f"{root}: {place} {found}: no run can lie here", "set another run.folder")
    context.target.vocabulary  # noqa: B018 (refuses a tokenizer that does not fit the config)
    plan = design.plan(recipe.design, context.target)
    check_lengths(context.sections, plan)
    told = try_inputs([n for n in context.sections if not context.folder(n).is_complete()], context)
    refuse_changes(context)
    costs, stages = (
        StageCosts(
            recipe, plan, device, context.target.has_weights, gguf=context.target.gguf_file is not None
        ),
        [],
    )
    for name in context.sections:
        folder = context.folder(name)
        begun = "unfinished" if (folder.path / FINGERPRINT).exists() else "new"
        stages.append(StageForecast(name, "done" if folder.is_complete() else begun, *costs.of(name)))
    free = shutil.disk_usage(place).free
    needed = sum(stage.disk_bytes for stage in stages if stage.state != "done")
    if needed > free:
        message = f"{root}: {_size(free)} free: the run needs about {_size(needed)}"
        raise FastDraftError(message, "free some space or set run.folder")
    verdicts = runtime_verdicts(context.target, plan)
    if as_json:
        target, draft = plan.target, plan.draft
        value = {
            "target": {"model": recipe.target.model, **target.as_dict(), "parameters": target.parameters},
            "draft": {**draft.as_dict(), "parameters": draft.parameters},
            "cost_ratios": design.cost_ratios(draft, target),
            "acceptance": asdict(expected(recipe, plan)),
            "device": device,
            "free_bytes": free,
            "stages": [asdict(stage) for stage in stages],
            "runtimes": [asdict(verdict) for verdict in verdicts],
        }
        print(json.dumps(value, indent=1))
    elif not console.quiet:
        _print(recipe, plan, device, stages, free)
        print(f"\n{verdict_table(verdicts)}\n")
        _print_inputs(recipe, context, told)


def _size(count: float) -> str:
    for suffix, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {suffix}"
    return f"{count / 1e3:.3g} kB"


def _print(
    recipe: Recipe, plan: design.DraftDesign, device: str, stages: list[StageForecast], free: int
) -> None:
    target, draft, ratios = plan.target, plan.draft, design.cost_ratios(plan.draft, plan.target)
    size = f"{target.family}, {format_count(target.parameters)} parameters, vocabulary {target.vocab_size}"
    print(f"target  {recipe.target.model}: {size}")
    shape = f"{draft.num_layers} layers, width {draft.hidden_size}, feed-forward {draft.intermediate_size}"
    print(f"draft   {format_count(draft.parameters)} parameters: {shape}")
    if plan.reason:
        reason = f"of the family {draft.family}: {plan.reason}"
        print(textwrap.indent(textwrap.fill(reason, TABLE_WIDTH - 8, break_on_hyphens=False), " " * 8))
    if plan.warning:
        print(textwrap.indent(textwrap.fill(plan.warning, TABLE_WIDTH - 8), " " * 8))
    print(f"device  {device}; {_size(free)} free in {recipe.run.folder}\n")
    left = [stage for stage in stages if stage.state != "done"]
    seconds, disk = sum(s.seconds for s in left), sum(s.disk_bytes for s in left)
    total = ["left to do", "", "", format_seconds(seconds), _size(disk), ""]
    columns = ("stage", "state", "tokens", "time, about", "disk", "memory")
    print(format_table("", columns, [*map(_row, stages), total]))
    k = forecast.PAPER_K
    gains = (f"{forecast.mbsu_at(rate, k, ratios['bytes']):.2f} at {rate}" for rate in forecast.RATES)
    print(f"\nmemory-bound speed-up (bytes read, K = {k}) by acceptance rate:\n  {', '.join(gains)}")
    print(textwrap.fill(str(expected(recipe, plan)), TABLE_WIDTH, break_on_hyphens=False))


def _row(stage: StageForecast) -> list[str]:
    return [
        stage.stage,
        stage.state,
        format_count(stage.tokens) if stage.tokens else "-",
        format_seconds(stage.seconds) if stage.seconds >= 1 else "-",
        _size(stage.disk_bytes) if stage.disk_bytes else "-",
        _size(stage.memory_bytes) if stage.memory_bytes else "-",
    ]


def _print_inputs(recipe: Recipe, context: StageContext, told: list[str]) -> None:
    by_evaluate = recipe.evaluate is not None and recipe.evaluate.texts.kind == "engine"
    if recipe.synthesize and (recipe.synthesize.asks or by_evaluate):
        folder = context.folder("synthesize")
        choice = choose_engine(recipe.synthesize.engine, context.target, recipe.run.device, folder)
        print(f"engine of synthesize: {choice}")
    for line in told:
        print(line)
    print("everything that can be checked here fits")
