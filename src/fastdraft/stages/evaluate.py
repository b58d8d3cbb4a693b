"""Evaluate: draft x target x tasks x temperature x K -> counts, rates, speed-ups, in `results.json`.

Decides the order of the work: the target writes its texts once; every checkpoint is replayed over them; the final draft
decodes the first prompts for real; its cost is measured; then results.json and samples.json are put together. Each step
is kept in units (decoding/workbench.py), so that a killed run goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, field_validator

from fastdraft.artifacts import Artifact, write_json
from fastdraft.config import Config
from fastdraft.errors import DataError
from fastdraft.interfaces import StageContext, TargetConfig
from fastdraft.tasks import TaskConfig, describe_task, load_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastdraft.decoding.figures import CostRatios
    from fastdraft.decoding.latency import Latency
    from fastdraft.decoding.workbench import EncodedTask, Plan

Checkpoint = Literal["design", "pretrain", "continue_pretrain", "align"]
Number = TypeVar("Number", int, float)
FOLDERS = {"design": "draft", "pretrain": "checkpoint", "continue_pretrain": "checkpoint", "align": "checkpoint"}


def _distinct(values: list[Number], low: float, high: float, rule: str) -> list[Number]:
    if any(not low <= value <= high for value in values):
        raise ValueError(rule)
    return sorted(set(values))


class ExactConfig(Config):
    """Real speculative decoding, beside replay: slower, and proof that both agree and that greedy text is the target's own."""

    num_speculative_tokens: list[int] = Field(default=[3], min_length=1)
    """K of the exact runs."""
    prompts: int = Field(default=16, ge=0)
    """Prompts of each task and temperature, from the front; 0 leaves exact runs out."""

    @field_validator("num_speculative_tokens")
    @classmethod
    def _checked(cls, values: list[int]) -> list[int]:
        return _distinct(values, 1, 64, "num_speculative_tokens must be between 1 and 64")


class EvaluateConfig(Config):
    """`evaluate:` — on what, and how, drafts are compared."""

    tasks: list[TaskConfig] = Field(min_length=1)
    """Shipped tasks by kind (code, summarization, text, instructions) or `kind: file`."""
    temperatures: list[float] = Field(default=[0.0, 0.6], min_length=1)
    """Of the target; 0 is greedy."""
    num_speculative_tokens: list[int] = Field(default=[1, 2, 3, 4, 5, 6, 7, 8], min_length=1)
    """Every K that replay covers: one pass of the draft serves them all."""
    checkpoints: list[Checkpoint] = Field(default=["pretrain", "continue_pretrain", "align"], min_length=1)
    """Which drafts of this run; those whose stage is not in the recipe are left out (design: the draft as it began)."""
    exact: ExactConfig = ExactConfig()
    """Exact runs of the last checkpoint."""
    top_k: int = Field(default=0, ge=0)
    """Of target and draft; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of target and draft; 1 keeps all."""
    draft_temperature: float | None = Field(default=None, ge=0)
    """The draft's own temperature where the target samples; any value is lossless; null: the target's."""
    batch_rows: int = Field(default=64, ge=1)
    """Prompts that the target answers together."""

    @field_validator("temperatures")
    @classmethod
    def _temperatures(cls, values: list[float]) -> list[float]:
        return _distinct(values, 0, 10, "temperatures must be between 0 and 10")

    @field_validator("num_speculative_tokens")
    @classmethod
    def _every_k(cls, values: list[int]) -> list[int]:
        return _distinct(values, 1, 64, "num_speculative_tokens must be between 1 and 64")

    @field_validator("tasks")
    @classmethod
    def _names(cls, tasks: list[Any]) -> list[Any]:
        names = [task.name for task in tasks]
        doubled = next((name for name in names if names.count(name) > 1), None)
        if doubled:
            raise ValueError(f"two tasks are called '{doubled}'; give one a name of its own")
        return tasks


def present_checkpoints(config: EvaluateConfig, context: StageContext) -> list[str]:
    """The drafts of this recipe that are to be compared, in the order of training; the last one is the final draft."""
    order = list(FOLDERS)
    found: list[str] = [name for name in sorted(config.checkpoints, key=order.index) if context.has(name)]
    return found or ["design"]


def fingerprint(config: EvaluateConfig, context: StageContext) -> dict[str, Any]:
    """Settings, task files, target, every checkpoint compared, and what they were trained on, in which the tasks' texts are looked for.

    Not the device, on which only latencies depend.
    """
    from fastdraft.modeling.source import model_identity

    target = context.target
    return {
        **config.model_dump(),
        "tasks": [describe_task(task) for task in config.tasks],
        "target": model_identity(target.model, target.location, target.revision, target.dtype),
        "seed": context.settings.seed,
        "trained_on": {artifact.name: artifact.digest() for artifact in _trained_on(context)},
        "checkpoints": {name: context.require(name).digest() for name in present_checkpoints(config, context)},
    }


