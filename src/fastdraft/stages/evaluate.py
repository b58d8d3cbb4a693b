"""Evaluate: draft x target x tasks x temperature x K -> counts, rates, speed-ups in `results.json`.

The target writes its texts once; every checkpoint is replayed over them; the final draft decodes some for
real. Each step is kept (evaluation/work.py), so that a killed run goes on where it was.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from transformers import PreTrainedModel

from fastdraft.data.chat import ChatTemplate
from fastdraft.data.contamination import search_training_text
from fastdraft.data.logs import describe
from fastdraft.data.rows import read_all
from fastdraft.decoding.cache import ReadableModel
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.decoding.scoring import score
from fastdraft.errors import Halving
from fastdraft.evaluation.lookup import lookup_rows
from fastdraft.evaluation.results import EvaluationResults, PromptOverlap, ReplayedTexts
from fastdraft.evaluation.rows import CostRatios, findings, samples, tell
from fastdraft.evaluation.tasks import describe_task, encode_task, load_task
from fastdraft.evaluation.texts import GivenTexts, logged_rows, trained_prompts
from fastdraft.evaluation.work import EvaluationWork, LoadModel, TextWorker
from fastdraft.functional.generation import Engine
from fastdraft.modeling.drafts import load_draft, pick_device, set_threads
from fastdraft.modeling.vocabulary import check_same
from fastdraft.provenance import describe_run
from fastdraft.recipe.evaluation import (
    AutoTexts,
    EngineTexts,
    EvaluateConfig,
    HeldOutTexts,
    LoggedTexts,
    TargetTexts,
)
from fastdraft.recipe.synthesize import ChosenEngine, LlamaCppEngineConfig, OpenVINOEngineConfig
from fastdraft.reporting.tables import ladder
from fastdraft.run_folder import StageFolder, write_json
from fastdraft.runtimes.engines import (
    choose_engine,
    convert_for_all,
    describe_engine,
    exact_pair,
    open_engine,
    place_of,
    uses_weights,
)
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from fastdraft.stages.context import DRAFT_FOLDERS, StageContext
from fastdraft.target import Target


def fingerprint(config: EvaluateConfig, context: StageContext) -> dict[str, Any]:
    """Settings, task files, target, drafts, training text; not the device, on which only latencies depend."""
    texts = describe(config.texts) if isinstance(config.texts, LoggedTexts) else config.texts.model_dump()
    if isinstance(config.texts, AutoTexts):
        texts["kind"] = "target"  # the same work, where no engine writes
    if writer := _writer(config, context):
        texts["engine"] = describe_engine(writer)
    return {
        **config.model_dump(),
        "tasks": [describe_task(task) for task in config.tasks],
        "texts": texts,
        "target": context.target.identity(weights=needs_weights(config, context.sections)),
        **context.template,
        "seed": context.settings.seed,
        "trained_on": {folder.name: folder.digest() for folder in _trained_on(context)},
        "checkpoints": {name: context.require(name).digest() for name in compared(config, context.sections)},
    }


def compared(config: EvaluateConfig, sections: Mapping[str, Any]) -> list[str]:
    """The drafts of this recipe that are to be compared, in the order of training."""
    return [name for name in DRAFT_FOLDERS if name in config.checkpoints and name in sections] or ["design"]


def needs_weights(config: EvaluateConfig, sections: Mapping[str, Any]) -> bool:
    """Whether the target's weights must be on this machine; `sections` are the recipe's, by stage."""
    if isinstance(config.texts, EngineTexts):
        return uses_weights(sections["synthesize"].engine)
    return isinstance(config.texts, AutoTexts | TargetTexts) or config.texts.logprobs == "target"


def run(config: EvaluateConfig, context: StageContext) -> None:
    """Writes `results.json` and `samples.json`."""
    start, folder, console, settings = (
        time.monotonic(),
        context.folder("evaluate"),
        context.console,
        context.settings,
    )
    set_threads(settings.threads)
    target = context.target
    names = compared(config, context.sections)
    drafts = {name: Target.at(context.require(name).path / DRAFT_FOLDERS[name]) for name in names}
    for draft in drafts.values():
        check_same(target.vocabulary, draft.vocabulary, where=draft.location)
    context_length = min(model.context_length for model in (target, *drafts.values()))
    models = model, loaders = _models(config, context)
    given = _given_texts(config, context, context_length)
    if given:
        tasks = given.tasks()
    else:
        tasks = [encode_task(task, context.chat, context_length, console) for task in config.tasks]
    writer = _writer(config, context)
    final, load_final = drafts[names[-1]], loaders[names[-1]]
    writing = target.vocabulary, model, given.rows if given else None
    decoding = _decoding(writer, model, final, load_final, context)
    work = EvaluationWork(
        config, tasks, settings.seed, folder, console, *writing, by_engine=writer is not None, **decoding
    )
    make = partial(_open_texts, config, writer, context.run.date, context)
    here = partial(make, models, work.advance)
    with context.workers("evaluate", make, place_of(writer), here=here) as work.workers:
        if work.workers.count:
            convert_for_all(writer, target, folder, console)
        work.take_turns(context_length)
        work.write_texts()
        replayed = work.replay(names)
    exact = work.exact(names[-1])
    both: tuple[ProposerKind, ...] = ("lookup", "lookup_draft")
    with_lookup = {kind: work.exact(names[-1], kind) for kind in both}
    latency = work.latency(load_final)
    costs = CostRatios(
        final.architecture.parameters / target.architecture.parameters,
        # At equal precision.
        final.architecture.bytes_per_token(16) / target.architecture.bytes_per_token(16),
        latency,
    )
    results = EvaluationResults(
        target=target.name,
        draft=f"{names[-1]}/{DRAFT_FOLDERS[names[-1]]}",
        cost_ratio_parameters=round(costs.parameters, 6),
        cost_ratio_bytes=round(costs.bytes, 6),
        cost_ratio_latency=round(latency.cost_ratio, 6) if latency else None,
        latency=latency,
        **findings(work, replayed, exact, costs, context_length),
        contamination=None if given else _contamination(config, context),
        lookup=lookup_rows(work, replayed, with_lookup, costs),
        texts=ReplayedTexts(kind=_texts_kind(config, writer), left_out=dict(given.left_out) if given else {}),
    )
    written = results.to_json()
    write_json(folder.path / "results.json", written)
    shown = samples(work, exact, target.tokenizer)
    write_json(folder.path / "samples.json", [sample.to_json() for sample in shown])
    title = f"Acceptance rate and tokens per target pass, K = {results.headline_k}"
    console.table(title, *ladder(results).plain())
    tell(results, console)
    folder.complete(
        tasks={
            t.name: {"prompts": len(t.prompt_ids), "skipped": t.num_skipped, "why": t.skipped}
            for t in work.tasks
        },
        **{name: written[name] for name in ("differences", "greedy_check", "contamination")},
        seconds=round(time.monotonic() - start, 1),
        provenance=describe_run(),
    )
    folder.remove_scratch()


def _models(config: EvaluateConfig, context: StageContext) -> tuple[LoadModel | None, dict[str, LoadModel]]:
    """What loads the target, where it is read, and each draft; each is loaded once."""
    device, target = pick_device(context.settings.device), context.target
    # Loaded when it is asked for: where OpenVINO writes and decodes, only its passes are timed, at the end.
    reads = isinstance(config.texts, AutoTexts | TargetTexts)
    model = cache(partial(target.model, device)) if reads else None
    # Same device and precision for both: that is what is decoded with and what latency compares.
    plain = model is None or (device.type == "cpu" and target.dtype in ("auto", "fp32"))

    def loaded(name: str) -> PreTrainedModel:
        dtype = torch.float32 if plain or model is None else model().dtype
        return load_draft(context.require(name).path / DRAFT_FOLDERS[name], device, dtype)

    return model, {name: cache(partial(loaded, name)) for name in compared(config, context.sections)}


def _open_texts(
    config: EvaluateConfig,
    writer: ChosenEngine | None,
    date: datetime.date,
    context: StageContext,
    models: tuple[LoadModel | None, dict[str, LoadModel]] | None = None,
    on_batch: Callable[[int], None] = lambda count: None,
) -> TextWorker:
    """What writes and replays texts, in this process with the models that it has."""
    set_threads(context.settings.threads)
    target, (model, drafts) = context.target, models or _models(config, context)
    open_engine = partial(_open_engine, writer, config.batch_rows, context, model, on_batch)
    chat = ChatTemplate(target.tokenizer, target.chat_template_kwargs, date)
    return TextWorker(open_engine, drafts, target.vocabulary, chat, on_batch)


def _decoding(
    writer: ChosenEngine | None,
    model: Callable[[], PreTrainedModel] | None,
    draft: Target,
    load: Callable[[], PreTrainedModel],
    context: StageContext,
) -> dict[str, Any]:
    """How exact runs are made: in OpenVINO over the very weights that wrote, else in transformers."""
    if model is None:
        return {}
    if isinstance(writer, OpenVINOEngineConfig) and writer.device.startswith("CPU"):
        how = context.folder("evaluate"), context.console, context.settings.threads
        return {"open_pair": partial(exact_pair, writer, context.target, draft, *how)}
    precision = str(model().dtype).removeprefix("torch.")
    return {"open_pair": lambda: (ReadableModel(model()), ReadableModel(load())), "precision": precision}


def _given_texts(config: EvaluateConfig, context: StageContext, context_length: int) -> GivenTexts | None:
    """Texts that nobody has to write any more; None where somebody has to."""
    texts, target, settings = config.texts, context.target, context.settings
    found, trained = GivenTexts(), frozenset[str]()
    if isinstance(texts, HeldOutTexts):
        rows = list(read_all(context.require("synthesize"), "validation"))
    elif isinstance(texts, LoggedTexts):
        rows, note = logged_rows(texts, context.chat, target.vocabulary, settings.seed, found.left_out)
        if note:
            context.console.say(f"texts '{texts.name}': {note}")
        for folder in _trained_on(context, "synthesize"):
            trained = trained_prompts(folder)
    else:
        return None
    wanted = texts.logprobs == "target"
    rescore = partial(score, target.model(pick_device(settings.device))) if wanted else None
    greedy_draft = config.draft_temperature == 0
    found.take(rows, context_length=context_length, trained=trained, score=rescore, greedy_draft=greedy_draft)
    if found.left_out:
        hint = "; sampled answers without log-probs count with evaluate.draft_temperature: 0"
        context.console.say(f"texts left out: {found.told}{hint if found.left_out['no_logprobs'] else ''}")
    return found


def _open_engine(
    writer: ChosenEngine | None,
    batch_rows: int,
    context: StageContext,
    model: Callable[[], PreTrainedModel] | None,
    on_batch: Callable[[int], None],
) -> Engine:
    """What writes the tasks' texts: the engine of synthesize, or the loaded target."""
    target, console, settings = context.target, context.console, context.settings
    if writer is None:
        assert model is not None
        halving = Halving("evaluate.batch_rows", console.warn)
        return HuggingFaceEngine(model(), target.vocabulary, batch_rows, on_batch, halving=halving)
    return open_engine(
        writer,
        target,
        context.folder("evaluate"),
        console,
        device=settings.device,
        threads=settings.threads,
        batch_rows=batch_rows,
        on_answer=on_batch,
    )


