"""The table of stages and how a recipe goes through them. Read this first.

Decides the order of the stages, what each depends on, that finished work is skipped, that unfinished work goes on, and
that a missing stage or work done with other settings is refused before anything runs or is thrown away.

    design -> prepare -> pretrain -> continue_pretrain -> synthesize -> align -> evaluate -> export -> benchmark -> report
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastdraft.console import Console, format_seconds
from fastdraft.errors import DataError, FastDraftError, RecipeError, TargetError, machine_errors
from fastdraft.recipe.base import Config
from fastdraft.recipe.recipe import Recipe
from fastdraft.run_folder import FINGERPRINT, RunFolder, read_json, write_atomic, write_json
from fastdraft.stages.context import StageContext
from fastdraft.target import Target


@dataclass(frozen=True)
class Stage:
    """One line of the table: what runs, and whose results it builds on."""

    name: str
    summary: str
    builds_on: tuple[str, ...] = ()
    module: str = ""
    """Set where one module serves two stages."""
    smaller: str = "close other programs, or use a machine with more memory"
    """What makes the stage need less memory."""
    parallel: bool = False
    """Works in many processes at once where the run has them."""
    remade: bool = False
    """Shows what there is: needs no earlier stage, and is made anew, not refused, when something changed."""

    def _call(self, function: str, config: Config, context: StageContext) -> Any:
        module = importlib.import_module(f"fastdraft.stages.{self.module or self.name}")
        call: Callable[..., Any] = getattr(module, function)
        return call(config, context, self.name) if self.module else call(config, context)

    def fingerprint(self, config: Config, context: StageContext) -> dict[str, Any]:
        """Just what the stage's result depends on."""
        fingerprint: dict[str, Any] = self._call("fingerprint", config, context)
        return fingerprint

    def check_installed(self, config: Config) -> None:
        """Raises:
        MissingExtra: when the stage needs a library that is not there.
        """
        check = getattr(
            importlib.import_module(f"fastdraft.stages.{self.module or self.name}"), "check_installed", None
        )
        if check:
            check(config)

    def run(self, config: Config, context: StageContext) -> None:
        """Does the stage's work, going on with what an earlier process left."""
        self._call("run", config, context)


