"""Synthesize: prompts -> responses that the target writes, as token ids with the log-prob of each.

Decides the order of the work: sources of prompts take turns so that any beginning holds their shares; each unit of prompts
is asked, filtered and committed as one file (`units/unit-00000.parquet`, its account inside it), so a killed run loses or
doubles nothing and goes on at the first unit that is missing; the stage ends with the first unit that reaches the budget.
Which engine writes is settled before the fingerprint, which names it: a run's text is written by one engine from end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from fastdraft.artifacts import FINGERPRINT, Artifact, write_json
from fastdraft.config import Config, Count, format_count
from fastdraft.conversation import Prompt
from fastdraft.data.filters import Looping, RowCounts
from fastdraft.data.prompts import CorpusPrompts, MagpiePrompts, PromptConfig, TextPrompts, normalised, select_texts
from fastdraft.data.responses import UNITS, read_columns, read_metadata, unit_path, write_rows
from fastdraft.data.units import CorpusPrefixes, UnitPlan, unit_seed
from fastdraft.errors import ArtifactError, DataError, DeviceError, MissingExtraError, TargetError
from fastdraft.interfaces import StageContext, TargetConfig
from fastdraft.provenance import describe_run
from fastdraft.runtimes.engines import (
    AutoEngineConfig,
    ChosenEngine,
    EngineConfig,
    Engines,
    HuggingFaceEngineConfig,
    choose_engine,
    open_engines,
)
from fastdraft.tasks import load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.console import Console
    from fastdraft.decoding.unit_writer import UnitWriter
    from fastdraft.vocabulary import Vocabulary

DRY_UNITS = 4
"""A source is given up after this many units in a row of which no row was kept."""


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
    batch_rows: int = Field(default=64, ge=1)
    """Prompts in a unit: generated together, committed together."""
    top_k: int = Field(default=0, ge=0)
    """0 keeps all: the draft learns the whole distribution."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """1 keeps all."""
    keep_truncated: bool = True
    """Keeps chat answers cut by max_new_tokens: every token of them is the target's own. false leaves such rows out."""
    looping: Looping = "cut"
    """An answer that runs into a loop ends there: cut behind the loop's second round, or drop the row; keep lets it go on."""
    engine: EngineConfig = AutoEngineConfig()
    """What runs the target: auto, huggingface or openvino."""

    @field_validator("temperatures")
    @classmethod
    def _distinct_temperatures(cls, values: list[float]) -> list[float]:
        if any(not 0 <= value <= 10 for value in values):
            raise ValueError("temperatures must be between 0 and 10")
        return list(dict.fromkeys(values))

    @model_validator(mode="after")
    def _distinct_names(self) -> SynthesizeConfig:
        names = [source.name for source in self.prompts]
        if len(set(names)) < len(names):
            raise ValueError("every entry of prompts needs a name of its own")
        return self


def fingerprint(config: SynthesizeConfig, context: StageContext) -> dict[str, Any]:
    """Target, engine, settings, seed, prompts; of the evaluation tasks only which prompts they forbid; prepared corpora where used.

    Raises:
        DataError: when a prompt or task file is missing. ArtifactError: when this machine cannot go on with the engine that began.
    """
    return _fingerprint(config, context, choose_engine(config.engine, context).settings)


def _fingerprint(config: SynthesizeConfig, context: StageContext, engine: ChosenEngine) -> dict[str, Any]:
    held_out = _evaluation_texts(context)
    prompts: dict[str, Any] = {}
    for source in config.prompts:
        if isinstance(source, TextPrompts):
            refused = select_texts(source, held_out, context.settings.seed).digest
            prompts[source.name] = {**source.describe(), "refused_for_evaluation": refused}
        else:
            prompts[source.name] = source.model_dump(mode="json")
    uses_corpus = any(isinstance(source, CorpusPrompts) for source in config.prompts)
    return {
        "target": _target_identity(context.target),
        "settings": {**config.model_dump(mode="json", exclude={"prompts"}), "engine": engine.model_dump(mode="json")},
        "prompts": prompts,
        "seed": context.settings.seed,
        "prepare": context.artifact("prepare").digest() if uses_corpus else None,
    }


