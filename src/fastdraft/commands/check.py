"""`fastdraft check`: refuses the impossible and forecasts the rest, before anything is trained.

Decides what is looked at (target, vocabulary, shape, corpora, prompts, tasks, device, earlier work in the run's folder,
disk) and what is forecast for each stage (tokens, time, disk, memory) and for the draft (speed-up by acceptance rate).
Reads configs and file listings, never weights; downloads nothing of a corpus; asks no server but by `--contact`.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastdraft import forecast
from fastdraft.commands import check_servers
from fastdraft.commands.check_fit import check_fit
from fastdraft.console import TABLE_WIDTH, Console, format_seconds, format_table
from fastdraft.data.prompts import look as look_at_prompts
from fastdraft.data.corpora import source_files
from fastdraft.data.logs import look as look_at_log
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.pipeline import STAGES, make_context, refuse_changes, refuse_missing_weights
from fastdraft.recipe.base import format_count
from fastdraft.recipe.evaluation import BenchmarkConfig
from fastdraft.recipe.recipe import Recipe
from fastdraft.runtimes.engines import choose_engine, require_openvino
from fastdraft.runtimes.openvino_families import require_convertible
from fastdraft.stages import design, evaluate, synthesize
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

WRITES = 3
"""Passes over a task's text: written once by the target, replayed by each checkpoint, part of it decoded exactly."""
CONVERTING_SECONDS, BYTES_PER_SECOND, TOKEN_SECONDS = 15.0, 1e10, 5e-4
"""Of a benchmark, roughly: one export; weights read a second when one text is written; what a token costs besides."""


@dataclass(frozen=True)
class StageForecast:
    """What one stage is expected to take."""

    stage: str
    state: str
    """new, unfinished or done."""
    tokens: int = 0
    seconds: float = 0.0
    disk_bytes: float = 0.0
    memory_bytes: float = 0.0


def run(
    recipe: Recipe, console: Console, as_json: bool = False, contact: bool = False, processes: int = 1
) -> None:
    """Checks everything and prints the forecast: a table on stdout (none when the console is quiet), or JSON.

    Args:
        recipe: What is looked at.
        console: Quiet prints nothing.
        as_json: Prints one JSON object instead.
        contact: Asks the servers of `synthesize.engine` too; else nothing goes over the network to them.
        processes: Among how many training is divided, each with a device of its own.

    Raises:
        FastDraftError: in one line, for the first thing that cannot work.
    """
    from fastdraft.modeling.drafts import pick_device

    context, picked = make_context(recipe, console), pick_device(recipe.run.device)
    device = str(picked)
    if recipe.design is None:
        raise RecipeError(
            "design", "missing", "a forecast needs the draft's shape", "add `design:` to the recipe"
        )
    plan = design.plan(recipe.design, context.target)
    check_fit(recipe, plan)
    _check_row_lengths(recipe, plan)
    unseen = list(_check_inputs(recipe))
    refuse_changes(recipe, context)
    states = {stage.name: _state(stage.name, context) for stage in STAGES if context.has(stage.name)}
    for name in (name for name, state in states.items() if state != "done"):
        refuse_missing_weights(recipe, name)
    stages = [
        _divided(_forecast(name, state, recipe, plan, device), device, processes)
        for name, state in states.items()
    ]
    free = _free_bytes(recipe.run.root)
    needed = sum(stage.disk_bytes for stage in stages if stage.state != "done")
    if needed > free:
        raise FastDraftError(
            recipe.run.root,
            f"{_size(free)} free",
            f"the run needs about {_size(needed)}",
            "free some space or set run.folder",
        )
    contacts = check_servers.ask(recipe) if contact else []
    if as_json:
        servers = {"servers": check_servers.as_dicts(contacts)} if contact else {}
        print(
            json.dumps(
                {**_as_dict(recipe, plan, device, stages, free), "processes": processes, **servers}, indent=1
            )
        )
    elif not console.quiet:
        _print(
            recipe,
            plan,
            f"{device}, training in {processes} processes" if processes > 1 else device,
            stages,
            free,
        )
        if recipe.synthesize and _asks_engine(recipe):
            hint = (
                ""
                if contact or recipe.synthesize.engine.kind != "openai"
                else " (not asked; --contact asks it what it serves)"
            )
            print(f"engine of synthesize: {choose_engine(recipe.synthesize.engine, context)}{hint}")
        for line in check_servers.lines(contacts, plan.target.context_length) if contact else ():
            print(line)
        for name in unseen:
            print(f"not looked at (it lies on the hub): {name}")
        if not check_servers.faults(contacts):
            print("everything that can be checked here fits")
    for fault in check_servers.faults(contacts):
        raise fault


