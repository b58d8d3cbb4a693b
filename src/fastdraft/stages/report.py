"""The report stage: reads every manifest of the run and writes `report.html` and `report.md`, after a benchmark `model_card.md` too.

Decides nothing about the figures (reporting/ does); it decides when a report is out of date: whenever any finished
stage of the run, or its results, changed. Making it costs seconds, so it is made anew rather than resumed. The card
beside the exported draft was written before the clock ran and stays as its manifest describes it; this one knows more.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from fastdraft.provenance import describe_run
from fastdraft.recipe.evaluation import ReportConfig
from fastdraft.run_folder import file_sha256, write_atomic
from fastdraft.stages.context import StageContext

if TYPE_CHECKING:
    from fastdraft.reporting.record import RunRecord

NAME = "report"
CARD = "model_card.md"
WIDTH = 79


def fingerprint(config: ReportConfig, context: StageContext) -> dict[str, Any]:
    """The title, the state of every finished stage, and the results."""
    from fastdraft.reporting.record import BENCHMARK, fingerprint_of

    results, benchmark = (
        context.folder("evaluate").path / "results.json",
        context.folder("benchmark").path / BENCHMARK,
    )
    return {
        "stages": fingerprint_of(context.run),
        "results": file_sha256(results) if results.is_file() else None,
        **({"benchmark": file_sha256(benchmark)} if benchmark.is_file() else {}),
    }


def run(config: ReportConfig, context: StageContext) -> None:
    """Writes the files and prints the summary tables, the path and, last, the verdict.

    Raises:
        FastDraftError: when a manifest, the results or the benchmark are damaged.
        FastDraftError: when the files cannot be written.
    """
    from fastdraft.reporting.model_card import model_card
    from fastdraft.reporting.page import render_html, render_markdown
    from fastdraft.reporting.record import read_record
    from fastdraft.reporting.report import compose_report

    artifact = context.folder(NAME)
    context.console.stop.check(artifact.path)
    record = read_record(context.run)
    report = compose_report(record)
    write_atomic(artifact.path / "report.md", render_markdown(report))
    write_atomic(artifact.path / "report.html", render_html(report))
    files = ["report.html", "report.md"]
    if record.benchmark is not None:
        write_atomic(artifact.path / CARD, model_card(record.manifests, record.results, record.benchmark))
        files.append(CARD)
    artifact.complete(
        files=files,
        sections=[section.anchor for section in report.sections],
        verdict=report.verdict,
        provenance=describe_run(),
    )
    _print_tables(record, context)
    context.console.say(f"report: {artifact.path / 'report.html'}")
    if record.benchmark is not None:
        context.console.say(
            f"model card with these figures, to publish beside the draft: {artifact.path / CARD}"
        )
    _print_verdict(record, context)


def _print_tables(record: RunRecord, context: StageContext) -> None:
    from fastdraft.reporting.summary import measured_tables, summary_tables

    measured = measured_tables(record.benchmark or {})
    for title, columns, rows in (*summary_tables(record.results or {}, prediction=not measured), *measured):
        context.console.table(title, columns, rows)


def _print_verdict(record: RunRecord, context: StageContext) -> None:
    """What the verdict rests on, then the verdict itself as the last word, both in 80 columns."""
    from fastdraft.reporting.benchmark_verdict import headline

    verdict = headline(record)
    if verdict.tone != "none":
        context.console.say(_wrapped(verdict.detail))
    context.console.say(_wrapped(verdict.sentence))


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
