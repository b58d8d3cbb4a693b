"""A finished run's folder with made-up but plausible figures, so that reports can be tried without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastdraft.benchmark.rows import BenchmarkResults
from fastdraft.evaluation.results import EvaluationResults
from fastdraft.run_folder import RunFolder, write_atomic, write_json

TASKS = {
    "code": (0.09, 0.4, 0.48),
    "summarization": (0.17, 0.19, 0.28),
    "text": (0.48, 0.47, 0.48),
    "instructions": (0.15, 0.19, 0.33),
}
CHECKPOINTS = ("pretrain", "continue_pretrain", "align")
COSTS = {"parameters": 0.187, "bytes": 0.142, "latency": 0.38}
PROVENANCE = {
    "time": "2026-03-02T10:11:12+00:00",
    "command": "fastdraft run demo",
    "python": "3.12.4",
    "system": "Linux x86_64",
    "cpus": 2,
    "libraries": {"fastdraft": "0.2.0", "torch": "2.9.0"},
}
HOSTILE = "<script>alert('x')</script> & \"quotes\" | `ticks`"


def write_run(
    root: Path, stages: tuple[str, ...] = (), *, name: str = "a/target", benchmarked: bool = False
) -> RunFolder:
    """A run with the given stages finished, all but the benchmark by default; `name` is the target's."""
    run = RunFolder(root)
    for stage, fields in _manifests(name).items():
        if stages and stage not in stages or stage == "benchmark" and not benchmarked:
            continue
        folder = run.folder(stage)
        folder.begin({"stage": stage})
        if stage in CHECKPOINTS:
            write_atomic(folder.path / "metrics.jsonl", _metrics(stage))
        if stage == "evaluate":
            write_json(folder.path / "results.json", results(name).to_json())
            write_json(folder.path / "samples.json", _samples(name))
        if stage == "benchmark":
            write_json(folder.path / "benchmark.json", benchmark().to_json())
        folder.complete(**fields, provenance=PROVENANCE)
    asked = "benchmark:\n  repeats: 3\n" if benchmarked else ""
    write_atomic(root / "recipe.yaml", f"run:\n  name: demo\n  seed: 0\n{asked}")
    return run


def results(target: str = "a/target", **changes: Any) -> EvaluationResults:
    """Every task, two temperatures, K from 1 to 8; `changes` are made to every row."""
    settings = [(c, t, "replay", k) for c in CHECKPOINTS for t in TASKS for k in range(1, 9)]
    settings += [("align", task, "exact", 3) for task in TASKS]
    rows = [_row(*setting, temperature) | changes for setting in settings for temperature in (0.0, 0.6)]
    position = {
        "checkpoint": "align",
        "num_prompts": 9,
        "num_conversations": 9,
        "num_drafts": 40,
        "num_draft_tokens": 120,
    }
    position |= {
        "num_accepted_tokens": 40,
        "num_examined_tokens": 90,
        "num_generated_tokens": 80,
        "acceptance_rate": 0.33,
    }
    position |= {
        "acceptance_rate_low": 0.3,
        "acceptance_rate_high": 0.36,
        "conditional_acceptance_rate": 0.5,
        "block_efficiency": 2.0,
    }
    value = {
        "schema": 1,
        "target": target,
        "draft": "align/checkpoint",
        **{f"cost_ratio_{basis}": ratio for basis, ratio in COSTS.items()},
        "latency": {
            "draft_seconds": 0.0011,
            "target_seconds": {"1": 0.0029, "4": 0.0033},
            "prefix_tokens": 128,
        }
        | {"device": "cpu", "draft_dtype": "float32", "target_dtype": "float32"},
        "rows": rows,
        "differences": [
            {
                "from": CHECKPOINTS[i],
                "to": CHECKPOINTS[i + 1],
                "task": task,
                "temperature": t,
                "num_speculative_tokens": 3,
            }
            | {
                "difference": (d := TASKS[task][i + 1] - TASKS[task][i]),
                "difference_low": d - 0.05,
                "difference_high": d + 0.05,
            }
            for task in TASKS
            for t in (0.0, 0.6)
            for i in (0, 1)
        ],
        "by_position": {
            "num_speculative_tokens": 3,
            "context_length": 2048,
            "rows": [
                position | {"task": "code", "temperature": t, "from": first, "to": first * 2 or 512}
                for t in (0.0, 0.6)
                for first in (0, 512)
            ],
            "faded": [
                {"checkpoint": "align", "task": "code", "temperature": 0.6, "from": 512}
                | {"acceptance_rate": 0.1, "best_acceptance_rate": 0.5}
            ],
        },
        "greedy_check": {"texts": 64, "different": 0, "near_ties": 0, "cases": []},
        "contamination": {
            task: {"prompts": 40, "prompts_with_overlap": task == "text", "ngrams": 4100, "ngrams_matched": 3}
            for task in TASKS
        },
    }
    return EvaluationResults.from_json(value)


