"""Synthesize: prompts -> responses that the target writes, as token ids with the log-prob of each.

Decides the order of the work: sources of prompts take turns so that any beginning holds their shares; each unit of prompts
is asked, filtered and committed as one file (`units/unit-00000.parquet`, its account inside it), so a killed run loses or
doubles nothing and goes on at the first unit that is missing; the stage ends with the first unit that reaches the budget.
Which engine writes is settled before the fingerprint, which names it: a run's text is written by one engine from end to end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from fastdraft.data.chat import end_of_turn_ids
from fastdraft.data.filters import RowCounts, RowFilter
from fastdraft.data.prompts import normalised, tell_counts
from fastdraft.data.rows import read_columns, read_facts, read_rows, unit_name, unit_path, write_rows
from fastdraft.data.sparse_logits import logits_path, write_sparse_logits
from fastdraft.data.synthesis_plan import DRY_UNITS, Account, Planner, SourcePlan, describe_sources, unit_seed
from fastdraft.errors import DataError, FastDraftError, MissingExtra, RecipeError, TargetError
from fastdraft.modeling.heads import output_head
from fastdraft.modeling.drafts import pick_device, set_threads
from fastdraft.provenance import describe_run
from fastdraft.recipe.base import format_count
from fastdraft.recipe.data import (
    TRANSPORT,
    ChosenEngine,
    HuggingFaceEngineConfig,
    SynthesizeConfig,
    CorpusPrompts,
    MagpiePrompts,
)
from fastdraft.run_folder import FINGERPRINT, StageFolder, write_json
from fastdraft.runtimes.engines import (
    NOBODY,
    Engines,
    choose_engine,
    no_engines,
    open_engines,
    require_installed,
    uses_weights,
)
from fastdraft.runtimes.synthesis import UnitWriter, unit_logits
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.evaluation.tasks import load_task

if TYPE_CHECKING:
    from fastdraft.modeling.vocabulary import Vocabulary


def check_installed(config: SynthesizeConfig) -> None:
    """Raises:
    MissingExtra: when the engine needs a library that is not there.
    """
    require_installed(config.engine)


def fingerprint(config: SynthesizeConfig, context: StageContext) -> dict[str, Any]:
    """Target, engine, settings, seed, prompts; of the evaluation tasks only which prompts they forbid; prepared corpora where used.

    Raises:
        DataError: when a prompt or task file is missing. TargetError: when weights are needed and missing.
        FastDraftError: when this machine cannot go on with the engine that began.
    """
    return _fingerprint(
        config, context, choose_engine(config.engine, context).settings if config.asks else None
    )


def _fingerprint(
    config: SynthesizeConfig, context: StageContext, engine: ChosenEngine | None
) -> dict[str, Any]:
    """With the engine that really writes, without its transport; None: nobody is asked."""
    require_weights(config, context.target)
    uses_corpus = any(isinstance(source, CorpusPrompts) for source in config.prompts)
    return {
        "target": _target_identity(config, context.target),
        # Without `logits: none`, so that rows written before there was a choice still count as the same work.
        "settings": {
            **config.model_dump(
                mode="json", exclude={"prompts", *(("logits",) if config.logits.kind == "none" else ())}
            ),
            "engine": engine.model_dump(mode="json", exclude=set(TRANSPORT)) if engine else {"kind": NOBODY},
        },
        "prompts": describe_sources(config.prompts, _evaluation_texts(context), context.settings.seed),
        "seed": context.settings.seed,
        "prepare": context.folder("prepare").digest() if uses_corpus else None,
    }


def require_weights(config: SynthesizeConfig, target: Target) -> None:
    """Refuses work that needs the target's weights where they are not, before any of it is claimed.

    Raises:
        TargetError: naming what is missing.
    """

    if not config.needs_weights:
        return
    try:
        target.files.check_weights()
    except TargetError as error:
        if config.asks and uses_weights(config.engine):
            raise
        rule = "synthesize.logits: top_k scores all text with the target's weights, whoever wrote it"
        fix = "put them there, or set synthesize.logits: {kind: none}"
        raise TargetError(f"{error.message}; {rule}", fix) from None


def _target_identity(config: SynthesizeConfig, target: Target) -> dict[str, Any]:

    return target.identity(weights=config.needs_weights)


def _evaluation_texts(context: StageContext) -> set[str]:
    """Every prompt of every evaluation task, also those beyond a task's `prompts`, normalised."""
    tasks = getattr(context.sections.get("evaluate"), "tasks", [])
    return {
        normalised(prompt.text)
        for task in tasks
        for prompt in load_task(task.model_copy(update={"prompts": 2**31})).prompts
    }


