"""`fastdraft check`: refuses the impossible and forecasts the rest, before anything is trained.

Reads configs and file listings, never weights; downloads nothing of a corpus and asks no server.
"""

from __future__ import annotations

import json
import os
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from fastdraft import forecast
from fastdraft.commands.stage_costs import StageCosts
from fastdraft.console import TABLE_WIDTH, Console, format_count, format_seconds, format_table
from fastdraft.data.chat import ChatTemplate
from fastdraft.data.corpora import source_files
from fastdraft.data.logs import look as look_at_log
from fastdraft.data.prompts import look as look_at_prompts
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.evaluation.tasks import load_task
from fastdraft.modeling.drafts import pick_device
from fastdraft.pipeline import make_context, refuse_changes, refuse_missing_weights
from fastdraft.recipe.evaluation import BenchmarkConfig
from fastdraft.recipe.recipe import Recipe
from fastdraft.run_folder import FINGERPRINT
from fastdraft.runtimes.engines import choose_engine
from fastdraft.runtimes.openvino import device_properties, require_openvino
from fastdraft.runtimes.openvino_export import require_convertible
from fastdraft.stages import design, synthesize
from fastdraft.stages.context import StageContext
from fastdraft.target import Target


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
    _check_lengths(recipe, plan)
    unseen = list(_check_inputs(recipe, context.target))
    _check_runtimes(recipe, context.target)
    refuse_changes(context)
    costs, stages = StageCosts(recipe, plan, device, context.target.has_weights), []
    for name in context.sections:
        folder = context.folder(name)
        begun = "unfinished" if (folder.path / FINGERPRINT).exists() else "new"
        stages.append(StageForecast(name, "done" if folder.is_complete() else begun, *costs.of(name)))
        if not folder.is_complete():
            refuse_missing_weights(name, context)
    free = shutil.disk_usage(place).free
    needed = sum(stage.disk_bytes for stage in stages if stage.state != "done")
    if needed > free:
        message = f"{root}: {_size(free)} free: the run needs about {_size(needed)}"
        raise FastDraftError(message, "free some space or set run.folder")
    if as_json:
        target, draft = plan.target, plan.draft
        value = {
            "target": {"model": recipe.target.model, **target.as_dict(), "parameters": target.parameters},
            "draft": {**draft.as_dict(), "parameters": draft.parameters},
            "cost_ratios": design.cost_ratios(draft, target),
            "device": device,
            "free_bytes": free,
            "stages": [asdict(stage) for stage in stages],
        }
        print(json.dumps(value, indent=1))
    elif not console.quiet:
        _print(recipe, plan, device, stages, free)
        _print_inputs(recipe, context, unseen)


def _check_lengths(recipe: Recipe, plan: design.DraftDesign) -> None:
    """Lengths against contexts, and the number of stored logits against the vocabulary."""
    context, synthesize = min(plan.draft.context_length, plan.target.context_length), recipe.synthesize
    tasks = recipe.evaluate.tasks if recipe.evaluate else ()
    for where, section in [
        *((f"evaluate.tasks[{n}]", t) for n, t in enumerate(tasks)),
        ("synthesize", synthesize),
    ]:
        if section and section.max_new_tokens >= context:
            rule = f"answer and prompt must fit the context of {context}"
            raise RecipeError(f"{where}.max_new_tokens: {section.max_new_tokens}: {rule}", "lower it")
    logits = synthesize.logits if synthesize else None
    if logits and logits.kind == "top_k" and logits.k >= plan.target.vocab_size:
        rule = f"must be below the {plan.target.vocab_size} ids of the target's vocabulary"
        raise RecipeError(f"synthesize.logits.k: {logits.k}: {rule}", "lower it; 64 is usual")
    length = recipe.prepare.row_length if recipe.prepare else 0
    if length > plan.draft.context_length:
        rule = f"must be at most the draft's context of {plan.draft.context_length}"
        raise RecipeError(f"prepare.row_length: {length}: {rule}", "lower it")
    for name in ("pretrain", "continue_pretrain"):
        batch = getattr(getattr(recipe, name), "batch_tokens", None)
        if batch and batch < length:
            rule = f"must hold one row of {length} tokens"
            raise RecipeError(f"{name}.batch_tokens: {batch}: {rule}", "raise it")