def _writer(config: EvaluateConfig, context: StageContext) -> ChosenEngine | None:
    """The engine of synthesize where it writes the tasks' texts; None: the loaded target, or nobody.

    Where that is `auto`, the one that wrote the training rows.
    """
    if isinstance(config.texts, AutoTexts):
        if not context.has("synthesize") or not context.section("synthesize").asks:
            return None
    elif not isinstance(config.texts, EngineTexts):
        return None
    engine, folder = context.section("synthesize").engine, context.folder("synthesize")
    chosen = choose_engine(engine, context.target, context.settings.device, folder).settings
    local = isinstance(chosen, OpenVINOEngineConfig | LlamaCppEngineConfig)
    return chosen if local or isinstance(config.texts, EngineTexts) else None


def _texts_kind(config: EvaluateConfig, writer: ChosenEngine | None) -> str:
    """For `results.json`: who wrote, where the recipe leaves it open."""
    return ("engine" if writer else "target") if isinstance(config.texts, AutoTexts) else config.texts.kind


def _trained_on(context: StageContext, *stages: str) -> list[StageFolder]:
    """Those stages of this recipe that are finished and hold training text."""
    folders = [context.folder(name) for name in stages or ("prepare", "synthesize") if context.has(name)]
    return [folder for folder in folders if folder.is_complete()]


def _contamination(config: EvaluateConfig, context: StageContext) -> dict[str, PromptOverlap] | None:
    """13-grams that prompts and references share with everything trained on; None without such text."""
    folders, tokenizer = _trained_on(context), context.target.tokenizer
    if not folders:
        return None
    texts = {
        task.name: [tokenizer(p.everything, add_special_tokens=False).input_ids for p in task.prompts]
        for task in map(load_task, config.tasks)
    }
    found = search_training_text(texts, folders, context.console)
    return {name: PromptOverlap.from_json(overlap) for name, overlap in found.items()}