def _row(checkpoint: str, task: str, method: str, k: int, temperature: float) -> dict[str, Any]:
    chance = TASKS[task][CHECKPOINTS.index(checkpoint)] + 0.04 * (temperature == 0)
    accepted = [chance ** (i + 1) for i in range(k)]
    efficiency, rate = 1 + sum(accepted), sum(accepted) / k
    rounds = 2000.0 / efficiency
    return {
        "checkpoint": checkpoint,
        "task": task,
        "method": method,
        "temperature": temperature,
        "num_speculative_tokens": k,
        "num_prompts": 40,
        "num_conversations": 40,
        "num_drafts": rounds,
        "num_draft_tokens": k * rounds,
        "num_accepted_tokens": sum(accepted) * rounds,
        "num_accepted_tokens_per_pos": [p * rounds for p in accepted],
        "num_generated_tokens": 2000,
        "acceptance_rate": rate,
        "conditional_acceptance_rate": chance,
        "overlap": chance,
        "block_efficiency": efficiency,
        **{f"mbsu_{basis}": efficiency / (k * ratio + 1) for basis, ratio in COSTS.items()},
        "predicted_speedup": efficiency / (k * 0.38 + 1.03 + 0.05 * k),
        **{"acceptance_rate_low": rate - 0.02, "acceptance_rate_high": rate + 0.02},
        **{"block_efficiency_low": efficiency - 0.06, "block_efficiency_high": efficiency + 0.06},
        "looping_share": 0.02,
        "acceptance_rate_without_looping": rate - 0.01,
        "block_efficiency_without_looping": efficiency - 0.04,
    }


def benchmark(**changes: Any) -> BenchmarkResults:
    """Two pairs of weights, sweeps, a lossy row and texts that part; `changes` are made to every row of the deployed pair's tasks."""
    rows = [_measured("tasks", task, "int4", k) | changes for task in TASKS for k in range(1, 6)]
    rows += [_measured("tasks", task, "int8", k) for task in TASKS for k in range(1, 6)]
    for part, values in {
        "prompt_tokens": (128, 1024, 4096),
        "max_new_tokens": (32, 128, 512),
        "concurrency": (1, 4, 16),
    }.items():
        rows += [
            _measured(part, task, "int4", 4, **{part: value}) for task in ("code", "text") for value in values
        ]
    rows.append(
        _measured("tasks", "code", "int4", 4)
        | {"temperature": 0.6, "lossless": False, "speedup": 2.9, "same_text": None}
    )
    if not changes:
        rows[0] |= {"same_text": 7, "differences": [{"prompt": "one", "token": 17, "logprob_gap": 0.01}]}
        rows[3] |= {
            "same_text": 6,
            "differences": [
                {"prompt": "one", "token": 17, "logprob_gap": 0.012},
                {"prompt": "two", "token": 40, "logprob_gap": None},
            ],
        }
    pairs = [{"target_weights": target, "draft_weights": "int8"} for target in ("int4", "int8")]
    value = {
        "schema": 1,
        "runtime": {"name": "openvino", "version": "2026.4.1", "device_name": "AMD EPYC", "device": "CPU"}
        | {"draft_device": "CPU", "threads": 0, "precision": "fast"},
        "target": "a/target",
        "draft": "align",
        "block": {"settings": {}, "left_out": ["prompts of 8192 tokens: they do not fit the context"]},
        "models": [
            {"role": role, "weights": weights, "bytes": size}
            for role, weights, size in (("target", "int4", 692_000_000), ("draft", "int8", 55_000_000))
        ],
        "latencies": [
            pair
            | {"prefix_tokens": 128, "draft_seconds": 0.0024, "device": "CPU", "draft_device": "CPU"}
            | {"target_seconds": {str(width): 0.0188 + 0.0004 * width for width in range(1, 7)}}
            for pair in pairs
        ],
        "breakdown": [
            pair
            | {
                "num_speculative_tokens": 4,
                "target_seconds": 0.9,
                "draft_seconds": 0.3,
                "other_seconds": 0.2,
                "total_seconds": 1.4,
            }
            for pair in pairs
        ],
        "memory": [
            pair | {"alone_bytes": 1_020_000_000, "with_draft_bytes": 1_131_000_000} for pair in pairs
        ],
        "rows": rows,
        "best": {"num_speculative_tokens": 2, "by_task": {}},
    }
    return BenchmarkResults.from_json(value)


