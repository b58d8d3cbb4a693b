"""Runs for a target behind a server, or known by its logs: with its weights away, and where somebody needs
them after all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("openai")

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.commands import check
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, read_all, read_rows
from fastdraft.data.sparse_logits import read_with_logits
from fastdraft.errors import DataError, FastDraftError, TargetError
from fastdraft.recipe.recipe import Recipe, load_recipe
from fastdraft.recipe.training import TokenKDConfig
from fastdraft.runtimes.synthesis import sparse_logits
from fastdraft.target import Target
from serving import Served


class Run:
    """A served target whose weights can be moved away, and the recipe of a run for it."""

    def __init__(self, folder: Path, target: Path, served: Served) -> None:
        self.folder, self.served, self.target = folder, served, folder / "target"
        shutil.copytree(target, self.target)
        self.away = folder / "model.safetensors"
        (self.target / "model.safetensors").rename(self.away)
        engine = {"kind": "openai", "servers": [served.url], "logprobs": "processed"}
        prompts = [{"kind": "jsonl", "name": "asked", "path": str(folder / "prompts.jsonl")}]
        self.synthesize = {"tokens": "2k", "temperatures": [0, 0.7], "max_new_tokens": 16, "batch_rows": 16}
        self.synthesize |= {"prompts": prompts, "engine": engine}
        self.recipe().run.root.mkdir(parents=True)
        pipeline.run(self.recipe(), only=["design", "prepare", "pretrain", "synthesize", "align"])

    def recipe(self, name: str = "tiny", synthesize: dict[str, Any] | None = None, **evaluate: Any) -> Recipe:
        path = write_recipe(self.folder, self.target, synthesize=synthesize or self.synthesize)
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
        for stage in ("continue_pretrain", "export", "report"):
            del value[stage]
        value["run"]["name"] = name
        value["align"].update({"tokens": "2k", "pretraining_share": 0})
        value["evaluate"].update({"checkpoints": ["pretrain", "align"], "temperatures": [0, 0.7], **evaluate})
        path.write_text(yaml.safe_dump(value), encoding="utf-8")
        return load_recipe(str(path))

    def results(self, **evaluate: Any) -> dict[str, Any]:
        run = pipeline.run(self.recipe(**evaluate), only=["evaluate"], redo=["evaluate"])
        return dict(json.loads((run.folder("evaluate").path / "results.json").read_text(encoding="utf-8")))

    def rows(self, split: Any = None) -> list[SyntheticRow]:
        """What the server wrote."""
        return list(read_all(pipeline.make_context(self.recipe(), _quiet()).require("synthesize"), split))

    def weights(self, *, here: bool) -> None:
        there = self.target / self.away.name
        source, goal = (self.away, there) if here else (there, self.away)
        if source.exists():
            source.rename(goal)


@pytest.fixture(scope="module")
def run(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with Served(tiny_target).running() as served:
        yield Run(tmp_path_factory.mktemp("served"), tiny_target, served)


@pytest.fixture(autouse=True)
def _weights_away(request: pytest.FixtureRequest) -> None:
    if "run" in request.fixturenames:
        request.getfixturevalue("run").weights(here=False)


def replayed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Replay rows without what only a loaded target can time."""
    timed = ("mbsu_latency", "predicted_speedup")
    rows = [row for row in results["rows"] if row["method"] == "replay"]
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


