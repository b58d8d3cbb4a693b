"""The report stage: reads every manifest of the run and writes `report.html` and `report.md`.

Decides nothing about the figures (reporting/ does); it decides when a report is out of date: whenever any finished
stage of the run, or its results, changed. Making it costs seconds, so it is made anew rather than resumed.
"""

from __future__ import annotations

from typing import Any

from fastdraft.artifacts import file_sha256, write_atomic
from fastdraft.config import Config
from fastdraft.interfaces import StageContext
from fastdraft.provenance import describe_run

NAME = "report"


class ReportConfig(Config):
    """`report:` — how the report presents itself."""

    title: str | None = None
    """Headline of the page; without it, the run's name."""


def fingerprint(config: ReportConfig, context: StageContext) -> dict[str, Any]:
    """The title, the state of every finished stage, and the results."""
    from fastdraft.reporting.record import fingerprint_of

    results = context.artifact("evaluate").path / "results.json"
    return {
        "title": config.title,
        "stages": fingerprint_of(context.run),
        "results": file_sha256(results) if results.is_file() else None,
    }


def run(config: ReportConfig, context: StageContext) -> None:
    """Writes both files and prints the summary table and the path.

    Raises:
        ArtifactError: when a manifest or the results are damaged.
        DiskError: when the files cannot be written.
    """
    from fastdraft.reporting.page import render_html, render_markdown
    from fastdraft.reporting.record import read_record
    from fastdraft.reporting.report import compose_report
    from fastdraft.reporting.summary import summary_tables
    from fastdraft.reporting.verdict import give_verdict

    artifact = context.artifact(NAME)
    context.console.stop.check(artifact.path)
    record = read_record(context.run)
    report = compose_report(record, config.title)
    write_atomic(artifact.path / "report.md", render_markdown(report))
    write_atomic(artifact.path / "report.html", render_html(report))
    artifact.complete(
        files=["report.html", "report.md"],
        sections=[section.anchor for section in report.sections],
        verdict=report.verdict,
        provenance=describe_run(),
    )
    for title, columns, rows in summary_tables(record.results or {}):
        context.console.table(title, columns, rows)
    context.console.say(report.verdict)
    if record.results is not None:
        context.console.say(give_verdict(record.results).detail)
    context.console.say(f"report: {artifact.path / 'report.html'}")
