"""Synthesize: prompts -> responses that the target writes, as token ids with the log-prob of each.

Sources take turns so that any beginning holds their shares. Each unit of prompts is asked, filtered and kept
as one file with its account inside, so that a killed run loses or doubles nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from typing import Any

from fastdraft.console import Console, format_count
from fastdraft.data.chat import ChatTemplate
from fastdraft.data.filters import RowCounts, RowFilter
from fastdraft.data.prompts import normalised, tell_counts
from fastdraft.data.rows import SyntheticRow, read_columns, read_facts, read_rows, unit_name, write_rows
from fastdraft.data.sparse_logits import logits_name, read_sparse_logits, write_sparse_logits
from fastdraft.data.synthesis_plan import DRY_UNITS, Account, Planner, SourcePlan, describe_sources, unit_seed
from fastdraft.errors import DataError, RecipeError, TargetError
from fastdraft.evaluation.tasks import load_task
from fastdraft.functional.generation import Engine
from fastdraft.modeling.drafts import pick_device, set_threads
from fastdraft.modeling.vocabulary import check_same
from fastdraft.provenance import describe_run
from fastdraft.recipe.run import TargetConfig
from fastdraft.recipe.synthesize import CorpusPrompts, MagpiePrompts, OpenVINOEngineConfig, SynthesizeConfig
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes.engines import (
    EngineChoice,
    choose_engine,
    converted,
    describe_engine,
    open_engine,
    require_installed,
    uses_weights,
)
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.runtimes.synthesis import Scorer, UnitWriter, scored_ids, unit_logits
from fastdraft.stages.context import StageContext
from fastdraft.target import Target


def check_installed(config: SynthesizeConfig) -> None:
    """Refuses an engine whose library is not there."""
    require_installed(config.engine)


def require_weights(config: SynthesizeConfig, writer: Target) -> None:
    """Refuses work that needs the target's weights where they are not, before any of it is claimed."""
    try:
        if config.needs_weights:
            writer.files.check_weights()
    except TargetError as error:
        if config.asks and uses_weights(config.engine):
            raise
        rule = "synthesize.logits: top_k scores what a server or a log has with the target's weights"
        fix = "put them there, or set synthesize.logits: {kind: none}"
        raise TargetError(f"{error.message}; {rule}", fix) from None


def fingerprint(config: SynthesizeConfig, context: StageContext) -> dict[str, Any]:
    """What the text depends on; of evaluation tasks only what they forbid; prepared corpora where used."""
    writing = writer_of(config, context)
    require_weights(config, writing)
    seed, engine = context.settings.seed, _engine(config, context)
    uses_corpus = any(isinstance(source, CorpusPrompts) for source in config.prompts)
    settings = config.model_dump(mode="json", exclude={"prompts", "writer"})
    written_by = {} if writing is context.target else {"writer": writing.identity()}
    return {
        "target": context.target.identity(weights=config.needs_weights and not written_by),
        **written_by,
        **context.template,
        "settings": settings | {"engine": describe_engine(engine.settings if engine else None)},
        "prompts": describe_sources(config.prompts, _evaluation_texts(context), seed),
        "seed": seed,
        "prepare": context.folder("prepare").digest() if uses_corpus else None,
    }


def writer_of(config: SynthesizeConfig, context: StageContext) -> Target:
    """The model that writes: the target, or another one of its vocabulary."""
    if not config.writer:
        return context.target
    writer = Target(TargetConfig(model=config.writer, dtype=context.target.dtype))
    check_same(context.target.vocabulary, writer.vocabulary, special_tokens=False, where="synthesize.writer")
    return writer


def _engine(config: SynthesizeConfig, context: StageContext) -> EngineChoice | None:
    """None where every answer is there already."""
    opened = (
        config.engine,
        writer_of(config, context),
        context.settings.device,
        context.folder("synthesize"),
    )
    return choose_engine(*opened) if config.asks else None


