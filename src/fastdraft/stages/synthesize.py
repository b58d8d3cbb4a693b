"""Synthesize: prompts -> responses that the target writes, as token ids with the log-prob of each.

Decides the order of the work: sources of prompts take turns so that any beginning holds their shares; each unit of prompts
is asked, filtered and committed as one file (`units/unit-00000.parquet`, its account inside it), so a killed run loses or
doubles nothing and goes on at the first unit that is missing; the stage ends with the first unit that reaches the budget.
Which engine writes is settled before the fingerprint, which names it: a run's text is written by one engine from end to end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from fastdraft.artifacts import FINGERPRINT, Artifact, write_json
from fastdraft.config import Config, Count, distinct, format_count
from fastdraft.data.filters import Looping, RowCounts
from fastdraft.data.ledger import DRY_UNITS, Ledger
from fastdraft.data.plans import Planner, describe_sources
from fastdraft.data.prompts import CorpusPrompts, MagpiePrompts, PromptConfig, normalised
from fastdraft.data.responses import UNITS, read_columns, read_metadata, unit_path, write_rows
from fastdraft.data.transcript_lines import TranscriptPrompts
from fastdraft.data.units import Plan, unit_seed
from fastdraft.errors import ArtifactError, DataError, DeviceError, MissingExtraError, TargetError
from fastdraft.interfaces import StageContext, TargetConfig
from fastdraft.provenance import describe_run
from fastdraft.runtimes.engine_settings import (
    TRANSPORT,
    AutoEngineConfig,
    ChosenEngine,
    EngineConfig,
    HuggingFaceEngineConfig,
    OpenAIEngineConfig,
)
from fastdraft.runtimes.engines import (
    NOBODY,
    Engines,
    choose_engine,
    no_engines,
    open_engines,
    require_installed,
    uses_weights,
)
from fastdraft.tasks import load_task

if TYPE_CHECKING:
    from fastdraft.decoding.unit_writer import UnitWriter
    from fastdraft.vocabulary import Vocabulary


class NoLogitsConfig(Config):
    """Only the tokens: all that sequence-level distillation needs."""

    kind: Literal["none"] = "none"


class TopKLogitsConfig(Config):
    """At every response token the target's most likely tokens and the mass of all others, at temperature 1, by a scoring pass of the
    target's weights: they must be here, also where a server or a log gives the text.
    """

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=64, ge=1, le=1024)
    """Tokens kept. About 4 bytes each: 258 to 274 bytes a response token for 64."""


LogitsConfig = Annotated[NoLogitsConfig | TopKLogitsConfig, Field(discriminator="kind")]


class SynthesizeConfig(Config):
    """`synthesize:` — what the target is asked, and how it answers."""

    prompts: list[PromptConfig] = Field(min_length=1)
    """Where prompts come from; `share` divides the budget's tokens."""
    tokens: Count = Field(default=250_000, ge=1)
    """Response tokens to write; the unit that reaches it is the last. (FastDraft's own number is not published.)"""
    temperatures: list[float] = Field(default=[0.0, 0.6, 0.8, 1.0], min_length=1)
    """Greedy and the paper's three; each prompt is asked at one, then, if the budget lasts, at the next."""
    samples: int = Field(default=1, ge=1)
    """Answers for each prompt at each temperature above 0, if the budget lasts; greedy is asked once."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Length at which an answer is cut."""
    batch_rows: int = Field(default=64, ge=1, le=65_536)
    """Prompts in a unit: generated together, committed together."""
    top_k: int = Field(default=0, ge=0)
    """0 keeps all: the draft learns the whole distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """1 keeps all."""
    logits: LogitsConfig = NoLogitsConfig()
    """none, or top_k: the target's distributions beside its tokens, for token-level distillation without the target."""
    keep_truncated: bool = True
    """Keeps chat answers cut by max_new_tokens: every token of them is the target's own. false leaves such rows out."""
    looping: Looping = "cut"
    """An answer that runs into a loop ends there: cut behind the loop's second round, or drop the row; keep lets it go on."""
    engine: EngineConfig = AutoEngineConfig()
    """What runs the target: auto, huggingface, openvino, or openai for a server."""

    @field_validator("temperatures")
    @classmethod
    def _distinct_temperatures(cls, values: list[float]) -> list[float]:
        distinct(values, 0, 10, "temperatures must be between 0 and 10")
        return list(dict.fromkeys(values))

    @model_validator(mode="after")
    def _distinct_names(self) -> SynthesizeConfig:
        names = {
            source.name.casefold() for source in self.prompts
        }  # capitals aside: each may name a task's files
        if len(names) < len(self.prompts):
            raise ValueError("every entry of prompts needs a name of its own, capitals aside")
        return self

    @model_validator(mode="after")
    def _logprobs_fit_the_sampling(self) -> SynthesizeConfig:
        if isinstance(self.engine, OpenAIEngineConfig) and self.asks:
            self.engine.check_sampling(self.temperatures, self.top_k, self.top_p)
        return self

    @property
    def asks(self) -> bool:
        """Whether the target is asked anything: not where all answers stand already."""
        return any(not isinstance(source, TranscriptPrompts) for source in self.prompts)

    @property
    def needs_weights(self) -> bool:
        """Whether the target's weights must be on this machine: they write, or score what others wrote."""
        return self.logits.kind == "top_k" or (self.asks and uses_weights(self.engine))


