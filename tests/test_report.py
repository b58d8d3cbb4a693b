"""Reports, summaries and model cards made from a run's folder, with made-up figures."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastdraft.console import Console, format_table
from fastdraft.errors import FastDraftError
from fastdraft.recipe.run import RunConfig
from fastdraft.reporting.charts import loss_chart, smooth
from fastdraft.reporting.check_sections import agreement_table
from fastdraft.reporting.document import Sample, Table, row
from fastdraft.reporting.drawing import lifted, spread
from fastdraft.reporting.model_card import model_card, render_model_card
from fastdraft.reporting.page import markdown_table, render_html, render_markdown
from fastdraft.reporting.record import RunRecord, read_metrics, read_record
from fastdraft.reporting.report import compose_report
from fastdraft.reporting.results import Results, interval
from fastdraft.reporting.summary import summary_tables
from fastdraft.reporting.verdict import give_verdict
from fastdraft.run_folder import RunFolder
from fastdraft.stages import report
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from report_fixture import HOSTILE, results, write_run

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects tags, text and unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.unbalanced = "", list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def context_of(run: RunFolder) -> StageContext:
    settings = RunConfig(name=run.root.name, folder=str(run.root.parent))
    return StageContext(run, settings, Target.at("target"), {"report": report.ReportConfig()}, Console())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(finished: RunFolder) -> str:
    return render_html(compose_report(read_record(finished)))


def test_the_stage_writes_both_files_and_prints_the_summary_and_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "demo")
    context, config = context_of(run), report.ReportConfig(title="My draft")
    run.folder("report").begin(report.fingerprint(config, context))
    report.run(config, context)
    folder = run.folder("report").path
    told = capsys.readouterr().err
    assert run.folder("report").is_complete()
    assert "<title>My draft</title>" in (folder / "report.html").read_text(encoding="utf-8")
    assert (folder / "report.md").read_text(encoding="utf-8").startswith("# My draft\n")
    assert "instructions" in told
    assert str(folder / "report.html") in told


def test_the_fingerprint_follows_the_results_and_the_finished_stages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", stages=("design", "evaluate"))
    context, config = context_of(run), report.ReportConfig()
    before = report.fingerprint(config, context)
    write_run(tmp_path / "demo", stages=("align",))
    after = report.fingerprint(config, context)
    assert json.loads(json.dumps(before)) == before
    assert before["results"] == after["results"]
    assert before["stages"] != after["stages"]
    (run.folder("evaluate").path / "results.json").write_text("{}")
    assert report.fingerprint(config, context)["results"] != after["results"]


def test_the_page_needs_no_network_and_no_script(page: str) -> None:
    assert not re.search(r"<script|@import|<link|<iframe|<img|javascript:", page)
    addresses = set(re.findall(r"https?://[^\"' )<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_the_page_is_well_formed_and_every_id_is_unique_and_found(page: str) -> None:
    parsed = Page(page)
    ids = [value["id"] for _, value in parsed.tags if value.get("id")]
    targets = {
        value[1:]
        for _, tags in parsed.tags
        for name, value in tags.items()
        if name == "href" and value and value.startswith("#")
    }
    targets |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert not parsed.unbalanced
    assert not parsed.open
    assert len(ids) == len(set(ids))
    assert targets <= set(ids)


def test_every_chapter_is_there_for_a_finished_run(page: str) -> None:
    anchors = re.findall(r'<section id="([^"]+)"', page)
    assert anchors == [
        "speedup",
        "ladder",
        "differences",
        "positions",
        "samples",
        "checks",
        "training",
        "data",
        "provenance",
        "definitions",
    ]
    assert page.count('<svg class="chart"') == 4 + 4 + 4 + 4 + 4


def test_charts_take_their_colours_and_fonts_from_the_page(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert "DejaVu" not in charts
    assert not re.search(r"#[0-9a-f]{6}\b", charts)
    assert {"var(--ladder-3)", "var(--hue-1)", "var(--ink)"} <= set(re.findall(r"var\([^)]+\)", charts))


def test_provenance_holds_versions_seed_and_the_resolved_recipe(page: str) -> None:
    part = page[page.index('<section id="provenance"') :]
    for words in ("torch 2.9.0", ">seed<", "2026-03-02 10:11:12", "Resolved recipe", "name: demo"):
        assert words in part


def test_the_same_run_gives_the_same_bytes(finished: RunFolder, page: str) -> None:
    assert render_html(compose_report(read_record(finished))) == page


def test_markup_in_names_and_texts_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    record = read_record(write_run(tmp_path / "demo", hostile=True))
    text = render_html(compose_report(record, title=HOSTILE))
    parsed = Page(text)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert not parsed.unbalanced
    assert HOSTILE in parsed.text
    assert "<script>" not in re.sub(
        r"```.*?```", "", render_markdown(compose_report(record, title=HOSTILE)), flags=re.DOTALL
    ).replace("\\<script\\>", "")


@pytest.mark.parametrize(
    "stages",
    [
        ("design",),
        ("design", "prepare"),
        ("design", "prepare", "pretrain"),
        ("synthesize",),
        ("evaluate",),
        ("align",),
    ],
)
def test_a_run_without_some_stages_still_gets_a_report_that_says_so(
    tmp_path: Path, stages: tuple[str, ...]
) -> None:
    record = read_record(write_run(tmp_path / "demo", stages=stages))
    text = render_html(compose_report(record))
    assert not Page(text).unbalanced
    assert "Not in this report" in text
    assert "Stage export: not run, or not finished" in text
    assert "Not in this report" in render_markdown(compose_report(record))


def test_a_run_without_anything_still_gets_a_report(tmp_path: Path) -> None:
    composed = compose_report(read_record(RunFolder(tmp_path / "empty")))
    assert composed.tone == "none"
    assert "not been evaluated" in render_html(composed)


def test_a_damaged_results_file_is_one_clear_error(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    (run.folder("evaluate").path / "results.json").write_text('{"rows": [')
    with pytest.raises(FastDraftError, match=r"results\.json"):
        read_record(run)


def test_damaged_metrics_lines_are_skipped_and_a_resumed_step_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "validation_loss": {"a": 1}}\n[1]\n{"step": 2, "loss": 1.5}\n{"st'
    )
    assert [line.get("loss") for line in read_metrics(path)] == [3, None, 1.5]


def test_the_verdict_names_every_task_with_its_best_k() -> None:
    verdict = give_verdict(results())
    assert verdict.tone == "good"
    for task in ("code", "summarization", "text", "instructions"):
        assert task in verdict.sentence
    best = Results(results()).best("align", "code", 0.6)
    assert best is not None
    assert (
        f"{best['mbsu_parameters']:.2f}× on\u00a0code ({best['block_efficiency']:.2f} tokens per target pass"
        in verdict.sentence
    )


def test_the_verdict_advises_against_a_draft_that_does_not_pay() -> None:
    raw = results()
    raw["rows"] = [item | {"mbsu_parameters": 0.7} for item in raw["rows"]]
    assert give_verdict(raw).tone == "bad"
    assert give_verdict(raw).sentence.startswith("Do not use this draft at this cost ratio (0.187)")
    raw["rows"] = [item | {"mbsu_parameters": 1.4 if item["task"] == "code" else 0.9} for item in raw["rows"]]
    mixed = give_verdict(raw)
    assert mixed.tone == "mixed"
    assert "do not use a draft there at this cost ratio" in mixed.sentence


def test_the_verdict_says_when_the_measured_times_predict_no_gain() -> None:
    raw = results()
    raw["rows"] = [item | {"predicted_speedup": 0.8} for item in raw["rows"]]
    assert "under 1 on every task: do not use a draft on that machine" in give_verdict(raw).detail


def test_best_k_is_the_one_with_the_highest_speed_up_and_the_smallest_when_equal() -> None:
    rows = [
        {
            "checkpoint": "align",
            "task": "t",
            "temperature": 0.6,
            "num_speculative_tokens": k,
            "mbsu_parameters": value,
        }
        for k, value in ((1, 1.1), (2, 1.3), (3, 1.3))
    ]
    best = Results({"rows": rows}).best("align", "t", 0.6)
    assert best is not None
    assert best["num_speculative_tokens"] == 2


def test_a_speed_up_has_the_interval_of_block_efficiency_scaled() -> None:
    item = {
        "block_efficiency": 2.0,
        "block_efficiency_low": 1.9,
        "block_efficiency_high": 2.2,
        "mbsu_bytes": 1.0,
    }
    assert interval(item, "mbsu_bytes") == pytest.approx((0.95, 1.1))
    assert interval(item, "overlap") is None


def test_replay_stands_for_a_setting_that_was_counted_both_ways() -> None:
    chosen = Results(results()).row("align", "code", 0.6, 3)
    assert chosen is not None
    assert chosen["method"] == "replay"


def test_null_figures_are_shown_as_dashes() -> None:
    raw = results()
    raw["rows"] = [
        item | dict.fromkeys(("mbsu_latency", "predicted_speedup", "overlap")) for item in raw["rows"]
    ]
    raw |= {"cost_ratio_latency": None, "latency": None, "contamination": None}
    text = render_html(compose_report(RunRecord("demo", {}, raw)))
    assert "None" not in Page(text).text
    assert "Contamination: not recorded" in text


def test_checkpoints_that_nobody_trained_are_called_untrained() -> None:
    raw = results()
    raw["rows"] = [item | {"checkpoint": "design"} for item in raw["rows"] if item["checkpoint"] == "align"]
    text = Page(render_html(compose_report(RunRecord("demo", {}, raw)))).text
    assert "untrained" in text


def test_labels_at_the_foot_of_a_chart_stay_above_its_axis() -> None:
    assert lifted([-20.0, -8.0, 5.0, 90.0], 2.0, 12.0) == [2.0, 14.0, 26.0, 90.0]
    assert lifted([], 2.0, 12.0) == []


def test_the_summary_fits_80_columns_and_holds_every_task() -> None:
    ((title, columns, rows),) = summary_tables(results())
    assert "(FT) brings at its best K" in title
    assert max(map(len, format_table(title, columns, rows).splitlines())) <= 80
    tasks = ("code", "summarization", "text", "instructions")
    assert [cells[:2] for cells in rows] == [[task, t] for task in tasks for t in ("0", "0.6")]
    assert summary_tables({"rows": []}) == []


def test_a_task_with_a_very_long_name_still_fits_80_columns() -> None:
    raw = results()
    raw["rows"] = [item | {"task": item["task"] * 9} for item in raw["rows"]]
    assert max(len(line) for table in summary_tables(raw) for line in format_table(*table).splitlines()) <= 80


def test_markdown_has_the_tables_of_the_page(finished: RunFolder) -> None:
    composed = compose_report(read_record(finished))
    text = render_markdown(composed)
    for section in composed.sections:
        assert f"## {section.title}" in text
        for table in (block for block in section.blocks if isinstance(block, Table)):
            assert markdown_table(table) in text
        for sample in (block for block in section.blocks if isinstance(block, Sample)):
            assert f"[{sample.pieces[-1][0]}]" in text
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]
    assert min(widths) >= 3


def test_a_pipe_in_a_cell_does_not_break_a_markdown_table() -> None:
    text = markdown_table(Table(("a|b", "c"), (row("x|y", "1"),)))
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in text.splitlines())


def test_labels_are_pushed_apart_but_keep_their_order_and_centre() -> None:
    assert spread([0, 100], 12) == [0, 100]
    assert spread([50, 51], 12) == [44.5, 56.5]
    placed = spread([1, 2, 3, 40, 41], 10)
    assert placed == sorted(placed)
    assert all(b - a >= 10 - 1e-9 for a, b in itertools.pairwise(placed))


def test_smoothing_keeps_a_constant_and_the_number_of_points() -> None:
    points = [(float(i), 2.0) for i in range(100)]
    assert smooth(points) == points
    assert [y for _, y in smooth([(0, 0.0), (1, 2.0), (2, 4.0)], share=0.67)] == [0.0, 1.0, 3.0]


def test_the_synthetic_table_adds_up_to_what_was_asked(finished: RunFolder) -> None:
    text = render_markdown(compose_report(read_record(finished)))
    assert "| **asked** | **2,400** | **100.0%** |" in text
    assert "| filtered: looping | 88 | 3.7% |" in text
    assert "not to what was asked" not in text


def test_the_time_of_a_stage_is_the_longer_of_its_own_and_the_pipelines() -> None:
    record = RunRecord(
        "demo", {"align": {"seconds": 10.0}, "export": {}}, timings={"align": 30.0, "export": 2.0}
    )
    assert (record.seconds("align"), record.seconds("export"), record.seconds("design")) == (30.0, 2.0, None)


def card_of(run: RunFolder) -> str:
    record = read_record(run)
    return model_card(record.manifests, record.results)


def test_the_model_card_has_front_matter_usage_figures_sources_and_limits(finished: RunFolder) -> None:
    text = card_of(finished)
    front = text.split("---\n")[1]
    assert "library_name: transformers" in front
    assert "base_model" not in front
    assert "license" not in front
    for words in (
        "assistant_model=draft",
        "## Figures",
        "Block efficiency",
        "CC0-1.0",
        "## Limits",
        "## Provenance",
        "tokens per target pass",
    ):
        assert words in text


def test_the_model_card_names_a_hub_target_as_base_model() -> None:
    text = model_card({"design": {"target": {"model": "meta-llama/Llama-3.1-8B-Instruct"}}}, None)
    assert "base_model: meta-llama/Llama-3.1-8B-Instruct\n" in text
    assert 'from_pretrained("meta-llama/Llama-3.1-8B-Instruct")' in text
    assert "not evaluated" in text


@pytest.mark.parametrize(
    "target",
    ["shipped:targets/starter", "./model", "C:\\models\\mine", "/srv/models/mine", "a/b/c", 'x"\n- evil: y'],
)
def test_the_model_card_never_takes_a_path_for_a_hub_id(target: str) -> None:
    text = model_card({"design": {"target": {"model": target}}}, None)
    assert "base_model" not in text.split("---\n")[1]
    assert 'from_pretrained("path/to/the/target")' in text


def test_the_model_card_tells_what_the_export_tested() -> None:
    checks: dict[str, Any] = {
        "assistant_same_greedy_text": False,
        "assistant_tokens_compared": 48,
        "assistant_dtype": "float32",
        "padding_mass_mean": 2e-3,
        "padding_mass_ok": False,
    }
    text = render_model_card(RunRecord("demo"), 3, checks)
    assert "was NOT equal" in text
    assert "NOT under" in text


def test_exact_and_replay_over_a_handful_of_prompts_are_not_called_apart() -> None:
    raw = results()
    exact = next(item for item in raw["rows"] if item["method"] == "exact")
    exact |= {"block_efficiency": 5.0, "block_efficiency_low": 4.9, "block_efficiency_high": 5.1}

    def details() -> list[str]:
        table = agreement_table(Results(raw))
        assert table is not None
        return [row.cells[-1].detail for row in table.rows]

    assert "intervals apart" in details()
    exact["num_prompts"] = 2
    assert "intervals apart" not in details()


def test_losses_in_a_narrow_range_have_figures_on_their_axis() -> None:
    lines = [{"step": i, "tokens": 1000 * i, "loss": 9.1 - 0.15 * i} for i in range(1, 11)]
    chart = loss_chart("pretrain", lines, "Pre-training")
    assert chart is not None
    assert len(re.findall(r">[789](?:\.\d)?<", chart.svg)) >= 2
