"""The benchmark stage: its settings, and a whole tiny run of it that is killed and goes on, with OpenVINO."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import write_recipe
from fastdraft import cli, pipeline
from fastdraft.benchmark.rows import BenchmarkResults, BenchmarkRow
from fastdraft.console import Console
from fastdraft.errors import FastDraftError, Interrupted, RecipeError
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.target import Target

LATER = ("prepare", "pretrain", "continue_pretrain", "synthesize", "align", "evaluate", "report")


def benchmark(folder: Path) -> dict[str, Any]:
    """Everything that the stage can do, tiny."""
    tasks = {"kind": "file", "name": "own", "path": str(folder / "tasks.jsonl"), "chat": True}
    tasks["max_new_tokens"] = 8
    return {
        "weights": [{"target": "int8", "draft": "int8"}, {"target": "int8", "draft": "fp16"}],
        "tasks": [tasks],
        "prompts": 2,
        "num_speculative_tokens": [1, 2],
        "lookup": [2],
        "temperatures": [0.0, 0.6],
        "repeats": 2,
        "sweep": {"prompt_tokens": [48, 999], "max_new_tokens": [4, 999], "concurrency": [1, 2]},
    }


def recipe_at(folder: Path, target: Path, **changes: object) -> Path:
    """A recipe of design, export and benchmark alone."""
    export = {"formats": ["huggingface", "openvino"], "openvino": {"target": "int8", "draft": "int8"}}
    values: dict[str, Any] = {"export": export, "benchmark": benchmark(folder)}
    return write_recipe(folder, target, **dict.fromkeys(LATER), **values | changes)


def test_the_tasks_are_those_of_evaluate_unless_named(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), ["benchmark={}"])
    assert recipe.benchmark is not None
    assert recipe.evaluate is not None
    assert recipe.benchmark.tasks_of(recipe.sections()) == recipe.evaluate.tasks
    named = load_recipe(str(tiny_recipe), ["benchmark.tasks=[{kind: code}]"]).benchmark
    assert named is not None
    assert [task.name for task in named.tasks_of(recipe.sections())] == ["code"]


def test_a_benchmark_without_an_export_is_refused(tiny_recipe: Path) -> None:
    recipe = load_recipe(str(tiny_recipe), ["benchmark={}", "export=null"])
    with pytest.raises(RecipeError, match="export"):
        pipeline.run(recipe, only=["benchmark"])


@pytest.fixture(scope="module")
def finished(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose benchmark is finished."""
    pytest.importorskip("openvino_genai")
    pytest.importorskip("nncf")
    pytest.importorskip("optimum.exporters.openvino", exc_type=ImportError)
    from fastdraft.runtimes import openvino_runtime

    path = recipe_at(tmp_path_factory.mktemp("benchmark"), tiny_target)
    recipe = load_recipe(str(path))
    run = pipeline.run(recipe, only=["design", "export"])

    def copy(source: Target, folder: Path, weights: str, *, pair: Path) -> None:
        # test_openvino.py converts; here it would only take time
        assert (Path(source.location).name, weights, pair.name) == ("huggingface", "fp16", "target")
        shutil.copytree(run.root / "export" / "openvino" / "draft", folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_runtime, "export_openvino", copy)
        pipeline.run(recipe, only=["benchmark"])
    return path


def folder_of(root: Path) -> Path:
    return root / "runs" / "tiny" / "benchmark"


def results_of(folder: Path) -> BenchmarkResults:
    value = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    assert BenchmarkResults.from_json(value).to_json() == value
    return BenchmarkResults.from_json(value)


def place(row: BenchmarkRow) -> tuple[Any, ...]:
    """What a row is about; the K of a sweep follows from the clock."""
    k = row.num_speculative_tokens if row.part == "tasks" else None
    sizes = row.concurrency, row.max_new_tokens, row.prompt_tokens
    return (row.proposer, row.part, row.task, row.weights, row.temperature, *sizes, k)