def _measured(part: str, task: str, weights: str, k: int, **setting: Any) -> dict[str, Any]:
    chance = {"code": 0.78, "summarization": 0.18, "text": 0.55, "instructions": 0.5}[task]
    efficiency = 1 + sum(chance ** (i + 1) for i in range(k))
    predicted = efficiency * 0.0192 / (k * 0.0024 + 0.0192 + 0.0004 * k)
    speedup = predicted * (0.91 if weights == "int4" else 0.8)
    row = {
        **{
            "part": part,
            "task": task,
            "target_weights": weights,
            "draft_weights": "int8",
            "temperature": 0.0,
        },
        **{
            "num_speculative_tokens": k,
            "confidence_threshold": 0.0,
            "concurrency": 1,
            "prompt_tokens": 131.5,
            "max_new_tokens": 96,
        },
        **{
            "num_prompts": 8,
            "repeats": 3,
            "num_accepted_tokens_per_pos": [1] * k,
            "acceptance_rate": (efficiency - 1) / k,
        },
        **{
            "conditional_acceptance_rate": chance,
            "block_efficiency": efficiency,
            "num_tokens_alone": 768,
            "num_tokens_with_draft": 768,
        },
        **{
            "tokens_per_second_alone": 50.0,
            "tokens_per_second_with_draft": 50.0 * speedup,
            "speedup": speedup,
        },
        **{"speedup_low": speedup - 0.06, "speedup_high": speedup + 0.05, "decode_speedup": speedup * 1.03},
        **{
            "first_token_seconds_alone": 0.083,
            "first_token_seconds_with_draft": 0.094,
            "seconds_per_output_token_alone": 0.0193,
        },
        **{
            "seconds_per_output_token_with_draft": 0.0193 / speedup,
            "predicted_speedup": predicted,
            "predicted_quotient": speedup / predicted,
        },
        **{
            "decode_quotient": speedup * 1.03 / predicted,
            "mbsu_bytes": efficiency / (k * 0.08 + 1),
            "mbsu_quotient": 0.9,
        },
        **{
            "texts": 8,
            "same_text": 8,
            "differences": [],
            "looping_share": 0.1 if task == "text" else 0.0,
            "lossless": True,
        },
    }
    return row | setting


def _manifests(target: str) -> dict[str, dict[str, Any]]:
    shape = {
        "family": "llama",
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 384,
    }
    half = {"rows": 1953, "tokens": 2_000_000, "documents": 937}
    source = {
        "kind": "jsonl",
        "from": "shipped:data/books.jsonl.xz",
        "license": "CC0-1.0",
        "tokens": 2_000_000,
    }
    trained = {
        "tokens_per_second": 12_100.0,
        "seconds": 165.0,
        "tokens": 2_000_000,
        "steps": 244,
        "train_loss": 4.11,
    }
    counts = {"asked": 1200, "written": 1115, "filtered": 84, "failed": 1}
    return {
        "design": {
            "architecture": shape,
            "parameters": 1_512_000,
            "target": {"model": target, "parameters": 6_820_000},
            "cost_ratio_parameters": 0.187,
            "seconds": 3.2,
        },
        "prepare": {
            "row_length": 1024,
            "corpora": {"text": {"train": half, "validation": half, "duplicates": 12, "sources": [source]}},
        },
        "pretrain": {**trained, "validation_loss": {"text": 4.18, "code": 5.9}},
        "continue_pretrain": {**trained, "validation_loss": {"text": 4.16, "code": 3.2}},
        "synthesize": {
            "asked": 2400,
            "written": 2231,
            "filtered": {"truncated": 79, "looping": 88},
            "failed": 2,
            "tokens": 251_000,
            "engine": "huggingface",
            "by_source": {"instruct": counts},
            "by_temperature": {"0": counts},
            "seconds": 104.0,
        },
        "align": {
            **trained,
            "best_step": 81,
            "start_block_efficiency": 1.41,
            "validation_block_efficiency": 1.64,
        },
        "evaluate": {"seconds": 171.0},
        "export": {
            "seconds": 1.0,
            "num_speculative_tokens": 3,
            "checks": {
                "assistant_same_greedy_text": True,
                "assistant_tokens_compared": 48,
                "assistant_dtype": "float32",
                "padding_mass_mean": 2e-6,
                "padding_mass_ok": True,
                "padding_mass_limit": 1e-4,
            },
        },
        "benchmark": {"seconds": 512.0},
    }


def _metrics(stage: str) -> str:
    """As a killed process leaves them: with half a line at the end."""
    lines = []
    for step in range(1, 101):
        fall, tokens = math.exp(-5 * step / 100), step * 8192
        lines.append({"step": step, "tokens": tokens, "loss": 3 + 5 * fall + 0.1 * math.sin(step * 2.7)})
        if step % 10 == 0:
            held = {"validation_block_efficiency": 1.66 - 0.35 * fall} if stage == "align" else {}
            lines.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "validation_loss": {"text": 3.1 + 4 * fall, "code": 3.9 + 4 * fall},
                    **held,
                }
            )
    return "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "tok'


def _samples(prompt: str) -> list[dict[str, Any]]:
    words = [
        "The ",
        "river ",
        "rises ",
        "in ",
        "the ",
        "hills ",
        "and ",
        "runs ",
        "past ",
        "the ",
        "old ",
        "mill.",
    ]
    pieces = [{"text": word, "accepted": i % 3 != 0} for i, word in enumerate(words)]
    about = {"task": "code", "id": "1", "temperature": 0.6, "num_speculative_tokens": 3}
    return [{**about, "prompt": f"{prompt}: describe a river.", "pieces": pieces}]
