"""Synthesize: prompts -> responses that the target writes, as token ids with the log-prob of each.

Decides the order of the work: sources of prompts take turns so that any beginning holds their shares; each unit of prompts
is asked, filtered and committed as one file (`units/unit-00000.parquet`, its account inside it), so a killed run loses or
doubles nothing and goes on at the first unit that is missing; the stage ends with the first unit that reaches the budget.
Which engine writes is settled before the fingerprint, which names it: a run's text is written by one engine from end to end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastdraft.data.filters import RowCounts
from fastdraft.data.ledger import DRY_UNITS, Ledger
from fastdraft.data.plans import Planner, describe_sources
from fastdraft.data.prompts import normalised
from fastdraft.data.rows import read_columns, read_facts, unit_path, write_rows
from fastdraft.data.units import Plan, unit_seed
from fastdraft.errors import DataError, FastDraftError, MissingExtra, RecipeError, TargetError
from fastdraft.provenance import describe_run
from fastdraft.recipe.base import format_count
from fastdraft.recipe.data import (
    TRANSPORT,
    ChosenEngine,
    CorpusPrompts,
    HuggingFaceEngineConfig,
    MagpiePrompts,
    SynthesizeConfig,
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
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.evaluation.tasks import load_task

if TYPE_CHECKING:
    from fastdraft.decoding.unit_writer import UnitWriter
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
    artifact = context.folder("synthesize")
    writer, plans, refused, engine = _prepare(config, context)
    ledger = Ledger(plans)
    for leftover in (artifact.path / "units").glob(".*.tmp"):
        leftover.unlink()
    _enter_committed(ledger, writer, artifact)
    before = ledger.total.generated
    with context.console.progress("synthesize", config.tokens, "tokens", ledger.total.tokens) as progress:
        while ledger.total.tokens < config.tokens and (plan := ledger.next_plan()):
            _write_unit(plan, ledger, writer, artifact, context)
            progress.update(
                ledger.total.tokens, f"{ledger.total.written} rows, {ledger.total.total_filtered} filtered"
            )
            context.console.stop.check(artifact.path)
        speed = (
            (ledger.total.generated - before) / progress.seconds if ledger.total.generated > before else None
        )
    if not ledger.total.written:
        found = f"0 of {ledger.total.asked} rows kept ({_reasons(ledger.total)})"
        raise DataError(artifact.path, found, "the target must write some text", _remedy(ledger.total))
    _tell(config, context, ledger, refused)
    name = engine.kind if engine else NOBODY
    artifact.complete(
        **_manifest(config, context, ledger, refused, speed), engine=name, provenance=describe_run()
    )
    del writer  # lets go of the converted target: on Windows an open file cannot be removed
    artifact.remove_scratch()


def _enter_committed(ledger: Ledger, writer: UnitWriter, artifact: StageFolder) -> None:
    """Takes over the units of an earlier process, in order, up to the first that is missing."""
    while (path := unit_path(artifact, ledger.units)).exists():
        facts, plan = read_facts(path), ledger.next_plan()
        expected = (plan.name, ledger.units_of[plan.name]) if plan else (None, None)
        if (facts.get("source"), facts.get("number")) != expected:
            found = f"holds unit {facts.get('number')} of prompts '{facts.get('source')}'"
            raise FastDraftError(
                path,
                found,
                f"must hold unit {expected[1]} of '{expected[0]}'",
                "redo it with --redo synthesize",
            )
        writer.write_logits(path)  # a process may have ended between a unit's rows and their logits
        columns = read_columns(path, ["row_id", "prompt_key"])
        writer.row_filter.remember(columns["row_id"], columns["prompt_key"])
        ledger.add(facts["source"], facts["temperature"], RowCounts.from_dict(facts["counts"]))


def _write_unit(
    plan: Plan, ledger: Ledger, writer: UnitWriter, artifact: StageFolder, context: StageContext
) -> None:
    """Asks the next unit of this source and commits it."""
    number = ledger.units_of[plan.name]
    unit = plan.unit(number)
    assert unit is not None, "has_unit said that there is one"
    rows, counts = writer.write(unit, unit_seed(context.settings.seed, ledger.units))
    facts = {
        "source": plan.name,
        "number": number,
        "temperature": unit.temperature,
        "counts": counts.as_dict(),
    }
    write_rows(unit_path(artifact, ledger.units), rows, facts)
    writer.write_logits(unit_path(artifact, ledger.units))
    ledger.add(plan.name, unit.temperature, counts)
    if not ledger.open[plan.name]:
        context.console.warn(
            f"prompts '{plan.name}': no row kept of the last {DRY_UNITS} units ({_reasons(counts)}); going on without"
        )


def _prepare(
    config: SynthesizeConfig, context: StageContext
) -> tuple[UnitWriter, list[Plan], dict[str, dict[str, int]], ChosenEngine | None]:
    """The target with its filters, each source's plan, the prompts refused by source and reason, and the engine that writes."""
    from fastdraft.data.chat import end_of_turn_ids
    from fastdraft.data.filters import RowFilter
    from fastdraft.decoding.logit_writer import open_logit_writer
    from fastdraft.decoding.unit_writer import UnitWriter
    from fastdraft.modeling.drafts import set_threads

    target = context.target
    set_threads(context.settings.threads)
    tokenizer = target.tokenizer
    held_out = _evaluation_texts(context)
    vocabulary = target.vocabulary
    planner = Planner(
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        held_out=held_out,
        temperatures=config.temperatures,
        samples=config.samples,
        unit_rows=config.batch_rows,
        seed=context.settings.seed,
        prepared=lambda: context.require("prepare"),
    )
    plans = planner.plan(config.prompts)
    for name, note in planner.notes.items():
        context.console.say(f"prompts '{name}': {note}")
    magpie = any(isinstance(source, MagpiePrompts) for source in config.prompts)
    turn_ends = (*vocabulary.eos_token_ids, *(sorted(end_of_turn_ids(tokenizer)) if magpie else ()))
    turns = replace(vocabulary, eos_token_ids=turn_ends)
    engine, engines = _open(config, context, vocabulary, turns)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    row_filter = RowFilter(vocabulary.missing_ids, decode, config.looping)
    writer = UnitWriter(
        engines.answering,
        instruction_engine=engines.instructing,
        tokenizer=tokenizer,
        row_filter=row_filter,
        max_new_tokens=config.max_new_tokens,
        context_length=engines.context_length,
        top_k=config.top_k,
        top_p=config.top_p,
        is_evaluation=held_out.__contains__,
        logit_writer=open_logit_writer(config.logits.k, engines.answering, context)
        if config.logits.kind == "top_k"
        else None,
    )
    return writer, plans, planner.refused, engine


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

    return no_engines(int(target.config.max_position_embeddings))


