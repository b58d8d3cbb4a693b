"""`fastdraft recipes --for TARGET`: a recipe whose budgets fill so many hours of this machine.

Measured in about a minute, with random weights: passes of writer, target and draft in OpenVINO, and a
training step. Start, head and the split of the hours are those of the draft for a target of 1.5 B in
docs/results.md: one run that went well, not yet the best of several.
"""

from __future__ import annotations

import re
import textwrap
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from fastdraft.commands.expected import expected
from fastdraft.commands.measure import MeasureSettings, measure
from fastdraft.console import Console, format_count, format_seconds
from fastdraft.errors import RecipeError
from fastdraft.modeling.drafts import build_draft, pick_device, set_threads
from fastdraft.modeling.families import DRAFT_FAMILIES
from fastdraft.modeling.trimmed_head import trim
from fastdraft.pipeline import make_context
from fastdraft.recipe.base import load_config
from fastdraft.recipe.recipe import Recipe
from fastdraft.recipe.run import user_path
from fastdraft.recipe.training import AlignConfig
from fastdraft.stages import design
from fastdraft.stages.synthesize import writer_of
from fastdraft.target import Target
from fastdraft.training.batches import packed_batch
from fastdraft.training.defaults import build_step, resolve
from fastdraft.training.objective import CrossEntropy

_LAYERS, _HEAD, _WIDE = 3, 12_288, 2_048
_TRIMMED_FROM = 32_768  # a smaller vocabulary keeps its head
_WRITING = 0.5  # share of the hours in which text is written and scored; in the others it is trained on
_SCORED = 0.5  # of the speed of writing, since the writer's distributions cost another pass over each token
_KEPT = 32  # likeliest tokens of each distribution; with them a draft learns more from the same text
_PASSES = 6  # over the written text, at most: more of them teach the rows, not the target
_ROWS = 64  # answers that are written together
_BATCHED = 0.6  # of the speed of one pass over 64 tokens: the last answers of a unit are written alone
_STEP_ROWS, _STEP_LENGTH = 2, 512
_PROMPTS = 32  # of each task of the evaluation
# What `--tasks` calls them: the shipped task that is evaluated, and what the text for alignment is asked for.
_CHAT = {"kind": "jsonl", "name": "instructions", "path": "shipped:data/prompts.jsonl.xz", "share": 3}
_CODE = {"kind": "corpus", "name": "code", "corpus": "code", "share": 2}
_TEXT = {"kind": "corpus", "name": "text", "corpus": "text", "share": 1}
_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "code": ("code", _CODE),
    "chat": ("instructions", _CHAT),
    "text": ("text", _TEXT),
    "summary": ("summarization", _CHAT),
}


@dataclass(frozen=True)
class Asked:
    """What `--for` is given; empty: chosen here."""

    target: str
    hours: float
    name: str = ""
    writer: str = ""  # a smaller model of the target's vocabulary that writes in its place
    start: str = ""  # a draft to begin from: re-alignment
    data: str = ""  # prompts or conversations of the user's own: JSONL, Parquet, or a folder of them
    threads: int = 0
    tasks: str = "code,chat,text"  # names of `_TASKS`, or files of prompts to evaluate on


@dataclass(frozen=True)
class Speeds:
    """What was measured here."""

    writing: float  # tokens a second, 64 answers together, their distributions included
    training: float  # tokens a second
    draft_share: float  # seconds of a draft's token / seconds of a target's

    def budgets(self, hours: float) -> tuple[int, int]:
        """Tokens to write and to train on, two digits each."""
        written = hours * 3600 * _WRITING * self.writing
        trained = min(hours * 3600 * (1 - _WRITING) * self.training, _PASSES * written)
        return _two_digits(written), _two_digits(trained)


