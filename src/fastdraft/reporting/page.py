"""Reports and model cards: `render("report.html.j2", read_run(run))`; also report.md.j2, model_card.md.j2.

What they say stands in templates/: chapters.j2 holds the chapters of both reports, rendered by the macros of
either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml

from fastdraft.benchmark.rows import BenchmarkResults
from fastdraft.console import format_seconds
from fastdraft.evaluation.results import SPEEDUPS, AnswerSample, EvaluationResults
from fastdraft.reporting import charts, definitions, proposers, tables
from fastdraft.reporting.verdict import give_verdict, measured_with, runtime_name
from fastdraft.run_folder import RunFolder, read_json

STAGES = (
    *("design", "prepare", "pretrain", "continue_pretrain", "synthesize", "align"),
    *("evaluate", "export", "benchmark"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


@dataclass(frozen=True)
class RunRecord:
    """What the finished stages of one run wrote."""

    name: str
    manifests: dict[str, dict[str, Any]]  # by stage, finished stages only
    results: EvaluationResults | None = None
    benchmark: BenchmarkResults | None = None
    # Lines of `metrics.jsonl` by training stage, ordered by step.
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[AnswerSample] = field(default_factory=list)
    recipe: str = ""  # as it was resolved
    earlier: EvaluationResults | None = None  # of the run that made the draft with which this one began

    @property
    def trained(self) -> list[dict[str, Any]]:
        """Manifests of the training stages."""
        return [self.manifests[stage] for stage in tables.TRAINING if stage in self.manifests]


def read_run(run: RunFolder) -> RunRecord:
    """Everything that a report shows of a run."""
    manifests = {stage: run.folder(stage).manifest() for stage in STAGES if run.folder(stage).is_complete()}
    timings = read_json(run.root / "timings.json") if (run.root / "timings.json").is_file() else {}
    for stage, manifest in manifests.items():
        # The stage's own count spans restarts; the pipeline's knows of loading.
        known = [found for found in (manifest.get("seconds"), timings.get(stage)) if found is not None]
        manifest["seconds"] = max(known, default=None)
    # A design that read rows stands behind the stages that wrote them.
    first = manifests.get("design", {}).get("reads", ())
    manifests = dict(sorted(manifests.items(), key=lambda item: item[0] not in first))

    def kept(stage: str, name: str, read: Callable[[Any], Any]) -> Any:
        return read(read_json(run.folder(stage).path / name)) if stage in manifests else None

    recipe, trained = run.root / "recipe.yaml", [stage for stage in tables.TRAINING if stage in manifests]
    return RunRecord(
        run.root.name,
        manifests,
        kept("evaluate", "results.json", EvaluationResults.from_json),
        kept("benchmark", "benchmark.json", BenchmarkResults.from_json),
        {stage: read_metrics(run.folder(stage).path / "metrics.jsonl") for stage in trained},
        kept("evaluate", "samples.json", lambda found: list(map(AnswerSample.from_json, found))) or [],
        recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        _earlier(manifests.get("design", {})),
    )


def _earlier(design: dict[str, Any]) -> EvaluationResults | None:
    """Where the draft lies in the folder of a run that was evaluated: what it reached on its own target."""
    source = Path(design.get("source") or "") if design.get("initialization") == "from" else Path()
    files = [folder / "evaluate/results.json" for folder in source.parents[:2]]
    found = next((file for file in files if file.is_file()), None)
    return EvaluationResults.from_json(read_json(found)) if found else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file by step; of a step that stands twice, as after a resume, the later line."""
    lines: dict[tuple[int, bool], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        # A killed process may leave half a line.
        if text.endswith("}"):
            line = json.loads(text)
            lines[line["step"], "loss" in line] = line
    return [lines[key] for key in sorted(lines)]


def render(template: str, run: RunRecord, **values: Any) -> str:
    """One of the templates about a run; `values`: a card's K and checks of the export."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastdraft.reporting"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rooms = {"tables": tables, "charts": charts, "proposers": proposers, "SPEEDUPS": SPEEDUPS}
    words = {"runtime_name": runtime_name, "measured_with": measured_with, "shape_words": shape_words}
    environment.globals |= {**vars(definitions), **rooms, **words, "is_hub_id": _HUB_ID.fullmatch}
    environment.filters |= {"md": escape_markdown, "md_table": markdown_table, "fence": fence}
    asked = yaml.safe_load(run.recipe) or {}  # a benchmark is missed only where the recipe asks for one
    missing = [s for s in STAGES if s not in run.manifests and (s != "benchmark" or asked.get(s) is not None)]
    text = environment.get_template(template).render(
        run=run,
        manifests=run.manifests,
        results=run.results,
        benchmark=run.benchmark,
        verdict=give_verdict(run.results, run.benchmark),
        tiles=_tiles(run),
        facts=facts(run),
        target=_target_name(run),
        missing=missing,
        made=max((m["provenance"] for m in run.manifests.values()), key=lambda p: p["time"], default=None),
        **values,
    )
    return text if environment.autoescape else re.sub(r"\n{3,}", "\n\n", text).lstrip()


def _tiles(run: RunRecord) -> list[tuple[str, tables.Cell]]:
    """The speed-up of every task at its best K: measured where it was, else memory-bound."""
    found: dict[str, tuple[str, tables.Cell]] = {}
    if run.results and run.results.speedups:
        for task, temperature, _, cell, *_ in tables.best(run.results).rows:
            if temperature.text == f"{run.results.temperatures[0]:g}":
                found[task.text] = "memory-bound", cell
    if run.benchmark:
        for task, k, cell in tables.measured(run.benchmark).only("Task", "Best K", "Measured").rows:
            detail = f"K\u00a0=\u00a0{k.text}, {cell.detail}"
            found[task.text] = "measured", cell._replace(detail=detail)
    return [(f"{task.capitalize()}, draft, {kind}", cell) for task, (kind, cell) in found.items()]


def facts(run: RunRecord) -> list[tuple[str, str]]:
    """Name and value pairs under the title."""
    found, count = [("Target", _target_name(run))], definitions.count
    if design := run.manifests.get("design"):
        shape, source = shape_words(design["architecture"]), design.get("source")
        found.append(("Draft", f"{count(design['parameters'])} parameters, {shape}"))
        found += [("Begun from", f"{source}, pre-trained before this run")] if source else []
        found.append(("Cost ratio", f"{design['cost_ratio_parameters']:.3g} by parameters"))
    if run.trained:
        stages = ", ".join(f"{definitions.label(m['stage'])} {count(m['tokens'])}" for m in run.trained)
        found.append(("Trained on", f"{count(sum(each['tokens'] for each in run.trained))} tokens: {stages}"))
    seconds = sum(manifest["seconds"] or 0.0 for manifest in run.manifests.values())
    return [*found, ("Time", f"{format_seconds(seconds)} in {len(run.manifests)} stages")]


def shape_words(shape: dict[str, Any]) -> str:
    """`llama, layers 2, hidden 128, FFN 384, heads 2, vocabulary 8192`."""
    keys = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "vocab_size")
    names = zip(("layers", "hidden", "FFN", "heads", "vocabulary"), keys, strict=True)
    return ", ".join([shape["family"], *(f"{words} {shape[key]}" for words, key in names)])


def _target_name(run: RunRecord) -> str:
    if "design" in run.manifests:
        return str(run.manifests["design"]["target"]["model"])
    return run.results.target if run.results else "the target"


def escape_markdown(text: object) -> str:
    """Text in which no character is markup."""
    return _SPECIAL.sub(r"\\\1", str(text))


def markdown_table(table: tables.Table) -> str:
    """A table in pipe syntax, small print in brackets, marked figures bold."""

    def shown(cell: tables.Cell) -> str:
        text = " ".join(escape_markdown(cell.text).split())
        text = f"**{text}**" if cell.mark in ("good", "bad") else text
        return f"{text} ({escape_markdown(cell.detail)})" if cell.detail else text

    head = [escape_markdown(column) for column in table.columns]
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [head, rule, *([shown(cell) for cell in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fence(text: str) -> str:
    """A block of code, whatever it holds."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{ticks}text\n{text.rstrip()}\n{ticks}"