def run(config: EvaluateConfig, context: StageContext) -> None:
    """Writes `results.json` and `samples.json`.

    Raises:
        DataError: when no prompt of a task fits the context.
        VocabularyError: when a draft's vocabulary is not the target's.
        ArtifactError: when a checkpoint is missing or damaged.
        Interrupted: after a signal, with all finished units saved.
    """
    from functools import cache, partial

    from fastdraft.decoding import scoreboard
    from fastdraft.decoding.turn_prompts import with_turns
    from fastdraft.decoding.workbench import Workbench
    from fastdraft.modeling.loading import load_draft, load_target, load_tokenizer, load_vocabulary, pick_device, set_threads
    from fastdraft.provenance import describe_run
    from fastdraft.runtimes.huggingface import HuggingFaceEngine

    start, artifact, console = time.monotonic(), context.artifact("evaluate"), context.console
    set_threads(context.settings.threads)
    device = pick_device(context.settings.device)
    folders = {name: context.require(name).path / FOLDERS[name] for name in present_checkpoints(config, context)}
    _check_vocabularies(context, folders)
    target, vocabulary = load_target(context.target, device), load_vocabulary(context.target)
    tokenizer = load_tokenizer(context.target.location, context.target.revision, context.target.trust_remote_code)
    context_length = _context_length(context, folders)
    engine = partial(HuggingFaceEngine, target, vocabulary, config.batch_rows)
    plan = _plan(config, context, tokenizer, context_length)
    plan = with_turns(plan, engine, folder=artifact.path, console=console, tokenizer=tokenizer, context_length=context_length)
    bench = Workbench(plan, artifact.path, console, target, vocabulary)
    # Same device and precision for both: that is what is decoded with and what latency compares.
    loaders = {name: cache(partial(load_draft, folder, device, target.dtype)) for name, folder in folders.items()}
    final = list(loaders)[-1]

    bench.write_texts(engine)
    replayed = bench.replay_all(loaders)
    exact = bench.exact_all(final, loaders[final])
    costs = _costs(context, folders[final], bench.latency(loaders[final]))
    results = {
        "schema": 1,
        "target": context.target.model,
        "draft": folders[final].relative_to(context.run.root).as_posix(),
        **_cost_fields(costs),
        "rows": scoreboard.result_rows(bench, replayed, exact, costs),
        "differences": scoreboard.headline_differences(replayed, plan.num_speculative_tokens, plan.seed),
        "by_position": scoreboard.by_position(bench, loaders, context_length),
        "greedy_check": scoreboard.greedy_check(bench, exact),
        "contamination": _contamination(config, context, tokenizer),
    }
    write_json(artifact.path / "results.json", results)
    write_json(artifact.path / "samples.json", scoreboard.samples(bench, exact, tokenizer))
    _tell(context, results, scoreboard.summary_table(results["rows"], plan.num_speculative_tokens))
    tasks = {task.name: {"prompts": len(task.prompt_ids), "skipped": task.num_skipped} for task in plan.tasks}
    found = {name: results[name] for name in ("differences", "greedy_check", "contamination")}
    artifact.complete(tasks=tasks, **found, seconds=round(time.monotonic() - start, 1), provenance=describe_run())


def _check_vocabularies(context: StageContext, folders: Mapping[str, Path]) -> None:
    """Raises:
    VocabularyError: when a draft's vocabulary is not the target's.
    """
    from fastdraft.modeling.loading import load_vocabulary
    from fastdraft.vocabulary import check_same

    target = load_vocabulary(context.target)
    for folder in folders.values():
        check_same(target, load_vocabulary(TargetConfig(model=str(folder))), where=str(folder))


def _context_length(context: StageContext, folders: Mapping[str, Path]) -> int:
    """Tokens that the target and every draft can read."""
    from fastdraft.modeling.loading import load_config

    target = load_config(context.target.location, context.target.revision, context.target.trust_remote_code)
    return min(int(c.max_position_embeddings) for c in (target, *(load_config(str(folder)) for folder in folders.values())))


