"""Puts a report together from what a run left on disk.

Decides the order of the chapters; the verdict comes first, definitions last, and what is missing is listed instead of
shown empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastdraft.recipe.base import format_count
from fastdraft.reporting.acceptance_sections import (
    differences_section,
    ladder_section,
    positions_section,
    speedup_section,
)
from fastdraft.reporting.benchmark_results import Benchmark
from fastdraft.reporting.benchmark_sections import wall_clock_section
from fastdraft.reporting.benchmark_verdict import headline, measured_with
from fastdraft.reporting.check_sections import checks_section
from fastdraft.reporting.document import Report, Section
from fastdraft.reporting.length_sections import length_section
from fastdraft.reporting.record import RunRecord
from fastdraft.reporting.results import number
from fastdraft.reporting.run_sections import (
    data_section,
    definitions_section,
    provenance_section,
    samples_section,
    training_section,
)
from fastdraft.reporting.tiles import tiles

CHAPTERS: tuple[Callable[[RunRecord], Section | str | None], ...] = (
    wall_clock_section,
    speedup_section,
    ladder_section,
    differences_section,
    positions_section,
    length_section,
    samples_section,
    checks_section,
    training_section,
    data_section,
    provenance_section,
    definitions_section,
)
"""In reading order; each gives a section, or the line that says why there is none, or nothing where none is expected."""


def compose_report(record: RunRecord, title: str | None = None) -> Report:
    """The report about one run, ready to be rendered."""
    verdict = headline(record)
    found = [chapter(record) for chapter in CHAPTERS]
    omitted = [f"Stage {stage}: not run, or not finished." for stage in record.missing]
    return Report(
        title=title or f"Draft report: {record.name}",
        subtitle=_subtitle(record),
        verdict=verdict.sentence,
        verdict_detail=verdict.detail,
        tone=verdict.tone,
        tiles=tiles(record),
        sections=tuple(item for item in found if isinstance(item, Section)),
        omitted=(*omitted, *(item for item in found if isinstance(item, str))),
        footer=_footer(record),
        facts=_facts(record),
    )


def target_name(manifests: Mapping[str, Mapping[str, Any]], results: Mapping[str, Any] | None) -> str:
    """How the run calls its target; `the target` when that is not recorded."""
    for value in ((results or {}).get("target"), manifests.get("design", {}).get("target")):
        if isinstance(value, str) and value:
            return value
        if isinstance(value, Mapping):
            name = value.get("model") or value.get("name") or value.get("location")
            if name:
                return str(name)
    return "the target"


def shape_of(design: Mapping[str, Any]) -> str:
    """The draft's shape in a few words."""
    shape = design.get("architecture")
    if not isinstance(shape, Mapping):
        return ""
    names = (
        ("num_layers", "layers"),
        ("hidden_size", "hidden"),
        ("intermediate_size", "FFN"),
        ("num_heads", "heads"),
        ("vocab_size", "vocabulary"),
    )
    parts = [f"{words} {value:g}" for key, words in names if (value := number(shape, key)) is not None]
    return ", ".join(([str(shape["family"])] if shape.get("family") else []) + parts)


def _subtitle(record: RunRecord) -> str:
    return f"A draft model for speculative decoding with {target_name(record.manifests, record.results)}"


def _facts(record: RunRecord) -> tuple[tuple[str, str], ...]:
    design = record.manifests.get("design", {})
    parameters = number(design, "parameters")
    draft = ", ".join(
        part
        for part in (f"{format_count(parameters)} parameters" if parameters else "", shape_of(design))
        if part
    )
    clock = measured_with(Benchmark(record.benchmark)) if record.benchmark is not None else ""
    facts = [
        ("Target", target_name(record.manifests, record.results)),
        ("Draft", draft),
        ("Measured with", clock),
        ("Run", record.name),
    ]
    return tuple((name, value) for name, value in facts if value)


def _footer(record: RunRecord) -> str:
    stamps = [
        (str(p.get("time")), p)
        for m in record.manifests.values()
        if isinstance(p := m.get("provenance"), Mapping) and p.get("time")
    ]
    if not stamps:
        return "Made by FastDraft."
    time, last = max(stamps, key=lambda stamp: stamp[0])
    libraries = last.get("libraries")
    version = (
        f" {libraries['fastdraft']}" if isinstance(libraries, Mapping) and libraries.get("fastdraft") else ""
    )
    return f"Made by FastDraft{version} from results of {time}."