def _manifest(
    config: SynthesizeConfig,
    context: StageContext,
    ledger: Ledger,
    refused: dict[str, dict[str, int]],
    speed: float | None,
) -> dict[str, Any]:
    by_temperature = sorted(ledger.by_temperature.items(), key=lambda item: float(item[0]))
    return {
        **ledger.total.as_dict(),
        "units": ledger.units,
        "by_source": {name: counts.as_dict() for name, counts in ledger.by_source.items()},
        "by_temperature": {name: counts.as_dict() for name, counts in by_temperature},
        "refused_prompts": refused,
        "generated_tokens_per_second": None if speed is None else round(speed, 1),
        "target": _target_identity(config, context.target),
        "logits": config.logits.model_dump(),
        "sampling": {
            name: getattr(config, name)
            for name in ("temperatures", "samples", "top_k", "top_p", "max_new_tokens")
        },
    }


def _tell(
    config: SynthesizeConfig, context: StageContext, ledger: Ledger, refused: dict[str, dict[str, int]]
) -> None:
    """What was written, in one table, and what the user should know."""
    console = context.console
    accounts = [*ledger.by_source.items(), ("all", ledger.total)]
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
    if ledger.total.filtered:
        console.say(f"filtered: {_reasons(ledger.total)}")
    for name, reasons in refused.items():
        if any(reasons.values()):
            console.say(
                f"prompts '{name}' not asked: "
                + ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
            )
    if ledger.total.tokens < config.tokens:
        done = f"{format_count(ledger.total.tokens)} of {format_count(config.tokens)} tokens"
        console.warn(f"all prompts are used up at {done}; add prompts or raise synthesize.samples")


def _reasons(counts: RowCounts) -> str:
    reasons = dict(counts.filtered) | ({"failed": counts.failed} if counts.failed else {})
    return (
        ", ".join(f"{rows} {reason}" for reason, rows in sorted(reasons.items(), key=lambda item: -item[1]))
        or "none filtered"
    )


def _remedy(counts: RowCounts) -> str:
    if counts.failed > counts.total_filtered:
        return "its numbers are not finite in this precision: set target.dtype=fp32"
    if counts.filtered.get("prompt_too_long", 0) * 2 > counts.asked:
        return "shorten the prompts or lower synthesize.max_new_tokens"
    return "check prompts and target, or change `looping`"