def _check_inputs(recipe: Recipe, target: Target) -> Iterator[str]:
    """Looks for every file that a stage will read; yields what can only be seen over the network."""
    for number, corpus in enumerate(recipe.prepare.corpora if recipe.prepare else ()):
        if corpus.kind == "hub":
            yield f"prepare.corpora[{number}]: {corpus.dataset}"
        else:
            source_files(corpus)
    for number, prompts in enumerate(recipe.synthesize.prompts if recipe.synthesize else ()):
        if prompts.kind == "hub":
            yield f"synthesize.prompts[{number}]: {prompts.dataset}"
        elif prompts.kind == "jsonl":
            look_at_prompts(prompts)
        elif prompts.kind == "transcripts":
            look_at_log(prompts)
        elif prompts.kind == "magpie" and not ChatTemplate(target.tokenizer).exists:
            rule = "kind: magpie needs a chat template, which this target lacks"
            fix = "take that source out; corpus prompts serve base models"
            raise RecipeError(f"synthesize.prompts[{number}]: {target.name}: {rule}", fix)
    for task in recipe.evaluate.tasks if recipe.evaluate else ():
        load_task(task)
    if recipe.evaluate and recipe.evaluate.texts.kind == "transcripts":
        look_at_log(recipe.evaluate.texts)
    if recipe.align and not recipe.synthesize:
        message = "align: no synthesize section: alignment trains on what the target wrote"
        raise RecipeError(message, "add `synthesize:` to the recipe")


def _check_runtimes(recipe: Recipe, target: Target) -> None:
    """What writes, scores what others wrote, or takes the export, must be here and take the target."""
    if recipe.export and "openvino" in recipe.export.formats:
        require_openvino()
        if recipe.export.openvino.target != "none":
            require_convertible(target)
    if recipe.synthesize:
        synthesize.check_installed(recipe.synthesize)
        synthesize.require_weights(recipe.synthesize, target)
        if recipe.synthesize.engine.kind == "openvino":
            require_convertible(target)
    if recipe.benchmark:
        _check_benchmark(recipe, recipe.benchmark, target)


def _check_benchmark(recipe: Recipe, config: BenchmarkConfig, target: Target) -> None:
    if recipe.export is None:
        raise RecipeError("benchmark: no export section: what is exported is measured", "add `export:`")
    require_openvino()
    for device in dict.fromkeys((config.device, config.draft_device or config.device)):
        device_properties(device, config.precision)
    require_convertible(target)
    most = max(config.num_speculative_tokens)
    for task in config.tasks_of(recipe.sections()):
        load_task(task)
        if task.max_new_tokens + most + 1 >= target.context_length:
            found = f"task '{task.name}' writes {task.max_new_tokens} tokens with K = {most}"
            rule = f"prompt, answer and one round must fit the context of {target.context_length}"
            raise RecipeError(f"benchmark: {found}: {rule}", "lower max_new_tokens")


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
    print(f"device  {device}; {_size(free)} free in {recipe.run.folder}\n")
    left = [stage for stage in stages if stage.state != "done"]
    seconds, disk = sum(s.seconds for s in left), sum(s.disk_bytes for s in left)
    total = ["left to do", "", "", format_seconds(seconds), _size(disk), ""]
    columns = ("stage", "state", "tokens", "time, about", "disk", "memory")
    print(format_table("", columns, [*map(_row, stages), total]))
    k = forecast.PAPER_K
    gains = (f"{forecast.mbsu_at(rate, k, ratios['bytes']):.2f} at {rate}" for rate in forecast.RATES)
    print(f"\nmemory-bound speed-up (bytes read, K = {k}) by acceptance rate:\n  {', '.join(gains)}")


def _row(stage: StageForecast) -> list[str]:
    return [
        stage.stage,
        stage.state,
        format_count(stage.tokens) if stage.tokens else "-",
        format_seconds(stage.seconds) if stage.seconds >= 1 else "-",
        _size(stage.disk_bytes) if stage.disk_bytes else "-",
        _size(stage.memory_bytes) if stage.memory_bytes else "-",
    ]


def _print_inputs(recipe: Recipe, context: StageContext, unseen: list[str]) -> None:
    by_evaluate = recipe.evaluate is not None and recipe.evaluate.texts.kind == "engine"
    if recipe.synthesize and (recipe.synthesize.asks or by_evaluate):
        folder = context.folder("synthesize")
        choice = choose_engine(recipe.synthesize.engine, context.target, recipe.run.device, folder)
        print(f"engine of synthesize: {choice}")
    for name in unseen:
        print(f"not looked at (it lies on the hub): {name}")
    print("everything that can be checked here fits")
