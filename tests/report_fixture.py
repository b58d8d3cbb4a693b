"""A finished run's folder with made-up but plausible figures, so that reports can be tried without training.

Rows and files take their form from tests/golden, which a real run left.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdraft.benchmark.rows import BenchmarkResults
from fastdraft.evaluation.results import EvaluationResults, LookupRow
from fastdraft.run_folder import RunFolder, write_atomic, write_json

CHANCES = {
    "code": (0.09, 0.4, 0.48, 0.78),
    "summarization": (0.17, 0.19, 0.28, 0.18),
    "text": (0.48, 0.47, 0.48, 0.55),
    "instructions": (0.15, 0.19, 0.33, 0.5),
}
"""By task, the chance that a proposal is accepted: of each checkpoint, and under the clock."""
FINDS = {"code": 0.3, "summarization": 0.6, "text": 0.02, "instructions": 0.15}
"""By task, the share of rounds in which prompt lookup finds something, and the chance that it is right."""
TASKS, CHECKPOINTS = tuple(CHANCES), ("pretrain", "continue_pretrain", "align")
COSTS = {"parameters": 0.187, "bytes": 0.142, "latency": 0.38}
HOSTILE = "<script>alert('x')</script> & \"quotes\" | `ticks`"


def golden(name: str) -> Any:
    return json.loads((Path(__file__).parent / "golden" / name).read_text(encoding="utf-8"))


def write_run(
    root: Path, stages: tuple[str, ...] = (), *, name: str = "a/target", benchmarked: bool = False
) -> RunFolder:
    """A run with the given stages finished, all but the benchmark by default; `name` is the target's."""
    run = RunFolder(root)
    for stage, fields in json.loads(MANIFESTS.replace("NAME", json.dumps(name)[1:-1])).items():
        if (stages and stage not in stages) or (stage == "benchmark" and not benchmarked):
            continue
        folder = run.folder(stage)
        folder.begin({"stage": stage})
        if stage in CHECKPOINTS:
            write_atomic(folder.path / "metrics.jsonl", metrics(stage))
        if stage == "evaluate":
            write_json(folder.path / "results.json", with_lookup(results(name)).to_json())
            write_json(
                folder.path / "samples.json", [golden("samples.json")[0] | {"prompt": name, "pieces": PIECES}]
            )
        if stage == "benchmark":
            write_json(folder.path / "benchmark.json", timed_lookup(benchmark()).to_json())
        folder.complete(**fields, provenance=PROVENANCE)
    asked = "benchmark:\n  repeats: 3\n" if benchmarked else ""
    write_atomic(root / "recipe.yaml", f"run:\n  name: demo\n{asked}")
    return run


def results(target: str = "a/target", **changes: Any) -> EvaluationResults:
    """Every task, two temperatures, K from 1 to 8; `changes` are made to every row."""
    value = golden("results.json")
    row, position, change = value["rows"][0], value["by_position"]["rows"][0], value["differences"][0]
    settings = [(c, task, "replay", k) for c in CHECKPOINTS for task in TASKS for k in range(1, 9)]
    settings += [("align", task, "exact", 3) for task in TASKS]
    value["rows"] = [row | _rates(*each, t) | changes for each in settings for t in (0.0, 0.6)]
    value["differences"] = [
        change
        | {"from": CHECKPOINTS[i], "to": CHECKPOINTS[i + 1], "task": task, "temperature": t}
        | {
            "difference": (d := found[i + 1] - found[i]),
            "difference_low": d - 0.05,
            "difference_high": d + 0.05,
        }
        for task, found in CHANCES.items()
        for t in (0.0, 0.6)
        for i in (0, 1)
    ]
    place = {"checkpoint": "align", "task": "code", "temperature": 0.6}
    value["by_position"]["rows"] = [
        position | place | {"from": start, "to": start * 2 or 512} for start in (0, 512)
    ]
    costs = {f"cost_ratio_{basis}": ratio for basis, ratio in COSTS.items()}
    return EvaluationResults.from_json(value | costs | {"target": target})