_FEWER_ROWS = "lower {}.batch_rows, or set target.dtype=bf16"
STAGES = (
    Stage("design", "target -> draft architecture and first weights"),
    Stage(
        "prepare",
        "corpora -> tokenised, packed shards",
        ("design",),
        smaller="lower run.threads or close other programs",
    ),
    Stage(
        "pretrain",
        "text shards -> a language model",
        ("prepare",),
        "pretrain",
        "lower pretrain.micro_batch_tokens",
        True,
    ),
    Stage(
        "continue_pretrain",
        "code and text shards -> a model of both",
        ("pretrain",),
        "pretrain",
        "lower continue_pretrain.micro_batch_tokens",
        True,
    ),
    Stage(
        "synthesize",
        "prompts -> responses that the target writes",
        ("prepare",),
        smaller=_FEWER_ROWS.format("synthesize"),
    ),
    Stage(
        "align",
        "responses -> a draft that predicts this target",
        ("continue_pretrain", "synthesize"),
        smaller="lower align.micro_batch_tokens",
        parallel=True,
    ),
    Stage(
        "evaluate",
        "draft x target x tasks -> acceptance, block efficiency",
        ("align",),
        smaller=_FEWER_ROWS.format("evaluate"),
    ),
    Stage("export", "the draft as runtimes load it", ("evaluate",)),
    Stage("benchmark", "the exported pair on this device's clock, beside the prediction", ("export",)),
    Stage("report", "everything on one page", ("export", "benchmark"), remade=True),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def make_context(recipe: Recipe, console: Console) -> StageContext:
    """What every stage of this recipe is given."""
    return StageContext(
        RunFolder(recipe.run.root), recipe.run, Target(recipe.target), recipe.sections(), console
    )


def downstream(names: Iterable[str]) -> set[str]:
    """The named stages and all that build on them."""
    found = set(names)
    for stage in STAGES:  # in order, so one pass reaches all
        if found & set(stage.builds_on):
            found.add(stage.name)
    return found


Launch = Callable[[str, Recipe, StageContext], None]
"""Does one stage's work in many processes, by the stage's name."""


def run(
    recipe: Recipe,
    console: Console | None = None,
    *,
    only: Iterable[str] | None = None,
    redo: Iterable[str] = (),
    launch: Launch | None = None,
) -> RunFolder:
    """Takes a recipe through its stages (or `only` some) and returns the run's directory.

    Args:
        recipe: From `fastdraft.load_recipe`, or built in Python.
        console: Where progress goes; None is silent.
        only: Names of stages; None means every stage with a section.
        redo: Stages whose finished work is thrown away first, with all that builds on it.
        launch: How the stages that can do so work in many processes (commands/launch.py); None: in this one.

    Raises:
        FastDraftError: in one line, whatever the user can mend. Nothing half-written stays behind.
    """
    context = make_context(recipe, console or Console(quiet=True))
    wanted, redone = _wanted(recipe, only), _redone(redo)
    _refuse_gaps(wanted, redone, context)
    for stage in wanted:
        if stage.name in redone or not context.folder(stage.name).is_complete():
            stage.check_installed(recipe.sections()[stage.name])  # now, and not after hours of training
            refuse_missing_weights(recipe, stage.name)
    start = time.monotonic()
    with machine_errors(context.run.root, Stage.smaller), context.console.stop.listen(), context.run.lock():
        refuse_changes(recipe, context, redone, wanted)
        for name in redone:
            context.folder(name).discard()
        write_atomic(context.run.root / "recipe.yaml", recipe.dump())
        worked = sum([_run_stage(stage, recipe, context, launch) for stage in wanted])
    if worked > 1:
        context.console.say(
            f"{recipe.run.name}: {worked} stages done in {format_seconds(time.monotonic() - start)}"
        )
    return context.run


def refuse_changes(
    recipe: Recipe, context: StageContext, redone: Collection[str] = (), wanted: Collection[Stage] = STAGES
) -> None:
    """Looks at every stage of the recipe, since its run's folder holds the work of one recipe only.

    Args:
        recipe: As given to `run`.
        context: Its context.
        redone: Stages whose work will be thrown away.
        wanted: Stages that will run; of the others, inputs may be missing (the run was moved to another machine).

    Raises:
        FastDraftError: when work that stands was done with other settings.
    """
    for stage in STAGES:
        artifact = context.folder(stage.name)
        begun = context.has(stage.name) and (artifact.path / FINGERPRINT).exists()
        if not begun or stage.remade or stage.name in redone:
            continue
        if not all(context.folder(name).is_complete() for name in stage.builds_on if context.has(name)):
            continue
        with contextlib.nullcontext() if stage in wanted else contextlib.suppress(DataError, TargetError):
            artifact.begin(stage.fingerprint(recipe.sections()[stage.name], context))


def refuse_missing_weights(recipe: Recipe, name: str) -> None:
    """Of a target behind an API or of logs only the config may be here: what needs more is told before anything is trained.

    Args:
        recipe: As given to `run`.
        name: Of the stage that would need the weights.

    Raises:
        TargetError: when it does and they are not in the target's directory.
    """

    reason = _why_weights(recipe, name)
    if reason and not Target(recipe.target).has_weights:
        rule, remedy = reason
        raise TargetError(
            recipe.target.location, "no model.safetensors", rule, f"put the weights there, or {remedy}"
        )


def _why_weights(recipe: Recipe, name: str) -> tuple[str, str] | None:
    """For what a stage reads the target's weights, and how it could do without; None when it does without.

    synthesize looks itself.
    """
    from fastdraft.stages import evaluate

    if (
        name == "align"
        and recipe.align
        and recipe.align.objective.kind == "token_kd"
        and recipe.align.objective.source == "target"
    ):
        return (
            "align.objective: source: target reads the target beside the draft",
            "leave out align.objective",
        )
    if name == "evaluate" and recipe.evaluate and evaluate.needs_weights(recipe.evaluate, recipe.sections()):
        where = f"evaluate.texts: kind: {recipe.evaluate.texts.kind} runs the target here"
        return (
            where,
            "set evaluate.texts: {kind: engine}, or {kind: synthesize} for rows with their own log-probs",
        )
    if (
        name == "export"
        and recipe.export
        and "openvino" in recipe.export.formats
        and recipe.export.openvino.target != "none"
    ):
        return "export.formats: openvino converts the target too", "set export.openvino.target: none"
    return ("benchmark runs the target here", "leave out `benchmark`") if name == "benchmark" else None


def _wanted(recipe: Recipe, only: Iterable[str] | None) -> list[Stage]:
    present = recipe.sections()
    names = set(present) if only is None else set(only)
    for name in sorted(names - set(present)):
        if name not in STAGE_NAMES:
            raise RecipeError("only", name, "no such stage", f"stages: {', '.join(STAGE_NAMES)}")
        raise RecipeError(
            name, "missing", "a stage runs only when its section is present", f"add `{name}:` to the recipe"
        )
    return [stage for stage in STAGES if stage.name in names]


def _redone(redo: Iterable[str]) -> set[str]:
    for name in set(redo) - set(STAGE_NAMES):
        raise RecipeError("redo", name, "no such stage", f"stages: {', '.join(STAGE_NAMES)}")
    return downstream(redo)


def _refuse_gaps(wanted: Sequence[Stage], redone: Collection[str], context: StageContext) -> None:
    """What the wanted stages build on must stand already or be wanted too."""
    coming = {stage.name for stage in wanted}
    for stage in wanted:
        for name in stage.builds_on if not stage.remade else ():
            if not context.has(name) or name in coming:
                continue
            if name in redone:
                rule = f"'{stage.name}' alone does not make it again"
                raise RecipeError(
                    "--redo",
                    f"would throw '{name}' away",
                    rule,
                    "use `fastdraft run RECIPE` with this --redo",
                )
            context.require(name)


def _run_stage(stage: Stage, recipe: Recipe, context: StageContext, launch: Launch | None) -> bool:
    """Whether there was anything to do."""
    with machine_errors(context.folder(stage.name).path, stage.smaller):
        return _do_stage(stage, recipe, context, launch)


def _do_stage(stage: Stage, recipe: Recipe, context: StageContext, launch: Launch | None) -> bool:
    config, artifact = recipe.sections()[stage.name], context.folder(stage.name)
    fingerprint = stage.fingerprint(config, context)
    if stage.remade and artifact.differences(fingerprint):
        artifact.discard()
    fresh = not (artifact.path / FINGERPRINT).exists()
    artifact.begin(fingerprint)
    if artifact.is_complete():
        artifact.remove_scratch()
        context.console.say(f"{stage.name}: already done")
        return False
    context.console.stop.check(artifact.path)
    context.console.say(f"{stage.name}: {stage.summary}")
    start = time.monotonic()
    try:
        if stage.parallel and launch:
            launch(stage.name, recipe, context)
        else:
            stage.run(config, context)
    finally:
        seconds = time.monotonic() - start
        with contextlib.suppress(
            FastDraftError
        ):  # a full disk has been told already, and a damaged file is only a clock
            _record_seconds(context, stage.name, seconds, fresh)
    context.console.say(f"{stage.name}: done in {format_seconds(seconds)}")
    return True


def _record_seconds(context: StageContext, name: str, seconds: float, fresh: bool) -> None:
    """Adds to `timings.json`: wall-clock seconds of all the processes that worked at each stage, killed ones left out."""
    path = context.run.root / "timings.json"
    if not path.parent.is_dir():
        return  # somebody moved the run away: nothing new may stand in its place
    found = read_json(path) if path.exists() else {}
    timings = (
        {stage: value for stage, value in found.items() if isinstance(value, (int, float))}
        if isinstance(found, dict)
        else {}
    )
    before = 0.0 if fresh else timings.get(name, 0.0)
    write_json(path, {**timings, name: round(before + seconds, 1)})
