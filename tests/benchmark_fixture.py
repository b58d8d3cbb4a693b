"""A made-up but plausible `benchmark.json`: one pair that pays on some tasks, a second in other precisions, sweeps and notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdraft.run_folder import RunFolder, write_json
from report_fixture import PROVENANCE, write_run

ACCEPTED = {"code": 0.78, "summarization": 0.18, "text": 0.55, "instructions": 0.5}
"""By task, the chance that an examined proposal is accepted."""
DEPLOYED, OTHER = ("int4", "int8"), ("int8", "int8")
DRAFT_SECONDS, TARGET_SECONDS = (
    0.0024,
    {"1": 0.0192, "2": 0.0196, "3": 0.0203, "4": 0.0211, "5": 0.0222, "6": 0.0236},
)
TARGET, DRAFT = 692_000_000, 55_000_000


def write_benchmarked_run(
    root: Path, value: dict[str, Any] | None = None, stages: tuple[str, ...] = ()
) -> RunFolder:
    """A finished run (or some of its stages) with a finished benchmark of it."""
    run = write_run(root, stages)
    artifact = run.folder("benchmark")
    artifact.begin({"stage": "benchmark", "seed": 0})
    write_json(artifact.path / "benchmark.json", benchmark() if value is None else value)
    artifact.complete(seconds=512.0, provenance=PROVENANCE)
    return run


def benchmark() -> dict[str, Any]:
    """The content of a `benchmark.json` with everything that it can hold."""
    rows = [benchmark_row("tasks", task, DEPLOYED, k) for task in ACCEPTED for k in range(1, 6)]
    rows += [benchmark_row("tasks", task, OTHER, k, slower=1.5) for task in ACCEPTED for k in range(1, 6)]
    rows += [
        benchmark_row("tasks", task, DEPLOYED, 5) | {"confidence_threshold": 0.4, "predicted_speedup": None}
        for task in ("code", "text")
    ]
    rows += [
        benchmark_row("prompt_tokens", "code", DEPLOYED, 4, prompt_tokens=n, slower=1 + n / 9000)
        for n in (128.0, 1024.0, 3900.5)
    ]
    rows += [
        benchmark_row("prompt_tokens", "text", DEPLOYED, 3, prompt_tokens=n, slower=1 + n / 6000)
        for n in (131.0, 1030.0)
    ]
    rows += [
        benchmark_row("max_new_tokens", "code", DEPLOYED, 4, max_new_tokens=n, slower=1.2 - n / 4000)
        for n in (32, 128, 512)
    ]
    rows += [
        benchmark_row("concurrency", "code", DEPLOYED, 4, concurrency=n, slower=1 + n / 20)
        for n in (1, 4, 16)
    ]
    rows.append(
        benchmark_row("tasks", "code", DEPLOYED, 4)
        | {"temperature": 0.6, "lossless": False, "speedup": 2.9, "speedup_low": 2.8}
    )
    rows[0]["differences"] = [{"prompt": "HumanEval/3", "token": 17, "logprob_gap": 0.01}]
    rows[0]["same_text"] = 7
    rows[3]["differences"] = [
        {"prompt": "HumanEval/3", "token": 17, "logprob_gap": 0.012},
        {"prompt": "HumanEval/5", "token": 40, "logprob_gap": None},
    ]
    rows[3]["same_text"] = 6
    best = {task: best_of(rows, task) for task in ACCEPTED}
    gains = " and ".join(f"{best[task]['speedup']:.2f}x on {task}" for task in ("code", "instructions"))
    sentence = (
        f"Use this draft with K = 2 where it pays: measured {gains}, but 0.94x on summarization (CPU, int4 target, int8 draft); "
        "there the target accepts 18 % of what is proposed."
    )
    return {
        "schema": 1,
        "runtime": {
            "name": "openvino",
            "version": "2026.4.1",
            "device": "CPU",
            "draft_device": "CPU",
            "device_name": "AMD EPYC 9654 96-Core Processor",
            "threads": 0,
            "precision": "fast",
        },
        "target": "shipped:targets/starter",
        "draft": "align",
        "block": {"left_out": ["prompts of 8192 tokens: they do not fit the context"]},
        "models": [
            {"role": "target", "weights": "int4", "bytes": TARGET},
            {"role": "draft", "weights": "int8", "bytes": DRAFT},
            {"role": "target", "weights": "int8", "bytes": 2 * TARGET},
        ],
        "latencies": [_latency(DEPLOYED, 1.0), _latency(DEPLOYED, 1.2, 1024), _latency(OTHER, 1.6)],
        "breakdown": [_breakdown(DEPLOYED, 0.62, 0.24), _breakdown(OTHER, 0.74, 0.17)],
        "memory": [
            {
                "target_weights": "int4",
                "draft_weights": "int8",
                "alone_bytes": 1_020_000_000,
                "with_draft_bytes": 1_131_000_000,
            },
            {
                "target_weights": "int8",
                "draft_weights": "int8",
                "alone_bytes": 1_720_000_000,
                "with_draft_bytes": 1_834_000_000,
            },
        ],
        "rows": rows,
        "best": {"num_speculative_tokens": 2, "by_task": best},
        "verdict": {"sentence": sentence, "tone": "mixed"},
    }


def best_of(rows: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """K and speed-up of the deployed pair's fastest row."""
    found = [
        row
        for row in rows
        if (row["task"], row["part"], row["target_weights"]) == (task, "tasks", DEPLOYED[0])
    ]
    best = max(
        (row for row in found if row["lossless"] and not row["confidence_threshold"]),
        key=lambda row: float(row["speedup"]),
    )
    return {"num_speculative_tokens": best["num_speculative_tokens"], "speedup": best["speedup"]}


