"""Synthesize: prompts -> responses that the target writes, as token ids with the log-prob of each.

Sources take turns so that any beginning holds their shares. Each unit of prompts is asked, filtered and kept
as one file with its account inside, so that a killed run loses or doubles nothing.
"""

from __future__ import annotations

import datetime
from collections import Counter, deque
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

from fastdraft.console import Console, format_count
from fastdraft.data.chat import ChatTemplate
from fastdraft.data.filters import RowCounts, RowFilter
from fastdraft.data.prompts import normalised, tell_counts
from fastdraft.data.rows import SyntheticRow, read_columns, read_facts, read_rows, unit_name, write_rows
from fastdraft.data.sparse_logits import SparseLogits, logits_name, read_sparse_logits, write_sparse_logits
from fastdraft.data.synthesis_plan import DRY_UNITS, Account, Planner, SourcePlan, describe_sources, unit_seed
from fastdraft.errors import DataError, RecipeError, TargetError
from fastdraft.evaluation.tasks import load_task
from fastdraft.functional.generation import Engine
from fastdraft.modeling.drafts import pick_device, set_threads
from fastdraft.modeling.vocabulary import check_same
from fastdraft.provenance import describe_run
from fastdraft.ray_workers import Place
from fastdraft.recipe.run import TargetConfig
from fastdraft.recipe.synthesize import (
    CorpusPrompts,
    MagpiePrompts,
    OpenAIEngineConfig,
    OpenVINOEngineConfig,
    SynthesizeConfig,
)
from fastdraft.run_folder import StageFolder
from fastdraft.runtimes.engines import (
    EngineChoice,
    choose_engine,
    convert_for_all,
    converted,
    describe_engine,
    open_engine,
    place_of,
    require_installed,
    uses_weights,
)
from fastdraft.runtimes.openvino_reader import OpenVINOModel
from fastdraft.runtimes.synthesis import Scorer, UnitWriter, keep_rows, scored_ids
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.workers import Job, Workers


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
    if choice:
        console.say(f"engine {choice}")
    make = partial(_open_writer, config, choice, held_out, context.run.date, context)
    with context.workers("synthesize", make, *_place(choice, config)) as workers:
        if workers.count and choice:
            convert_for_all(choice.settings, writer_of(config, context), folder, console)
        workers.open()
        units = _Units(config, folder, account, workers, _row_filter(config, target), settings.seed)
        with console.progress("synthesize", config.tokens, "tokens", 0) as progress:
            while account.total.tokens < config.tokens and (plan := account.next_plan()):
                units.keep(plan)
                done = account.total
                progress.update(done.tokens, f"{done.written} rows, {done.total_filtered} filtered")
                if account.is_dry(plan.name):
                    gone = f"no row kept of its last {DRY_UNITS} units; going on without"
                    console.warn(f"prompts '{plan.name}': {gone}")
                console.stop.check(folder.path)
            units.keep_all_logits()
            seconds, fresh = progress.seconds, units.fresh
        speed = round(fresh.total() / seconds, 1) if fresh else None
    if workers.count:
        told = [f"{name} {format_count(count / seconds)}" for name, count in sorted(fresh.items())]
        console.say(f"tokens/s by worker: {', '.join(told)}")
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
    folder.remove_scratch()


def _place(choice: EngineChoice | None, config: SynthesizeConfig) -> tuple[Place, int]:
    """What each worker has for itself, and how many there are where the machines do not say so."""
    settings = choice.settings if choice else None
    if isinstance(settings, OpenAIEngineConfig) and not config.needs_weights:
        return "none", len(settings.servers)
    return place_of(settings), 0


