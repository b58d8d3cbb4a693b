"""The table of stages, and how a recipe goes through them. Read this first.

    design -> prepare -> pretrain -> continue_pretrain -> synthesize -> align -> evaluate -> export ->
    benchmark -> report

A design that reads rows comes behind the stages that write them (`order`).

Finished work is skipped and unfinished work goes on. A missing stage, or work done with other settings, is
refused before anything runs. Under torchrun process 0 goes through the stages, and the others join it in
those that train.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from fastdraft.console import Console, format_seconds
from fastdraft.errors import DataError, FastDraftError, RecipeError, TargetError, machine_errors
from fastdraft.ray_workers import connect
from fastdraft.recipe.base import Config
from fastdraft.recipe.recipe import Recipe
from fastdraft.run_folder import CONVERTED, FINGERPRINT, RunFolder, read_json, write_atomic, write_json
from fastdraft.stages import (
    SPREAD,
    SUMMARIES,
    align,
    benchmark,
    design,
    evaluate,
    export,
    prepare,
    pretrain,
    report,
    synthesize,
)
from fastdraft.stages.context import StageContext
from fastdraft.stages.inputs import check_lengths, try_inputs
from fastdraft.target import Target
from fastdraft.training import distributed

_CONVERTING = ("synthesize", "evaluate", "export")  # these share one conversion of the target
_MEMORY = "close other programs, or use a machine with more memory"
_ROWS = "lower {}.batch_rows, or set target.dtype=bf16"
_TOKENS = "lower {}.micro_batch_tokens"


@dataclass(frozen=True)
class Stage:
    """One line of the table: what runs, and whose results it builds on."""

    name: str
    module: ModuleType  # has `fingerprint` and `run`
    builds_on: tuple[str, ...] = ()
    smaller: str = _MEMORY  # what makes the stage need less of it
    trains: bool = False  # works in all processes of torchrun
    remade: bool = False  # shows what there is: needs no earlier stage, made anew when something changed

    def fingerprint(self, context: StageContext) -> dict[str, Any]:
        """Just what the stage's result depends on."""
        found: dict[str, Any] = self.module.fingerprint(*self._arguments(context))
        return found

    def run(self, context: StageContext) -> None:
        """Does the stage's work, going on with what an earlier process left."""
        self.module.run(*self._arguments(context))

    def _arguments(self, context: StageContext) -> tuple[Any, ...]:
        named = (self.name,) if self.module is pretrain else ()
        return context.sections[self.name], context, *named


STAGES = (
    Stage("design", design),
    Stage("prepare", prepare, ("design",)),
    Stage("pretrain", pretrain, ("design", "prepare"), _TOKENS.format("pretrain"), trains=True),
    Stage("continue_pretrain", pretrain, ("pretrain",), _TOKENS.format("continue_pretrain"), trains=True),
    Stage("synthesize", synthesize, ("prepare",), _ROWS.format("synthesize")),
    Stage("align", align, ("continue_pretrain", "synthesize"), _TOKENS.format("align"), trains=True),
    Stage("evaluate", evaluate, ("align",), _ROWS.format("evaluate")),
    Stage("export", export, ("evaluate",)),
    Stage("benchmark", benchmark, ("export",)),
    Stage("report", report, ("export", "benchmark"), remade=True),
)


def make_context(recipe: Recipe, console: Console) -> StageContext:
    """What every stage of this recipe is given."""
    folder = RunFolder(recipe.run.root)
    target = Target(recipe.target)
    found = recipe.sections()
    sections = {stage.name: found[stage.name] for stage in order(found) if stage.name in found}
    return StageContext(folder, recipe.run, target, sections, console, recipe.folder)


def order(sections: Mapping[str, Config]) -> tuple[Stage, ...]:
    """The table for these sections: design stands behind the stages that it reads, and builds on them."""
    reads: tuple[str, ...] = getattr(sections.get("design"), "reads", ())
    if not reads:
        return STAGES
    table = {stage.name: stage for stage in STAGES}
    table["prepare"] = replace(table["prepare"], builds_on=())
    table["design"] = replace(table["design"], builds_on=reads)
    return tuple(sorted(table.values(), key=lambda stage: stage.name not in reads))


def downstream(names: Iterable[str], table: Collection[Stage] = STAGES) -> set[str]:
    """The named stages and all that build on them."""
    found = set(names)
    for stage in table:  # in order, so one pass reaches all
        if found & set(stage.builds_on):
            found.add(stage.name)
    return found


