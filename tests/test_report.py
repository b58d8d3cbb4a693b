"""Reports, tables, verdicts and model cards made from a run's folder, with made-up figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastdraft.benchmark.rows import BenchmarkResults, best_k, best_proposer
from fastdraft.console import Console, format_table
from fastdraft.recipe.evaluation import ReportConfig
from fastdraft.recipe.run import RunConfig, TargetConfig
from fastdraft.reporting import charts, proposers, tables
from fastdraft.reporting.definitions import byte_size, duration
from fastdraft.reporting.page import RunRecord, read_metrics, read_run, render
from fastdraft.reporting.verdict import forecast_verdict, give_verdict, measured_verdict
from fastdraft.run_folder import RunFolder, read_json, write_json
from fastdraft.stages import report
from fastdraft.stages.context import StageContext
from fastdraft.target import Target
from report_fixture import HOSTILE, TASKS, benchmark, results, timed_lookup, with_lookup, write_run

VOID = {"meta", "br", "img"}


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

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def html(record: RunRecord) -> str:
    return render("report.html.j2", record)


def markdown(record: RunRecord) -> str:
    return render("report.md.j2", record)


def card(record: RunRecord, **checks: Any) -> str:
    return render("model_card.md.j2", record, k=3, checks=checks)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", benchmarked=True)


@pytest.fixture(scope="module")
def record(finished: RunFolder) -> RunRecord:
    return read_run(finished)


@pytest.fixture(scope="module")
def page(record: RunRecord) -> str:
    return html(record)


def context_of(run: RunFolder) -> StageContext:
    target = Target(TargetConfig(model="target"))
    return StageContext(run, RunConfig(name="demo"), target, {"report": ReportConfig()}, Console())


def test_the_stage_writes_its_files_and_ends_with_the_verdict_in_80_columns(
    finished: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    context, folder, config = context_of(finished), finished.folder("report"), ReportConfig()
    folder.begin(report.fingerprint(config, context))
    report.run(config, context)
    told = capsys.readouterr().err
    assert folder.manifest()["files"] == ["report.md", "report.html", "model_card.md"]
    assert "<title>Draft report: demo</title>" in (folder.path / "report.html").read_text(encoding="utf-8")
    assert (folder.path / "report.md").read_text(encoding="utf-8").startswith("# Draft report: demo\n")
    assert told.replace("\n", " ").rstrip().endswith(folder.manifest()["verdict"])
    assert max(len(line) for line in told.splitlines() if str(folder.path) not in line) <= 80
    assert all(task in told for task in TASKS)
    assert "Begun from  shipped:drafts/body, pre-trained before this run\n" in told


def test_the_terminals_table_of_two_runtimes_and_all_proposers_fits_80_columns() -> None:
    found = timed_lookup(benchmark(speedup=1.234, block_efficiency=1.5, tokens_per_second_alone=1234.5))
    both = [replace(row, proposer="lookup_draft") for row in found.rows]
    other = [replace(row, runtime="llamacpp") for row in [*found.rows, *both]]
    shown = proposers.clocked(replace(found, rows=[*found.rows, *other]), brief=True)
    assert list(shown.columns) == ["Task", "Runtime", "Nothing", "Lookup", "Draft", "Both"]
    rows = shown.plain(details=True)[1]
    assert [row[:2] for row in rows[:1] + rows[-1:]] == [["code", "OpenVINO"], ["instructions", "llama.cpp"]]
    assert rows[0][2:] == ["1,234 tok/s", "1.10× (1.13)", "1.23× (1.50)", "-"]
    assert max(map(len, format_table("", *shown.plain(details=True)).splitlines())) <= 80


def test_the_fingerprint_follows_results_benchmark_and_finished_stages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "demo", benchmarked=True)
    context = context_of(run)
    seen = [report.fingerprint(ReportConfig(), context)]
    for name in ("evaluate/results.json", "benchmark/benchmark.json"):
        (run.root / name).write_text("{}")
        seen.append(report.fingerprint(ReportConfig(), context))
    run.folder("align").discard()
    seen.append(report.fingerprint(ReportConfig(), context))
    assert len({json.dumps(each) for each in seen}) == 4


def test_the_page_needs_no_network_and_no_script_and_is_well_formed(page: str) -> None:
    assert not re.search(r"<script|@import|<link|<iframe|javascript:", page)
    sources = [tag["src"] or "" for name, tag in Page(page).tags if name == "img"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.findall(r"https?://", re.sub(r'src="[^"]+"', "", page))
    parsed = Page(page)
    ids = [tag["id"] for _, tag in parsed.tags if tag.get("id")]
    assert (parsed.unbalanced, parsed.open) == ([], [])
    assert {tag["href"] for name, tag in parsed.tags if name == "a"} == {f"#{name}" for name in ids}
    assert all(tag.get("alt") for name, tag in parsed.tags if name == "img")


def test_every_chapter_is_there_with_its_charts(page: str) -> None:
    chapters = "wall-clock speedup ladder differences positions along-the-text samples checks training data provenance definitions"
    assert re.findall(r'<section id="([^"]+)"', page) == chapters.split()
    wall_clock, rest = page.split('<section id="speedup">')
    assert wall_clock.count("<img") == 4 + 3 + 1
    assert rest.count("<img") == 4 + 4 + 4 + 4 + 4


def test_markdown_has_the_chapters_and_tables_of_the_page(record: RunRecord, page: str) -> None:
    text = markdown(record)
    assert re.findall("^## (.+)", text, re.MULTILINE) == re.findall("<h2>(.+?)</h2>", page)
    assert len(re.findall(r"^\| -[-: |]+$", text, re.MULTILINE)) == page.count("<thead>")
    for line in text.splitlines():
        assert not line.startswith("| ") or len(re.findall(r"(?<!\\)\|", line)) >= 3
    assert "The [river ][rises ]in [the ][hills ]" in text


def test_markup_in_names_and_texts_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path / "demo", name=HOSTILE))
    parsed = Page(html(record))
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert parsed.text.count(HOSTILE) >= 2
    outside = re.sub(r"```.*?```", "", markdown(record) + card(record), flags=re.DOTALL)
    assert "<script>" not in outside.replace(r"\<script\>", "")


@pytest.mark.parametrize(
    "stages", [("design",), ("prepare", "pretrain"), ("synthesize",), ("evaluate",), ("align",)]
)
def test_a_run_without_some_stages_still_gets_a_report_that_says_so(
    tmp_path: Path, stages: tuple[str, ...]
) -> None:
    record = read_run(write_run(tmp_path / "demo", stages))
    if "evaluate" not in stages:  # whose charts take their time
        assert not Page(html(record)).unbalanced
    assert "Stage export: not run, or not finished." in markdown(record)
    assert "Stage benchmark" not in markdown(record)
    assert ("nothing can be said" in markdown(record)) == ("evaluate" not in stages)
    assert "# A draft model for" in card(record)


def test_a_damaged_metrics_line_is_skipped_and_a_resumed_step_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 2, "tokens": 4}\n{"step": 2, "loss": 1.5}\n{"st'
    )
    assert [line.get("loss") for line in read_metrics(path)] == [3, None, 1.5]


def test_the_forecast_names_every_task_with_its_best_k() -> None:
    found = results()
    verdict = forecast_verdict(found)
    assert verdict.tone == "good"
    for task in TASKS:
        best = found.best(task, 0.6)
        assert best is not None
        assert (
            f"{best.mbsu_parameters:.2f}× on\u00a0{task} ({best.block_efficiency:.2f} tokens per"
            in verdict.sentence
        )


def test_the_forecast_advises_against_a_draft_that_does_not_pay() -> None:
    poor = forecast_verdict(results(mbsu_parameters=0.7, predicted_speedup=0.8))
    assert poor.tone == "bad"
    assert poor.sentence.startswith("Do not use this draft at this cost ratio (0.187)")
    assert "In transformers (" in poor.detail
    assert "under 1 on every task: do not use a draft there" in poor.detail
    rows = [replace(row, mbsu_parameters=1.4 if row.task == "code" else 0.9) for row in results().rows]
    mixed = forecast_verdict(replace(results(), rows=rows))
    assert mixed.tone == "mixed"
    assert "but stays under 1 with" in mixed.sentence


def test_the_clock_leads_the_verdict_and_the_forecast_follows() -> None:
    verdict = give_verdict(results(), benchmark())
    assert verdict.tone == "mixed"
    assert verdict.sentence.startswith(
        "Use this draft with K\u00a0=\u00a02 where it pays: measured 1.68× on\u00a0code"
    )
    assert "0.85× on\u00a0summarization (CPU, int4 target, int8 draft); there" in verdict.sentence
    assert "Memory-bound forecast: At its best K" in verdict.detail
    assert "OpenVINO 2026.4.1 on AMD EPYC (CPU)" in give_verdict(None, benchmark()).detail


@pytest.mark.parametrize(
    ("changes", "tone", "words"),
    [
        ({"speedup": 1.6, "speedup_low": 1.5}, "good", "Use this draft with K"),
        ({"speedup": 1.6, "speedup_low": 0.9}, "mixed", "but 0.90× in one repeat: measure again"),
        ({"speedup": 1.02}, "mixed", "A draft brings next to nothing here"),
        ({"speedup": 0.7, "predicted_speedup": None}, "bad", "the target accepts"),
        (
            {"speedup": 0.7, "predicted_speedup": 1.5},
            "bad",
            "promised 1.50×, but inside the runtime the passes take longer",
        ),
        (
            {"speedup": 0.7, "predicted_speedup": 0.9, "conditional_acceptance_rate": 0.1},
            "bad",
            "the acceptance is too low: 10\u00a0% of",
        ),
    ],
)
def test_the_clock_says_whether_a_draft_pays_and_why_not(
    changes: dict[str, Any], tone: str, words: str
) -> None:
    verdict = measured_verdict(benchmark(**changes))
    assert (verdict.tone, words in verdict.sentence) == (tone, True), verdict


@pytest.mark.parametrize(
    ("draft_seconds", "wide", "words"),
    [
        (0.03, 0.02, "the target answers in 19.2 ms a token and the draft needs 30.0 ms"),
        (0.002, 0.06, "verifying is too dear"),
    ],
)
def test_costs_out_of_reach_are_named(draft_seconds: float, wide: float, words: str) -> None:
    found = benchmark(speedup=0.7, predicted_speedup=0.9)
    seconds = {1: 0.0192, 2: wide, 3: 2 * wide}
    passes = [replace(row, draft_seconds=draft_seconds, target_seconds=seconds) for row in found.latencies]
    assert words in measured_verdict(replace(found, latencies=passes)).sentence


NOTHING = dict.fromkeys(TASKS, 0.0)


@pytest.mark.parametrize(
    ("finds", "start", "words"),
    [
        (NOTHING, "At its best K the draft reaches", ""),
        (
            dict.fromkeys(TASKS, 0.95),
            "Use prompt lookup, train nothing: it reaches a memory-bound",
            "the draft",
        ),
        (NOTHING | {"code": 0.95}, "At its best K", "does no worse on its own: 7.08×"),
        (dict.fromkeys(TASKS, 0.4), "At its best K", "where it finds nothing is better: "),
    ],
)
def test_the_forecast_knows_what_lookup_reaches(finds: dict[str, float], start: str, words: str) -> None:
    sentence = forecast_verdict(with_lookup(results(), finds=finds)).sentence
    assert sentence.startswith(start), sentence
    assert words in sentence, sentence
    assert ("lookup" in sentence) == bool(words)


@pytest.mark.parametrize(
    ("draft", "lookup", "named", "start", "end"),
    [
        (1.5, 1.0, ("draft", 1), "Use this draft with K\u00a0=\u00a01: measured", "int8 draft)."),
        (1.5, 1.9, ("lookup", 3), "Use prompt lookup with K\u00a0=\u00a03, train nothing: ", "int4 target)."),
        (
            1.5,
            1.46,
            ("lookup", 3),
            "Use prompt lookup with K\u00a0=\u00a03, train nothing: ",
            "int4 target).",
        ),
        (0.8, 1.0, ("draft", 1), "Do not use a draft here: measured 0.80×", "."),
        (0.8, 1.3, ("lookup", 3), "Use prompt lookup", "train nothing: measured 1.30×"),
    ],
)
def test_the_verdict_and_what_is_launched_are_of_the_proposer_that_is_worth_it(
    draft: float, lookup: float, named: tuple[str, int], start: str, end: str
) -> None:
    found = benchmark(speedup=draft, speedup_low=draft, predicted_speedup=None)
    found = timed_lookup(found, **dict.fromkeys(TASKS, lookup))
    sentence = measured_verdict(found).sentence
    assert best_proposer(found.rows, found.pairs[0]) == named
    assert sentence.startswith(start), sentence
    assert end in sentence, sentence
    assert "Better by task" not in sentence


def test_where_another_proposer_is_faster_is_said_by_task() -> None:
    found = timed_lookup(benchmark(), code=1.0, summarization=1.6, text=1.0, instructions=1.0)
    sentence = measured_verdict(found).sentence
    assert sentence.startswith("Use this draft")
    assert sentence.endswith(
        "Better by task: prompt lookup reaches 1.60× on\u00a0summarization (K\u00a0=\u00a03)."
    )
    rows = {row[0].text: row for row in proposers.clocked(found).rows}
    marks = {task: [cell.mark for cell in rows[task][2:]] for task in ("code", "summarization")}
    assert marks == {"code": ["", "good"], "summarization": ["good", ""]}


def test_all_proposers_stand_side_by_side_and_an_older_run_has_no_such_table(record: RunRecord) -> None:
    assert record.results is not None
    shown = proposers.tokens(record.results)
    assert list(shown.columns) == ["Task", "T", "Nothing", "Prompt lookup", "Draft", "Lookup, then draft"]
    assert [cell.text for cell in shown.rows[0]][:5] == ["code", "0", "1.00", "1.13", "1.93"]
    assert card(record).count("which needs no draft") >= 2
    text = markdown(replace(record, results=results(), benchmark=benchmark()))
    assert "What a draft must beat" in markdown(record)
    assert "What a draft must beat" not in text


@pytest.mark.parametrize(("place", "found"), [("align", True), ("align/checkpoint", True), ("../x/y", False)])
def test_a_re_aligned_draft_is_shown_on_the_target_that_it_was_made_for_too(
    tmp_path: Path, place: str, found: bool
) -> None:
    base, run = write_run(tmp_path / "base", name="base-model"), write_run(tmp_path / "again")
    path = run.folder("design").path / "manifest.json"
    begun = {"initialization": "from", "source": str(base.root / place)}
    write_json(path, read_json(path) | begun)
    record = read_run(run)
    assert ("Own target: this draft before, on base-model," in markdown(record)) is found
    assert "Own target" not in markdown(read_run(base))
    assert record.results
    shown = tables.ladder(record.results, record.earlier)
    assert ("own target rate" in shown.columns) is found
    if found:  # the same made-up figures: after the last stage
        own, *_, after = shown.only("own target rate", "PT rate", "FT rate").rows[0]
        assert own == after
        assert tables.ladder(record.results).columns == [c for c in shown.columns if "own" not in c]


def test_lossy_figures_carry_no_verdict(record: RunRecord) -> None:
    lossy = benchmark(lossless=False, temperature=0.6)
    rows = [row for row in lossy.rows if row.part == "tasks" and row.target_weights == "int4"]
    lossy = replace(lossy, rows=rows, best=best_k([]))
    assert measured_verdict(lossy).sentence.startswith("No verdict")
    assert give_verdict(results(), lossy).sentence.startswith("At its best K")
    assert "does not sample losslessly" in markdown(replace(record, benchmark=lossy))


def test_null_figures_are_shown_as_dashes(record: RunRecord) -> None:
    nothing = "mbsu_latency predicted_speedup overlap acceptance_rate_low num_conversations looping_share"
    less = dict.fromkeys(("latency", "contamination", "by_position", "greedy_check"))
    found = replace(results(**dict.fromkeys(nothing.split())), **less)
    nothing = (
        "predicted_speedup predicted_quotient same_text looping_share speedup_low first_token_seconds_alone"
    )
    measured = benchmark(**dict.fromkeys(nothing.split()))
    assert "None" not in markdown(replace(record, results=found, benchmark=measured))


def test_texts_that_part_are_counted_once_with_the_widest_gap(record: RunRecord) -> None:
    gaps = [[cell.text for cell in row] for row in tables.different_texts(benchmark()).rows]
    assert gaps == [["code", "one", "17", "0.0120"], ["code", "two", "40", "-"]]
    assert "At 2 places the texts part; 1 of them are near-ties" in markdown(record)


def test_exact_and_replay_over_a_handful_of_prompts_are_not_called_apart() -> None:
    def details(prompts: int) -> set[str]:
        exact = {"block_efficiency": 5.0, "block_efficiency_low": 4.9, "block_efficiency_high": 5.1}
        rows = [
            replace(row, **exact, num_prompts=prompts) if row.method == "exact" else row
            for row in results().rows
        ]
        return {row[-1].detail for row in tables.agreement(replace(results(), rows=rows)).rows}

    assert details(40) == {"intervals apart"}
    assert details(2) == {""}


def test_charts_without_enough_to_compare_are_left_out() -> None:
    rows = [row for row in benchmark().rows if row.part == "tasks" and row.target_weights == "int4"]
    one: BenchmarkResults = replace(benchmark(), rows=rows, breakdown=[])
    assert (charts.sweeps(one), charts.breakdown(one)) == ([], [])
    assert charts.losses({"pretrain": []}) == []


@pytest.mark.parametrize(
    "target",
    ["shipped:targets/starter", "./model", "C:\\models\\mine", "/srv/mine", "a/b/c", 'x"\n- evil: y'],
)
def test_the_model_card_never_takes_a_path_for_a_hub_id(target: str) -> None:
    text = card(RunRecord("demo", {}, results(target)))
    assert "base_model" not in text.split("---\n")[1]
    assert 'from_pretrained("path/to/the/target")' in text


def test_the_model_card_tells_use_figures_sources_and_what_the_export_tested(record: RunRecord) -> None:
    failed = {
        "assistant_same_greedy_text": False,
        "assistant_tokens_compared": 48,
        "assistant_dtype": "float32",
    }
    text = card(record, **failed, padding_mass_mean=2e-3, padding_mass_ok=False, padding_mass_limit=1e-4)
    words = "base_model: a/target|assistant_model=draft|num_assistant_tokens=2|## Figures|CC0-1.0|## Limits|was NOT equal|, NOT under"
    assert [word for word in words.split("|") if word not in text] == []
    assert text.index("## Wall clock") < text.index("## Figures")


def test_times_and_bytes_have_three_digits_and_a_unit() -> None:
    times = [duration(value) for value in (0.000412, 0.00241, 0.0193, 0.183, 2.41, None)]
    assert times == ["0.412 ms", "2.41 ms", "19.3 ms", "183 ms", "2.41 s", "-"]
    sizes = [byte_size(value) for value in (5.2e6, 55e6, 692e6, 1.31e9, -4100, None)]
    assert sizes == ["5.20 MB", "55.0 MB", "692 MB", "1.31 GB", "−4.10 kB", "-"]
