"""Benchmark: the exported pair on this device's clock, beside the prediction -> `benchmark.json`.

One runtime after the other, on the same prompts: missing exports are made; single passes timed; each pair of
weights runs the tasks with every proposer, in turn with the target alone; the first pair runs the sweeps at
its best K; then time spent and memory. A killed benchmark goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fastdraft.benchmark.at_a_time import at_a_time
from fastdraft.benchmark.figures import rows_of
from fastdraft.benchmark.plan import BenchmarkPlan, Measurement, WeightsOfPair, encode, make_plan
from fastdraft.benchmark.replayed import draft_accepts
from fastdraft.benchmark.rows import (
    BenchmarkResults,
    BenchmarkRow,
    ModelSize,
    RuntimeUsed,
    best_k,
    best_proposer,
    judged_rows,
)
from fastdraft.benchmark.runs import PairRuns, unit_names
from fastdraft.console import Console
from fastdraft.decoding.proposers import ProposerKind
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.evaluation.results import nearest_k
from fastdraft.evaluation.tasks import describe_task
from fastdraft.modeling.gguf_files import GGUFFile, read_gguf
from fastdraft.provenance import describe_run
from fastdraft.recipe.evaluation import BenchmarkConfig, BenchmarkRuntime
from fastdraft.recipe.run import resolve_path
from fastdraft.reporting import tables
from fastdraft.reporting.verdict import measured_verdict
from fastdraft.run_folder import StageFolder, write_json
from fastdraft.runtimes.llama_cpp_engine import check_vocabulary
from fastdraft.runtimes.llama_cpp_runtime import LlamaCppRuntime, check_files, check_server, file_type
from fastdraft.runtimes.openvino import device_properties, require_openvino
from fastdraft.runtimes.openvino_decoder import OpenVINODecoderRuntime
from fastdraft.runtimes.openvino_export import require_convertible
from fastdraft.runtimes.openvino_runtime import OpenVINORuntime
from fastdraft.runtimes.runtime import Proposer, Runtime
from fastdraft.runtimes.vllm_runtime import check_served, open_served
from fastdraft.stages.context import StageContext
from fastdraft.target import Target

NAME = "benchmark"
# A runtime, the weights of its pairs, and where exports stand already, by role and weights.
Opened = tuple[Runtime, list[WeightsOfPair], dict[tuple[str, str], Path]]
_LISTS = ("latencies", "breakdown", "memory", "rows", "at_a_time")


def named_runtimes(config: BenchmarkConfig, context: StageContext) -> list[BenchmarkRuntime]:
    """The runtimes that the recipe names, or its target and export allow."""
    return config.runtimes_of(context.section("export").formats, gguf=context.target.gguf_file is not None)


def check_installed(config: BenchmarkConfig, context: StageContext) -> None:
    """Refuses what is not there, told before hours of training."""
    if not context.has("export"):
        raise RecipeError("benchmark: no export section: what is exported is measured", "add `export:`")
    runtimes = named_runtimes(config, context)
    if not {"openvino", "fastdraft"}.isdisjoint(runtimes):
        require_openvino()
        for device in dict.fromkeys((config.device, config.draft_device or config.device)):
            device_properties(device, config.precision)
        require_convertible(context.target)
    if "llamacpp" in runtimes:
        check_server(config.llamacpp.server)
        target = _target_file(config, context)
        if config.llamacpp.draft:
            check_files(target, _draft_file(config, context))
        elif "gguf" not in context.section("export").formats:
            rule = "benchmark.runtimes: llamacpp runs the draft's GGUF file"
            fix = "add gguf to export.formats, or name a file in benchmark.llamacpp.draft"
            raise RecipeError(f"export.formats: no gguf; {rule}", fix)
    if "vllm" in runtimes:
        check_served(config, context.target)


def _target_file(config: BenchmarkConfig, context: StageContext) -> GGUFFile:
    """The GGUF file that llama.cpp runs as the target."""
    target, where = context.target, "benchmark.llamacpp.target"
    own, engine = target.gguf_file, getattr(context.sections.get("synthesize"), "engine", None)
    if own and not config.llamacpp.target:
        return read_gguf(own)
    named = config.llamacpp.target or getattr(engine, "model", "") * (
        getattr(engine, "kind", "") == "llamacpp"
    )
    file = _named_file(named, where)
    check_vocabulary(file, target)
    return file


def _named_file(named: str, where: str) -> GGUFFile:
    path = resolve_path(named, where) if named else None
    if path is None or not path.is_file():
        rule = "must be a GGUF file where llama.cpp is measured"
        raise RecipeError(f"{where}: {named or 'empty'}: {rule}", "name the file")
    return read_gguf(path)


def _draft_file(config: BenchmarkConfig, context: StageContext) -> GGUFFile:
    """The file that is named, or the one that export made."""
    if config.llamacpp.draft:
        return _named_file(config.llamacpp.draft, "benchmark.llamacpp.draft")
    folder = context.require("export").path / "gguf"
    found = sorted(folder.rglob("*.gguf"))
    found = [path for path in found if "draft" in str(path.relative_to(folder))] or found
    if not found:
        raise FastDraftError(f"{folder}: no draft's file", "add gguf to export.formats, --redo export")
    return read_gguf(found[0])


def fingerprint(config: BenchmarkConfig, context: StageContext) -> dict[str, Any]:
    """Settings, task files, the export, the target, threads and seed."""
    context.section("export")
    runtimes = named_runtimes(config, context)
    files = (_target_file, _draft_file) if "llamacpp" in runtimes else ()
    return {
        **config.model_dump(exclude={"vllm": {"api_key_env"} if "vllm" in runtimes else True}),
        **({"gguf": [find(config, context).digest for find in files]} if files else {}),
        "tasks": [describe_task(task) for task in config.tasks_of(context.sections)],
        "target": context.target.identity(),
        **context.template,
        "export": context.require("export").digest(),
        "threads": context.settings.threads,
        "seed": context.settings.seed,
    }


def open_runtimes(config: BenchmarkConfig, context: StageContext) -> list[Opened]:
    """What is to be measured, with the weights of its pairs, the deployed one first."""
    opening: dict[str, Callable[[BenchmarkConfig, StageContext], Opened]] = {
        "openvino": partial(_open_openvino, kind=OpenVINORuntime),
        "fastdraft": partial(_open_openvino, kind=OpenVINODecoderRuntime),
        "llamacpp": _open_llama_cpp,
        "vllm": _open_vllm,
    }
    return [opening[name](config, context) for name in named_runtimes(config, context)]


def _open_openvino(config: BenchmarkConfig, context: StageContext, kind: type[OpenVINORuntime]) -> Opened:
    runtime = kind(
        device=config.device,
        draft_device=config.draft_device,
        precision=config.precision,
        threads=context.settings.threads,
        rows=max([1, *config.sweep.concurrency]),
        eos_ids=context.target.vocabulary.eos_token_ids,
    )
    export = context.require("export")
    exported = export.manifest().get("openvino") or {}
    files = {
        (role, exported[role]): export.path / "openvino" / role
        for role in ("target", "draft")
        if exported.get(role, "none") != "none"
    }
    return runtime, [(pair.target, pair.draft) for pair in config.weights], files


def _open_llama_cpp(config: BenchmarkConfig, context: StageContext) -> Opened:
    """The target's own file with the draft's of the export stage."""
    settings, target = config.llamacpp, _target_file(config, context)
    draft = _draft_file(config, context)
    check_files(target, draft)
    runtime = LlamaCppRuntime(
        server=settings.server,
        threads=settings.threads or context.settings.threads,
        eos_ids=context.target.vocabulary.eos_token_ids,
    )
    weights = file_type(target), file_type(draft)
    return runtime, [weights], {("target", weights[0]): target.path, ("draft", weights[1]): draft.path}


def _open_vllm(config: BenchmarkConfig, context: StageContext) -> Opened:
    draft = context.require("export").path / "huggingface"
    return open_served(config.vllm, context.target, draft, context.settings.threads)


def run(config: BenchmarkConfig, context: StageContext) -> None:
    """Writes `benchmark.json`."""
    start, console = time.monotonic(), context.console
    folder, export = context.folder(NAME), context.require("export")
    target, draft = context.target, Target.at(export.path / "huggingface")
    runtimes = open_runtimes(config, context)
    used = [RuntimeUsed.from_json(runtime.describe()) for runtime, _, _ in runtimes]
    kinds: dict[ProposerKind, list[int]] = {"draft": config.num_speculative_tokens}
    kinds |= {"lookup": config.lookup, "lookup_draft": config.lookup}
    shared = make_plan(
        [encode(task, context.chat) for task in config.tasks_of(context.sections)],
        count=config.prompts,
        context_length=min(target.context_length, draft.context_length),
        sweep=config.sweep.model_dump(),
        runtime="",
        weights=[],
        proposers=[Proposer(kind, k) for kind, ks in kinds.items() for k in ks],
        temperatures=config.temperatures,
        repeats=config.repeats,
        seed=context.settings.seed,
    )
    for (runtime, _, _), each in zip(runtimes, used, strict=True):
        runtime.check_pair(target, draft)
        _check_same_machine(each, folder)
    for words in shared.left_out:
        console.say(f"left out: {words}")
    models, found = list[ModelSize](), list[dict[str, Any]]()
    for runtime, weights, files in runtimes:
        can = [each for each in shared.proposers if each.kind in runtime.proposers]
        plan = replace(shared, runtime=runtime.name, weights=weights, proposers=can)
        pairs = _exported_pairs(plan, runtime, target, draft, files, folder, console)
        for pair in pairs:
            pair.accepts = partial(draft_accepts, pair.draft, draft)
        models += _sizes(pairs)
        found.append(_measure(pairs, target, draft, console))
    launches = {each.name: one["launch"] for each, one in zip(used, found, strict=True)}
    lists: dict[str, Any] = {name: [row for each in found for row in each[name]] for name in _LISTS}
    results = BenchmarkResults(
        runtime=used[0],
        target=target.name,
        draft=export.manifest()["source"],
        block={"settings": config.model_dump(), "left_out": shared.left_out},
        models=models,
        best=found[0]["best"],
        launch=found[0]["launch"],
        runtimes=used,
        launches=launches,
        **lists,
    )
    verdict = measured_verdict(results)
    results = replace(results, verdict={"sentence": verdict.sentence, "tone": verdict.tone})
    value = results.to_json()
    write_json(folder.path / "benchmark.json", value)
    if results.judged():
        columns = ("Task", "Best K", "Tokens per target pass", "Measured", "Predicted")
        title = "Speed-up on the clock, {}, {} target, {} draft".format(used[0].device, *results.pairs[0][1:])
        console.table(title, *tables.measured(results).only(*columns).plain(details=True))
    console.say(" ".join([verdict.sentence, *(row.sentence for row in results.at_a_time)]))
    summary = {name: value[name] for name in ("runtime", "runtimes", "models", "best", "verdict")}
    folder.complete(**summary, seconds=round(time.monotonic() - start, 1), provenance=describe_run())


def _check_same_machine(used: RuntimeUsed, folder: StageFolder) -> None:
    """One benchmark is of one device and release: work begun on another is not gone on with."""
    now = {"version": used.version, "device_name": used.device_name}
    begun = folder.keep(f"units/{used.name}-device.json", lambda: now)
    if begun != now:
        found = "begun on {device_name} ({version}), and this is ".format(**begun)
        here = f"{used.device_name} ({used.version}); one benchmark is of one device"
        raise FastDraftError(f"{folder.path}: {found}{here}", f"go on there, or add --redo {NAME}")


def _exported_pairs(
    plan: BenchmarkPlan,
    runtime: Runtime,
    target: Target,
    draft: Target,
    files: Mapping[tuple[str, str], Path],
    folder: StageFolder,
    console: Console,
) -> list[PairRuns]:
    """Every pair's exports: those that stand already, of the same weights, others made in `models/`."""

    def find(role: str, weights: str, with_target: Path | None = None) -> Path:
        if (role, weights) in files:
            return files[role, weights]
        path = folder.path / "models" / f"{runtime.exports}-{role}-{weights}"
        if not path.is_dir():
            console.stop.check(folder.path)
            console.say(f"converting the {role} ({weights})")
            path.parent.mkdir(exist_ok=True)
            runtime.export(target if role == "target" else draft, path, weights, with_target)
        return path

    return [
        PairRuns(plan, each, path := find("target", each[0]), find("draft", each[1], path), runtime, folder)
        for each in plan.weights
    ]