def _evaluation_texts(context: StageContext) -> set[str]:
    """Every prompt of every evaluation task, also those beyond a task's `prompts`, normalised."""
    tasks = getattr(context.sections.get("evaluate"), "tasks", [])
    whole = [load_task(task.model_copy(update={"prompts": 2**31})) for task in tasks]
    return {normalised(prompt.text) for task in whole for prompt in task.prompts}


def run(config: SynthesizeConfig, context: StageContext) -> None:
    """Writes units until the budget is reached or every prompt was asked at every temperature."""
    folder, console, target = context.folder("synthesize"), context.console, context.target
    settings, choice, held_out = context.settings, _engine(config, context), _evaluation_texts(context)
    set_threads(settings.threads)
    drawn = (context.chat, target.vocabulary, held_out, settings.seed)
    account = Account(Planner(config, *drawn, lambda: context.require("prepare")).plans())
    for source in account.plans:
        if source.note:
            console.say(f"prompts '{source.name}': {source.note}")
    engine = None
    if choice:
        console.say(f"engine {choice}")
        how: dict[str, Any] = settings.model_dump(include={"device", "threads"})
        how |= {"batch_rows": config.batch_rows}
        how |= {"end_loops": config.looping != "keep"}  # what would be cut off or dropped need not be written
        engine = open_engine(choice.settings, writer_of(config, context), folder, console, **how)
    writer, fresh = _writer(config, target, context.chat, engine, held_out), 0
    scorer = _scorer(config, choice, engine, context)
    with console.progress("synthesize", config.tokens, "tokens", 0) as progress:
        while account.total.tokens < config.tokens and (plan := account.next_plan()):
            fresh += _take_unit(plan, account, writer, folder, settings.seed)
            if scorer and config.logits.kind == "top_k":
                _keep_logits(folder, account.units - 1, scorer, config.logits.k)
            done = account.total
            progress.update(done.tokens, f"{done.written} rows, {done.total_filtered} filtered")
            if account.is_dry(plan.name):
                gone = f"no row kept of its last {DRY_UNITS} units; going on without"
                console.warn(f"prompts '{plan.name}': {gone}")
            console.stop.check(folder.path)
        speed = round(fresh / progress.seconds, 1) if fresh else None
    if not account.total.written:
        found = f"{folder.path}: 0 of {account.total.asked} rows kept ({account.total.reasons})"
        fix = "check prompts and target, or change `looping`"
        if account.total.failed > account.total.total_filtered:
            fix = "its numbers are not finite in this precision: set target.dtype=fp32"
        elif account.total.filtered.get("prompt_too_long", 0) * 2 > account.total.asked:
            fix = "shorten the prompts or lower synthesize.max_new_tokens"
        raise DataError(f"{found}; the target must write some text", fix)
    _tell(config, account, console)
    folder.complete(
        **asdict(account.total),
        units=account.units,
        by_source={name: asdict(c) for name, c in account.by_source.items()},
        by_temperature={f"{t:g}": asdict(c) for t, c in sorted(account.by_temperature.items())},
        template=context.chat.settings,
        notes={plan.name: plan.note for plan in account.plans if plan.note},
        refused_prompts={plan.name: plan.refused for plan in account.plans if plan.refused},
        generated_tokens_per_second=speed,
        target=target.identity(weights=config.needs_weights),
        writer=config.writer or None,
        logits=config.logits.model_dump(),
        sampling=config.model_dump(include={"temperatures", "samples", "top_k", "top_p", "max_new_tokens"}),
        engine=choice.settings.kind if choice else "none",
        provenance=describe_run(),
    )
    del engine, writer, scorer  # lets go of the converted target: on Windows an open file cannot be removed
    folder.remove_scratch()