def _target_identity(target: TargetConfig) -> dict[str, Any]:
    from fastdraft.modeling.source import model_identity

    return model_identity(target.model, target.location, target.revision, target.dtype)


def _evaluation_texts(context: StageContext) -> set[str]:
    """Every prompt of every evaluation task, also those beyond a task's `prompts`, normalised."""
    tasks = getattr(context.sections.get("evaluate"), "tasks", [])
    return {normalised(prompt.text) for task in tasks for prompt in load_task(task.model_copy(update={"prompts": 2**31})).prompts}


@dataclass
class _Ledger:
    """What the committed units add up to; the next unit follows from it alone."""

    names: list[str]
    units: int = 0
    total: RowCounts = field(default_factory=RowCounts)
    by_temperature: dict[str, RowCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_source = {name: RowCounts() for name in self.names}
        self.units_of = dict.fromkeys(self.names, 0)
        self.dry = dict.fromkeys(self.names, 0)
        self.open = dict.fromkeys(self.names, True)

    def add(self, source: str, temperature: float, counts: RowCounts) -> None:
        """Enters a committed unit."""
        for account in (self.total, self.by_source[source], self.by_temperature.setdefault(f"{temperature:g}", RowCounts())):
            account.add(counts)
        self.units += 1
        self.units_of[source] += 1
        self.dry[source] = 0 if counts.written else self.dry[source] + 1
        self.open[source] &= self.dry[source] < DRY_UNITS


def run(config: SynthesizeConfig, context: StageContext) -> None:
    """Writes units until the budget is reached or every prompt was asked at every temperature.

    Raises:
        DataError: when no row at all could be kept.
        ArtifactError: when a committed unit is damaged.
    """
    artifact = context.artifact("synthesize")
    writer, plans, refused, engine = _prepare(config, context)
    ledger = _Ledger([plan.name for plan in plans])
    for leftover in (artifact.path / UNITS).glob(".*.tmp"):
        leftover.unlink()
    _enter_committed(plans, ledger, writer, artifact)
    before = ledger.total.generated
    with context.console.progress("synthesize", config.tokens, "tokens", ledger.total.tokens) as progress:
        while ledger.total.tokens < config.tokens and (plan := _next_plan(plans, ledger)):
            _write_unit(plan, ledger, writer, artifact, context)
            progress.update(ledger.total.tokens, f"{ledger.total.written} rows, {ledger.total.total_filtered} filtered")
            context.console.stop.check(artifact.path)
        speed = (ledger.total.generated - before) / progress.seconds if ledger.total.generated > before else None
    if not ledger.total.written:
        found = f"0 of {ledger.total.asked} rows kept ({_reasons(ledger.total)})"
        raise DataError(artifact.path, found, "the target must write some text", _remedy(ledger.total))
    _tell(config, context, ledger, refused)
    artifact.complete(**_manifest(config, context, ledger, refused, speed), engine=engine.kind, provenance=describe_run())
    del writer  # lets go of the converted target: on Windows an open file cannot be removed
    artifact.remove_scratch()


def _next_plan(plans: list[UnitPlan], ledger: _Ledger) -> UnitPlan | None:
    """The source furthest behind its share that still has a unit."""
    open_plans = [plan for plan in plans if ledger.open[plan.name] and plan.has_unit(ledger.units_of[plan.name])]
    return min(open_plans, key=lambda plan: ledger.by_source[plan.name].tokens / plan.share, default=None)


def _enter_committed(plans: list[UnitPlan], ledger: _Ledger, writer: UnitWriter, artifact: Artifact) -> None:
    """Takes over the units of an earlier process, in order, up to the first that is missing."""
    while (path := unit_path(artifact, ledger.units)).exists():
        facts, plan = read_metadata(path), _next_plan(plans, ledger)
        expected = (plan.name, ledger.units_of[plan.name]) if plan else (None, None)
        if (facts.get("source"), facts.get("number")) != expected:
            found = f"holds unit {facts.get('number')} of prompts '{facts.get('source')}'"
            raise ArtifactError(path, found, f"must hold unit {expected[1]} of '{expected[0]}'", "redo it with --redo synthesize")
        columns = read_columns(path, ["row_id", "prompt_key"])
        writer.row_filter.remember(columns["row_id"], columns["prompt_key"])
        ledger.add(facts["source"], facts["temperature"], RowCounts.from_dict(facts["counts"]))


def _write_unit(plan: UnitPlan, ledger: _Ledger, writer: UnitWriter, artifact: Artifact, context: StageContext) -> None:
    """Asks the next unit of this source and commits it."""
    number = ledger.units_of[plan.name]
    unit = plan.unit(number)
    assert unit is not None, "has_unit said that there is one"
    rows, counts = writer.write(unit, unit_seed(context.settings.seed, ledger.units))
    facts = {"source": plan.name, "number": number, "temperature": unit.temperature, "counts": counts.as_dict()}
    write_rows(unit_path(artifact, ledger.units), rows, facts)
    ledger.add(plan.name, unit.temperature, counts)
    if not ledger.open[plan.name]:
        context.console.warn(f"prompts '{plan.name}': no row kept of the last {DRY_UNITS} units ({_reasons(counts)}); going on without")


def _prepare(config: SynthesizeConfig, context: StageContext) -> tuple[UnitWriter, list[UnitPlan], dict[str, dict[str, int]], ChosenEngine]:
    """The target with its filters, each source's plan, the prompts refused by source and reason, and the engine that writes."""
    from fastdraft.data.chat import end_of_turn_ids
    from fastdraft.data.filters import RowFilter
    from fastdraft.decoding.unit_writer import UnitWriter
    from fastdraft.modeling.loading import load_tokenizer, load_vocabulary, set_threads

    target = context.target
    set_threads(context.settings.threads)
    tokenizer = load_tokenizer(target.location, target.revision, target.trust_remote_code)
    held_out = _evaluation_texts(context)
    plans, refused = _plan_sources(config, context, tokenizer, held_out)
    vocabulary = load_vocabulary(target)
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
    )
    return writer, plans, refused, engine