def test_a_benchmark_leaves_rows_of_the_published_schema(finished: Path) -> None:
    found = results_of(folder_of(finished.parent))
    assert found.schema == 2
    used = found.runtime
    assert (used.name, used.device, used.draft_device) == ("openvino", "CPU", "CPU")
    tasks = [row for row in found.rows if row.part == "tasks"]
    assert [row.proposer for row in tasks].count("draft") == 2 * 2 * 2, "weights x temperatures x K"
    lookup = [(row.weights, row.temperature) for row in tasks if row.proposer == "lookup"]
    assert lookup == [(("int8", "int8"), 0.0), (("int8", "int8"), 0.6)], "on the deployed pair"
    assert len({place(row) for row in found.rows}) == len(found.rows)
    swept = [(row.part, row.concurrency, row.max_new_tokens) for row in found.rows if row.part != "tasks"]
    alone = [("prompt_tokens", 1, 8), ("max_new_tokens", 1, 4)]
    assert swept == [*alone, ("concurrency", 1, 8), ("concurrency", 2, 8)]
    assert [row.prompt_tokens for row in found.rows if row.part == "prompt_tokens"] == [48]
    assert len(found.block["left_out"]) == 2


def test_our_own_decoder_is_a_second_way_to_run_the_same_exports(finished: Path) -> None:
    runs = finished.parent / "runs"
    for stage in ("design", "export"):
        shutil.copytree(runs / "tiny" / stage, runs / "own" / stage)
    changes = ["run.name=own", "benchmark.runtimes=[fastdraft]", "benchmark.precision=exact"]
    changes += ["benchmark.weights=[{target: int8, draft: int8}]", "benchmark.temperatures=[0, 0.6]"]
    changes += ["benchmark.num_speculative_tokens=[2]", "benchmark.lookup=[3]", "benchmark.repeats=1"]
    changes += ["benchmark.sweep={prompt_tokens: [], max_new_tokens: [], concurrency: []}"]
    pipeline.run(load_recipe(str(finished), changes), only=["benchmark"])
    found = results_of(runs / "own" / "benchmark")
    assert {row.key for row in found.rows} == {("fastdraft", "int8", "int8")}
    assert {row.proposer for row in found.rows} == {"draft", "lookup", "lookup_draft"}
    lengths = {(row.proposer, row.num_speculative_tokens, row.num_lookup_tokens) for row in found.rows}
    assert lengths == {("draft", 2, None), ("lookup", 3, None), ("lookup_draft", 2, 3)}
    assert all(row.lossless for row in found.rows), "sampled text too"
    assert all(row.same_text == row.texts for row in found.rows if row.temperature == 0)
    for row in found.rows:
        if row.replayed_accepted_tokens is not None and row.temperature == 0:
            assert row.num_accepted_tokens == pytest.approx(row.replayed_accepted_tokens, abs=1)
    assert found.launch.startswith("fastdraft generate RUN --runtime openvino")


def test_its_figures_hang_together(finished: Path) -> None:
    found = results_of(folder_of(finished.parent))
    for row in found.rows:
        assert row.speedup_low <= row.speedup <= row.speedup_high  # type: ignore[operator]
        assert row.num_drafts
        assert row.lossless == (row.temperature == 0)
        assert (row.same_text is None) == (row.temperature > 0)
        known = row.proposer == "draft" or row.replayed_block_efficiency  # of lookup only by replay
        assert (row.predicted_speedup is not None) == bool(row.concurrency == 1 and known)
        if row.temperature == 0:
            assert row.same_text == row.texts - len(row.differences)
            assert row.num_tokens_alone <= row.num_prompts * row.max_new_tokens
    prefixes = {(passes.draft_weights, passes.prefix_tokens) for passes in found.latencies}
    assert prefixes == {("int8", 48), ("int8", 128), ("fp16", 128)}
    assert all(set(passes.target_seconds) == {1, 2, 3} for passes in found.latencies)
    sizes = [(model.role, model.weights) for model in found.models]
    assert sizes == [("target", "int8"), ("draft", "int8"), ("draft", "fp16")]
    assert all(entry.total_seconds > 0 and entry.other_seconds >= 0 for entry in found.breakdown)
    assert all(entry.with_draft_bytes and entry.alone_bytes for entry in found.memory)
    assert found.best.num_speculative_tokens in (1, 2)
    assert set(found.best.by_task) == {"own"}
    assert found.verdict["tone"] in ("good", "mixed", "bad")
    assert [found.launch] == list(found.launches.values())
    assert ("prompt_lookup=True" in found.launch) != ("draft_model=draft" in found.launch)


