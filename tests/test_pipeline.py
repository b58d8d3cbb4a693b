"""The whole pipeline on a tiny target: it runs, skips, refuses, resumes."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import write_recipe
from fastdraft import cli
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, MissingExtra
from fastdraft.pipeline import downstream, run
from fastdraft.pipeline import order as pipeline_order
from fastdraft.recipe.recipe import load_recipe
from fastdraft.recipe.training import DesignConfig
from fastdraft.reporting.page import read_run
from fastdraft.stages import SUMMARIES
from kill_and_resume import Kind, kill_and_resume

Capture = pytest.CaptureFixture[str]

NAMES = [name for name in SUMMARIES if name != "benchmark"]
"""Stages of the tiny recipe: a benchmark needs another runtime, and has tests of its own."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """A recipe whose run is finished."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished"), tiny_target)
    run(load_recipe(str(recipe)))
    return recipe


def test_one_call_takes_a_target_to_an_exported_draft_and_a_report(finished: Path) -> None:
    folder = finished.parent / "runs" / "tiny"
    assert all((folder / name / "manifest.json").is_file() for name in NAMES)
    assert (folder / "export" / "huggingface" / "model.safetensors").is_file()
    assert "<html" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_results_have_the_published_schema(finished: Path) -> None:
    path = finished.parent / "runs" / "tiny" / "evaluate" / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    costs = {f"cost_ratio_{by}" for by in ("parameters", "bytes", "latency")}
    assert results["schema"] == 1
    assert costs | {"target", "draft", "rows"} <= set(results)
    keys = [
        "checkpoint",
        "task",
        "method",
        "temperature",
        "num_speculative_tokens",
        "num_prompts",
        "num_drafts",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_accepted_tokens_per_pos",
        "num_generated_tokens",
        "acceptance_rate",
        "overlap",
        "block_efficiency",
        "conditional_acceptance_rate",
        "mbsu_parameters",
        "mbsu_bytes",
        "mbsu_latency",
    ]
    assert all(set(keys) <= set(row) for row in results["rows"])
    replayed = {(name, "replay") for name in ("pretrain", "continue_pretrain", "align")}
    assert {(row["checkpoint"], row["method"]) for row in results["rows"]} == replayed | {("align", "exact")}


def test_a_second_run_does_nothing(finished: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.parent / "runs").rglob("*.safetensors")}
    run(load_recipe(str(finished)), Console())
    assert capsys.readouterr().err.count("already done") == len(NAMES)
    assert before == {
        path: path.stat().st_mtime_ns for path in (finished.parent / "runs").rglob("*.safetensors")
    }