def run(
    recipe: Recipe,
    console: Console | None = None,
    *,
    only: Iterable[str] | None = None,
    redo: Iterable[str] = (),
) -> RunFolder:
    """Takes a recipe through its stages (or `only` some) and returns the run's folder.

    Args:
        recipe: From `fastdraft.load_recipe`, or built in Python.
        console: Where progress goes; None is silent.
        only: Names of stages; None means every stage with a section.
        redo: Stages whose finished work is thrown away first, with all that builds on it.

    Raises:
        FastDraftError: in one line, whatever the user can mend. Nothing half-written stays behind.
    """
    context = make_context(recipe, console or Console(quiet=True))
    wanted, redone = _wanted(context, only), downstream(map(_known, redo), order(context.sections))
    start = time.monotonic()
    with machine_errors(context.run.root, _MEMORY), context.console.stop.listen():
        if distributed.process_rank() > 0:
            # All other processes take their share of the stages that train, when the first one begins them.
            context.console.silent = True
            for stage in wanted:
                if stage.trains and distributed.begins(
                    stage.name, partial(context.console.stop.check, "training")
                ):
                    stage.run(context)
            return context.run
        _refuse_gaps(wanted, redone, context)
        _try(wanted, redone, context)
        with context.run.lock():
            refuse_changes(context, redone, wanted)
            for name in redone:
                context.folder(name).discard()
            write_atomic(context.run.root / "recipe.yaml", recipe.dump())
            context.run.keep_date()
            worked = sum([_run_stage(stage, context) for stage in wanted])
            if all(context.folder(name).is_complete() for name in _CONVERTING if context.has(name)):
                shutil.rmtree(context.run.root / CONVERTED, ignore_errors=True)
    if worked > 1:
        done = format_seconds(time.monotonic() - start)
        context.console.say(f"{recipe.run.name}: {worked} stages done in {done}")
    return context.run


def _try(wanted: list[Stage], redone: Collection[str], context: StageContext) -> None:
    """What unfinished stages read and need is tried now, and not after hours of training."""
    unfinished = [s.name for s in wanted if s.name in redone or not context.folder(s.name).is_complete()]
    if "design" in unfinished:
        check_lengths(context.sections, design.plan(context.section("design"), context.target))
    for line in try_inputs(unfinished, context):
        context.console.say(line)
    if context.settings.cluster and not set(unfinished).isdisjoint(SPREAD):
        connect(context.settings.cluster.address)


def _wanted(context: StageContext, only: Iterable[str] | None) -> list[Stage]:
    names = set(context.sections) if only is None else set(map(_known, only))
    for name in sorted(names - set(context.sections)):
        raise RecipeError(f"{name}: missing: a stage runs only when its section is present", f"add `{name}:`")
    return [stage for stage in order(context.sections) if stage.name in names]


def _known(name: str) -> str:
    if name not in SUMMARIES:
        raise RecipeError(f"{name}: no such stage", f"stages: {', '.join(SUMMARIES)}")
    return name


def _refuse_gaps(wanted: list[Stage], redone: Collection[str], context: StageContext) -> None:
    """What the wanted stages build on must stand already or be wanted too."""
    coming = {stage.name for stage in wanted}
    for stage in wanted:
        for name in () if stage.remade else stage.builds_on:
            if context.has(name) and name not in coming:
                if name in redone:
                    message = f"--redo would throw '{name}' away: '{stage.name}' alone does not make it again"
                    raise RecipeError(message, "use `fastdraft run RECIPE` with this --redo")
                context.require(name)


def refuse_changes(
    context: StageContext, redone: Collection[str] = (), wanted: Collection[Stage] | None = None
) -> None:
    """Refuses work that stands and was done with other settings; of stages not wanted (None: all are), inputs
    may be missing.
    """
    for stage in order(context.sections):
        folder = context.folder(stage.name)
        begun = context.has(stage.name) and (folder.path / FINGERPRINT).exists()
        if not begun or stage.remade or stage.name in redone:
            continue
        if all(context.folder(name).is_complete() for name in stage.builds_on if context.has(name)):
            # A run that was moved to another machine may lack the inputs of its finished stages.
            told = () if wanted is None or stage in wanted else (DataError, TargetError)
            with contextlib.suppress(*told):
                folder.begin(stage.fingerprint(context))


def _run_stage(stage: Stage, context: StageContext) -> bool:
    """Whether there was anything to do."""
    folder, console = context.folder(stage.name), context.console
    with machine_errors(folder.path, stage.smaller):
        fingerprint = stage.fingerprint(context)
        if stage.remade and folder.differences(fingerprint):
            folder.discard()
        fresh = not (folder.path / FINGERPRINT).exists()
        folder.begin(fingerprint)
        works = not folder.is_complete()
        if works:
            console.stop.check(folder.path)
        if stage.trains:
            distributed.begin(stage.name, works)
        if not works:
            folder.remove_scratch()
            console.say(f"{stage.name}: already done")
            return False
        console.say(f"{stage.name}: {SUMMARIES[stage.name]}")
        start = time.monotonic()
        try:
            stage.run(context)
        finally:
            seconds = time.monotonic() - start
            with contextlib.suppress(FastDraftError, OSError):  # a clock; a full disk has been told already
                _record_seconds(context.run.root, stage.name, seconds, fresh)
        console.say(f"{stage.name}: done in {format_seconds(seconds)}")
        return True


def _record_seconds(root: Path, name: str, seconds: float, fresh: bool) -> None:
    """Adds to `timings.json`: wall-clock seconds of all processes that worked at each stage, killed ones left
    out.
    """
    path = root / "timings.json"
    if root.is_dir():  # nobody has moved the run away
        timings = read_json(path) if path.exists() else {}
        before = 0.0 if fresh else timings.get(name, 0.0)
        write_json(path, {**timings, name: round(before + seconds, 1)})