def _writer(
    config: SynthesizeConfig,
    target: Target,
    chat: ChatTemplate,
    engine: Engine | None,
    held_out: Collection[str],
) -> UnitWriter:
    tokenizer, vocabulary, instructing = target.tokenizer, target.vocabulary, None
    if engine and any(isinstance(source, MagpiePrompts) for source in config.prompts):
        instructing = engine.with_ends([*vocabulary.eos_token_ids, *sorted(chat.end_of_turn_ids())])
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    row_filter = RowFilter(vocabulary.missing_ids, lambda ids: str(decode(ids)), config.looping)
    limits = (config.max_new_tokens, target.context_length, config.top_k, config.top_p)
    return UnitWriter(engine, instructing, chat, row_filter, *limits, held_out)


def _scorer(
    config: SynthesizeConfig, choice: EngineChoice | None, engine: Engine | None, context: StageContext
) -> Scorer | None:
    """The model whose distributions are kept: the one that writes here, else the target loaded beside it."""
    if config.logits.kind == "none":
        return None
    scorer = getattr(engine, "model", None)
    if choice and isinstance(choice.settings, OpenVINOEngineConfig) and choice.settings.device == "CPU":
        where = (context.folder("synthesize"), context.console)
        export = converted(writer_of(config, context), choice.settings.weights, *where)
        scorer = OpenVINOModel(export, choice.settings.precision, context.settings.threads)
    scorer = scorer or writer_of(config, context).model(pick_device(context.settings.device))
    if config.logits.k >= (size := scored_ids(scorer)):
        rule = f"must be below the {size} ids of the target's vocabulary"
        raise RecipeError(f"synthesize.logits.k: {config.logits.k}; {rule}", "lower it; 64 is usual")
    return scorer


def _take_unit(plan: SourcePlan, account: Account, writer: UnitWriter, folder: StageFolder, seed: int) -> int:
    """Asks and keeps the source's next unit, or takes over a kept one; returns the tokens generated now."""
    index, rows, generated = account.units, list[SyntheticRow](), 0

    def ask() -> dict[str, Any]:
        nonlocal generated
        number = account.units_of[plan.name]
        unit = plan.unit(number)
        written, counts = writer.write(unit, unit_seed(seed, index))
        rows.extend(written)
        generated = counts.generated
        facts = {"source": plan.name, "number": number, "temperature": unit.temperature}
        return {**facts, "counts": asdict(counts)}

    name = unit_name(index)
    facts = folder.keep(name, ask, read=read_facts, write=lambda path, facts: write_rows(path, rows, facts))
    writer.row_filter.remember(*read_columns(folder.path / name, ["row_id", "prompt_key"]).values())
    account.add(plan.name, facts["temperature"], RowCounts(**facts["counts"]))
    return generated


def _keep_logits(folder: StageFolder, index: int, model: Scorer, k: int) -> None:
    """The distributions over a unit that stands: a process may have ended between its rows and these."""
    name, size = unit_name(index), scored_ids(model)
    folder.keep(
        logits_name(name),
        lambda: unit_logits(model, read_rows(folder.path / name), k),
        read=partial(read_sparse_logits, start=0, stop=0),
        write=lambda path, logits: write_sparse_logits(path, logits, size),
    )


def _tell(config: SynthesizeConfig, account: Account, console: Console) -> None:
    """What was written, in one table, and what the user should know."""
    rows, total = [], account.total
    for name, c in [*account.by_source.items(), ("all", total)]:
        ended, tokens = f"{c.stopped / max(c.written, 1):.0%}", format_count(c.tokens)
        rows.append([name, c.asked, c.written, c.total_filtered, c.failed, tokens, ended, c.cut])
    header = ["prompts", "asked", "written", "filtered", "failed", "tokens", "ended", "loops cut"]
    console.table("", header, rows)
    if total.filtered:
        console.say(f"filtered: {total.reasons}")
    for plan in account.plans:
        if reasons := tell_counts(plan.refused):
            console.say(f"prompts '{plan.name}' not asked: {reasons}")
    if total.tokens < config.tokens:
        done = f"{format_count(total.tokens)} of {format_count(config.tokens)} tokens"
        console.warn(f"all prompts are used up at {done}; add prompts or raise synthesize.samples")