def _rates(checkpoint: str, task: str, method: str, k: int, temperature: float) -> dict[str, Any]:
    chance = CHANCES[task][CHECKPOINTS.index(checkpoint)] + 0.04 * (temperature == 0)
    accepted = [chance ** (i + 1) for i in range(k)]
    efficiency, rate = 1 + sum(accepted), sum(accepted) / k
    found = {"checkpoint": checkpoint, "task": task, "method": method, "temperature": temperature}
    found |= {"num_speculative_tokens": k, "num_prompts": 40, "num_conversations": 40, "num_drafts": 1000}
    found |= {"num_accepted_tokens_per_pos": [1000 * p for p in accepted], "acceptance_rate": rate}
    found |= {"acceptance_rate_low": rate - 0.02, "acceptance_rate_high": rate + 0.02}
    found |= {"block_efficiency": efficiency, "block_efficiency_low": efficiency - 0.06}
    found |= {"block_efficiency_high": efficiency + 0.06, "predicted_speedup": efficiency / (0.43 * k + 1.03)}
    return found | {f"mbsu_{basis}": efficiency / (k * ratio + 1) for basis, ratio in COSTS.items()}


def with_lookup(found: EvaluationResults, *, finds: dict[str, float] = FINDS) -> EvaluationResults:
    """The same with prompt lookup alone and before the final draft, on every task."""
    rows = []
    for row in found.select(checkpoint=CHECKPOINTS[-1], method="replay"):
        share, tau, k = finds[row.task], row.block_efficiency or 0.0, row.num_speculative_tokens
        alone = 1 + share * sum(share ** (i + 1) for i in range(k))
        for kind, here in (("lookup", alone), ("lookup_draft", alone - 1 + (1 - share) * (tau - 1) + 1)):
            drafted = (1 - share) * k * (kind != "lookup")
            value = row.to_json() | {"proposer": kind, "num_lookups": 1000 * share, "num_examined_tokens": 1}
            value |= {"checkpoint": row.checkpoint if drafted else None, "block_efficiency": here}
            value |= {"block_efficiency_low": here - 0.04, "block_efficiency_high": here + 0.04}
            value |= {f"mbsu_{basis}": here / (drafted * ratio + 1) for basis, ratio in COSTS.items()}
            rows.append(LookupRow.from_json(value))
    return replace(found, lookup=rows)


def timed_lookup(found: BenchmarkResults, **speedups: float) -> BenchmarkResults:
    """The same with prompt lookup timed at K of 3 and 5 on the deployed pair: as fast as given, else its finds."""
    rows = []
    for row in found.judged():
        if (k := row.num_speculative_tokens) in (3, 5):
            share = FINDS[row.task]
            speed = speedups.get(row.task, 0.97 + share * sum(share ** (i + 1) for i in range(k)))
            value = {
                "proposer": "lookup",
                "speedup": speed,
                "speedup_low": speed - 0.02,
                "speedup_high": speed,
            }
            value |= {"block_efficiency": speed + 0.03, "predicted_speedup": None, "acceptance_rate": None}
            rows.append(replace(row, **value))
    return replace(found, rows=[*found.rows, *rows])


def benchmark(**changes: Any) -> BenchmarkResults:
    """Two pairs of weights, sweeps, a lossy row and texts that part; `changes` are made to the deployed
    pair's tasks.
    """
    value = golden("benchmark.json")
    row = value["rows"][0] | {
        "differences": [],
        "texts": 8,
        "same_text": 8,
        "lossless": True,
        "temperature": 0.0,
    }
    rows = [row | _clock("tasks", task, "int4", k) | changes for task in TASKS for k in range(1, 6)]
    rows += [row | _clock("tasks", task, "int8", k) for task in TASKS for k in range(1, 6)]
    for part, values in {
        "prompt_tokens": (128, 4096),
        "max_new_tokens": (32, 512),
        "concurrency": (1, 16),
    }.items():
        rows += [row | _clock(part, task, "int4", 4) | {part: n} for task in ("code", "text") for n in values]
    lossy = {"temperature": 0.6, "lossless": False, "same_text": None}
    rows.append(row | _clock("tasks", "code", "int4", 4) | lossy)
    if not changes:
        parted = [{"prompt": "one", "token": 17, "logprob_gap": gap} for gap in (0.01, 0.012)]
        rows[0] |= {"same_text": 7, "differences": parted[:1]}
        rows[3] |= {
            "same_text": 6,
            "differences": [parted[1], {"prompt": "two", "token": 40, "logprob_gap": None}],
        }
    pairs = [{"target_weights": target, "draft_weights": "int8"} for target in ("int4", "int8")]
    seconds = {"draft_seconds": 0.0024, "target_seconds": {str(n): 0.0188 + 0.0004 * n for n in range(1, 7)}}
    value["latencies"] = [value["latencies"][0] | pair | seconds for pair in pairs]
    shares = {"target_seconds": 0.9, "draft_seconds": 0.3, "other_seconds": 0.2, "total_seconds": 1.4}
    value["breakdown"] = [value["breakdown"][0] | pair | shares for pair in pairs]
    value["memory"] = [value["memory"][0] | pair for pair in pairs]
    best = {"num_speculative_tokens": 2, "by_task": {}}
    return BenchmarkResults.from_json(
        value | {"rows": rows, "best": best, "launch": "run(num_assistant_tokens=2)"}
    )


