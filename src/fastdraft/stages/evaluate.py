"""Evaluate: draft x target x tasks x temperature x K -> counts, rates, speed-ups, in `results.json`.

Decides the order of the work: the target writes its texts once; every checkpoint is replayed over them; the final draft
decodes the first prompts for real; its cost is measured; then results.json and samples.json are put together. Each step
is kept in units (decoding/workbench.py), so that a killed run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.data.transcript_lines import describe
from fastdraft.errors import Halving
from fastdraft.functional.generation import Engine
from fastdraft.recipe.evaluation import EngineTexts, EvaluateConfig, LoggedTexts, TargetTexts, TextsConfig
from fastdraft.run_folder import StageFolder, write_json
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.tasks import describe_task, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fastdraft.decoding.figures import CostRatios
    from fastdraft.decoding.latency import Latency
    from fastdraft.decoding.standing_texts import StandingTexts
    from fastdraft.decoding.workbench import Plan
    from fastdraft.recipe.data import ChosenEngine

FOLDERS = {
    "design": "draft",
    "pretrain": "checkpoint",
    "continue_pretrain": "checkpoint",
    "align": "checkpoint",
}


def present_checkpoints(config: EvaluateConfig, context: StageContext) -> list[str]:
    """The drafts of this recipe that are to be compared, in the order of training; the last one is the final draft."""
    order = list(FOLDERS)
    found: list[str] = [name for name in sorted(config.checkpoints, key=order.index) if context.has(name)]
    return found or ["design"]


def fingerprint(config: EvaluateConfig, context: StageContext) -> dict[str, Any]:
    """Settings, task files, target, every checkpoint compared, and what they were trained on, in which the tasks' texts are looked for.

    Not the device, on which only latencies depend.
    """

    target = context.target
    return {
        **config.model_dump(),
        "tasks": [describe_task(task) for task in config.tasks],
        "texts": _describe_texts(config.texts, context),
        "target": target.identity(weights=needs_weights(config, context.sections)),
        "seed": context.settings.seed,
        "trained_on": {artifact.name: artifact.digest() for artifact in _trained_on(context)},
        "checkpoints": {
            name: context.require(name).digest() for name in present_checkpoints(config, context)
        },
    }


def _describe_texts(texts: TextsConfig, context: StageContext) -> dict[str, Any]:
    """With the log's files, or the engine that really writes."""
    from fastdraft.recipe.data import TRANSPORT

    if isinstance(texts, LoggedTexts):
        return describe(texts)
    engine = (
        {"engine": _chosen_engine(context).model_dump(mode="json", exclude=set(TRANSPORT))}
        if isinstance(texts, EngineTexts)
        else {}
    )
    return {**texts.model_dump(), **engine}


def _chosen_engine(context: StageContext) -> ChosenEngine:
    """The engine of synthesize; where that is `auto`, the one that wrote the training rows."""
    from fastdraft.runtimes.engines import choose_engine

    return choose_engine(context.section("synthesize").engine, context).settings


def needs_weights(config: EvaluateConfig, sections: Mapping[str, Any]) -> bool:
    """Whether the target's weights must be on this machine.

    Args:
        config: The recipe's `evaluate`.
        sections: All of the recipe's, by stage.
    """
    from fastdraft.runtimes.engines import uses_weights

    if isinstance(config.texts, EngineTexts):
        return uses_weights(sections["synthesize"].engine)
    return isinstance(config.texts, TargetTexts) or config.texts.logprobs == "target"