def log_of(rows: list[SyntheticRow], path: Path) -> dict[str, Any]:
    """Rows as a server's log, ids in and ids out; the source of texts or prompts that reads it."""
    lines = []
    for row in rows:
        choice = {"token_ids": row.response_ids, "finish_reason": row.finish_reason}
        choice["logprobs"] = {"token_logprobs": row.logprobs}
        drawn = {"temperature": row.temperature, "top_k": row.top_k, "top_p": row.top_p}
        lines.append({"prompt": row.prompt_ids, **drawn, "choices": [choice]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {"kind": "transcripts", "name": "log", "path": str(path), "logprobs": "processed"}


def evaluated_rows(run: Run) -> list[SyntheticRow]:
    written = sorted((run.recipe().run.root / "evaluate" / "generations").glob("*.parquet"))
    return [row for path in written for row in read_rows(path)]


def _quiet() -> Console:
    return Console(quiet=True)


def test_synthesize_and_align_need_no_weights_and_no_secret_is_kept(run: Run) -> None:
    assert run.rows()
    assert all(row.is_replayable for row in run.rows())
    manifest = (run.recipe().run.root / "synthesize" / "fingerprint.json").read_text(encoding="utf-8")
    assert run.served.url not in manifest, "another address gives the same text"


def test_replay_over_logged_text_gives_the_rows_that_the_weights_give(run: Run) -> None:
    run.weights(here=True)
    with_weights = run.results()
    texts = log_of(evaluated_rows(run), run.folder / "served.jsonl") | {"name": "own"}
    run.weights(here=False)
    without = run.results(texts=texts)
    assert replayed(without) == replayed(with_weights)
    assert without["latency"] is None
    assert not [row for row in without["rows"] if row["method"] == "exact"]


def test_the_servers_own_answers_to_the_tasks_need_no_weights(run: Run) -> None:
    run.weights(here=True)
    own = [row for row in replayed(run.results()) if row["temperature"] == 0]
    run.weights(here=False)
    served = replayed(run.results(texts="engine"))
    assert [row for row in served if row["temperature"] == 0] == own, "greedy text is the same"
    assert [row for row in served if row["temperature"] == 0.7]


def test_a_draft_that_proposes_greedily_needs_no_logprobs(run: Run) -> None:
    run.results(texts="engine")
    rows = evaluated_rows(run)
    texts = log_of(rows, run.folder / "log.jsonl") | {"logprobs": "none"}
    greedy = replayed(run.results(texts=texts, draft_temperature=0))
    assert {row["temperature"] for row in greedy} == {0.0, 0.7}
    sampled = run.results(texts=texts)
    assert {row["temperature"] for row in replayed(sampled)} == {0.0}
    assert sampled["texts"]["left_out"] == {"no_logprobs": sum(row.temperature > 0 for row in rows)}


def test_prompts_that_were_trained_on_are_left_out_of_an_evaluation(run: Run) -> None:
    texts = log_of(run.rows("train"), run.folder / "trained.jsonl")
    with pytest.raises(DataError, match="trained_on"):
        run.results(texts=texts)


def test_training_rows_from_a_log_are_those_of_the_log(run: Run) -> None:
    rows = run.rows()
    source = log_of(rows, run.folder / "all.jsonl") | {"name": "asked"}
    recipe = run.recipe("from-log", {"tokens": "1M", "batch_rows": 8, "prompts": [source]})
    ready(run, recipe, "design", "prepare")
    artifact = pipeline.run(recipe, only=["synthesize"]).folder("synthesize")
    assert sorted(read_all(artifact), key=lambda row: row.row_id) == sorted(rows, key=lambda row: row.row_id)
    assert artifact.manifest()["engine"] == "none"


def ready(run: Run, recipe: Recipe, *stages: str) -> Recipe:
    """With the work of stages that no change of the recipe touches."""
    for stage in stages:
        shutil.copytree(run.recipe().run.root / stage, recipe.run.root / stage)
    return recipe


def test_logits_of_a_servers_text_come_from_the_weights_and_teach_the_draft(run: Run) -> None:
    with_logits = {**run.synthesize, "logits": {"kind": "top_k", "k": 16}}
    recipe = ready(run, run.recipe("taught", with_logits), "design", "prepare", "pretrain")
    asked = len(run.served.asked)
    with pytest.raises(TargetError, match="top_k scores what a server"):
        pipeline.run(recipe, only=["synthesize"])
    assert len(run.served.asked) == asked
    assert not (recipe.run.root / "synthesize").exists(), "nothing is claimed before the weights are there"
    run.weights(here=True)
    artifact = pipeline.run(recipe, only=["synthesize"]).folder("synthesize")
    assert list(read_all(artifact)) == run.rows()
    assert artifact.manifest()["logits"] == {"kind": "top_k", "k": 16}
    model = Target(recipe.target).model("cpu")
    row, logits = next(read_with_logits(artifact))
    own = sparse_logits(model, [row], 16)[0]
    assert np.array_equal(logits.read(0, len(row.response_ids)).ids, own.ids)
    assert recipe.align
    objective = TokenKDConfig(kind="token_kd", loss="forward_kl", source="stored")
    distilled = recipe.model_copy(update={"align": recipe.align.model_copy(update={"objective": objective})})
    assert pipeline.run(distilled, only=["align"]).folder("align").is_complete()


NEEDS_ALIGN = ["align.objective={kind: token_kd, source: target}"]
TOLD = "evaluate.texts: kind: target runs the target here.*kind: engine"


@pytest.mark.parametrize(
    ("texts", "overrides", "words"),
    [("engine", NEEDS_ALIGN, "align.objective: source: target reads"), ("target", [], TOLD)],
)
def test_what_needs_weights_that_are_not_here_is_told_before_a_day_of_training(
    run: Run, texts: str, overrides: list[str], words: str
) -> None:
    run.recipe("no-weights", texts={"kind": texts})
    recipe = load_recipe(str(run.folder / "recipe.yaml"), overrides)
    for begin in (lambda: check.run(recipe, _quiet()), lambda: pipeline.run(recipe)):
        with pytest.raises(TargetError, match=words):
            begin()
    assert not recipe.run.root.exists()


def test_a_log_of_evaluation_prompts_is_refused_as_training_data(run: Run) -> None:
    asked = [{"role": "user", "content": f"Tell me about number {i} and the fox."} for i in range(6)]
    lines = [{"messages": [message], "response": "y", "temperature": 0} for message in asked]
    path = run.folder / "leak.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = run.recipe("leak", {"prompts": [{"kind": "transcripts", "name": "leak", "path": str(path)}]})
    ready(run, recipe, "design", "prepare")
    with pytest.raises(DataError, match="6 evaluation"):
        pipeline.run(recipe, only=["synthesize"])


def test_missing_weights_are_told_where_they_are_needed(run: Run) -> None:
    with pytest.raises(FastDraftError, match="safetensors"):
        run.results()
