"""The report stage: `report.html` and `report.md` about a run, after a benchmark `model_card.md` too; the
verdict in the terminal.
"""

from __future__ import annotations

import textwrap
from typing import Any

from fastdraft.provenance import describe_run
from fastdraft.recipe.evaluation import ReportConfig
from fastdraft.reporting import proposers, tables
from fastdraft.reporting.page import STAGES, facts, read_run, render
from fastdraft.reporting.verdict import give_verdict
from fastdraft.run_folder import file_sha256, write_atomic
from fastdraft.stages.context import StageContext


def fingerprint(config: ReportConfig, context: StageContext) -> dict[str, Any]:
    """The title, the state of every finished stage, and the results."""
    finished = [context.folder(stage) for stage in STAGES if context.folder(stage).is_complete()]
    files = [
        context.folder("evaluate").path / "results.json",
        context.folder("benchmark").path / "benchmark.json",
    ]
    return {
        "stages": {folder.name: folder.digest() for folder in finished},
        "results": {path.name: file_sha256(path) for path in files if path.is_file()},
    }


def run(config: ReportConfig, context: StageContext) -> None:
    """Writes the files; prints what was done and what it brings, then the verdict as the last word."""
    folder, console, record = context.folder("report"), context.console, read_run(context.run)
    files = {name: render(f"{name}.j2", record) for name in ("report.md", "report.html")}
    if record.benchmark:
        # The card beside the export was written before the clock ran and stays as its manifest describes it.
        export = record.manifests["export"]
        files["model_card.md"] = render(
            "model_card.md.j2", record, k=export["num_speculative_tokens"], checks=export["checks"]
        )
    for name, text in files.items():
        write_atomic(folder.path / name, text)
    verdict = give_verdict(record.results, record.benchmark)
    folder.complete(files=list(files), verdict=verdict.sentence, provenance=describe_run())
    for name, value in facts(record):
        console.say(_lines(f"{name:<11} {value}", indent=12))
    if record.benchmark:
        title = "Times as fast as the target with nothing (tokens per target pass)"
        console.table(title, *proposers.clocked(record.benchmark, brief=True).plain(details=True))
    elif record.results and record.results.speedups:
        shown = tables.best(record.results).only(
            "Task", "T", "Tokens per target pass", "by parameters", "by bytes read"
        )
        console.table("Memory-bound speed-up at the best K", *shown.plain())
    for name in files:
        console.say(f"{folder.path / name}")
    for text in (verdict.detail, verdict.sentence):
        console.say(_lines(text))


def _lines(text: str, indent: int = 0) -> str:
    """Broken between words, for 80 columns."""
    after = " " * indent
    return textwrap.fill(text, 79, subsequent_indent=after, break_long_words=False, break_on_hyphens=False)