def run(config: EvaluateConfig, context: StageContext) -> None:
    """Writes `results.json` and `samples.json`.

    Raises:
        DataError: when no prompt of a task fits the context.
        TargetError: when a draft's vocabulary is not the target's.
        FastDraftError: when a checkpoint is missing or damaged.
        Interrupted: after a signal, with all finished units saved.
    """
    from functools import cache, partial

    import torch

    from fastdraft.decoding import scoreboard
    from fastdraft.decoding.turn_prompts import opened_once, with_turns
    from fastdraft.decoding.workbench import Workbench
    from fastdraft.modeling.drafts import load_draft, pick_device, set_threads
    from fastdraft.provenance import describe_run

    start, artifact, console = time.monotonic(), context.folder("evaluate"), context.console
    set_threads(context.settings.threads)
    device = pick_device(context.settings.device)
    folders = _drafts(config, context)
    target = context.target.model(device) if isinstance(config.texts, TargetTexts) else None
    vocabulary = context.target.vocabulary
    tokenizer = context.target.tokenizer
    context_length = _context_length(context, folders)
    standing = _standing_texts(config, context, tokenizer, context_length)
    engine = opened_once(partial(_engine, config, context, target))
    plan = _plan(config, context, tokenizer, context_length, standing)
    plan = with_turns(
        plan,
        engine,
        folder=artifact.path,
        console=console,
        tokenizer=tokenizer,
        context_length=context_length,
    )
    bench = Workbench(plan, artifact.path, console, target, vocabulary)
    # Same device and precision for both: that is what is decoded with and what latency compares.
    dtype = target.dtype if target else torch.float32
    loaders = {name: cache(partial(load_draft, folder, device, dtype)) for name, folder in folders.items()}
    final = list(loaders)[-1]
    if standing is not None:
        bench.keep_texts(standing.rows)
    else:
        bench.write_texts(engine)
    del engine  # with the model that it may hold, and its files: on Windows an open file cannot be removed
    replayed = bench.replay_all(loaders)
    exact = bench.exact_all(final, loaders[final]) if target is not None else {}
    costs = _costs(context, folders[final], bench.latency(loaders[final]) if target is not None else None)
    results = {
        "schema": 1,
        "target": context.target.name,
        "draft": folders[final].relative_to(context.run.root).as_posix(),
        **_cost_fields(costs),
        **scoreboard.findings(bench, replayed, exact, costs, context_length),
        "contamination": None if standing is not None else _contamination(config, context, tokenizer),
        "texts": {"kind": config.texts.kind, "left_out": standing.left_out if standing is not None else {}},
    }
    write_json(artifact.path / "results.json", results)
    write_json(artifact.path / "samples.json", scoreboard.samples(bench, exact, tokenizer))
    _tell(context, results, scoreboard.summary_table(results["rows"], plan.num_speculative_tokens))
    tasks = {task.name: {"prompts": len(task.prompt_ids), "skipped": task.num_skipped} for task in plan.tasks}
    found = {name: results[name] for name in ("differences", "greedy_check", "contamination")}
    artifact.complete(
        tasks=tasks, **found, seconds=round(time.monotonic() - start, 1), provenance=describe_run()
    )
    artifact.remove_scratch()


def _drafts(config: EvaluateConfig, context: StageContext) -> dict[str, Path]:
    """Folders of the drafts that are compared.

    Raises:
        FastDraftError: when a stage has not finished. TargetError: when a draft's vocabulary is not the target's.
    """
    from fastdraft.modeling.vocabulary import check_same

    folders = {
        name: context.require(name).path / FOLDERS[name] for name in present_checkpoints(config, context)
    }
    target = context.target.vocabulary
    for folder in folders.values():
        check_same(target, Target.at(folder).vocabulary, where=str(folder))
    return folders


def _context_length(context: StageContext, folders: Mapping[str, Path]) -> int:
    """Tokens that the target and every draft can read."""
    from fastdraft.modeling.families import text_config

    target = context.target.config
    return min(
        int(text_config(c).max_position_embeddings)
        for c in (target, *(Target.at(f).config for f in folders.values()))
    )


def _engine(
    config: EvaluateConfig,
    context: StageContext,
    target: PreTrainedModel | None,
    on_batch: Callable[[int], None],
) -> Engine:
    """What writes the tasks' texts: the loaded target, or the engine of synthesize."""

    vocabulary = context.target.vocabulary
    if target is not None:
        from fastdraft.runtimes.huggingface import HuggingFaceEngine

        halving = Halving("evaluate.batch_rows", context.console.warn)
        return HuggingFaceEngine(target, vocabulary, config.batch_rows, on_batch, halving=halving)
    from fastdraft.runtimes.engines import open_engines

    shared: dict[str, Any] = {
        "batch_rows": config.batch_rows,
        "end_loops": False,
        "on_answer": on_batch,
        "stage": "evaluate",
    }
    return open_engines(_chosen_engine(context), context, vocabulary, vocabulary, **shared).answering