def _check_inputs(recipe: Recipe) -> Iterator[str]:
    """Looks for every file that a stage will read; yields what can only be seen over the network."""
    from fastdraft.evaluation.tasks import load_task

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
    for task in recipe.evaluate.tasks if recipe.evaluate else ():
        load_task(task)
    if recipe.evaluate and recipe.evaluate.texts.kind == "transcripts":
        look_at_log(recipe.evaluate.texts)
    if recipe.synthesize and any(prompts.kind == "magpie" for prompts in recipe.synthesize.prompts):
        _check_template(recipe)
    _check_runtimes(recipe)
    if recipe.benchmark:
        _check_benchmark(recipe)
    if recipe.align and not recipe.synthesize:
        raise RecipeError(
            "align",
            "no synthesize section",
            "alignment trains on what the target wrote",
            "add `synthesize:` to the recipe",
        )


def _check_row_lengths(recipe: Recipe, plan: design.DraftDesign) -> None:
    """A row must fit into the draft's context, and into a batch where its size is given."""
    limit = getattr(plan.draft_config, "max_position_embeddings", None)
    longest = recipe.prepare.row_length if recipe.prepare else 0
    if recipe.prepare and limit and longest > limit:
        key = "prepare.row_length"
        raise RecipeError(key, longest, f"must be at most the draft's context of {limit}", "lower it")
    for name in ("pretrain", "continue_pretrain"):
        section = getattr(recipe, name)
        if section and recipe.prepare and section.batch_tokens and section.batch_tokens < longest:
            raise RecipeError(
                f"{name}.batch_tokens",
                section.batch_tokens,
                f"must hold one row of {longest} tokens",
                "raise it",
            )


def _check_runtimes(recipe: Recipe) -> None:
    """What writes, scores what others wrote, or takes the export, must be here and take the target."""
    if recipe.export and "openvino" in recipe.export.formats:
        require_openvino()
        if recipe.export.openvino.target != "none":
            require_convertible(recipe.target.location, recipe.target.revision)
    if recipe.synthesize:
        synthesize.check_installed(recipe.synthesize)
        synthesize.require_weights(recipe.synthesize, Target(recipe.target))
        if recipe.synthesize.engine.kind == "openvino":
            require_convertible(recipe.target.location, recipe.target.revision)


def _asks_engine(recipe: Recipe) -> bool:
    """Whether `synthesize.engine` is asked anything, by synthesize or by evaluate."""
    by_evaluate = recipe.evaluate is not None and recipe.evaluate.texts.kind == "engine"
    return recipe.synthesize is not None and (recipe.synthesize.asks or by_evaluate)


def _check_benchmark(recipe: Recipe) -> None:
    """What a benchmark needs must be there: an export, OpenVINO, the device, a task's files, room for K proposals in the context."""
    from fastdraft.evaluation.tasks import load_task
    from fastdraft.runtimes.openvino import device_properties

    config = recipe.benchmark
    if config is None:
        return
    if recipe.export is None:
        raise RecipeError(
            "benchmark", "no export section", "what is exported is measured", "add `export:` to the recipe"
        )
    require_openvino()
    for device in dict.fromkeys((config.device, config.draft_device or config.device)):
        device_properties(device, config.precision)
    require_convertible(recipe.target.location, recipe.target.revision)
    context = Target(recipe.target).context_length
    most = max(config.num_speculative_tokens)
    for task in config.tasks_of(recipe.sections()):
        load_task(task)
        if task.max_new_tokens + most + 1 >= context:
            found = f"task '{task.name}' writes {task.max_new_tokens} tokens with K = {most}"
            raise RecipeError(
                "benchmark",
                found,
                f"prompt, answer and one round must fit the context of {context}",
                "lower max_new_tokens",
            )


def _check_template(recipe: Recipe) -> None:
    """Magpie gives the target the beginning of its chat template, so there must be one."""
    from fastdraft.data.chat import has_chat_template

    target = Target(recipe.target)
    if not has_chat_template(target.tokenizer):
        rule = "kind: magpie needs a chat template, which this target lacks"
        raise RecipeError(
            "synthesize.prompts", target.name, rule, "take that source out; corpus prompts serve base models"
        )


def _state(name: str, context: StageContext) -> str:
    artifact = context.folder(name)
    if artifact.is_complete():
        return "done"
    return "unfinished" if (artifact.path / "fingerprint.json").exists() else "new"


