"""Benchmark: the exported pair on this device's clock, beside the prediction -> `benchmark.json`.

Decides the order of the work: missing exports; single passes of both models; each pair of weights on the tasks with every
K, the target alone in turn with them; then, on the first pair at its best K, the sweeps; where the time goes; how much memory
is held. Each step is kept in units (runtimes/wall_clock_bench.py), so that a killed benchmark goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdraft.recipe.evaluation import BenchmarkConfig
from fastdraft.run_folder import write_json
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from fastdraft.evaluation.tasks import describe_task

if TYPE_CHECKING:
    from fastdraft.decoding.latency import Latency
    from fastdraft.runtimes.wall_clock_bench import Bench, Pair, Place
    from fastdraft.runtimes.wall_clock_plan import Plan
    from fastdraft.runtimes.wall_clock_rows import PairCosts

NAME = "benchmark"
PREFIX_TOKENS = 128
NPU_MOST = 5
"""On an NPU OpenVINO adapts K by itself, beginning with at most this one."""
BUSY = 0.25
"""Share of the processors kept busy by others from which times are doubtful."""
LOOPING = 0.25
"""Share of looping texts from which it is said."""


def check_installed(config: BenchmarkConfig) -> None:
    """Raises:
    MissingExtra: without OpenVINO.
    """
    from fastdraft.runtimes.engines import require_openvino

    require_openvino()


def fingerprint(config: BenchmarkConfig, context: StageContext) -> dict[str, Any]:
    """Settings, task files, the export, the target, threads and seed."""

    context.section("export")
    target = context.target
    return {
        **config.model_dump(),
        "tasks": [describe_task(task) for task in config.tasks_of(context.sections)],
        "target": target.identity(),
        "export": context.require("export").digest(),
        "threads": context.settings.threads,
        "seed": context.settings.seed,
    }


def run(config: BenchmarkConfig, context: StageContext) -> None:
    """Writes `benchmark.json`.

    Raises:
        MissingExtra: without OpenVINO. RecipeError: for a device that it does not see.
        TargetError: when draft and target do not fit. DataError: when no prompt of a task fits the context.
        FastDraftError: when an export or a unit is missing, damaged or of another machine.
        Interrupted: after a signal, with all finished units saved.
    """
    from fastdraft.provenance import describe_run
    from fastdraft.runtimes.engines import require_openvino
    from fastdraft.runtimes.openvino_device import describe_device
    from fastdraft.runtimes.openvino_pair import check_pair
    from fastdraft.runtimes.wall_clock_bench import Bench, model_sizes

    start, artifact, console = time.monotonic(), context.folder(NAME), context.console
    require_openvino()
    device = describe_device(config.device, config.precision)
    if config.draft_device:
        describe_device(config.draft_device, config.precision)
    check_pair(context.target.location, context.require("export").path / "huggingface")
    bench = Bench(_plan(config, context), artifact.path, _place(config, context), console)
    bench.claim(device)
    for words in bench.plan.left_out:
        console.say(f"left out: {words}")
    _warn_if_busy(context)
    pairs = _exports(config, context)
    latencies = {pair.weights: bench.latencies(pair, _prefixes(bench.plan, pair)) for pair in pairs}
    found = _measure(bench, pairs, latencies, context)
    results = {
        "schema": 1,
        "runtime": {"name": "openvino", **device, **bench.place.as_dict()},
        "target": context.target.name,
        "draft": context.require("export").manifest()["source"],
        "block": {"settings": config.model_dump(), "left_out": bench.plan.left_out},
        "models": model_sizes(pairs),
        **found,
    }
    write_json(artifact.path / "benchmark.json", results)
    _tell(results, bench, context)
    summary = {name: results[name] for name in ("runtime", "models", "best", "verdict")}
    artifact.complete(**summary, seconds=round(time.monotonic() - start, 1), provenance=describe_run())


def _place(config: BenchmarkConfig, context: StageContext) -> Place:
    from fastdraft.runtimes.wall_clock_bench import Place

    return Place(
        config.device,
        config.draft_device,
        config.precision,
        context.settings.threads,
        rows=max([1, *config.sweep.concurrency]),
        eos_ids=context.target.vocabulary.eos_token_ids,
    )


def _plan(config: BenchmarkConfig, context: StageContext) -> Plan:
    """All prompts as token ids, and every measurement."""
    from fastdraft.runtimes.wall_clock_plan import make_plan
    from fastdraft.runtimes.wall_clock_prompts import encode
    from fastdraft.runtimes.wall_clock_runs import as_settings

    target = context.target
    tokenizer = target.tokenizer
    draft = str(context.require("export").path / "huggingface")
    return make_plan(
        [encode(task, tokenizer) for task in config.tasks_of(context.sections)],
        count=config.prompts,
        context_length=min(target.context_length, Target.at(draft).context_length),
        weights=[(pair.target, pair.draft) for pair in config.weights],
        temperatures=config.temperatures,
        settings=as_settings(config.num_speculative_tokens, []),
        sweep=config.sweep.model_dump(),
        repeats=config.repeats,
        seed=context.settings.seed,
    )


def _exports(config: BenchmarkConfig, context: StageContext) -> list[Pair]:
    """Every pair's exports: those of the export stage where the weights are the same, the others made once."""
    from fastdraft.runtimes.openvino_export import export_openvino
    from fastdraft.runtimes.wall_clock_bench import export_pairs

    exported, source, console = context.require("export"), context.target, context.console
    found = exported.manifest().get("openvino") or {}
    standing = {
        (role, found[role]): exported.path / "openvino" / role
        for role in ("target", "draft")
        if found.get(role, "none") != "none"
    }

    def export(role: str, weights: Any, folder: Path, target: Path | None) -> None:
        console.stop.check(context.folder(NAME).path)
        console.say(
            f"converting the {role} for OpenVINO ({weights}): it is loaded and tried, which takes a while"
        )
        if role == "target":
            export_openvino(source.location, folder, weights, revision=source.revision)
        else:
            export_openvino(exported.path / "huggingface", folder, weights, pair=target)

    weights = [(pair.target, pair.draft) for pair in config.weights]
    return export_pairs(weights, standing, context.folder(NAME).path / "models", export)