def _standing_texts(
    config: EvaluateConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, context_length: int
) -> StandingTexts | None:
    """Texts that nobody has to write any more; None where somebody has to."""
    from fastdraft.decoding.standing_texts import gather

    if isinstance(config.texts, (TargetTexts, EngineTexts)):
        return None
    return gather(
        config.texts, context, tokenizer, context_length, greedy_draft=config.draft_temperature == 0
    )


def _plan(
    config: EvaluateConfig,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    standing: StandingTexts | None,
) -> Plan:
    """All prompts as token ids, and the settings."""
    from fastdraft.decoding.task_prompts import encode_task
    from fastdraft.decoding.workbench import EncodedTask, Plan

    if standing is None:
        tasks = [encode_task(task, context.console, tokenizer, context_length) for task in config.tasks]
    else:
        tasks = [
            EncodedTask(
                name,
                [row.row_id for row in rows],
                [row.prompt_ids for row in rows],
                max(len(row.response_ids) for row in rows),
            )
            for name, rows in standing.tasks.items()
        ]
    only = tuple(standing.rows) if standing is not None else ()
    return Plan(
        tasks=tasks,
        temperatures=sorted({temperature for _, temperature in only}) if only else config.temperatures,
        only=only,
        num_speculative_tokens=config.num_speculative_tokens,
        exact_num_speculative_tokens=config.exact.num_speculative_tokens,
        exact_prompts=config.exact.prompts,
        top_k=config.top_k,
        top_p=config.top_p,
        draft_temperature=config.draft_temperature,
        seed=context.settings.seed,
    )


def _costs(context: StageContext, folder: Path, latency: Latency | None) -> CostRatios:
    """The final draft's cost for one token over the target's: parameters, bytes at equal precision, measured time."""
    from fastdraft.decoding.figures import CostRatios

    target = context.target.architecture
    draft = Target.at(folder).architecture
    return CostRatios(
        draft.parameters / target.parameters, draft.bytes_per_token(16) / target.bytes_per_token(16), latency
    )


def _cost_fields(costs: CostRatios) -> dict[str, Any]:
    """The costs as they stand in `results.json`."""
    latency = costs.latency
    return {
        "cost_ratio_parameters": round(costs.parameters, 6),
        "cost_ratio_bytes": round(costs.bytes, 6),
        "cost_ratio_latency": round(latency.cost_ratio, 6) if latency else None,
        "latency": latency.to_json() if latency else None,
    }


def _tell(
    context: StageContext, results: Mapping[str, Any], table: tuple[str, list[str], list[list[str]]]
) -> None:
    """The table, and what deserves a warning."""
    from fastdraft.decoding import scoreboard

    console, check = context.console, results["greedy_check"]
    console.table(*table)
    if check["texts"]:
        equal = check["texts"] - check["different"]
        ties = f"; {check['near_ties']} of the others are near-ties" if check["different"] else ""
        console.say(f"greedy exact runs equal to the target's own text: {equal} of {check['texts']}{ties}")
    for sentence in scoreboard.faded(results["by_position"]):
        console.warn(sentence)
    if check["different"] > check["near_ties"]:
        console.warn(
            "some greedy texts differ from the target's own by more than rounding; see greedy_check in results.json"
        )


def _contamination(
    config: EvaluateConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any] | None:
    """13-grams that evaluation texts (prompts and references) share with everything trained on; null without training data."""
    from fastdraft.data.contamination import search_training_text

    trained_on = _trained_on(context)
    if not trained_on:
        return None
    tasks = [load_task(task) for task in config.tasks]
    texts = {
        task.name: [_bare_ids(tokenizer, prompt.everything) for prompt in task.prompts] for task in tasks
    }
    return search_training_text(texts, trained_on, context.console, context.folder("evaluate").path)


def _trained_on(context: StageContext) -> list[StageFolder]:
    """The finished artifacts of this recipe that hold training text."""
    artifacts = [context.folder(name) for name in ("prepare", "synthesize") if context.has(name)]
    return [artifact for artifact in artifacts if artifact.is_complete()]


def _bare_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