def test_exports_of_the_export_stage_are_used_and_only_others_made(finished: Path) -> None:
    folder = folder_of(finished.parent)
    assert [path.name for path in (folder / "models").iterdir()] == ["openvino-draft-fp16"]
    names = {path.name for path in folder.iterdir()}
    assert names == {"benchmark.json", "manifest.json", "fingerprint.json", "units", "models"}


def test_the_terminal_shows_one_table_and_the_verdict(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = copy_of(finished, tmp_path)
    (folder_of(tmp_path) / "manifest.json").unlink()
    pipeline.run(recipe, Console(), only=["benchmark"])
    told = capsys.readouterr().err
    assert "Speed-up on the clock, CPU, int8 target, int8 draft" in told
    sentence = results_of(folder_of(tmp_path)).verdict["sentence"]
    assert " ".join(sentence.split()) in " ".join(told.split())


def copy_of(finished: Path, folder: Path) -> Recipe:
    """The finished run again in another folder."""
    shutil.copytree(finished.parent / "runs", folder / "runs")
    return load_recipe(str(finished), [f"run.folder={(folder / 'runs').as_posix()}"])


class StopsAt(Console):
    """Asks to stop at the n-th safe point."""

    def __init__(self, moment: int) -> None:
        super().__init__(quiet=True)
        self.left = moment
        self.stop.check = self.check  # type: ignore[method-assign]

    def check(self, where: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted(where)


def test_a_killed_benchmark_goes_on_and_no_row_is_lost_or_doubled(finished: Path, tmp_path: Path) -> None:
    recipe, before = copy_of(finished, tmp_path), results_of(folder_of(finished.parent))
    folder = folder_of(tmp_path)
    for name in ("manifest.json", "benchmark.json"):
        (folder / name).unlink()
    tasks = "*tasks-own-int8-int8-t0.repeat-2", "*tasks-own-int8-fp16-t0.6.counts"
    for pattern in (*tasks, "*-concurrency-*", "*-memory-int8-fp16-*"):
        for path in (folder / "units").glob(f"{pattern}.json"):
            path.unlink()
    stops = 0
    for moment in (1, 3, 6, 100):
        kept = {path: path.read_bytes() for path in (folder / "units").iterdir()}
        try:
            pipeline.run(recipe, StopsAt(moment), only=["benchmark"])
        except Interrupted:
            stops += 1
            assert not (folder / "benchmark.json").exists()
        assert all(path.read_bytes() == content for path, content in kept.items())
    assert stops == 3
    after = results_of(folder)
    assert [place(row) for row in after.rows] == [place(row) for row in before.rows]
    for one, two in zip(before.rows, after.rows, strict=True):
        if one.part == "tasks" and one.temperature == 0:  # sampled text depends on what was written before
            for name in ("num_drafts", "num_accepted_tokens", "num_tokens_alone", "same_text"):
                assert getattr(one, name) == getattr(two, name)
    assert not list(folder.rglob("*.tmp"))


def test_another_machine_does_not_go_on_with_it(finished: Path, tmp_path: Path) -> None:
    recipe = copy_of(finished, tmp_path)
    (folder_of(tmp_path) / "manifest.json").unlink()
    other = {"version": "2026.4.1", "device_name": "another"}
    (folder_of(tmp_path) / "units" / "openvino-device.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(FastDraftError, match="begun on another"):
        pipeline.run(recipe, only=["benchmark"])


def test_check_forecasts_a_benchmark_and_refuses_an_unknown_device(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["check", str(finished)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("benchmark"))
    assert line.split()[1] == "done"
    assert cli.main(["check", str(finished), "run.name=other", "benchmark.device=XPU7"]) == 2
    assert "OpenVINO sees" in capsys.readouterr().err
    assert cli.main(["check", str(finished), "run.name=other", "export=null"]) == 2
    assert "no export section" in capsys.readouterr().err
    assert cli.main(["check", str(finished), "run.name=other", "benchmark.tasks[0].max_new_tokens=300"]) == 2
    assert "must fit the context of 256" in capsys.readouterr().err