def _prefixes(plan: Plan, pair: Pair) -> list[int]:
    """Lengths behind which passes are timed: the usual one, on the deployed pair also the swept ones."""
    swept = (
        [swept.value for swept in plan.swept if swept.part == "prompt_tokens"]
        if pair.weights == plan.weights[0]
        else []
    )
    return sorted({PREFIX_TOKENS, *swept})


def _measure(
    bench: Bench,
    pairs: Sequence[Pair],
    latencies: Mapping[tuple[str, str], list[Latency]],
    context: StageContext,
) -> dict[str, Any]:
    """The measured fields of `benchmark.json`."""
    from fastdraft.runtimes.wall_clock_bench import Models
    from fastdraft.runtimes.wall_clock_rows import rows_of
    from fastdraft.runtimes.wall_clock_verdict import best, breakdown_entry, speaking_rows, verdict

    plan, deployed = bench.plan, pairs[0]
    costs = {pair.weights: _costs(pair, latencies[pair.weights], context) for pair in pairs}
    rows: list[dict[str, Any]] = []
    swept: list[dict[str, Any]] = []
    breakdown, memory = [], []
    with bench.console.progress(
        "runs in turn", plan.planned_tokens, "tokens", bench.finished_tokens()
    ) as progress:
        for pair in pairs:
            models = Models(pair, bench.place)
            for measured in bench.measure_all(models, plan.of_tasks(pair.weights), progress):
                rows += rows_of(measured, costs[pair.weights])
            k = best(speaking_rows(rows, *deployed.weights))["num_speculative_tokens"] or _middle(plan)
            if pair is deployed:
                for measured in bench.measure_all(models, plan.of_sweeps(k), progress):
                    swept += rows_of(measured, costs[pair.weights])
            breakdown.append(breakdown_entry(*pair.weights, k, bench.breakdown(models, k)))
            del models  # before the memory of the next is taken
    for pair in pairs:
        memory.append(
            {
                "target_weights": pair.target_weights,
                "draft_weights": pair.draft_weights,
                **bench.memory(pair, k),
            }
        )
    speaking = speaking_rows(rows, *deployed.weights)
    return {
        "latencies": [
            _latency_entry(pair, latency, bench.place)
            for pair in pairs
            for latency in latencies[pair.weights]
        ],
        "breakdown": breakdown,
        "memory": memory,
        "rows": rows + swept,
        "best": best(speaking),
        "verdict": verdict(speaking, latencies[deployed.weights], breakdown[0], bench.place.in_words),
    }