def run(asked: Asked, console: Console) -> Path:
    """Measures, writes NAME.yaml into the working directory, tells what it is made of; returns its path."""
    name = asked.name or re.sub("[^a-z0-9._-]+", "-", Path(asked.target).stem.lower()).strip("-.")
    path = Path(f"{name}.yaml")
    if path.exists():
        rule = "is there already, and a recipe is never written over"
        raise RecipeError(f"{path}: {rule}", "move it, or give another --name")
    value = sections(asked, name)
    recipe = load_config(Recipe, value)
    context = make_context(recipe, console)
    assert recipe.design
    assert recipe.synthesize
    writer = writer_of(recipe.synthesize, context)
    plan = design.plan(recipe.design, context.target)
    set_threads(asked.threads)
    speeds = measure_speeds(context.target, writer, plan, recipe, console)
    written, trained = speeds.budgets(asked.hours)
    value["synthesize"]["tokens"], value["align"]["tokens"] = written, trained
    told = [
        f"measured here: {format_count(int(speeds.writing))} tokens/s written, "
        f"{format_count(int(speeds.training))} trained; a token of the draft costs "
        f"{speeds.draft_share:.2f} of one of the target",
        f"budgets for {format_seconds(asked.hours * 3600)}: {format_count(written)} tokens written in "
        f"{format_seconds(written / speeds.writing)}, {format_count(trained)} trained on in "
        f"{format_seconds(trained / speeds.training)}; evaluation, export and benchmark come on top",
        str(expected(load_config(Recipe, value), plan)),
    ]
    header = [f"A draft for {asked.target}, made by `fastdraft recipes --for`.", *told]
    lines = [f"# {line}" for text in header for line in textwrap.wrap(text, 108)]
    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=140, default_flow_style=None)
    path.write_text("\n".join([*lines, text]), encoding="utf-8")
    for line in told:
        console.say(line)
    console.say(f"wrote {path}: look at it, then `fastdraft check {path}` and `fastdraft run {path}`")
    return path


def sections(asked: Asked, name: str) -> dict[str, Any]:
    """The recipe with provisional budgets, as YAML has it."""
    run = {"name": name} | ({"threads": asked.threads} if asked.threads else {})
    value: dict[str, Any] = {"run": run, "target": {"model": asked.target}}
    target = Target.at(asked.target)
    small = Target.at(asked.writer) if asked.writer else target
    value["design"] = {"draft": _draft(asked, small)}
    if target.architecture.vocab_size > _TRIMMED_FROM and not asked.start:
        value["design"]["vocabulary"] = {"kind": "frequent", "size": _HEAD}
    public = "public domain / CC0-1.0"
    books = {"name": "text", "kind": "jsonl", "path": "shipped:data/books.jsonl.xz", "tokens": 300_000}
    code = {"name": "code", "kind": "source_code", "path": "python:stdlib", "tokens": 1_000_000}
    value["prepare"] = {
        "row_length": 512,
        "validation": 0.01,
        "corpora": [books | {"license": public}, code | {"license": "PSF-2.0"}],
    }
    tasks, prompts = _tasks_and_prompts(asked)
    value["synthesize"] = {
        "tokens": 100_000,
        "temperatures": [0, 0.6],
        "max_new_tokens": 128,
        "logits": {"kind": "top_k", "k": _KEPT},
        "prompts": prompts,
    }
    if asked.writer:
        value["synthesize"]["writer"] = asked.writer
    # OpenVINO writes many answers at a time, llama.cpp on a CPU a few.
    value["synthesize"]["engine"] = {"kind": "openvino", "weights": "int4" if _is_large(small) else "int8"}
    value["align"] = {
        "tokens": 400_000,
        "batch_tokens": 8192,
        "pretraining_share": 0.03,
        "objective": {"kind": "token_kd", "loss": "ce_kl", "source": "stored"},
        "optimizer": {"kind": "muon", "learning_rate": 2e-3, "embedding_learning_rate": 7e-4},
    }
    value["evaluate"] = {"tasks": tasks, "temperatures": [0, 0.6], "exact": {"prompts": 4}}
    if asked.start:  # what the draft has lost on this target, and what is regained
        value["evaluate"]["checkpoints"] = ["design", "align"]
    weights = {"target": "int4" if _is_large(target) else "int8", "draft": "int8"}
    formats = ["huggingface", "openvino", *(["gguf"] if target.gguf else [])]
    value["export"] = {"formats": formats, "openvino": weights}
    value["benchmark"] = {
        "runtimes": ["fastdraft", "openvino", *(["llamacpp"] if target.gguf else [])],
        "weights": [dict(weights)],
        "prompts": 4,
        "num_speculative_tokens": [1, 2, 3],
        "lookup": [3],
        "sweep": {"prompt_tokens": [], "max_new_tokens": [], "concurrency": []},
        "repeats": 2,
    }
    value["report"] = {}
    return value


