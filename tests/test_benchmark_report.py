"""The measured wall clock in reports, on the terminal and in the model card, from a made-up `benchmark.json`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmark_fixture import benchmark, benchmark_row, write_benchmarked_run
from fastdraft.console import Console, format_table
from fastdraft.errors import FastDraftError
from fastdraft.recipe.run import RunConfig
from fastdraft.reporting.benchmark_charts import breakdown_chart, pair_charts, sweep_charts, wall_clock_charts
from fastdraft.reporting.benchmark_results import Benchmark, Pair, byte_size, milliseconds
from fastdraft.reporting.benchmark_sections import launch_hint, wall_clock_section
from fastdraft.reporting.benchmark_tables import best_table, full_table, passes_table
from fastdraft.reporting.benchmark_verdict import headline, measured_verdict
from fastdraft.reporting.document import Section, Text
from fastdraft.reporting.model_card import model_card
from fastdraft.reporting.page import render_html, render_markdown
from fastdraft.reporting.record import RunRecord, read_record
from fastdraft.reporting.report import compose_report
from fastdraft.reporting.summary import measured_tables
from fastdraft.reporting.tiles import tiles
from fastdraft.run_folder import RunFolder, write_atomic
from fastdraft.stages import report
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from report_fixture import HOSTILE, results, write_run
from test_report import Page

TASKS = ("code", "summarization", "text", "instructions")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_benchmarked_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(finished: RunFolder) -> str:
    return render_html(compose_report(read_record(finished)))


def section_of(value: dict[str, Any]) -> Section:
    found = wall_clock_section(RunRecord("demo", benchmark=value))
    assert isinstance(found, Section)
    return found


def notes_of(value: dict[str, Any]) -> str:
    return "\n".join(block.text for block in section_of(value).blocks if isinstance(block, Text))


def with_rows(change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    value = benchmark()
    return value | {"rows": [change(row) for row in value["rows"]]}


def test_the_clock_leads_the_verdict_and_the_forecast_follows(finished: RunFolder) -> None:
    verdict = headline(read_record(finished))
    assert verdict.sentence.startswith(
        "Measured on this machine: use this draft with K\u00a0=\u00a02 where it pays: "
    )
    assert "0.94× on summarization" in verdict.sentence
    assert verdict.tone == "mixed"
    assert verdict.detail.startswith("Memory-bound forecast: at its best K the draft reaches 1.28×")
    assert "the prediction is" not in verdict.detail


def test_without_an_evaluation_the_clock_speaks_alone() -> None:
    verdict = headline(RunRecord("demo", benchmark=benchmark()))
    assert verdict.sentence.startswith("Measured on this machine")
    assert "forecast" not in verdict.detail
    assert "OpenVINO 2026.4.1" in verdict.detail


def test_advice_against_a_draft_leads_even_where_the_forecast_promises_a_gain() -> None:
    value = benchmark() | {
        "verdict": {"sentence": "Do not use a draft here: measured 0.52x on code.", "tone": "bad"}
    }
    verdict = headline(RunRecord("demo", results=results(), benchmark=value))
    assert verdict.sentence == "Measured on this machine: do not use a draft here: 0.52× on code."
    assert verdict.tone == "bad"


@pytest.mark.parametrize(
    ("speedup", "tone", "words"),
    [(1.6, "good", "the draft brings 1.60×"), (0.7, "bad", "do not use a draft here")],
)
def test_a_benchmark_without_a_sentence_gets_one(speedup: float, tone: str, words: str) -> None:
    value = with_rows(lambda row: row | {"speedup": speedup}) | {"verdict": None, "best": None}
    verdict = measured_verdict(Benchmark(value))
    assert verdict is not None
    assert (verdict.tone, words in verdict.sentence) == (tone, True)


def test_tasks_that_gain_and_tasks_that_do_not_are_told_apart() -> None:
    value = with_rows(lambda row: row | {"speedup": 1.6 if row["task"] == "code" else 0.9}) | {
        "verdict": None,
        "best": None,
    }
    verdict = measured_verdict(Benchmark(value))
    assert verdict is not None
    assert verdict.tone == "mixed"
    assert "1.60× on\u00a0code" in verdict.sentence.split("do not use a draft on")[0]
    assert "0.90× on\u00a0text" in verdict.sentence.split("do not use a draft on")[1]


def test_figures_of_lossy_sampling_carry_no_verdict() -> None:
    value = with_rows(lambda row: row | {"temperature": 0.6, "lossless": False})
    assert measured_verdict(Benchmark(value)) is None
    assert headline(RunRecord("demo", results=results(), benchmark=value)).sentence.startswith(
        "At its best K"
    )
    assert "does not sample losslessly" in notes_of(value)
    assert measured_tables(value) == []


def test_a_task_has_one_tile_the_measured_one_first(finished: RunFolder) -> None:
    found = tiles(read_record(finished))
    assert [tile.label for tile in found[:4]] == [f"{task.capitalize()}, measured" for task in TASKS]
    assert [tile.tone for tile in found[:4]] == ["good", "bad", "good", "good"]
    value = benchmark()
    value["rows"] = [row for row in value["rows"] if row["task"] == "code"]
    labels = [tile.label for tile in tiles(RunRecord("demo", results=results(), benchmark=value))]
    assert labels[:2] == ["Code, measured", "Summarization, memory-bound"]


def test_a_gain_too_small_to_be_worth_a_second_model_is_neither_green_nor_red() -> None:
    value = with_rows(lambda row: row | {"speedup": 1.02})
    assert tiles(RunRecord("demo", benchmark=value))[0].tone == ""


def test_the_wall_clock_is_the_first_chapter_with_all_its_charts(page: str) -> None:
    anchors = re.findall(r'<section id="([^"]+)"', page)
    assert anchors[:2] == ["wall-clock", "speedup"]
    chapter = page[page.index('<section id="wall-clock"') : page.index('<section id="speedup"')]
    assert chapter.count('<svg class="chart"') == 4 + 4 + 3 + 1
    assert (
        "Measured with OpenVINO 2026.4.1 on AMD EPYC 9654 96-Core Processor (CPU), precision fast" in chapter
    )
    assert "Measured speed-up" in page[page.index('<section id="definitions"') :]


def test_the_page_stays_well_formed_without_network_and_the_same_twice(
    finished: RunFolder, page: str
) -> None:
    parsed = Page(page)
    ids = [value["id"] for _, value in parsed.tags if value.get("id")]
    assert not parsed.unbalanced
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)
    assert set(re.findall(r"https?://[^\"' )<]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"#[0-9a-f]{6}\b", "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL)))
    assert render_html(compose_report(read_record(finished))) == page


def test_the_table_holds_the_best_k_of_each_task_with_quotients_latencies_and_the_check_of_the_text() -> None:
    value = benchmark()
    table = best_table(Benchmark(value))
    code = next(row for row in value["rows"] if row["task"] == "code" and row["num_speculative_tokens"] == 4)
    cells = table.rows[0].cells
    assert [row.cells[0].text for row in table.rows] == list(TASKS)
    assert [cell.text for cell in cells[1:4]] == [
        "4",
        f"{code['block_efficiency']:.2f}",
        f"{code['speedup']:.2f}×",
    ]
    assert cells[3].detail == f"{code['speedup_low']:.2f} to {code['speedup_high']:.2f}"
    assert [cell.detail for cell in cells[4:7]] == [
        f"quotient {code[key]:.2f}" for key in ("decode_quotient", "predicted_quotient", "mbsu_quotient")
    ]
    assert (cells[7].text, cells[7].detail) == ("93.8 ms", "83.0 ms without")
    assert (cells[9].text, cells[9].mark) == ("6 of 8", "")
    assert table.rows[1].cells[9].mark == "good"


def test_each_task_has_measured_and_predicted_lines_on_one_scale() -> None:
    charts = wall_clock_charts(Benchmark(benchmark()))
    assert [chart.title.split(":")[0] for chart in charts] == list(TASKS)
    for chart in charts:
        assert {"measured", "predicted"} <= set(re.findall(r">(measured|predicted)<", chart.svg))
        assert "stroke-dasharray" in chart.svg
        assert re.search(r"measured \d\.\d\d× at K\u00a0=\u00a01.*; predicted", chart.alt)


def test_charts_without_enough_to_compare_are_left_out() -> None:
    value = benchmark()
    value["rows"] = [
        row for row in value["rows"] if row["part"] == "tasks" and row["target_weights"] == "int4"
    ]
    value["breakdown"] = [{"target_seconds": None, "draft_seconds": 1.0, "other_seconds": 0.0}]
    assert pair_charts(Benchmark(value)) == ()
    assert sweep_charts(Benchmark(value)) == ()
    assert breakdown_chart(value["breakdown"]) is None
    value["rows"] = [row for row in value["rows"] if row["num_speculative_tokens"] == 4]
    assert wall_clock_charts(Benchmark(value)) == ()


def test_the_deployed_pair_is_that_of_the_sweeps() -> None:
    value = benchmark()
    value["rows"] = value["rows"][::-1]
    assert Benchmark(value).deployed == Pair("int4", "int8")
    assert len(Benchmark(value).pairs) == 2


def test_best_k_is_the_one_that_the_benchmark_names_and_else_the_fastest() -> None:
    value = benchmark()
    value["best"]["by_task"]["code"]["num_speculative_tokens"] = 3
    assert (Benchmark(value).best("code") or {})["num_speculative_tokens"] == 3
    assert (Benchmark(value | {"best": None}).best("code") or {})["num_speculative_tokens"] == 4
    assert Benchmark(value | {"best": None}).best_k == 4
    assert Benchmark(value).best("unknown") is None


def test_dynamic_lengths_and_sweeps_do_not_count_as_a_fixed_k() -> None:
    value = benchmark()
    value["rows"].append(
        benchmark_row("tasks", "code", ("int4", "int8"), 5) | {"confidence_threshold": 0.4, "speedup": 9.0}
    )
    value["rows"].append(
        benchmark_row("concurrency", "code", ("int4", "int8"), 5, concurrency=64) | {"speedup": 9.0}
    )
    best = Benchmark(value | {"best": None}).best("code")
    assert best is not None
    assert best["speedup"] < 2
    assert "Dynamic draft length" in render_markdown(compose_report(RunRecord("demo", benchmark=value)))


def test_texts_that_part_at_near_ties_are_counted_once_and_wide_or_unknown_gaps_are_told() -> None:
    value = benchmark()
    assert "At 2 places the texts part; 1 of them are near-ties" in notes_of(value)
    assert "largest gap 0.012 nats" in notes_of(value)
    text = render_markdown(compose_report(RunRecord("demo", benchmark=value)))
    assert "| code | HumanEval/3 | 17 | 0.0120 (near-tie) |" in text
    assert "| code | HumanEval/5 | 40 | **-** (not computed) |" in text
    exact = value | {"runtime": value["runtime"] | {"precision": "exact"}}
    assert "0 of them are near-ties" in notes_of(exact)
    assert "in 424 of 424 comparisons." in notes_of(
        with_rows(lambda row: row | {"same_text": 8, "differences": []})
    )


def test_what_did_not_fit_is_told() -> None:
    assert "Left out: prompts of 8192 tokens: they do not fit the context." in notes_of(benchmark())


def test_every_row_of_the_file_stands_in_the_folded_table() -> None:
    value = benchmark()
    table = full_table(Benchmark(value))
    assert len(table.rows) == len(value["rows"])
    assert {len(row.cells) for row in table.rows} == {len(table.columns)}
    assert any("not lossless" in cell.detail for row in table.rows for cell in row.cells)


def test_many_widths_of_a_pass_are_thinned_out_but_keep_the_first_and_the_last() -> None:
    value = benchmark()
    value["latencies"][0]["target_seconds"] = {str(width): width / 1000 for width in range(1, 17)}
    table = passes_table(Benchmark(value | {"latencies": value["latencies"][:1]}))
    assert table is not None
    assert table.columns[3] == "Target, 1 token"
    assert table.columns[-1] == "Target, 16 tokens"
    assert len(table.columns) == 3 + 6


def nulled(value: Any) -> Any:
    """Every figure of a file null, all else as it is."""
    if isinstance(value, dict):
        return {key: item if key == "schema" else nulled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulled(item) for item in value]
    return None if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def test_null_figures_are_shown_as_dashes_and_crash_nothing() -> None:
    value = nulled(benchmark())
    composed = compose_report(RunRecord("demo", results=results(), benchmark=value))
    assert "None" not in Page(render_html(composed)).text
    assert composed.verdict.startswith("At its best K")
    assert "## Wall clock" not in model_card({}, None, value)
    assert measured_tables(value) == []


DRAWN = (
    "part",
    "task",
    "target_weights",
    "temperature",
    "num_speculative_tokens",
    "speedup",
    "speedup_low",
    "predicted_speedup",
)


def small_benchmark() -> dict[str, Any]:
    """One task, two K, two pairs, one sweep: few charts, quickly drawn."""
    value = benchmark()
    kept = [
        row
        for row in value["rows"]
        if row["task"] == "code" and (row["num_speculative_tokens"] < 3 or row["part"] == "concurrency")
    ]
    return value | {"rows": kept}


@pytest.mark.parametrize(
    "missing", [*((key,) for key in DRAWN), tuple(set(benchmark()["rows"][0]) - set(DRAWN))]
)
def test_no_field_of_a_row_is_needed(missing: tuple[str, ...]) -> None:
    value = small_benchmark()
    value["rows"] = [
        {name: item for name, item in row.items() if name not in missing} for row in value["rows"]
    ]
    assert not Page(render_html(compose_report(RunRecord("demo", benchmark=value)))).unbalanced
    model_card({}, None, value)
    measured_tables(value)


def test_no_part_of_the_file_is_needed() -> None:
    full = small_benchmark()
    for key in full:
        value = {name: item for name, item in full.items() if name != key}
        record = RunRecord("demo", benchmark=value)
        assert headline(record).sentence
        assert tiles(record) or key == "rows"
        assert wall_clock_section(record)
        model_card({}, None, value)


def test_a_benchmark_that_measured_nothing_says_so() -> None:
    composed = compose_report(RunRecord("demo", benchmark={"schema": 1, "rows": []}))
    assert "Wall clock: the benchmark measured nothing." in composed.omitted


def test_a_run_without_a_benchmark_gets_the_report_of_before(tmp_path: Path) -> None:
    composed = compose_report(read_record(write_run(tmp_path / "demo")))
    assert composed.omitted == ()
    assert "wall-clock" not in [section.anchor for section in composed.sections]
    assert "Measured speed-up" not in render_markdown(composed)


def test_a_benchmark_that_the_recipe_asks_for_and_that_is_not_there_is_missed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo")
    write_atomic(run.root / "recipe.yaml", "run:\n  name: demo\nbenchmark:\n  runtime: openvino\n")
    assert "Stage benchmark: not run, or not finished." in compose_report(read_record(run)).omitted
    write_atomic(run.root / "recipe.yaml", "run:\n  name: demo\nbenchmark: null\n")
    assert compose_report(read_record(run)).omitted == ()


def test_a_missing_file_of_a_finished_benchmark_leaves_the_chapter_out(tmp_path: Path) -> None:
    run = write_benchmarked_run(tmp_path / "demo")
    (run.folder("benchmark").path / "benchmark.json").unlink()
    assert compose_report(read_record(run)).sections[0].anchor == "speedup"


@pytest.mark.parametrize("content", ['{"schema": 1, "rows": [', "[]", '{"schema": 2, "rows": []}'])
def test_a_damaged_benchmark_is_one_clear_error(tmp_path: Path, content: str) -> None:
    run = write_benchmarked_run(tmp_path / "demo")
    (run.folder("benchmark").path / "benchmark.json").write_text(content)
    with pytest.raises(FastDraftError, match=r"benchmark\.json"):
        read_record(run)


def test_names_from_the_file_are_shown_and_not_obeyed() -> None:
    value = with_rows(lambda row: row | {"task": HOSTILE if row["task"] == "code" else row["task"]})
    value["runtime"]["device_name"] = HOSTILE
    parsed = Page(render_html(compose_report(RunRecord("demo", benchmark=value))))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert HOSTILE in parsed.text


def test_the_launch_hint_names_weights_devices_and_the_measured_best_k() -> None:
    value = benchmark()
    value["runtime"]["draft_device"] = "GPU"
    hint = launch_hint(Benchmark(value))
    compile(hint, "hint", "exec")
    assert 'draft_model("path/to/draft-int8", "GPU")' in hint
    assert 'LLMPipeline("path/to/target-int4", "CPU", draft_model=draft)' in hint
    assert "num_assistant_tokens=2" in hint
    assert launch_hint(Benchmark(value | {"runtime": {"name": "another"}})) == ""


def test_a_draft_that_does_not_pay_is_not_advertised() -> None:
    value = benchmark() | {"verdict": {"sentence": "Do not use a draft here.", "tone": "bad"}}
    text = render_markdown(compose_report(RunRecord("demo", benchmark=value)))
    assert "Try it with OpenVINO GenAI on another device" in text
    assert "Use it with OpenVINO GenAI" not in text


def test_the_model_card_has_the_verdict_the_table_and_the_launch_hint(finished: RunFolder) -> None:
    record = read_record(finished)
    text = model_card(record.manifests, record.results, record.benchmark)
    assert "**Measured on this machine: use this draft with K\u00a0=\u00a02" in text
    assert text.index("## Wall clock") < text.index("## Figures")
    assert re.search(r"\| code \| 4 \| 3\.\d\d \| \*\*1\.\d\d×\*\* \(1\.\d\d to 1\.\d\d\) \|", text)
    assert "num_assistant_tokens=2" in text


def test_the_stage_writes_the_card_and_ends_with_the_verdict_in_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_benchmarked_run(tmp_path / "demo")
    settings = RunConfig(name="demo", folder=str(tmp_path))
    context = StageContext(run, settings, Target.at("target"), {"report": report.ReportConfig()}, Console())
    run.folder("report").begin(report.fingerprint(report.ReportConfig(), context))
    report.run(report.ReportConfig(), context)
    told = capsys.readouterr().err
    assert (run.folder("report").path / "model_card.md").read_text(encoding="utf-8").startswith("---\n")
    assert run.folder("report").manifest()["files"] == ["report.html", "report.md", "model_card.md"]
    last = told[told.index("Measured on this machine") :]
    assert last.endswith("there the target accepts 18\u00a0% of what is proposed.\n")
    assert max(map(len, last.splitlines())) <= 79
    assert "quotient" in told
    assert "model_card.md" in told


def test_the_fingerprint_of_the_report_follows_the_benchmark(tmp_path: Path) -> None:
    run = write_benchmarked_run(tmp_path / "demo")
    context = StageContext(
        run, RunConfig(name="demo"), Target.at("target"), {"report": report.ReportConfig()}, Console()
    )
    before = report.fingerprint(report.ReportConfig(), context)
    (run.folder("benchmark").path / "benchmark.json").write_text('{"schema": 1}')
    assert report.fingerprint(report.ReportConfig(), context) != before


def test_the_table_for_the_terminal_fits_80_columns() -> None:
    value = with_rows(lambda row: row | {"task": row["task"] * 6})
    ((title, columns, rows),) = measured_tables(value | {"best": None})
    assert "OpenVINO 2026.4.1, CPU" in title
    assert len(rows) == 4
    assert max(map(len, format_table(title, columns, rows).splitlines())) <= 80


def test_times_and_bytes_have_three_digits_and_a_unit() -> None:
    assert [milliseconds(value) for value in (0.000412, 0.00241, 0.0193, 0.183, 2.41, None)] == [
        "0.412 ms",
        "2.41 ms",
        "19.3 ms",
        "183 ms",
        "2.41 s",
        "-",
    ]
    assert [byte_size(value) for value in (5.2e6, 55e6, 692e6, 1.31e9, 4100, None)] == [
        "5.20 MB",
        "55.0 MB",
        "692 MB",
        "1.31 GB",
        "4.10 kB",
        "-",
    ]
