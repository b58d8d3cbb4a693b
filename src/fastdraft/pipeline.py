"""The table of stages and how a recipe goes through them. Read this first.

Decides the order of the stages, what each depends on, that finished work is skipped, that unfinished work goes on and
that work done with other settings is refused before anything runs.

    design -> prepare -> pretrain -> continue_pretrain -> synthesize -> align -> evaluate -> export -> report
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from fastdraft.artifacts import RunDirectory, read_json, write_atomic, write_json
from fastdraft.config import Config
from fastdraft.console import Console, format_seconds
from fastdraft.errors import RecipeError
from fastdraft.interfaces import StageContext
from fastdraft.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """One line of the table: what runs, and whose results it builds on."""

    name: str
    summary: str
    builds_on: tuple[str, ...] = ()
    module: str = ""
    """Set where one module serves two stages."""

    def _call(self, function: str, config: Config, context: StageContext) -> Any:
        module = importlib.import_module(f"fastdraft.stages.{self.module or self.name}")
        call: Callable[..., Any] = getattr(module, function)
        return call(config, context, self.name) if self.module else call(config, context)

    def fingerprint(self, config: Config, context: StageContext) -> dict[str, Any]:
        """Just what the stage's result depends on."""
        fingerprint: dict[str, Any] = self._call("fingerprint", config, context)
        return fingerprint

    def run(self, config: Config, context: StageContext) -> None:
        """Does the stage's work, going on with what an earlier process left."""
        self._call("run", config, context)


STAGES = (
    Stage("design", "target -> draft architecture and first weights"),
    Stage("prepare", "corpora -> tokenised, packed shards", ("design",)),
    Stage("pretrain", "text shards -> a language model", ("prepare",), module="pretrain"),
    Stage("continue_pretrain", "code and text shards -> a model of both", ("pretrain",), module="pretrain"),
    Stage("synthesize", "prompts -> responses that the target writes", ("prepare",)),
    Stage("align", "responses -> a draft that predicts this target", ("continue_pretrain", "synthesize")),
    Stage("evaluate", "draft x target x tasks -> acceptance, block efficiency", ("align",)),
    Stage("export", "the draft as runtimes load it", ("evaluate",)),
    Stage("report", "everything on one page", ("export",)),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def make_context(recipe: Recipe, console: Console) -> StageContext:
    """What every stage of this recipe is given."""
    return StageContext(RunDirectory(recipe.run.root), recipe.run, recipe.target, recipe.sections(), console)


def downstream(names: Iterable[str]) -> set[str]:
    """The named stages and all that build on them."""
    found = set(names)
    for stage in STAGES:  # in order, so one pass reaches all
        if found & set(stage.builds_on):
            found.add(stage.name)
    return found


def run(recipe: Recipe, console: Console | None = None, *, only: Iterable[str] | None = None, redo: Iterable[str] = ()) -> RunDirectory:
    """Takes a recipe through its stages (or `only` some) and returns the run's directory.

    Args:
        recipe: From `fastdraft.load_recipe`, or built in Python.
        console: Where progress goes; None is silent.
        only: Names of stages; None means every stage with a section.
        redo: Stages whose finished work is thrown away first, with all that builds on it.

    Raises:
        FastDraftError: in one line, whatever the user can mend. Nothing half-written stays behind.
    """
    context = make_context(recipe, console or Console(quiet=True))
    wanted = _wanted(recipe, only)
    with context.console.stop.listen(), context.run.lock():
        for name in downstream(redo):
            context.artifact(name).discard()
        for stage in wanted:  # refuse everything that does not fit before the first of them works
            _refuse_changes(stage, recipe, context)
        write_atomic(context.run.root / "recipe.yaml", recipe.dump())
        for stage in wanted:
            _run_stage(stage, recipe, context)
    return context.run


def _wanted(recipe: Recipe, only: Iterable[str] | None) -> list[Stage]:
    present = recipe.sections()
    names = set(present) if only is None else set(only)
    for name in sorted(names - set(present)):
        raise RecipeError(name, "missing", "a stage runs only when its section is present", f"add `{name}:` to the recipe")
    return [stage for stage in STAGES if stage.name in names]


def _refuse_changes(stage: Stage, recipe: Recipe, context: StageContext) -> None:
    artifact = context.artifact(stage.name)
    if not (artifact.path / "fingerprint.json").exists() or not all(
        context.artifact(name).is_complete() for name in stage.builds_on if context.has(name)
    ):
        return
    artifact.begin(stage.fingerprint(recipe.sections()[stage.name], context))


def _run_stage(stage: Stage, recipe: Recipe, context: StageContext) -> None:
    config, artifact = recipe.sections()[stage.name], context.artifact(stage.name)
    for name in stage.builds_on:
        if context.has(name):
            context.require(name)
    artifact.begin(stage.fingerprint(config, context))
    if artifact.is_complete():
        context.console.say(f"{stage.name}: already done")
        return
    context.console.stop.check(artifact.path)
    context.console.say(f"{stage.name}: {stage.summary}")
    start = time.monotonic()
    stage.run(config, context)
    seconds = time.monotonic() - start
    _record_seconds(context, stage.name, seconds)
    context.console.say(f"{stage.name}: done in {format_seconds(seconds)}")


def _record_seconds(context: StageContext, name: str, seconds: float) -> None:
    """Adds to `timings.json`: wall-clock seconds of the process that finished each stage."""
    path = context.run.root / "timings.json"
    timings = read_json(path) if path.exists() else {}
    write_json(path, {**timings, name: round(seconds, 1)})