def _costs(pair: Pair, latencies: Sequence[Latency], context: StageContext) -> PairCosts:
    """What is known of a pair before its texts are timed."""
    from fastdraft.runtimes.wall_clock_rows import PairCosts

    source = context.target
    target = source.architecture
    draft = Target.at(context.require("export").path / "huggingface").architecture
    of_draft, of_target = (
        draft.exported_bytes_per_token(pair.draft_weights),
        target.exported_bytes_per_token(pair.target_weights),
    )
    return PairCosts(latencies, of_draft / of_target)


def _middle(plan: Plan) -> int:
    """K of the sweeps where no row tells the best: 3 or the nearest."""
    return min((setting.num_speculative_tokens for setting in plan.settings), key=lambda k: (abs(k - 3), k))


def _latency_entry(pair: Pair, latency: Latency, place: Place) -> dict[str, Any]:
    return {
        "target_weights": pair.target_weights,
        "draft_weights": pair.draft_weights,
        "prefix_tokens": latency.prefix_tokens,
        "draft_seconds": latency.draft_seconds,
        "target_seconds": {str(width): value for width, value in latency.target_seconds.items()},
        "device": place.device,
        "draft_device": place.draft_device or place.device,
    }


def _warn_if_busy(context: StageContext) -> None:
    from fastdraft.runtimes.wall_clock_bench import busy_share

    share = busy_share()
    if share is not None and share >= BUSY:
        context.console.warn(
            f"other processes keep {share:.0%} of this machine busy: times will be worse and the ranges wider"
        )


def _tell(results: Mapping[str, Any], bench: Bench, context: StageContext) -> None:
    """The table, what deserves a word, and the verdict last."""
    from fastdraft.runtimes.wall_clock_verdict import speaking_rows, summary_table

    console, plan = context.console, bench.plan
    pair = f"{plan.weights[0][0]} target, {plan.weights[0][1]} draft"
    speaking = speaking_rows(results["rows"], *plan.weights[0])
    if speaking:
        console.table(*summary_table(speaking, results["best"], f"{bench.place.in_words}, {pair}"))
    others = [f"{number} weights pairs" for number in [len(plan.weights)] if number > 1]
    others += (
        ["confidence thresholds"] if any(setting.confidence_threshold for setting in plan.settings) else []
    )
    others += [part.replace("_", " ") for part in dict.fromkeys(swept.part for swept in plan.swept)]
    if others:
        console.say(f"in benchmark.json and the report besides: {', '.join(others)}")
    if any(not row["lossless"] for row in results["rows"]):
        console.say(
            "sampled rows give no speed-up of a draft: this release of OpenVINO lets sampled text lean towards the draft, which flatters it"
        )
    cases = [case for row in results["rows"] for case in row["differences"]]
    if cases:
        largest = max((case["logprob_gap"] or 0.0 for case in cases), default=0.0)
        texts = sum(row["texts"] for row in results["rows"] if row["same_text"] is not None)
        console.say(
            f"greedy text differs from the target's own in {len(cases)} of {texts} texts; largest log-prob gap there {largest:.2g}"
        )
    looping = [row["looping_share"] for row in speaking]
    if looping and sum(looping) / len(looping) >= LOOPING:
        share = sum(looping) / len(looping)
        console.say(
            f"{share:.0%} of the texts run into loops, which a draft predicts easily: see speedup_without_looping in benchmark.json"
        )
    console.say(results["verdict"]["sentence"])