def _sizes(pairs: Sequence[PairRuns]) -> list[ModelSize]:
    found = {("target", pair.weights[0]): pair.target for pair in pairs}
    found |= {("draft", pair.weights[1]): pair.draft for pair in pairs}
    runtime = pairs[0].runtime
    return [
        ModelSize(role=role, weights=each, bytes=runtime.weights_bytes(path), runtime=runtime.name)
        for (role, each), path in found.items()
    ]


def _measure(pairs: Sequence[PairRuns], target: Target, draft: Target, console: Console) -> dict[str, Any]:
    """What one runtime adds to `benchmark.json`: the lists of its rows, its best K and how to launch it."""
    plan, folder, runtime, deployed = pairs[0].plan, pairs[0].folder, pairs[0].runtime, pairs[0].weights
    key = (runtime.name, *deployed)
    rows, swept = list[BenchmarkRow](), list[BenchmarkRow]()
    passes, breakdown, memory = {}, [], []
    for pair in pairs:
        console.stop.check(folder.path)
        passes[pair.weights] = pair.passes()
    # Which K the sweeps run at is known only behind the tasks; all K write as many tokens.
    works = [plan.everything(k, n) for k in plan.draft_ks for n in plan.apart or [0]]
    n: int | None = None
    planned = sum(work.planned_tokens * (1 + plan.repeats) for work in works[0])
    kept = {name: w.planned_tokens for each in works for w in each for name in unit_names(w, plan.repeats)}
    done = sum(tokens for name, tokens in kept.items() if (folder.path / name).is_file())
    with console.progress(f"{runtime.name} in turn", planned, "tokens", done) as progress:

        def on_batch(tokens: int, name: str) -> None:
            progress.advance(tokens, name)
            console.stop.check(folder.path)

        def measured(pair: PairRuns, works: Sequence[Measurement]) -> list[BenchmarkRow]:
            of_draft = runtime.bytes_per_token(draft, pair.draft, pair.weights[1])
            ratio = of_draft / runtime.bytes_per_token(target, pair.target, pair.weights[0])
            return [row for work in works for row in rows_of(pair.measure(work), passes[pair.weights], ratio)]

        for pair in pairs:
            pair.on_batch = on_batch
            rows += measured(pair, plan.of_tasks(pair.weights))
            best = best_k(judged_rows(rows, key))
            k = best.num_speculative_tokens or nearest_k(plan.draft_ks)  # where no row tells the best
            if pair.weights == deployed:
                if plan.apart:
                    n = best_k(judged_rows(rows, key, "lookup")).num_speculative_tokens or plan.apart[0]
                    rows += measured(pair, plan.of_both(k, n))
                swept = measured(pair, plan.of_sweeps(k))
            breakdown.append(pair.time_spent(k))
            pair.unload()  # before the memory of the next is taken
    for pair in pairs if not runtime.serves else ():
        console.stop.check(folder.path)
        memory.append(pair.peaks(k))
    many = at_a_time(swept, passes[deployed])
    named = best_proposer(rows, key)  # as the verdict names it
    chosen = Proposer(*named, {"lookup_draft": n}.get(named[0])) if named else None
    return {
        "latencies": [row for pair in pairs for row in passes[pair.weights]],
        "breakdown": [row for row in breakdown if row is not None],
        "memory": memory,
        "rows": rows + swept,
        "at_a_time": [many] if many else [],
        "best": best,
        "launch": runtime.launch_line(*deployed, chosen) if chosen else "",
    }