def check_installed(config: SynthesizeConfig) -> None:
    """Raises:
    MissingExtraError: when the engine needs a library that is not there.
    """
    require_installed(config.engine)


def fingerprint(config: SynthesizeConfig, context: StageContext) -> dict[str, Any]:
    """Target, engine, settings, seed, prompts; of the evaluation tasks only which prompts they forbid; prepared corpora where used.

    Raises:
        DataError: when a prompt or task file is missing. TargetError: when weights are needed and missing.
        ArtifactError: when this machine cannot go on with the engine that began.
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
        "prepare": context.artifact("prepare").digest() if uses_corpus else None,
    }


def require_weights(config: SynthesizeConfig, target: TargetConfig) -> None:
    """Refuses work that needs the target's weights where they are not, before any of it is claimed.

    Raises:
        TargetError: naming what is missing.
    """
    from fastdraft.modeling.source import check_weights

    if not config.needs_weights:
        return
    try:
        check_weights(target.location)
    except TargetError as error:
        if config.asks and uses_weights(config.engine):
            raise
        rule = "synthesize.logits: top_k scores all text with the target's weights, whoever wrote it"
        raise TargetError(
            target.location, error.found, rule, "put them there, or set synthesize.logits: {kind: none}"
        ) from None


def _target_identity(config: SynthesizeConfig, target: TargetConfig) -> dict[str, Any]:
    from fastdraft.modeling.source import model_identity

    return model_identity(
        target.model, target.location, target.revision, target.dtype, weights=config.needs_weights
    )


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
        ArtifactError: when a committed unit is damaged.
    """
    artifact = context.artifact("synthesize")
    writer, plans, refused, engine = _prepare(config, context)
    ledger = Ledger(plans)
    for leftover in (artifact.path / UNITS).glob(".*.tmp"):
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


def _enter_committed(ledger: Ledger, writer: UnitWriter, artifact: Artifact) -> None:
    """Takes over the units of an earlier process, in order, up to the first that is missing."""
    while (path := unit_path(artifact, ledger.units)).exists():
        facts, plan = read_metadata(path), ledger.next_plan()
        expected = (plan.name, ledger.units_of[plan.name]) if plan else (None, None)
        if (facts.get("source"), facts.get("number")) != expected:
            found = f"holds unit {facts.get('number')} of prompts '{facts.get('source')}'"
            raise ArtifactError(
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
    plan: Plan, ledger: Ledger, writer: UnitWriter, artifact: Artifact, context: StageContext
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
    from fastdraft.modeling.loading import load_tokenizer, load_vocabulary, set_threads

    target = context.target
    set_threads(context.settings.threads)
    tokenizer = load_tokenizer(target.location, target.revision, target.trust_remote_code)
    held_out = _evaluation_texts(context)
    vocabulary = load_vocabulary(target)
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

    row_filter = RowFilter(vocabulary.missing_ids, decode, config.looping, config.keep_truncated)
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
    choice, artifact = choose_engine(config.engine, context), context.artifact("synthesize")
    end_loops = config.looping != "keep"  # what would be cut off or dropped need not be written
    context.console.say(f"engine {choice}")
    try:
        return choice.settings, open_engines(
            choice.settings, context, vocabulary, turns, batch_rows=config.batch_rows, end_loops=end_loops
        )
    except (TargetError, MissingExtraError, ArtifactError, DeviceError) as error:
        if choice.by_recipe or choice.settings.kind == "huggingface" or unit_path(artifact, 0).exists():
            raise
        context.console.warn(f"OpenVINO cannot run this target, so transformers writes: {error}")
    engine = HuggingFaceEngineConfig()
    write_json(artifact.path / FINGERPRINT, _fingerprint(config, context, engine))  # nothing is written yet
    return engine, open_engines(
        engine, context, vocabulary, turns, batch_rows=config.batch_rows, end_loops=end_loops
    )


def _nobody(target: TargetConfig) -> Engines:
    """For answers that stand already: all that is asked of the target is how long they may be."""
    from fastdraft.modeling.loading import load_config

    return no_engines(int(load_config(target.location, target.revision).max_position_embeddings))


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
    return "check prompts and target, or change `looping` and `keep_truncated`"