def _tasks_and_prompts(asked: Asked) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`evaluate.tasks` and `synthesize.prompts`: the user's own prompts, and those of the tasks by name."""
    tasks, prompts = list[dict[str, Any]](), list[dict[str, Any]]()
    if asked.data:
        own = user_path(asked.data, "--data")
        if not own.exists():
            raise RecipeError(f"--data {own}: is not there; must be a file or a folder", "correct the path")
        prompts.append({"kind": "jsonl", "name": "own", "path": str(own), "share": 6})
    for name in filter(None, map(str.strip, asked.tasks.split(","))):
        if name in _TASKS:
            kind, source = _TASKS[name]
            tasks.append({"kind": kind, "prompts": _PROMPTS})
            prompts += [source] if source not in prompts else []
        elif (file := user_path(name, "--tasks")).is_file():
            tasks.append({"kind": "file", "path": str(file), "chat": True, "prompts": _PROMPTS})
        else:
            rule = f"must be one of {', '.join(_TASKS)}, or a JSONL file of prompts"
            raise RecipeError(f"--tasks: {name}; {rule}", "correct the name; several are apart by commas")
    if not tasks or not prompts:
        found = "no prompts for the text to align on" if tasks else "names no task"
        raise RecipeError(f"--tasks: {asked.tasks!r}; {found}", "add chat, or --data with prompts")
    return tasks, prompts


def _draft(asked: Asked, small: Target) -> dict[str, Any]:
    """An earlier draft, layers of the smaller model, or a new shape where its family is not a draft's."""
    if asked.start:
        return {"kind": "from", "path": asked.start}
    if small.config.model_type in DRAFT_FAMILIES:
        shape, own = small.architecture, {"model": asked.writer} if asked.writer else {}
        start = {"kind": "pruned", **own, "layers": min(_LAYERS, shape.num_layers)}
        # Half of a wide feed-forward part makes training half as dear; a fit takes over most of what is cut.
        wide = shape.intermediate_size > _WIDE and shape.family != "phi3"
        return start | ({"intermediate_size": shape.intermediate_size // 2} if wide else {})
    return {"kind": "budget", "parameters": _two_digits(small.architecture.parameters * 0.1)}


def _is_large(model: Target) -> bool:
    return model.architecture.parameters > 300e6


def _two_digits(number: float) -> int:
    return int(float(f"{max(number, 1000):.2g}"))


def measure_speeds(
    target: Target, writer: Target, plan: design.DraftDesign, recipe: Recipe, console: Console
) -> Speeds:
    """Times the passes of writer and target in OpenVINO, and training steps of the draft's shape."""
    assert recipe.benchmark
    shape, threads = plan.draft, recipe.run.threads
    # A model of the head's ids alone costs what the trimmed draft does: of the embedding one row is read.
    shape = replace(shape, vocab_size=shape.head_size or shape.vocab_size, head_size=0, tied=False)
    pair = recipe.benchmark.weights[0]
    how = MeasureSettings(
        pair.target, pair.draft, threads=threads, num_speculative_tokens=(3, _ROWS - 1), prefix=64
    )
    found = measure(target, [shape], how, console)
    alone = found.target_seconds[1]
    many = found.target_seconds[_ROWS]
    if writer is not target:
        many = measure(writer, [shape], replace(how, weights="int4"), console).target_seconds[_ROWS]
    draft_share = found.drafts[0].seconds / alone
    trained = training_speed(plan, recipe.align or AlignConfig())
    return Speeds(_SCORED * _BATCHED * _ROWS / many, trained, draft_share)


def training_speed(plan: design.DraftDesign, config: AlignConfig) -> float:
    """Tokens a second of a step of the draft's shape, on random ids; the first step is not timed."""
    model = build_draft(plan.draft_config, 0).to(pick_device("auto"))
    if plan.draft.head_size:
        trim(model, torch.arange(plan.draft.head_size))
    settings = resolve(config, "align", model, 1_000_000, "auto")
    step = build_step(model.train(), settings, CrossEntropy())
    generator, seconds = np.random.default_rng(0), []
    for _ in range(3):
        ids = generator.integers(
            plan.draft.head_size or plan.draft.vocab_size, size=(_STEP_ROWS, _STEP_LENGTH + 1)
        )
        start = time.perf_counter()
        step.gradients([step.on_head(packed_batch(ids))])
        seconds.append(time.perf_counter() - start)
        step.update(1.0)
    return _STEP_ROWS * _STEP_LENGTH / min(seconds[1:])
