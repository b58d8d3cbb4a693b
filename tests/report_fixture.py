"""Writes a finished run's folder with made-up but plausible figures, so that reports can be tried without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fastdraft.run_folder import RunFolder, write_atomic, write_json

TASKS = {
    "code": (0.06, 0.26, 0.31),
    "summarization": (0.11, 0.12, 0.18),
    "text": (0.31, 0.30, 0.31),
    "instructions": (0.10, 0.12, 0.21),
}
CHECKPOINTS = ("pretrain", "continue_pretrain", "align")
COSTS = {"parameters": 0.187, "bytes": 0.142, "latency": 0.38}
PROVENANCE = {
    "time": "2026-03-02T10:11:12+00:00",
    "command": "fastdraft run recipes/demo.yaml",
    "python": "3.12.4",
    "system": "Linux x86_64",
    "cpus": 2,
    "libraries": {"fastdraft": "0.1.0", "torch": "2.9.0", "transformers": "5.5.4"},
}
HOSTILE = "<script>alert('x')</script> & \"quotes\" | `ticks`"


def write_run(root: Path, stages: tuple[str, ...] = (), hostile: bool = False) -> RunFolder:
    """A run with the given stages finished (all of them by default).

    Args:
        root: The run's folder.
        stages: Names of the stages to write; empty for all.
        hostile: Puts markup into names and texts, to test escaping.
    """
    run = RunFolder(root)
    name = HOSTILE if hostile else "shipped:targets/starter"
    manifests = _manifests(name)
    for stage, fields in manifests.items():
        if stages and stage not in stages:
            continue
        artifact = run.folder(stage)
        artifact.begin({"stage": stage, "seed": 0})
        if stage in ("pretrain", "continue_pretrain", "align"):
            write_atomic(artifact.path / "metrics.jsonl", _metrics(stage))
        if stage == "evaluate":
            write_json(artifact.path / "results.json", results(name))
            write_json(artifact.path / "samples.json", _samples(hostile))
        artifact.complete(**fields, provenance=PROVENANCE)
    write_atomic(
        root / "recipe.yaml", "run:\n  name: demo\n  seed: 0\ntarget:\n  model: shipped:targets/starter\n"
    )
    return run


def results(target: str = "shipped:targets/starter", scale: float = 1.0) -> dict[str, Any]:
    """The content of a `results.json`; `scale` multiplies every acceptance rate."""
    rows = [
        _row((checkpoint, task, "replay"), temperature, k, TASKS[task][i] * scale)
        for i, checkpoint in enumerate(CHECKPOINTS)
        for task in TASKS
        for temperature in (0.0, 0.6)
        for k in range(1, 9)
    ]
    rows += [
        _row(
            ("align", task, "exact"),
            temperature,
            3,
            TASKS[task][2] * scale * (1.0 if temperature == 0 else 1.01),
        )
        for task in TASKS
        for temperature in (0.0, 0.6)
    ]
    return {
        "schema": 1,
        "target": target,
        "draft": "runs/demo/align/checkpoint",
        **{f"cost_ratio_{basis}": ratio for basis, ratio in COSTS.items()},
        "rows": rows,
        "differences": _differences(scale),
        "latency": {
            "draft_seconds": 0.0011,
            "target_seconds": {"1": 0.0029, "2": 0.003, "4": 0.0033, "9": 0.0041},
            "device": "cpu",
            "target_dtype": "float32",
        },
        "greedy_check": {"texts": 64, "different": 0, "near_ties": 0, "cases": []},
        "contamination": {
            task: {
                "prompts": 40,
                "prompts_with_overlap": int(task == "text"),
                "ngrams_matched": 3 * (task == "text"),
                "ngrams": 4100,
            }
            for task in TASKS
        },
    }


def _row(setting: tuple[str, str, str], temperature: float, k: int, rate: float) -> dict[str, Any]:
    checkpoint, task, method = setting
    conditional = min(0.97, (rate * 1.55 + 0.03) * (1.12 if temperature == 0 else 1.0))
    positions = [conditional ** (i + 1) * (0.96**i) for i in range(k)]
    rounds = 2000.0 / (1 + sum(positions))
    accepted, proposed = sum(positions) * rounds, k * rounds
    efficiency, share = 1 + sum(positions), accepted / proposed
    row = {
        "checkpoint": checkpoint,
        "task": task,
        "method": method,
        "temperature": temperature,
        "num_speculative_tokens": k,
        "num_prompts": 40,
        "num_drafts": rounds,
        "num_draft_tokens": proposed,
        "num_accepted_tokens": accepted,
        "num_accepted_tokens_per_pos": [p * rounds for p in positions],
        "num_generated_tokens": 2000,
        "acceptance_rate": share,
        "conditional_acceptance_rate": conditional,
        "overlap": conditional,
        "block_efficiency": efficiency,
        "acceptance_rate_low": share - 0.02,
        "acceptance_rate_high": share + 0.02,
        "block_efficiency_low": efficiency - 0.06,
        "block_efficiency_high": efficiency + 0.06,
        "looping_share": 0.12 if temperature == 0 else 0.02,
        "acceptance_rate_without_looping": share - 0.012,
        "block_efficiency_without_looping": efficiency - 0.04,
    }
    return (
        row
        | {f"mbsu_{basis}": efficiency / (k * ratio + 1) for basis, ratio in COSTS.items()}
        | {"predicted_speedup": efficiency / (k * 0.38 + 1.03 + 0.05 * k)}
    )


def _differences(scale: float) -> list[dict[str, Any]]:
    found = []
    for task, rates in TASKS.items():
        for temperature in (0.0, 0.6):
            for i in (0, 1):
                change = (rates[i + 1] - rates[i]) * scale
                place = {
                    "task": task,
                    "temperature": temperature,
                    "num_speculative_tokens": 3,
                    "from": CHECKPOINTS[i],
                    "to": CHECKPOINTS[i + 1],
                }
                found.append(
                    place
                    | {
                        "difference": change,
                        "difference_low": change - 0.018,
                        "difference_high": change + 0.018,
                    }
                )
    return found


def _manifests(target: str) -> dict[str, dict[str, Any]]:
    def corpus(tokens: int, duplicates: int) -> dict[str, Any]:
        sources = [
            {
                "kind": "jsonl",
                "from": f"shipped:data/{duplicates}.jsonl.xz",
                "license": "CC0-1.0",
                "tokens": tokens,
            }
        ]
        train = {"rows": tokens // 1024, "tokens": tokens, "documents": tokens // 900, "shards": []}
        return {
            "train": train,
            "validation": {"rows": 20, "tokens": 20_480, "documents": 31},
            "duplicates": duplicates,
            "sources": sources,
        }

    shape = {
        "family": "llama",
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 384,
    }
    trained = {"tokens_per_second": 12_100.0, "seconds": 165.0, "tokens": 2_000_000, "steps": 244}
    return {
        "design": {
            "architecture": shape,
            "parameters": 1_512_000,
            "target": {"model": target, "parameters": 6_820_000},
            "cost_ratio_parameters": COSTS["parameters"],
            "seconds": 3.2,
        },
        "prepare": {
            "row_length": 1024,
            "corpora": {"text": corpus(2_000_000, 12), "code": corpus(3_000_000, 240)},
            "seconds": 31.0,
        },
        "pretrain": {**trained, "train_loss": 4.11, "validation_loss": {"text": 4.18, "code": 5.9}},
        "continue_pretrain": {**trained, "train_loss": 3.42, "validation_loss": {"text": 4.16, "code": 3.2}},
        "synthesize": {
            "asked": 2400,
            "written": 2231,
            "filtered": {"truncated": 61, "looping": 88, "empty": 3, "duplicate": 15},
            "failed": 2,
            "tokens": 251_000,
            "engine": "huggingface",
            "by_source": {"instruct": 1400, "magpie": 420, "code": 411},
            "by_temperature": {"0": 540, "0.6": 561, "0.8": 560, "1.0": 570},
            "seconds": 104.0,
        },
        "align": {
            "tokens": 800_000,
            "steps": 98,
            "best_step": 81,
            "train_loss": 2.9,
            "start_block_efficiency": 1.41,
            "validation_block_efficiency": 1.64,
            "seconds": 71.0,
            "tokens_per_second": 11_300.0,
        },
        "evaluate": {"seconds": 171.0, "num_prompts": 160},
        "export": {"seconds": 1.0, "formats": ["huggingface"]},
    }


def _metrics(stage: str) -> str:
    floor, start = {"pretrain": (4.0, 9.0), "continue_pretrain": (3.3, 4.9), "align": (2.8, 3.4)}[stage]
    steps, lines = {"pretrain": 244, "continue_pretrain": 244, "align": 98}[stage], []
    for step in range(1, steps + 1):
        fall = math.exp(-5 * step / steps)
        wave = 0.09 * math.sin(step * 2.7) * math.cos(step * 0.9)
        tokens = step * 8192
        lines.append(
            {
                "step": step,
                "tokens": tokens,
                "loss": floor + (start - floor) * fall + wave,
                "lr": 0.003,
                "grad_norm": 1.0,
                "tokens_per_second": 12_000,
            }
        )
        if step % (steps // 10) == 0:
            if stage == "align":
                lines.append(
                    {
                        "step": step,
                        "tokens": tokens,
                        "validation_block_efficiency": 1.66 - 0.35 * fall - (step / steps - 0.8) ** 2 * 0.1,
                        "validation_loss": {"responses": floor + 0.2 + fall},
                    }
                )
            else:
                code = 1.7 if stage == "pretrain" else -0.2
                lines.append(
                    {
                        "step": step,
                        "tokens": tokens,
                        "validation_loss": {"text": floor + 0.1 + 2 * fall, "code": floor + code + 2 * fall},
                    }
                )
    return "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "tok'


def _samples(hostile: bool) -> list[dict[str, Any]]:
    code = [
        ("    ", True),
        ("total", False),
        (" =", True),
        (" ", True),
        ("0", True),
        ("\n    ", False),
        ("for", True),
        (" value", False),
        (" in", True),
        (" values", True),
        (":", True),
        ("\n        ", True),
        ("total", False),
        (" +=", True),
        (" value", True),
        ("\n    ", False),
        ("return", True),
        (" total", True),
    ]
    words = [
        (word + " ", i % 3 != 0)
        for i, word in enumerate(
            [
                "The",
                "river",
                "rises",
                "in",
                "the",
                "hills",
                "and",
                "runs",
                "past",
                "the",
                "old",
                "mill",
                "before",
                "it",
                "meets",
                "the",
                "sea",
                "at",
                "a",
                "small",
                "grey",
                "town",
                ".",
            ]
        )
    ]
    prompt = HOSTILE if hostile else 'def total_of(values):\n    """Return the sum of the values."""\n'
    return [
        {
            "task": "code",
            "prompt": prompt,
            "temperature": 0.0,
            "num_speculative_tokens": 3,
            "pieces": [{"text": t, "accepted": a} for t, a in code],
        },
        {
            "task": "instructions",
            "prompt": "Describe a river in one sentence.",
            "temperature": 0.6,
            "num_speculative_tokens": 3,
            "pieces": [{"text": t, "accepted": a} for t, a in words],
        },
    ]