def _forecast(name: str, state: str, recipe: Recipe, plan: design.DraftDesign, device: str) -> StageForecast:
    """One row of the table. Rates are orders of magnitude; a run prints its own."""

    draft, target, threads = plan.draft, plan.target, recipe.run.threads
    tokens, seconds, disk, memory = 0, 0.0, 0.0, 0.0
    checkpoint = forecast.checkpoint_bytes(draft.parameters)
    if name == "design":
        disk, memory = checkpoint, forecast.loading_bytes(draft.parameters)
    elif name == "prepare" and recipe.prepare:
        tokens = sum(corpus.tokens or 0 for corpus in recipe.prepare.corpora)
        seconds, disk = (
            forecast.tokenize_seconds(tokens, recipe.run.threads),
            forecast.shard_bytes(tokens, draft.vocab_size),
        )
    elif name in ("pretrain", "continue_pretrain", "align"):
        tokens = _training_tokens(name, recipe)
        seconds = forecast.training_seconds(tokens, draft.read_parameters, device, threads)
        disk = 2 * checkpoint + 2 * forecast.checkpoint_bytes(draft.parameters, resumable=True)
        memory = forecast.training_memory_bytes(
            draft.parameters,
            draft.vocab_size,
            draft.hidden_size,
            draft.intermediate_size,
            draft.num_layers,
            _micro_batch(name, recipe, device),
        )
        if name == "align" and _asks_target(recipe):
            seconds += forecast.scoring_seconds(tokens, target.read_parameters, device, threads)
            memory += _target_bytes(recipe, plan, device)
    elif name == "synthesize" and recipe.synthesize:
        tokens = recipe.synthesize.tokens
        disk = forecast.synthetic_bytes(tokens)
        if (
            recipe.synthesize.asks and recipe.synthesize.engine.kind != "openai"
        ):  # how fast a server is cannot be told
            seconds = forecast.writing_seconds(tokens, target.read_parameters, device, threads)
        memory = _target_bytes(recipe, plan, device) if recipe.synthesize.needs_weights else 0
        if recipe.synthesize.logits.kind == "top_k":
            seconds += forecast.scoring_seconds(tokens, target.read_parameters, device, threads)
            disk += tokens * _record_bytes(recipe.synthesize.logits.k, target.vocab_size)
    elif name == "evaluate" and recipe.evaluate:
        tokens = _evaluation_tokens(recipe)
        needs_weights = evaluate.needs_weights(recipe.evaluate, recipe.sections())
        if needs_weights:  # else a server writes, or the texts stand already, and the draft alone reads them
            seconds = WRITES * forecast.writing_seconds(tokens, target.read_parameters, device, threads)
        disk, memory = (
            forecast.synthetic_bytes(tokens),
            checkpoint + (_target_bytes(recipe, plan, device) if needs_weights else 0),
        )
    elif name == "export":
        disk, memory = (
            checkpoint,
            checkpoint + (_target_bytes(recipe, plan, device) if Target(recipe.target).has_weights else 0),
        )
    elif name == "benchmark" and recipe.benchmark:
        tokens, seconds, disk, memory = _benchmark(recipe, recipe.benchmark, plan)
    return StageForecast(name, state, tokens, seconds, disk, memory)


def _divided(stage: StageForecast, device: str, processes: int) -> StageForecast:
    """Training's time is shared among devices; processes on one CPU share its cores, which one process uses up already."""
    if device == "cpu" or not any(known.name == stage.stage and known.parallel for known in STAGES):
        return stage
    return replace(stage, seconds=stage.seconds / processes)


def _record_bytes(k: int, vocab_size: int) -> int:
    """Disk for the stored logits of one token."""
    from fastdraft.data.sparse_logits import bytes_per_token

    return bytes_per_token(k, vocab_size)


def _asks_target(recipe: Recipe) -> bool:
    """Whether align has the target loaded."""
    objective = recipe.align.objective if recipe.align else None
    return objective is not None and objective.kind == "token_kd" and objective.source == "target"


def _training_tokens(name: str, recipe: Recipe) -> int:
    if name != "align":
        section = getattr(recipe, name)
        return int(section.tokens)
    if recipe.align is None:
        return 0
    written = recipe.synthesize.tokens if recipe.synthesize else 0
    return int(recipe.align.tokens or written * (3))


def _micro_batch(name: str, recipe: Recipe, device: str) -> int:
    """Tokens that go through the draft at once: at least one row."""
    from fastdraft.training.step import MICRO_BATCH_TOKENS

    longest = recipe.prepare.row_length if recipe.prepare else 0
    return max(
        longest,
        int(
            getattr(recipe, name).micro_batch_tokens
            or MICRO_BATCH_TOKENS["cpu" if device == "cpu" else "other"]
        ),
    )


def _evaluation_tokens(recipe: Recipe) -> int:
    from fastdraft.evaluation.tasks import load_task

    if recipe.evaluate is None or recipe.evaluate.texts.kind not in ("target", "engine"):
        return 0  # how long texts are that stand already shows when they are read
    tokens, temperatures = 0, len(recipe.evaluate.temperatures)
    for task in recipe.evaluate.tasks:
        turns = [
            len(prompt.conversation.users) if prompt.conversation else 1 for prompt in load_task(task).prompts
        ]
        earlier = sum(turns) - len(turns)  # answered greedily once, for the prompts of the turns behind them
        tokens += (sum(turns) * temperatures + earlier) * task.max_new_tokens
    return tokens