def _clock(part: str, task: str, weights: str, k: int) -> dict[str, Any]:
    chance = CHANCES[task][3]
    efficiency = 1 + sum(chance ** (i + 1) for i in range(k))
    predicted = efficiency * 0.0192 / (k * 0.0024 + 0.0192 + 0.0004 * k)
    quotient = 0.91 if weights == "int4" else 0.8
    found = {"part": part, "task": task, "target_weights": weights, "draft_weights": "int8"}
    found |= {
        "num_speculative_tokens": k,
        "conditional_acceptance_rate": chance,
        "block_efficiency": efficiency,
    }
    found |= {"speedup": (speedup := predicted * quotient), "speedup_low": speedup - 0.06}
    found |= {"speedup_high": speedup + 0.05, "predicted_speedup": predicted, "predicted_quotient": quotient}
    return found | {"looping_share": 0.1 if task == "text" else 0.0}


def metrics(stage: str) -> str:
    """Lines of `metrics.jsonl` as a killed process leaves them: with half a line at the end."""
    lines = []
    for step in range(1, 101):
        fall, at = math.exp(-5 * step / 100), {"step": step, "tokens": step * 8192}
        lines.append(at | {"loss": 3 + 5 * fall + 0.1 * math.sin(step * 2.7)})
        if step % 10 == 0:
            held = {"validation_block_efficiency": 1.66 - 0.35 * fall} if stage == "align" else {}
            lines.append(at | {"validation_loss": {"text": 3.1 + 4 * fall, "code": 3.9 + 4 * fall}, **held})
    return "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 101, "tok'


PIECES = [
    {"text": f"{word} ", "accepted": i % 3 != 0}
    for i, word in enumerate(["The", "river", "rises", "in", "the", "hills"])
]
PROVENANCE = json.loads("""{"time": "2026-03-02T10:11:12+00:00", "command": "fastdraft run demo", "python": "3.12.4",
 "system": "Linux x86_64", "cpus": 2, "libraries": {"fastdraft": "0.2.0", "torch": "2.9.0"}}""")
MANIFESTS = """{
"design": {"architecture": {"family": "llama", "vocab_size": 8192, "hidden_size": 128, "num_layers": 2, "num_heads": 2,
  "intermediate_size": 384}, "parameters": 1512000, "target": {"model": "NAME", "parameters": 6820000},
  "cost_ratio_parameters": 0.187, "source": "shipped:drafts/body", "seconds": 3.2},
"prepare": {"row_length": 1024, "corpora": {"text": {"train": {"rows": 1953, "tokens": 2000000, "documents": 937},
  "validation": {"rows": 20, "tokens": 20000, "documents": 9}, "duplicates": 12,
  "sources": [{"kind": "jsonl", "from": "shipped:data/books.jsonl.xz", "license": "CC0-1.0", "tokens": 2000000}]}}},
"pretrain": {"tokens_per_second": 12100.0, "seconds": 165.0, "tokens": 2000000, "steps": 244, "train_loss": 4.11,
  "validation_loss": {"text": 4.18, "code": 5.9}},
"continue_pretrain": {"tokens_per_second": 12100.0, "seconds": 165.0, "tokens": 2000000, "steps": 244,
  "train_loss": 3.42, "validation_loss": {"text": 4.16, "code": 3.2}},
"synthesize": {"asked": 2400, "written": 2231, "filtered": {"truncated": 79, "looping": 88}, "failed": 2,
  "tokens": 251000, "engine": "huggingface", "by_source": {"instruct": {"asked": 2400, "written": 2231}},
  "by_temperature": {"0": {"asked": 2400, "written": 2231}}, "seconds": 104.0},
"align": {"tokens_per_second": 11300.0, "seconds": 71.0, "tokens": 800000, "steps": 98, "train_loss": 2.9,
  "best_step": 81, "start_block_efficiency": 1.41, "validation_block_efficiency": 1.64},
"evaluate": {"seconds": 171.0},
"export": {"seconds": 1.0, "num_speculative_tokens": 3, "checks": {"assistant_same_greedy_text": true,
  "assistant_tokens_compared": 48, "assistant_dtype": "float32", "padding_mass_mean": 2e-6, "padding_mass_ok": true,
  "padding_mass_limit": 1e-4}},
"benchmark": {"seconds": 512.0}
}"""