def run(config: SynthesizeConfig, context: StageContext) -> None:
    """Writes units until the budget is reached or every prompt was asked at every temperature.

    Raises:
        DataError: when no row at all could be kept.
        FastDraftError: when a committed unit is damaged.
    """
    folder = context.folder("synthesize")
    writer, account, engine, scorer = _prepare(config, context)
    before = None
    with context.console.progress("synthesize", config.tokens, "tokens", 0) as progress:
        while account.total.tokens < config.tokens and (plan := account.next_plan()):
            if not (folder.path / unit_name(account.units)).exists() and before is None:
                before = account.total.generated
            _keep_unit(plan, account, writer, folder, context.settings.seed)
            if scorer is not None:
                _keep_logits(folder, account.units - 1, scorer, config.logits.k)
            progress.update(
                account.total.tokens, f"{account.total.written} rows, {account.total.total_filtered} filtered"
            )
            if account.is_dry(plan.name):
                context.console.warn(
                    f"prompts '{plan.name}': no row kept of the last {DRY_UNITS} units; going on without"
                )
            context.console.stop.check(folder.path)
        speed = None if before is None else (account.total.generated - before) / progress.seconds
    if not account.total.written:
        found = f"0 of {account.total.asked} rows kept ({account.total.reasons})"
        raise DataError(f"{folder.path}: {found}; the target must write some text", _remedy(account.total))
    _tell(config, context, account)
    name = engine.kind if engine else NOBODY
    folder.complete(**_manifest(config, context, account, speed), engine=name, provenance=describe_run())
    del writer, scorer  # lets go of the converted target: on Windows an open file cannot be removed
    folder.remove_scratch()


def _keep_unit(
    plan: SourcePlan, account: Account, writer: UnitWriter, folder: StageFolder, seed: int
) -> None:
    """Asks the source's next unit and keeps it, or takes over the one that an earlier process kept."""
    path = unit_path(folder, account.units)
    if not path.exists():
        number = account.units_of[plan.name]
        unit = plan.unit(number)
        rows, counts = writer.write(unit, unit_seed(seed, account.units))
        facts = {"source": plan.name, "number": number, "temperature": unit.temperature}
        write_rows(path, rows, {**facts, "counts": counts.as_dict()})
    facts, columns = read_facts(path), read_columns(path, ["row_id", "prompt_key"])
    writer.row_filter.remember(columns["row_id"], columns["prompt_key"])
    account.add(facts["source"], facts["temperature"], RowCounts.from_dict(facts["counts"]))


def _keep_logits(folder: StageFolder, index: int, model: PreTrainedModel, k: int) -> None:
    unit = unit_path(folder, index)
    if not logits_path(unit).exists():
        logits = unit_logits(model, read_rows(unit), k)
        write_sparse_logits(logits_path(unit), logits, output_head(model)[1].vocab_size)


def _prepare(
    config: SynthesizeConfig, context: StageContext
) -> tuple[UnitWriter, Account, ChosenEngine | None, PreTrainedModel | None]:
    """The target with its filters, each source's plan, the engine that writes, and the model that scores."""
    target, console = context.target, context.console
    set_threads(context.settings.threads)
    tokenizer = target.tokenizer
    held_out, vocabulary = _evaluation_texts(context), target.vocabulary
    planner = Planner(
        config, tokenizer, vocabulary, held_out, context.settings.seed, lambda: context.require("prepare")
    )
    plans = planner.plans()
    for plan in plans:
        if plan.note:
            console.say(f"prompts '{plan.name}': {plan.note}")
    magpie = any(isinstance(source, MagpiePrompts) for source in config.prompts)
    turn_ends = (*vocabulary.eos_token_ids, *(sorted(end_of_turn_ids(tokenizer)) if magpie else ()))
    turns = replace(vocabulary, eos_token_ids=turn_ends)
    engine, engines = _open(config, context, vocabulary, turns)
    row_filter = RowFilter(
        vocabulary.missing_ids,
        lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
        config.looping,
    )
    writer = UnitWriter(
        engines.answering,
        instruction_engine=engines.instructing,
        tokenizer=tokenizer,
        row_filter=row_filter,
        max_new_tokens=config.max_new_tokens,
        context_length=engines.context_length,
        top_k=config.top_k,
        top_p=config.top_p,
        held_out=held_out,
    )
    scorer = None
    if config.logits.kind == "top_k":
        scorer = getattr(engines.answering, "model", None)
        if not isinstance(scorer, PreTrainedModel):
            scorer = target.model(pick_device(context.settings.device))
        size = output_head(scorer)[1].vocab_size
        if config.logits.k >= size:
            rule = f"must be below the {size} ids of the target's vocabulary"
            raise RecipeError(f"synthesize.logits.k: {config.logits.k}; {rule}", "lower it; 64 is usual")
    return writer, Account(plans), engine, scorer