def _benchmark(
    recipe: Recipe, config: BenchmarkConfig, plan: design.DraftDesign
) -> tuple[int, float, float, float]:
    """Tokens, seconds, bytes on disk and in memory: every setting in turn, the untimed run besides."""
    tasks, sweep = config.tasks_of(recipe.sections()), config.sweep
    settings = 1 + len(config.num_speculative_tokens)
    per_pair = (
        settings * len(config.temperatures) * config.prompts * sum(task.max_new_tokens for task in tasks)
    )
    usual, at_once = min(task.max_new_tokens for task in tasks), max([0, *sweep.concurrency])
    swept = config.prompts * (len(sweep.prompt_tokens) * usual + sum(sweep.max_new_tokens))
    swept += max(config.prompts, at_once) * len(sweep.concurrency) * usual
    tokens = (1 + config.repeats) * (per_pair * len(config.weights) + 2 * swept)
    target = plan.target.bytes_per_token(8)
    exports = 2 * len(config.weights)
    seconds = CONVERTING_SECONDS * exports + tokens * (target / BYTES_PER_SECOND + TOKEN_SECONDS)
    held = 2 * forecast.loading_bytes(plan.target.parameters, 1) + forecast.loading_bytes(
        plan.draft.parameters, 1
    )
    disk = len(config.weights) * forecast.loading_bytes(plan.target.parameters + plan.draft.parameters, 1)
    return tokens, seconds, disk, max(held, forecast.loading_bytes(plan.target.parameters))


def _target_bytes(recipe: Recipe, plan: design.DraftDesign, device: str) -> float:
    wide = recipe.target.dtype == "fp32" or (recipe.target.dtype == "auto" and device == "cpu")
    return forecast.loading_bytes(plan.target.parameters, 4 if wide else 2)


def _free_bytes(root: Path) -> int:
    """Free space where the run will lie; the nearest folder that exists stands for it."""
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(count: float) -> str:
    for suffix, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {suffix}"
    return f"{count / 1e3:.3g} kB"


def _as_dict(
    recipe: Recipe, plan: design.DraftDesign, device: str, stages: list[StageForecast], free: int
) -> dict[str, Any]:
    return {
        "target": {
            "model": recipe.target.model,
            **plan.target.as_dict(),
            "parameters": plan.target.parameters,
        },
        "draft": {**plan.draft.as_dict(), "parameters": plan.draft.parameters},
        "cost_ratios": design.cost_ratios(plan.draft, plan.target),
        "device": device,
        "free_bytes": free,
        "stages": [asdict(stage) for stage in stages],
    }


def _print(
    recipe: Recipe, plan: design.DraftDesign, device: str, stages: list[StageForecast], free: int
) -> None:
    target, draft, ratios = plan.target, plan.draft, design.cost_ratios(plan.draft, plan.target)
    print(
        f"target  {recipe.target.model}: {target.family}, {format_count(target.parameters)} parameters, vocabulary {target.vocab_size}"
    )
    shape = f"{draft.num_layers} layers, width {draft.hidden_size}, feed-forward {draft.intermediate_size}"
    print(f"draft   {format_count(draft.parameters)} parameters: {shape}")
    if plan.reason:
        reason = textwrap.fill(
            f"of the family {draft.family}: {plan.reason}", TABLE_WIDTH - 8, break_on_hyphens=False
        )
        print(textwrap.indent(reason, " " * 8))
    print(f"device  {device}; {_size(free)} free in {recipe.run.folder}\n")
    left = [stage for stage in stages if stage.state != "done"]
    total = [
        "left to do",
        "",
        "",
        format_seconds(sum(s.seconds for s in left)),
        _size(sum(s.disk_bytes for s in left)),
        "",
    ]
    print(
        format_table(
            "", ("stage", "state", "tokens", "time, about", "disk", "memory"), [*map(_row, stages), total]
        )
    )
    gains = ", ".join(
        f"{forecast.mbsu_at(rate, forecast.PAPER_K, ratios['bytes']):.2f} at {rate}"
        for rate in forecast.RATES
    )
    print(f"\nmemory-bound speed-up (bytes read, K = {forecast.PAPER_K}) by acceptance rate:\n  {gains}")


def _row(stage: StageForecast) -> list[str]:
    return [
        stage.stage,
        stage.state,
        format_count(stage.tokens) if stage.tokens else "-",
        format_seconds(stage.seconds) if stage.seconds >= 1 else "-",
        _size(stage.disk_bytes) if stage.disk_bytes else "-",
        _size(stage.memory_bytes) if stage.memory_bytes else "-",
    ]
