"""The chapters about the run itself: training, data, samples, stages, provenance, definitions.

Decides what each chapter shows of the manifests; a chapter whose material is missing returns the line that says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from fastdraft.console import format_seconds
from fastdraft.recipe.base import format_count
from fastdraft.reporting.charts import loss_chart, validation_chart
from fastdraft.reporting.definitions import BENCHMARK_DEFINITIONS, DEFINITIONS
from fastdraft.reporting.document import Block, Charts, Details, Row, Sample, Section, Table, Text, row
from fastdraft.reporting.record import STAGES, TRAINING, RunRecord
from fastdraft.reporting.results import k_name, number, temperature_name
from fastdraft.reporting.summary import show

TITLES = {
    "pretrain": "Pre-training (PT)",
    "continue_pretrain": "Continued pre-training (CP)",
    "align": "Alignment (FT)",
}


def training_section(record: RunRecord) -> Section | str:
    """Loss curves and the final losses of every training stage."""
    stages = [stage for stage in TRAINING if stage in record.manifests]
    if not stages:
        return "Training curves: no training stage has finished."
    drawn = [loss_chart(stage, record.metrics.get(stage, []), TITLES[stage]) for stage in stages]
    drawn += [
        validation_chart(
            stage,
            record.metrics.get(stage, []),
            number(record.manifests[stage], "best_step"),
            "FT: tokens per target pass",
        )
        for stage in stages
    ]
    charts = tuple(chart for chart in drawn if chart is not None)
    caption = (
        "Cross-entropy in nats per token, logarithmic axis; grey is the training loss and its running mean, colours are "
        "held-out text per corpus."
    )
    blocks: list[Block] = [Charts(charts, caption)] if charts else [Text("No metrics were logged.", "muted")]
    blocks.append(
        Table(
            ("Stage", "Tokens", "Steps", "Train loss", "Validation loss", "Tokens/s", "Time"),
            tuple(_training_row(stage, record.manifests[stage]) for stage in stages),
        )
    )
    return Section("Training", "training", tuple(blocks))


def data_section(record: RunRecord) -> Section | str:
    """What was trained on: the prepared corpora and the text that the target wrote."""
    prepare, synthetic = record.manifests.get("prepare", {}), record.manifests.get("synthesize", {})
    named = {
        "prepared corpora": corpora_table(prepare),
        "sources": sources_table(prepare),
        "synthetic data": synthetic_table(synthetic),
    }
    tables = [table for table in named.values() if table is not None]
    if not tables:
        return "Data: neither prepare nor synthesize has finished."
    for key, title in (("by_source", "By source"), ("by_temperature", "By temperature")):
        if isinstance(synthetic.get(key), Mapping) and synthetic[key]:
            tables.append(_breakdown(synthetic[key], title))
    missing = [name for name, table in named.items() if table is None]
    lines = [Text(f"Not recorded in this run: {', '.join(missing)}.", "muted")] if missing else []
    return Section("Data", "data", (*tables, *lines))


def corpora_table(manifest: Mapping[str, Any] | None) -> Table | None:
    """Documents, tokens and rows of every corpus."""
    corpora = (manifest or {}).get("corpora")
    if not isinstance(corpora, Mapping) or not corpora:
        return None
    rows = []
    for name, corpus in corpora.items():
        train, validation = (_mapping(_mapping(corpus).get(split)) for split in ("train", "validation"))
        cells = [
            _count(number(train, "documents")),
            _count(number(train, "tokens")),
            _count(number(train, "rows")),
            _count(number(validation, "tokens")),
        ]
        rows.append(row(str(name), *cells, _count(number(_mapping(corpus), "duplicates"))))
    lengths = (manifest or {}).get("row_lengths") or [number(manifest, "row_length")]
    note = (
        f"Packed into rows of {' and '.join(f'{length:g}' for length in lengths)} tokens."
        if None not in lengths
        else ""
    )
    return Table(
        ("Corpus", "Documents", "Tokens", "Rows", "Validation tokens", "Duplicates removed"),
        tuple(rows),
        "Prepared corpora",
        note,
    )


def sources_table(manifest: Mapping[str, Any] | None) -> Table | None:
    """Where the corpora come from, with the licence that the recipe names."""
    corpora = (manifest or {}).get("corpora")
    rows = []
    for name, corpus in corpora.items() if isinstance(corpora, Mapping) else ():
        for source in (corpus.get("sources") or []) if isinstance(corpus, Mapping) else []:
            if isinstance(source, Mapping):
                rows.append(
                    row(
                        str(name),
                        str(source.get("from") or source.get("kind", "-")),
                        str(source.get("license") or "not recorded"),
                        _count(number(source, "tokens")),
                    )
                )
    return Table(("Corpus", "Source", "Licence", "Tokens taken"), tuple(rows), "Sources") if rows else None


def synthetic_table(manifest: Mapping[str, Any] | None) -> Table | None:
    """Asked = written + filtered by reason + failed."""
    if not manifest or number(manifest, "asked") is None:
        return None
    asked = number(manifest, "asked") or 0.0
    filtered = manifest.get("filtered") if isinstance(manifest.get("filtered"), Mapping) else {}
    entries = [
        ("written", number(manifest, "written")),
        *((f"filtered: {name}", number(filtered, name)) for name in filtered or {}),
        ("failed", number(manifest, "failed")),
    ]
    rows = [
        row(name, show(count, "{:,.0f}"), f"{count / asked:.1%}" if asked and count is not None else "-")
        for name, count in entries
    ]
    total = sum(count or 0.0 for _, count in entries)
    tokens, engine = number(manifest, "tokens"), manifest.get("engine")
    note = ". ".join(
        [
            *([f"{format_count(tokens)} response tokens"] if tokens is not None else []),
            *([f"Engine: {engine}"] if engine else []),
        ]
    )
    if total != asked:
        note += f". These parts add up to {total:,.0f}, not to what was asked"
    rows.insert(0, row("asked", f"{asked:,.0f}", "100.0%", kind="strong"))
    return Table(
        ("Answers of the target", "Rows", "Share"), tuple(rows), "Synthetic data", f"{note}." if note else ""
    )


def samples_section(record: RunRecord) -> Section | str:
    """Answers with the tokens that the draft proposed and the target accepted."""
    if not record.samples:
        return "Samples: the evaluation wrote none."
    blocks = []
    for item in record.samples:
        pieces = tuple(
            (str(piece.get("text", "")), bool(piece.get("accepted")))
            for piece in item["pieces"]
            if isinstance(piece, Mapping)
        )
        share = sum(len(text) for text, accepted in pieces if accepted) / max(
            1, sum(len(text) for text, _ in pieces)
        )
        k = number(item, "num_speculative_tokens")
        facts = [
            temperature_name(number(item, "temperature")),
            k_name(k) if k is not None else "",
            f"{share:.0%} of the text from the draft",
        ]
        blocks.append(
            Sample(
                str(item.get("task", "")),
                ", ".join(fact for fact in facts if fact),
                str(item.get("prompt", "")),
                pieces,
            )
        )
    return Section(
        "Samples",
        "samples",
        tuple(blocks),
        "Marked tokens were proposed by the draft and accepted; the others are the target's own. Greedy text is the "
        "same without a draft, sampled text has the same distribution.",
    )


def provenance_section(record: RunRecord) -> Section | str:
    """Stages with their times, versions, machine, and the resolved recipe."""
    if not record.manifests:
        return "Provenance: no stage has finished."
    order = [stage for stage in STAGES if stage in record.manifests]
    timed = any(record.seconds(stage) is not None for stage in order)
    rows = []
    for stage in order:
        manifest, seconds = record.manifests[stage], record.seconds(stage)
        origin = _provenance(manifest)
        rows.append(
            row(
                stage,
                *([format_seconds(seconds) if seconds is not None else "-"] if timed else []),
                str(origin.get("time", "-")).replace("T", " ").removesuffix("+00:00"),
                str(manifest.get("fingerprint", "-")),
            )
        )
    blocks: list[Block] = [
        Table(("Stage", *(["Time"] if timed else []), "Finished (UTC)", "Fingerprint"), tuple(rows))
    ]
    machine = _machine_table(record)
    if machine.rows:
        blocks.append(machine)
    if record.recipe is not None:
        blocks.append(Details("Resolved recipe", text=record.recipe))
    blocks += [
        Details(
            f"Manifest of {stage}",
            text=json.dumps(_short(record.manifests[stage]), indent=1, ensure_ascii=False),
        )
        for stage in order
    ]
    return Section("Provenance", "provenance", tuple(blocks))


def definitions_section(record: RunRecord) -> Section:
    """What every figure means."""
    shown = DEFINITIONS + (BENCHMARK_DEFINITIONS if record.benchmark is not None else ())
    return Section(
        "Definitions",
        "definitions",
        (Table(("Figure", "Definition"), tuple(row(name, text) for name, text in shown)),),
    )


def _training_row(stage: str, manifest: Mapping[str, Any]) -> Row:
    losses = manifest.get("validation_loss")
    named = losses.items() if isinstance(losses, Mapping) else [("", losses)] if losses is not None else []
    validation = ", ".join(
        f"{name} {value:.3f}".strip() for name, value in named if isinstance(value, (int, float))
    )
    efficiency, seconds = number(manifest, "validation_block_efficiency"), number(manifest, "seconds")
    if efficiency is not None:
        start = number(manifest, "start_block_efficiency")
        gain = (f"{start:.2f} → " if start is not None else "") + f"{efficiency:.2f} tokens per target pass"
        validation = ", ".join(part for part in (validation, gain) if part)
    cells = [
        _count(number(manifest, "tokens")),
        show(number(manifest, "steps"), "{:,.0f}"),
        show(number(manifest, "train_loss")),
        validation or "-",
    ]
    return row(
        TITLES[stage],
        *cells,
        _count(number(manifest, "tokens_per_second")),
        format_seconds(seconds) if seconds is not None else "-",
    )


def _breakdown(counts: Mapping[str, Any], title: str) -> Table:
    nested = [item for item in counts.values() if isinstance(item, Mapping)]
    if not nested:
        return Table(
            ("", "Rows"),
            tuple(row(str(name), show(number(counts, name), "{:,.0f}")) for name in counts),
            title,
        )
    keys = [
        key
        for key in dict.fromkeys(key for item in nested for key in item)
        if any(number(item, key) is not None for item in nested)
    ]
    rows = tuple(
        row(str(name), *(show(number(item, key), "{:,.0f}") for key in keys))
        for name, item in counts.items()
        if isinstance(item, Mapping)
    )
    return Table(("", *(key.replace("_", " ") for key in keys)), rows, title)


def _machine_table(record: RunRecord) -> Table:
    """Where and with what the last stage ran, and the settings on which the numbers depend."""
    last = next(
        (origin for stage in reversed(STAGES) if (origin := _provenance(record.manifests.get(stage, {})))), {}
    )
    facts = {name: last.get(name) for name in ("command", "python", "system", "cpus")} | _run_settings(
        record.recipe
    )
    libraries = ", ".join(f"{name} {version}" for name, version in _mapping(last.get("libraries")).items())
    rows = [row(name, str(value)) for name, value in facts.items() if value is not None]
    return Table(
        ("", ""), (*rows, *([row("libraries", libraries)] if libraries else [])), "Machine, versions and seed"
    )


def _run_settings(recipe: str | None) -> dict[str, Any]:
    """Seed, device and threads from the resolved recipe."""
    try:
        section = _mapping(_mapping(yaml.safe_load(recipe or "")).get("run"))
    except yaml.YAMLError:
        return {}
    threads = section.get("threads")
    return {
        "seed": section.get("seed"),
        "device": section.get("device"),
        "threads": "chosen by torch" if threads == 0 else threads,
    }


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _provenance(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    value = manifest.get("provenance")
    return value if isinstance(value, Mapping) else {}


def _short(value: Any, limit: int = 12) -> Any:
    """Long lists (shards, units) cut, so that a manifest can be read."""
    if isinstance(value, Mapping):
        return {key: _short(item, limit) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item, limit) for item in value[:limit]] + (
            [f"... {len(value) - limit} more"] if len(value) > limit else []
        )
    return value


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value < 10_000 else format_count(value)