def _open(
    config: SynthesizeConfig, context: StageContext, vocabulary: Vocabulary, turns: Vocabulary
) -> tuple[ChosenEngine | None, Engines]:
    """The chosen engine, opened; where it was not the recipe's choice and cannot run this target, transformers in its place."""
    if not config.asks:
        return None, _nobody(context.target)
    choice, artifact = choose_engine(config.engine, context), context.folder("synthesize")
    end_loops = config.looping != "keep"  # what would be cut off or dropped need not be written
    context.console.say(f"engine {choice}")
    try:
        return choice.settings, open_engines(
            choice.settings, context, vocabulary, turns, batch_rows=config.batch_rows, end_loops=end_loops
        )
    except (TargetError, MissingExtra, FastDraftError, RecipeError) as error:
        if choice.by_recipe or choice.settings.kind == "huggingface" or unit_path(artifact, 0).exists():
            raise
        context.console.warn(f"OpenVINO cannot run this target, so transformers writes: {error}")
    engine = HuggingFaceEngineConfig()
    write_json(artifact.path / FINGERPRINT, _fingerprint(config, context, engine))  # nothing is written yet
    return engine, open_engines(
        engine, context, vocabulary, turns, batch_rows=config.batch_rows, end_loops=end_loops
    )


def _nobody(target: Target) -> Engines:
    """For answers that stand already: all that is asked of the target is how long they may be."""
    return no_engines(target.context_length)


def _manifest(
    config: SynthesizeConfig, context: StageContext, account: Account, speed: float | None
) -> dict[str, Any]:
    by_temperature = sorted(account.by_temperature.items())
    return {
        **account.total.as_dict(),
        "units": account.units,
        "by_source": {name: counts.as_dict() for name, counts in account.by_source.items()},
        "by_temperature": {f"{name:g}": counts.as_dict() for name, counts in by_temperature},
        "refused_prompts": {plan.name: plan.refused for plan in account.plans if plan.refused},
        "generated_tokens_per_second": None if speed is None else round(speed, 1),
        "target": _target_identity(config, context.target),
        "logits": config.logits.model_dump(),
        "sampling": {
            name: getattr(config, name)
            for name in ("temperatures", "samples", "top_k", "top_p", "max_new_tokens")
        },
    }


def _tell(config: SynthesizeConfig, context: StageContext, account: Account) -> None:
    """What was written, in one table, and what the user should know."""
    console = context.console
    accounts = [*account.by_source.items(), ("all", account.total)]
    rows = [
        [
            name,
            c.asked,
            c.written,
            c.total_filtered,
            c.failed,
            format_count(c.tokens),
            f"{c.stopped / max(c.written, 1):.0%}",
            c.cut,
        ]
        for name, c in accounts
    ]
    console.table(
        "", ["prompts", "asked", "written", "filtered", "failed", "tokens", "ended", "loops cut"], rows
    )
    if account.total.filtered:
        console.say(f"filtered: {account.total.reasons}")
    for plan in account.plans:
        if reasons := tell_counts(plan.refused):
            console.say(f"prompts '{plan.name}' not asked: {reasons}")
    if account.total.tokens < config.tokens:
        done = f"{format_count(account.total.tokens)} of {format_count(config.tokens)} tokens"
        console.warn(f"all prompts are used up at {done}; add prompts or raise synthesize.samples")


def _remedy(counts: RowCounts) -> str:
    if counts.failed > counts.total_filtered:
        return "its numbers are not finite in this precision: set target.dtype=fp32"
    if counts.filtered.get("prompt_too_long", 0) * 2 > counts.asked:
        return "shorten the prompts or lower synthesize.max_new_tokens"
    return "check prompts and target, or change `looping`"