def _open(config: SynthesizeConfig, context: StageContext, vocabulary: Vocabulary, turns: Vocabulary) -> tuple[ChosenEngine, Engines]:
    """The chosen engine, opened; where it was not the recipe's choice and cannot run this target, transformers in its place."""
    choice, artifact = choose_engine(config.engine, context), context.artifact("synthesize")
    end_loops = config.looping != "keep"  # what would be cut off or dropped need not be written
    context.console.say(f"engine {choice}")
    try:
        return choice.settings, open_engines(choice.settings, context, vocabulary, turns, batch_rows=config.batch_rows, end_loops=end_loops)
    except (TargetError, MissingExtraError, ArtifactError, DeviceError) as error:
        if choice.by_recipe or choice.settings.kind == "huggingface" or unit_path(artifact, 0).exists():
            raise
        context.console.warn(f"OpenVINO cannot run this target, so transformers writes: {error}")
    engine = HuggingFaceEngineConfig()
    write_json(artifact.path / FINGERPRINT, _fingerprint(config, context, engine))  # nothing is written yet
    return engine, open_engines(engine, context, vocabulary, turns, batch_rows=config.batch_rows, end_loops=end_loops)


def _plan_sources(
    config: SynthesizeConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, held_out: set[str]
) -> tuple[list[UnitPlan], dict[str, dict[str, int]]]:
    """Each source's units, and the prompts refused by source and reason."""
    seed, plans, refused = context.settings.seed, [], {}
    common: dict[str, Any] = {"samples": config.samples, "unit_rows": config.batch_rows, "seed": seed}
    for place, source in enumerate(config.prompts):
        if isinstance(source, TextPrompts):
            chosen = select_texts(source, held_out, seed)
            refused[source.name] = chosen.refused
            own = _text_plan(source, chosen.texts, tokenizer, context.console)
        else:
            own = _corpus_plan(source, context, tokenizer) if isinstance(source, CorpusPrompts) else _magpie_plan(source, tokenizer)
        start = place % len(config.temperatures)  # sources begin at different temperatures, so that few units hold all of them
        temperatures = config.temperatures[start:] + config.temperatures[:start]
        plans.append(UnitPlan(name=source.name, share=source.share, temperatures=temperatures, **common, **own))
    return plans, refused