def _open_writer(
    config: SynthesizeConfig,
    choice: EngineChoice | None,
    held_out: Collection[str],
    date: datetime.date,
    context: StageContext,
) -> UnitWriter:
    """What writes and scores, with the target loaded: in this process or a worker's."""
    settings, target, instructing, engine = context.settings, context.target, None, None
    set_threads(settings.threads)
    chat = ChatTemplate(target.tokenizer, target.chat_template_kwargs, date)
    if choice:
        how: dict[str, Any] = settings.model_dump(include={"device", "threads"})
        how |= {"batch_rows": config.batch_rows}
        how |= {"end_loops": config.looping != "keep"}  # what would be cut off or dropped need not be written
        where = (context.folder("synthesize"), context.console)
        engine = open_engine(choice.settings, writer_of(config, context), *where, **how)
        if any(isinstance(source, MagpiePrompts) for source in config.prompts):
            ends = [*target.vocabulary.eos_token_ids, *sorted(chat.end_of_turn_ids())]
            instructing = engine.with_ends(ends)
    missing, scorer = frozenset(target.vocabulary.missing_ids), _scorer(config, choice, engine, context)
    limits = (config.max_new_tokens, target.context_length, config.top_k, config.top_p)
    return UnitWriter(engine, instructing, chat, missing, *limits, held_out, scorer)


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


def _row_filter(config: SynthesizeConfig, target: Target) -> RowFilter:
    decode = partial(target.tokenizer.decode, skip_special_tokens=True)
    return RowFilter(target.vocabulary.missing_ids, lambda ids: str(decode(ids)), config.looping)


@dataclass
class _Units:
    """Units in their order: asked of the workers, filtered by what stands before them, kept, then scored."""

    config: SynthesizeConfig
    folder: StageFolder
    account: Account
    workers: Workers
    row_filter: RowFilter
    seed: int
    fresh: Counter[str] = field(default_factory=Counter)  # tokens generated now, by worker
    _unscored: deque[int] = field(default_factory=deque)  # units that stand, whose logits may not

    def keep(self, plan: SourcePlan) -> None:
        """Asks and keeps the source's next unit, or takes over a kept one."""
        name, rows = unit_name(self.account.units), list[SyntheticRow]()

        def ask() -> dict[str, Any]:
            number = self.account.units_of[plan.name]
            answers = self.workers.take(self._asking(plan, number), self._ahead())
            written, counts = keep_rows(answers, self.row_filter)
            rows.extend(written)
            self.fresh[self.workers.last] += counts.generated
            facts = {"source": plan.name, "number": number, "temperature": answers.temperature}
            return {**facts, "counts": asdict(counts)}

        facts = self.folder.keep(
            name, ask, read=read_facts, write=lambda path, it: write_rows(path, rows, it)
        )
        columns = read_columns(self.folder.path / name, ["row_id", "prompt_key"])
        self.row_filter.remember(*columns.values())
        if self.config.logits.kind == "top_k":
            self._unscored.append(self.account.units)
        self.account.add(plan.name, facts["temperature"], RowCounts(**facts["counts"]))
        while len(self._unscored) > 2 * self.workers.count:  # where others work they need not be waited for
            self._keep_logits()

    def keep_all_logits(self) -> None:
        """Waits for those of the last units too."""
        while self._unscored:
            self._keep_logits()

    def _keep_logits(self) -> None:
        """The distributions over a unit that stands: a process may have ended between its rows and these."""
        index, sizes = self._unscored[0], list[int]()

        def score() -> SparseLogits:
            found, size = self.workers.take(self._scoring(index), self._ahead())
            sizes.append(size)
            return cast(SparseLogits, found)

        self.folder.keep(
            logits_name(unit_name(index)),
            score,
            read=partial(read_sparse_logits, start=0, stop=0),
            write=lambda path, logits: write_sparse_logits(path, logits, sizes[0]),
        )
        self._unscored.popleft()

    def _asking(self, plan: SourcePlan, number: int) -> Job:
        seed = unit_seed(self.seed, plan.name, number)
        return Job((plan.name, number), "write", lambda: (plan.unit(number), seed))

    def _scoring(self, index: int) -> Job:
        path, k = self.folder.path / unit_name(index), getattr(self.config.logits, "k", 0)
        return Job(("logits", index), "logits", lambda: (read_rows(path), k))

    def _ahead(self) -> Iterator[Job]:
        """Scoring first: it holds up the least."""
        for index in self._unscored:
            if not self.folder.has(logits_name(unit_name(index))):
                yield self._scoring(index)
        for plan, number in self.account.ahead(self.config.tokens):
            yield self._asking(plan, number)


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
