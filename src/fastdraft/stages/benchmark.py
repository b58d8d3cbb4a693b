"""Benchmark: the exported pair on this device's clock, beside the prediction -> `benchmark.json`.

Missing exports are made; single passes timed; each pair of weights runs the tasks with every K, in turn with
the target alone; the first pair runs the sweeps at its best K; then time spent and memory. A killed benchmark
goes on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdraft.benchmark.figures import rows_of
from fastdraft.benchmark.plan import BenchmarkPlan, Measurement, encode, make_plan
from fastdraft.benchmark.rows import (
    BenchmarkResults,
    BenchmarkRow,
    ModelSize,
    RuntimeUsed,
    best_k,
    judged_rows,
)
from fastdraft.benchmark.runs import PairRuns, unit_names
from fastdraft.console import Console
from fastdraft.errors import FastDraftError
from fastdraft.evaluation.tasks import describe_task
from fastdraft.provenance import describe_run
from fastdraft.recipe.evaluation import BenchmarkConfig
from fastdraft.reporting import tables
from fastdraft.reporting.verdict import measured_verdict
from fastdraft.run_folder import StageFolder, write_json
from fastdraft.runtimes.openvino import require_openvino
from fastdraft.runtimes.openvino_runtime import OpenVINORuntime
from fastdraft.runtimes.runtime import Runtime
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

NAME = "benchmark"


def check_installed(config: BenchmarkConfig) -> None:
    """MissingExtra where a library is not there: told before hours of training."""
    require_openvino()


def fingerprint(config: BenchmarkConfig, context: StageContext) -> dict[str, Any]:
    """Settings, task files, the export, the target, threads and seed."""
    context.section("export")
    return {
        **config.model_dump(),
        "tasks": [describe_task(task) for task in config.tasks_of(context.sections)],
        "target": context.target.identity(),
        "export": context.require("export").digest(),
        "threads": context.settings.threads,
        "seed": context.settings.seed,
    }


def run(config: BenchmarkConfig, context: StageContext) -> None:
    """Writes `benchmark.json`."""
    start, console = time.monotonic(), context.console
    folder, export = context.folder(NAME), context.require("export")
    target, draft = context.target, Target.at(export.path / "huggingface")
    runtime = OpenVINORuntime(
        device=config.device,
        draft_device=config.draft_device,
        precision=config.precision,
        threads=context.settings.threads,
        rows=max([1, *config.sweep.concurrency]),
        eos_ids=target.vocabulary.eos_token_ids,
    )
    used = RuntimeUsed.from_json(runtime.describe())
    runtime.check_pair(target, draft)
    plan = make_plan(
        [encode(task, target.tokenizer) for task in config.tasks_of(context.sections)],
        count=config.prompts,
        context_length=min(target.context_length, draft.context_length),
        sweep=config.sweep.model_dump(),
        num_speculative_tokens=config.num_speculative_tokens,
        weights=[(pair.target, pair.draft) for pair in config.weights],
        temperatures=config.temperatures,
        repeats=config.repeats,
        seed=context.settings.seed,
    )
    _check_same_machine(used, folder)
    for words in plan.left_out:
        console.say(f"left out: {words}")
    pairs = _exported_pairs(plan, runtime, target, draft, export, folder, console)
    results = BenchmarkResults(
        runtime=used,
        target=target.name,
        draft=export.manifest()["source"],
        block={"settings": config.model_dump(), "left_out": plan.left_out},
        models=_sizes(pairs),
        **_measure(pairs, target, draft, console),
    )
    verdict = measured_verdict(results)
    results = replace(results, verdict={"sentence": verdict.sentence, "tone": verdict.tone})
    value = results.to_json()
    write_json(folder.path / "benchmark.json", value)
    if results.judged():
        columns = ("Task", "Best K", "Tokens per target pass", "Measured", "Predicted")
        title = "Speed-up on the clock, {}, {} target, {} draft".format(used.device, *plan.weights[0])
        console.table(title, *tables.measured(results).only(*columns).plain(details=True))
    console.say(verdict.sentence)
    summary = {name: value[name] for name in ("runtime", "models", "best", "verdict")}
    folder.complete(**summary, seconds=round(time.monotonic() - start, 1), provenance=describe_run())


def _check_same_machine(used: RuntimeUsed, folder: StageFolder) -> None:
    """One benchmark is of one device and release: work begun on another is not gone on with."""
    now = {"version": used.version, "device_name": used.device_name}
    begun = folder.keep("units/device.json", lambda: now)
    if begun != now:
        found = "begun on {device_name} ({version}), and this is ".format(**begun)
        here = f"{used.device_name} ({used.version}); one benchmark is of one device"
        raise FastDraftError(f"{folder.path}: {found}{here}", f"go on there, or add --redo {NAME}")


def _exported_pairs(
    plan: BenchmarkPlan,
    runtime: Runtime,
    target: Target,
    draft: Target,
    export: StageFolder,
    folder: StageFolder,
    console: Console,
) -> list[PairRuns]:
    """Every pair's exports: the export stage's where the weights are the same, others made in `models/`."""
    exported = export.manifest().get(runtime.name) or {}

    def find(role: str, weights: str, with_target: Path | None = None) -> Path:
        if exported.get(role, "none") == weights:
            return export.path / runtime.name / role
        path = folder.path / "models" / f"{role}-{weights}"
        if not path.is_dir():
            console.stop.check(folder.path)
            console.say(f"converting the {role} ({weights})")
            path.parent.mkdir(exist_ok=True)
            runtime.export(target if role == "target" else draft, path, weights, with_target)
        return path

    pairs = []
    for weights in plan.weights:
        path = find("target", weights[0])
        pairs.append(PairRuns(plan, weights, path, find("draft", weights[1], path), runtime, folder))
    return pairs


def _sizes(pairs: Sequence[PairRuns]) -> list[ModelSize]:
    found = {("target", pair.weights[0]): pair.target for pair in pairs}
    found |= {("draft", pair.weights[1]): pair.draft for pair in pairs}
    size = pairs[0].runtime.weights_bytes
    return [ModelSize(role=role, weights=each, bytes=size(path)) for (role, each), path in found.items()]


def _measure(pairs: Sequence[PairRuns], target: Target, draft: Target, console: Console) -> dict[str, Any]:
    """The measured fields of `benchmark.json`."""
    plan, folder, deployed = pairs[0].plan, pairs[0].folder, pairs[0].weights
    rows: list[BenchmarkRow] = []
    swept: list[BenchmarkRow] = []
    passes, breakdown, memory = {}, [], []
    for pair in pairs:
        console.stop.check(folder.path)
        passes[pair.weights] = pair.passes()
    # Which K the sweeps run at is known only behind the tasks; all K write as many tokens.
    works = [plan.everything(k) for k in plan.num_speculative_tokens]
    planned = sum(work.planned_tokens * (1 + plan.repeats) for work in works[0])
    kept = {name: w.planned_tokens for each in works for w in each for name in unit_names(w, plan.repeats)}
    done = sum(tokens for name, tokens in kept.items() if (folder.path / name).is_file())
    with console.progress("runs in turn", planned, "tokens", done) as progress:

        def on_batch(tokens: int, name: str) -> None:
            progress.advance(tokens, name)
            console.stop.check(folder.path)

        def measured(pair: PairRuns, works: Sequence[Measurement]) -> list[BenchmarkRow]:
            of_draft = draft.architecture.exported_bytes_per_token(pair.weights[1])
            ratio = of_draft / target.architecture.exported_bytes_per_token(pair.weights[0])
            return [row for work in works for row in rows_of(pair.measure(work), passes[pair.weights], ratio)]

        for pair in pairs:
            pair.on_batch = on_batch
            rows += measured(pair, plan.of_tasks(pair.weights))
            best = best_k(judged_rows(rows, deployed))
            # Where no row tells the best: 3 or the nearest.
            nearest = min(plan.num_speculative_tokens, key=lambda each: (abs(each - 3), each))
            k = best.num_speculative_tokens or nearest
            if pair.weights == deployed:
                swept = measured(pair, plan.of_sweeps(k))
            breakdown.append(pair.time_spent(k))
            pair.unload()  # before the memory of the next is taken
    for pair in pairs:
        console.stop.check(folder.path)
        memory.append(pair.peaks(k))
    return {
        "latencies": [row for pair in pairs for row in passes[pair.weights]],
        "breakdown": [row for row in breakdown if row is not None],
        "memory": memory,
        "rows": rows + swept,
        "best": best,
        "launch": pairs[0].runtime.launch_line(*deployed, k) if best.num_speculative_tokens else "",
    }
