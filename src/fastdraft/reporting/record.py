"""Reads back everything a run left on disk that a report can show.

Decides what is optional: every stage, every metrics line and the samples may be missing, and a damaged metrics line is
skipped (a killed process may leave half a line); a damaged manifest or results file is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastdraft.errors import FastDraftError
from fastdraft.reporting.results import number
from fastdraft.run_folder import FINGERPRINT, RunFolder, read_json

STAGES = (
    "design",
    "prepare",
    "pretrain",
    "continue_pretrain",
    "synthesize",
    "align",
    "evaluate",
    "export",
    "benchmark",
)
OPTIONAL = ("benchmark",)
"""Stages that nobody misses in a recipe without them."""
TRAINING = ("pretrain", "continue_pretrain", "align")
RECIPE, TIMINGS, BENCHMARK = "recipe.yaml", "timings.json", "benchmark.json"
BENCHMARK_SCHEMA = 1


@dataclass(frozen=True)
class RunRecord:
    """What the finished stages of one run wrote."""

    name: str
    manifests: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """By stage, finished stages only."""
    results: dict[str, Any] | None = None
    benchmark: dict[str, Any] | None = None
    """The content of `benchmark.json`."""
    metrics: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Lines of `metrics.jsonl` by training stage, ordered by step."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    recipe: str | None = None
    """The resolved recipe as YAML text."""
    timings: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock seconds by stage, as the pipeline recorded them."""

    def seconds(self, stage: str) -> float | None:
        """How long a stage took: its own count, which spans restarts, or the pipeline's, whichever is longer."""
        known = [
            value
            for value in (number(self.manifests.get(stage), "seconds"), number(self.timings, stage))
            if value is not None
        ]
        return max(known, default=None)

    @property
    def missing(self) -> list[str]:
        """Stages that have not finished; an optional one only when the recipe has its section."""
        return [
            stage
            for stage in STAGES
            if stage not in self.manifests and (stage not in OPTIONAL or self.asks_for(stage))
        ]

    def asks_for(self, stage: str) -> bool:
        """Whether the recipe has a section for this stage."""
        try:
            recipe = yaml.safe_load(self.recipe or "")
        except yaml.YAMLError:
            return False
        return isinstance(recipe, dict) and recipe.get(stage) is not None


def read_record(run: RunFolder) -> RunRecord:
    """Everything a report shows about `run`.

    Raises:
        FastDraftError: when a manifest, the results or the benchmark are damaged.
    """
    manifests = {stage: run.folder(stage).manifest() for stage in STAGES if run.folder(stage).is_complete()}
    evaluated = "evaluate" in manifests
    folder, benchmarked = run.folder("evaluate").path, "benchmark" in manifests
    return RunRecord(
        name=run.root.name,
        manifests=manifests,
        results=read_results(folder / "results.json") if evaluated else None,
        benchmark=read_benchmark(run.folder("benchmark").path / BENCHMARK) if benchmarked else None,
        metrics={
            stage: read_metrics(run.folder(stage).path / "metrics.jsonl")
            for stage in TRAINING
            if stage in manifests
        },
        samples=_read_samples(folder / "samples.json") if evaluated else [],
        recipe=(run.root / RECIPE).read_text(encoding="utf-8", errors="replace")
        if (run.root / RECIPE).is_file()
        else None,
        timings=_read_timings(run.root / TIMINGS),
    )


def read_results(path: Path) -> dict[str, Any] | None:
    """The content of `results.json`; None when there is no such file.

    Raises:
        FastDraftError: when it is damaged.
    """
    return _read_mapping(path, "an evaluation's results", "evaluate")


def read_benchmark(path: Path) -> dict[str, Any] | None:
    """The content of `benchmark.json`; None when there is no such file.

    Raises:
        FastDraftError: when it is damaged, or of another schema.
    """
    value = _read_mapping(path, "a benchmark's figures", "benchmark")
    if value is not None and value.get("schema") != BENCHMARK_SCHEMA:
        rule, remedy = (
            f"must be schema {BENCHMARK_SCHEMA}",
            "run `fastdraft benchmark` again with --redo benchmark",
        )
        raise FastDraftError(path, f"schema {value.get('schema')}", rule, remedy)
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file by step; when a step stands twice (a resumed run), the later line wins."""
    if not path.is_file():
        return []
    lines: dict[tuple[float, bool], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), (int, float)):
            lines[(line["step"], "loss" in line)] = line
    return [lines[key] for key in sorted(lines)]


def fingerprint_of(run: RunFolder) -> dict[str, Any]:
    """The state of every finished stage, for the report's own fingerprint."""
    done = [run.folder(stage) for stage in STAGES if run.folder(stage).is_complete()]
    return {
        artifact.name: artifact.digest() if (artifact.path / FINGERPRINT).is_file() else "unknown"
        for artifact in done
    }


def _read_mapping(path: Path, content: str, stage: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise FastDraftError(
            path,
            "not a mapping",
            f"must hold {content}",
            f"run `fastdraft {stage}` again with --redo {stage}",
        )
    return value


def _read_samples(path: Path) -> list[dict[str, Any]]:
    value = read_json(path) if path.is_file() else []
    items = value.get("samples", []) if isinstance(value, dict) else value
    return (
        [item for item in items if isinstance(item, dict) and isinstance(item.get("pieces"), list)]
        if isinstance(items, list)
        else []
    )


def _read_timings(path: Path) -> dict[str, float]:
    value = read_json(path) if path.is_file() else {}
    return (
        {str(name): float(seconds) for name, seconds in value.items() if isinstance(seconds, (int, float))}
        if isinstance(value, dict)
        else {}
    )