@pytest.mark.parametrize(
    ("sections", "extra"),
    [
        (["export.formats=[openvino]"], "openvino"),
        (["benchmark={}"], "openvino"),
        (["synthesize.engine={kind: openvino}"], "openvino"),
        (["synthesize.engine={kind: openai, servers: ['http://127.0.0.1:1/v1']}"], "server"),
    ],
)
def test_a_library_that_a_late_stage_needs_is_asked_for_before_the_first_one_runs(
    sections: list[str], extra: str, tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engines", "openvino"):
        monkeypatch.setattr(f"fastdraft.runtimes.{module}.find_spec", lambda name: None)
    recipe = load_recipe(str(write_recipe(tmp_path, tiny_target)), sections)
    with pytest.raises(MissingExtra, match=rf"fastdraft\[{extra}\]"):
        run(recipe)
    assert not (tmp_path / "runs" / "tiny" / "design").exists()


def test_a_changed_recipe_over_finished_work_is_refused_before_anything_runs(finished: Path) -> None:
    with pytest.raises(FastDraftError, match=r"tokens.*--redo align"):
        run(load_recipe(str(finished), ["align.tokens=7k"]))


def test_settings_that_no_stage_depends_on_may_change(finished: Path) -> None:
    run(load_recipe(str(finished), ["pretrain.checkpoint_every=7"]))


def test_a_stage_alone_needs_the_ones_before_it(tmp_path: Path, tiny_target: Path) -> None:
    recipe = load_recipe(str(write_recipe(tmp_path, tiny_target)))
    with pytest.raises(FastDraftError, match=r"run `fastdraft .* RECIPE` first"):
        run(recipe, only=["align"])
    assert not recipe.run.root.exists()


def test_nothing_is_thrown_away_for_a_run_that_is_refused(finished: Path) -> None:
    report = finished.parent / "runs" / "tiny" / "report" / "report.html"
    for changes, only, redo in (
        (["pretrain.tokens=9k"], None, ["align"]),
        ([], ["evaluate"], ["align"]),
        ([], None, ["nothing"]),
    ):
        with pytest.raises(FastDraftError):
            run(load_recipe(str(finished), changes), only=only, redo=redo)
    assert report.is_file()


def test_one_stage_alone_is_refused_too_when_the_recipe_tells_another_story(finished: Path) -> None:
    kept = (finished.parent / "runs" / "tiny" / "recipe.yaml").read_text(encoding="utf-8")
    with pytest.raises(FastDraftError, match="--redo pretrain"):
        run(load_recipe(str(finished), ["pretrain.tokens=9k"]), only=["export"])
    assert (finished.parent / "runs" / "tiny" / "recipe.yaml").read_text(encoding="utf-8") == kept


def test_check_refuses_what_a_run_would_refuse(finished: Path, capsys: Capture) -> None:
    assert cli.main(["check", str(finished), "align.tokens=7k"]) == 2
    assert "--redo align" in capsys.readouterr().err
    assert cli.main(["check", str(finished), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_report_can_be_made_at_any_time_and_is_made_anew(tmp_path: Path, tiny_target: Path) -> None:
    path = str(write_recipe(tmp_path, tiny_target))
    page = run(load_recipe(path), only=["design", "report"]).root / "report" / "report.html"
    before = page.read_text(encoding="utf-8")
    run(load_recipe(path), only=["prepare", "report"])
    assert page.read_text(encoding="utf-8") != before


def test_redoing_a_stage_redoes_what_builds_on_it() -> None:
    assert downstream(["synthesize"]) == {"synthesize", "align", "evaluate", "export", "benchmark", "report"}
    assert downstream(["design"]) >= {"prepare", "report"}


def test_a_design_that_reads_rows_runs_behind_the_stages_that_write_them(
    tmp_path: Path, tiny_target: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(DesignConfig, "reads", ("prepare", "synthesize"))
    path, order = str(write_recipe(tmp_path, tiny_target)), ["prepare", "synthesize", "design", "pretrain"]
    recipe = load_recipe(path)
    with pytest.raises(FastDraftError, match="run `fastdraft prepare RECIPE` first"):
        run(recipe, only=["design"])
    assert cli.main(["check", path, "--json"]) == 0
    assert [stage["stage"] for stage in json.loads(capsys.readouterr().out)["stages"]][:4] == order
    folder = run(recipe, only=["design", "synthesize", "prepare"])
    assert list(read_run(folder).manifests) == order[:3]
    read = folder.folder("design").stored_fingerprint()["shape"]["reads"]
    assert read == {name: folder.folder(name).digest() for name in order[:2]}
    table = pipeline_order(recipe.sections())
    assert "design" in downstream(["prepare"], table)
    assert "prepare" not in downstream(["design"], table)
    run(load_recipe(path, ["synthesize.tokens=700"]), only=order[1:3], redo=["synthesize"])
    assert folder.folder("design").stored_fingerprint()["shape"]["reads"] != read


def test_a_run_killed_at_random_moments_ends_as_if_undisturbed(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, kills=3) == []


@pytest.mark.skipif(find_spec("httpx") is None, reason="the extra `server` is not installed")
def test_run_and_server_killed_at_a_random_moment_end_as_if_undisturbed(tmp_path: Path) -> None:
    assert kill_and_resume(tmp_path, kills=1, kind=Kind(http=True, logits=True, short=True)) == []