def _plan(config: EvaluateConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, context_length: int) -> Plan:
    """All prompts as token ids, and the settings."""
    from fastdraft.decoding.workbench import Plan

    return Plan(
        tasks=[_encode(task, context, tokenizer, context_length) for task in config.tasks],
        temperatures=config.temperatures,
        num_speculative_tokens=config.num_speculative_tokens,
        exact_num_speculative_tokens=config.exact.num_speculative_tokens,
        exact_prompts=config.exact.prompts,
        top_k=config.top_k,
        top_p=config.top_p,
        draft_temperature=config.draft_temperature,
        seed=context.settings.seed,
    )


def _encode(task: TaskConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase, context_length: int) -> EncodedTask:
    """A task's prompts that fit the context; those left out are told."""
    from fastdraft.data.chat import prompt_ids
    from fastdraft.decoding.workbench import EncodedTask

    loaded = load_task(task)
    talks = [(prompt.id, prompt.conversation) for prompt in loaded.prompts if prompt.conversation]
    texts = [prompt for prompt in loaded.prompts if not prompt.conversation]
    encoded = [(prompt.id, prompt_ids(tokenizer, prompt.text, loaded.chat)) for prompt in texts]
    room = context_length - task.max_new_tokens
    fitting = [(name, ids) for name, ids in encoded if 0 < len(ids) <= room]
    skipped = len(encoded) - len(fitting)
    if not fitting and not talks:
        found = f"none of {len(encoded)} prompts has 1 to {room} tokens"
        rule = f"prompt and {task.max_new_tokens} new tokens must fit the context of {context_length}"
        raise DataError(f"task '{task.name}'", found, rule, "shorten the prompts or lower max_new_tokens")
    if skipped:
        limit = f"the context of {context_length} less {task.max_new_tokens} new tokens"
        context.console.warn(f"{task.name}: {skipped} of {len(encoded)} prompts skipped: empty or longer than {limit}")
    return EncodedTask(task.name, [name for name, _ in fitting], [ids for _, ids in fitting], task.max_new_tokens, skipped, talks)


def _costs(context: StageContext, folder: Path, latency: Latency) -> CostRatios:
    """The final draft's cost for one token over the target's: parameters, bytes at equal precision, measured time."""
    from fastdraft.decoding.figures import CostRatios
    from fastdraft.modeling.architecture import read_architecture
    from fastdraft.modeling.loading import load_config

    target = read_architecture(load_config(context.target.location, context.target.revision, context.target.trust_remote_code))
    draft = read_architecture(load_config(str(folder)))
    return CostRatios(draft.parameters / target.parameters, draft.bytes_per_token(16) / target.bytes_per_token(16), latency)


def _cost_fields(costs: CostRatios) -> dict[str, Any]:
    """The costs as they stand in `results.json`."""
    latency = costs.latency
    return {
        "cost_ratio_parameters": round(costs.parameters, 6),
        "cost_ratio_bytes": round(costs.bytes, 6),
        "cost_ratio_latency": round(latency.cost_ratio, 6) if latency else None,
        "latency": latency.as_dict() if latency else None,
    }


def _tell(context: StageContext, results: Mapping[str, Any], table: tuple[str, list[str], list[list[str]]]) -> None:
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
        console.warn("some greedy texts differ from the target's own by more than rounding; see greedy_check in results.json")


def _contamination(config: EvaluateConfig, context: StageContext, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """13-grams that evaluation texts (prompts and references) share with everything trained on; null without training data."""
    from fastdraft.data.contamination import Contamination
    from fastdraft.data.responses import read_all
    from fastdraft.data.shards import corpus_names, open_corpus

    trained_on = _trained_on(context)
    if not trained_on:
        return None
    tasks = [load_task(task) for task in config.tasks]
    search = Contamination({task.name: [_bare_ids(tokenizer, p.everything) for p in task.prompts] for task in tasks})
    prepared = [artifact for artifact in trained_on if artifact.name == "prepare"]
    corpora = [open_corpus(artifact, name, "train") for artifact in prepared for name in corpus_names(artifact)]
    with context.console.progress("overlap search", sum(corpus.tokens for corpus in corpora), "tokens") as progress:

        def on_shard(count: int) -> None:
            progress.advance(count)
            context.console.stop.check(context.artifact("evaluate").path)

        for corpus in corpora:
            search.scan_corpus(corpus, on_shard)
        for artifact in trained_on:
            if artifact.name == "synthesize":
                search.scan_many(row.prompt_ids + row.response_ids for row in read_all(artifact))
    return search.result()


def _trained_on(context: StageContext) -> list[Artifact]:
    """The finished artifacts of this recipe that hold training text."""
    artifacts = [context.artifact(name) for name in ("prepare", "synthesize") if context.has(name)]
    return [artifact for artifact in artifacts if artifact.is_complete()]


def _bare_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