def benchmark_row(
    part: str,
    task: str,
    weights: tuple[str, str],
    k: int,
    *,
    prompt_tokens: float = 131.5,
    max_new_tokens: int = 96,
    concurrency: int = 1,
    slower: float = 1.0,
) -> dict[str, Any]:
    """One row; `slower` makes the target's passes longer than they are alone, as in long contexts and large batches."""
    chance = ACCEPTED[task]
    positions = [chance ** (i + 1) for i in range(k)]
    efficiency = 1 + sum(positions)
    predicted = efficiency * TARGET_SECONDS["1"] / (k * DRAFT_SECONDS + TARGET_SECONDS[str(k + 1)])
    speedup, tokens, first = predicted * 0.91 / slower**0.5, 8 * max_new_tokens, 0.083 * prompt_tokens / 131.5
    alone = first + 0.0193 * max_new_tokens
    mbsu = efficiency / (k * DRAFT / TARGET + 1)
    rounds = tokens / efficiency
    return {
        "part": part,
        "task": task,
        "target_weights": weights[0],
        "draft_weights": weights[1],
        "temperature": 0.0,
        "num_speculative_tokens": k,
        "confidence_threshold": 0.0,
        "concurrency": concurrency,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "num_prompts": 8,
        "repeats": 3,
        "num_drafts": round(rounds),
        "num_draft_tokens": round(k * rounds),
        "num_accepted_tokens": round(sum(positions) * rounds),
        "num_accepted_tokens_per_pos": [round(p * rounds) for p in positions],
        "num_examined_tokens": round(rounds * 1.4),
        "num_generated_tokens": tokens,
        "acceptance_rate": sum(positions) / k,
        "conditional_acceptance_rate": chance,
        "block_efficiency": efficiency,
        "num_tokens_alone": tokens,
        "num_tokens_with_draft": tokens,
        "seconds_alone": 8 * alone,
        "seconds_alone_low": 7.9 * alone,
        "seconds_alone_high": 8.2 * alone,
        "seconds_with_draft": 8 * alone / speedup,
        "seconds_with_draft_low": 7.9 * alone / speedup,
        "seconds_with_draft_high": 8.3 * alone / speedup,
        "tokens_per_second_alone": tokens / (8 * alone),
        "tokens_per_second_with_draft": tokens / (8 * alone) * speedup,
        "speedup": speedup,
        "speedup_low": speedup - 0.06,
        "speedup_high": speedup + 0.05,
        "decode_speedup": speedup * 1.03,
        "first_token_seconds_alone": first,
        "first_token_seconds_with_draft": first * 1.13,
        "seconds_per_output_token_alone": 0.0193,
        "seconds_per_output_token_with_draft": 0.0193 / speedup,
        "predicted_speedup": predicted,
        "predicted_quotient": speedup / predicted,
        "decode_quotient": speedup * 1.03 / predicted,
        "mbsu_bytes": mbsu,
        "mbsu_quotient": speedup / mbsu,
        "texts": 8,
        "same_text": 8,
        "differences": [],
        "looping_share": 0.1 if task == "text" else 0.0,
        "lossless": True,
    }


def _latency(weights: tuple[str, str], factor: float, prefix: int = 128) -> dict[str, Any]:
    return {
        "target_weights": weights[0],
        "draft_weights": weights[1],
        "prefix_tokens": prefix,
        "draft_seconds": DRAFT_SECONDS,
        "target_seconds": {width: seconds * factor for width, seconds in TARGET_SECONDS.items()},
        "device": "CPU",
        "draft_device": "CPU",
    }


def _breakdown(weights: tuple[str, str], target: float, draft: float) -> dict[str, Any]:
    return {
        "target_weights": weights[0],
        "draft_weights": weights[1],
        "num_speculative_tokens": 4,
        "target_seconds": target * 1.4,
        "draft_seconds": draft * 1.4,
        "other_seconds": (1 - target - draft) * 1.4,
        "total_seconds": 1.4,
    }