def _text_plan(source: TextPrompts, texts: list[Prompt], tokenizer: PreTrainedTokenizerBase, console: Console) -> dict[str, Any]:
    from fastdraft.data.chat import has_chat_template, prompt_ids
    from fastdraft.data.dialogue import conversation_plan

    if found := conversation_plan(tokenizer, texts):
        if found.format.note:
            console.say(f"prompts '{source.name}': {found.format.note}")
        return found.fields
    chat, bare = source.chat and has_chat_template(tokenizer), [str(text) for text in texts]
    return {"size": len(bare), "chat": chat, "encode": lambda index: prompt_ids(tokenizer, bare[index], chat)}


def _corpus_plan(source: CorpusPrompts, context: StageContext, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    from fastdraft.data.chat import plain_prefix_ids
    from fastdraft.data.shards import open_corpus

    prepare = context.require("prepare")
    rows, separator = open_corpus(prepare, source.corpus, "train"), prepare.manifest()["separator_id"]
    prefixes = CorpusPrefixes(rows, separator, source.prompt_tokens, before=plain_prefix_ids(tokenizer), seed=context.settings.seed)
    return {"size": min(len(prefixes), source.count or len(prefixes)), "chat": False, "encode": prefixes}


def _magpie_plan(source: MagpiePrompts, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    from fastdraft.data.chat import user_prefix_ids

    prefix = user_prefix_ids(tokenizer)
    return {"size": source.count, "encode": lambda index: list(prefix), "instruction_tokens": source.max_instruction_tokens}


def _manifest(
    config: SynthesizeConfig, context: StageContext, ledger: _Ledger, refused: dict[str, dict[str, int]], speed: float | None
) -> dict[str, Any]:
    by_temperature = sorted(ledger.by_temperature.items(), key=lambda item: float(item[0]))
    return {
        **ledger.total.as_dict(),
        "units": ledger.units,
        "by_source": {name: counts.as_dict() for name, counts in ledger.by_source.items()},
        "by_temperature": {name: counts.as_dict() for name, counts in by_temperature},
        "refused_prompts": refused,
        "generated_tokens_per_second": None if speed is None else round(speed, 1),
        "target": _target_identity(context.target),
        "sampling": {name: getattr(config, name) for name in ("temperatures", "samples", "top_k", "top_p", "max_new_tokens")},
    }


def _tell(config: SynthesizeConfig, context: StageContext, ledger: _Ledger, refused: dict[str, dict[str, int]]) -> None:
    """What was written, in one table, and what the user should know."""
    console = context.console
    accounts = [*ledger.by_source.items(), ("all", ledger.total)]
    rows = [
        [name, c.asked, c.written, c.total_filtered, c.failed, format_count(c.tokens), f"{c.stopped / max(c.written, 1):.0%}", c.cut]
        for name, c in accounts
    ]
    console.table("", ["prompts", "asked", "written", "filtered", "failed", "tokens", "ended", "loops cut"], rows)
    if ledger.total.filtered:
        console.say(f"filtered: {_reasons(ledger.total)}")
    for name, reasons in refused.items():
        if any(reasons.values()):
            console.say(f"prompts '{name}' not asked: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count))
    if ledger.total.tokens < config.tokens:
        done = f"{format_count(ledger.total.tokens)} of {format_count(config.tokens)} tokens"
        console.warn(f"all prompts are used up at {done}; add prompts or raise synthesize.samples")


def _reasons(counts: RowCounts) -> str:
    reasons = dict(counts.filtered) | ({"failed": counts.failed} if counts.failed else {})
    return ", ".join(f"{rows} {reason}" for reason, rows in sorted(reasons.items(), key=lambda item: -item[1])) or "none filtered"


def _remedy(counts: RowCounts) -> str:
    if counts.failed > counts.total_filtered:
        return "its numbers are not finite in this precision: set target.dtype=fp32"
    if counts.filtered.get("prompt_too_long", 0) * 2 > counts.asked:
        return "shorten the prompts or lower synthesize.max_new_tokens"
    return "check prompts and target, or change `looping` and `keep_truncated`"
