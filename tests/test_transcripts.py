"""Logs of a target: every shape of line, training rows that stand as they are, replay without the target's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("httpx")

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.data.chat import prompt_ids
from fastdraft.data.responses import SyntheticRow, read_all, read_rows
from fastdraft.data.transcripts import TranscriptLog, read_transcripts
from fastdraft.errors import DataError, FastDraftError, RecipeError, TargetError
from fastdraft.interfaces import Generation, Sampling, TargetConfig
from fastdraft.modeling.loading import load_target, load_tokenizer, load_vocabulary
from fastdraft.recipe import Recipe, load_recipe
from fastdraft.runtimes.huggingface import HuggingFaceEngine
from serving import Served


@pytest.fixture(scope="module")
def written(tiny_target: Path) -> Generation:
    """One sampled answer of the target."""
    config = TargetConfig(model=str(tiny_target))
    engine = HuggingFaceEngine(load_target(config, "cpu"), load_vocabulary(config))
    prompt = prompt_ids(load_tokenizer(str(tiny_target)), "What is a fox?", True)
    return engine.generate([prompt], Sampling(0.7), 12, 1)[0]


def read(folder: Path, target: Path, *lines: object, **settings: Any) -> Any:
    path = folder / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = TranscriptLog(**{"kind": "transcripts", "name": "log", "path": str(path), "logprobs": "processed", **settings})
    return read_transcripts(config, load_tokenizer(str(target)), load_vocabulary(TargetConfig(model=str(target))), 0)


def shapes(written: Generation, text: str) -> dict[str, dict[str, Any]]:
    """One answer in every shape of line that is understood."""
    messages = [{"role": "user", "content": "What is a fox?"}]
    ids = {"token_ids": written.response_ids, "finish_reason": written.finish_reason}
    legacy = {**ids, "text": text, "logprobs": {"tokens": ["?"] * len(written.logprobs), "token_logprobs": written.logprobs}}
    named = {"tokens": [f"token_id:{i}" for i in written.response_ids], "token_logprobs": written.logprobs}
    content = [{"id": i, "token": "?", "logprob": p} for i, p in zip(written.response_ids, written.logprobs, strict=True)]
    sglang = {"output_token_logprobs": [[p, i, "?"] for i, p in zip(written.response_ids, written.logprobs, strict=True)]}
    message = {"message": {"role": "assistant", "content": text}, "finish_reason": written.finish_reason}
    request = {"messages": messages, "temperature": 0.7}
    return {
        "chat and choices": {"messages": messages, "temperature": 0.7, "choices": [legacy]},
        "chat and response": {
            "messages": messages,
            "temperature": 0.7,
            "response": {"choices": [{**message, "logprobs": {"content": content}}]},
        },
        "request and response": {"request": request, "response": {"choices": [{**message, "meta_info": sglang}]}},
        "batch": {"body": request, "response": {"status_code": 200, "body": {"choices": [{**legacy, "logprobs": named}]}}},
        "prompt ids": {"prompt": written.prompt_ids, "temperature": 0.7, "choices": [legacy]},
        "logged prompt ids": {"prompt": "lost", "prompt_token_ids": written.prompt_ids, "temperature": 0.7, "choices": [legacy]},
        "plain lists": {"messages": messages, "temperature": 0.7, "response": text, **ids, "logprobs": written.logprobs},
    }


@pytest.mark.parametrize(
    "shape", ["chat and choices", "chat and response", "request and response", "batch", "prompt ids", "logged prompt ids", "plain lists"]
)
def test_every_shape_of_line_gives_the_answer_that_was_written(tmp_path: Path, tiny_target: Path, written: Generation, shape: str) -> None:
    text = load_tokenizer(str(tiny_target)).decode(written.response_ids, skip_special_tokens=True)
    rows = read(tmp_path, tiny_target, shapes(written, text)[shape]).rows
    assert len(rows) == 1
    assert rows[0].generation == written
    assert rows[0].sampling == Sampling(0.7)


def test_a_conversation_that_ends_with_the_assistant_is_an_answer(tmp_path: Path, tiny_target: Path) -> None:
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One fox."}, {"role": "user", "content": "More."}]
    row = read(tmp_path, tiny_target, {"messages": [*turns, {"role": "assistant", "content": "the stars"}]}, temperature=1.0).rows[0]
    tokenizer = load_tokenizer(str(tiny_target))
    assert tokenizer.decode(row.generation.response_ids) == "the stars<|end|>"
    assert "One fox." in tokenizer.decode(row.generation.prompt_ids)
    assert row.generation.logprobs == [], "nobody told them"


def test_a_request_that_bends_the_distribution_keeps_no_logprobs(tmp_path: Path, tiny_target: Path, written: Generation) -> None:
    line = shapes(written, "x")["chat and choices"]
    assert read(tmp_path, tiny_target, {**line, "repetition_penalty": 1.2}).rows[0].generation.logprobs == []
    assert read(tmp_path, tiny_target, {**line, "repetition_penalty": 1.0}).rows[0].generation.logprobs == written.logprobs


def test_raw_logprobs_count_at_temperature_one_only(tmp_path: Path, tiny_target: Path, written: Generation) -> None:
    line = shapes(written, "x")["chat and choices"]
    assert read(tmp_path, tiny_target, line, logprobs="raw").rows[0].generation.logprobs == []
    assert read(tmp_path, tiny_target, {**line, "temperature": 1}, logprobs="raw").rows[0].generation.logprobs == written.logprobs


def test_text_that_does_not_come_back_exactly_is_told(tmp_path: Path, tiny_target: Path) -> None:
    line = {"prompt": "The fox", "temperature": 1, "choices": [{"text": "half a \ufffd", "finish_reason": "length"}]}
    assert read(tmp_path, tiny_target, line).rows[0].generation.fault == "not_round_trip"
    special = {"prompt": "The fox", "temperature": 1, "choices": [{"text": "says <|user|>", "finish_reason": "length"}]}
    assert read(tmp_path, tiny_target, special).rows[0].generation.fault == "not_round_trip"
    tool = {
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 1,
        "choices": [{"message": {"tool_calls": [{}]}, "finish_reason": "tool_calls"}],
    }
    assert read(tmp_path, tiny_target, tool).rows[0].generation.fault == "finish_tool_calls"
    counted = {**line, "choices": [{"text": " the stars", "finish_reason": "length"}], "usage": {"completion_tokens": 9}}
    assert read(tmp_path, tiny_target, counted).rows[0].generation.fault == "not_round_trip"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "x", "choices": [{"text": "y", "finish_reason": "stop"}]}, "no temperature"),
        ({"prompt": "x", "temperature": 1}, "must hold"),
        ({"text": "x"}, "must hold"),
        ({"messages": [{"role": "user"}], "response": "y", "temperature": 1}, "message without text"),
        ({"prompt": "x", "response": "y", "temperature": "hot"}, "must be numbers"),
        ([1], "JSON list"),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(tmp_path: Path, tiny_target: Path, line: object, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read(tmp_path, tiny_target, {"prompt": "a", "temperature": 0, "response": "fox"}, line)
    assert "line 2" in str(caught.value)


# ------------------------------------------------------------------------------------------------------- whole runs


class Run:
    """A served target whose weights can be moved away, and the recipe of a run for it."""

    def __init__(self, folder: Path, target: Path, served: Served) -> None:
        self.folder, self.served, self.target = folder, served, folder / "target"
        shutil.copytree(target, self.target)
        self.away = folder / "model.safetensors"
        (self.target / "model.safetensors").rename(self.away)
        engine = {"kind": "openai", "servers": [served.url], "logprobs": "processed"}
        prompts = [{"kind": "jsonl", "name": "asked", "path": str(folder / "prompts.jsonl")}]
        self.synthesize = {
            "tokens": "2k",
            "temperatures": [0, 0.7],
            "max_new_tokens": 16,
            "batch_rows": 16,
            "prompts": prompts,
            "engine": engine,
        }
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
        return dict(json.loads((run.artifact("evaluate").path / "results.json").read_text(encoding="utf-8")))

    def weights(self, *, here: bool) -> None:
        source, goal = (self.away, self.target / self.away.name) if here else (self.target / self.away.name, self.away)
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
    return [{k: v for k, v in row.items() if k not in timed} for row in results["rows"] if row["method"] == "replay"]


def log_of(rows: list[SyntheticRow], path: Path) -> Path:
    """Rows as a server's log: ids in, ids out."""
    lines = [
        {"prompt": row.prompt_ids, "temperature": row.temperature, "top_k": row.top_k, "top_p": row.top_p,
         "choices": [{"token_ids": row.response_ids, "finish_reason": row.finish_reason, "logprobs": {"token_logprobs": row.logprobs}}]}
        for row in rows
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_synthesize_and_align_need_no_weights_and_no_secret_is_kept(run: Run) -> None:
    rows = list(read_all(pipeline.make_context(run.recipe(), _quiet()).require("synthesize")))
    assert rows
    assert all(row.is_replayable for row in rows)
    manifest = (run.recipe().run.root / "synthesize" / "fingerprint.json").read_text(encoding="utf-8")
    assert run.served.url not in manifest, "another address gives the same text"


def _quiet() -> Any:
    from fastdraft.console import Console

    return Console(quiet=True)


def test_replay_over_logged_text_gives_the_rows_that_the_weights_give(run: Run) -> None:
    run.weights(here=True)
    with_weights = run.results()
    texts = sorted((run.recipe().run.root / "evaluate" / "generations").glob("*.parquet"))
    rows = [row for path in texts for row in read_rows(path)]
    log = log_of(rows, run.folder / "served.jsonl")
    run.weights(here=False)
    without = run.results(texts={"kind": "transcripts", "name": "own", "path": str(log), "logprobs": "processed"})
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


def test_held_out_rows_are_scored_alike_with_and_without_weights(run: Run) -> None:
    kept = run.results(texts="synthesize")
    run.weights(here=True)
    scored = run.results(texts={"kind": "synthesize", "logprobs": "target"})
    assert {row["task"] for row in replayed(kept)} == {"asked"}
    for own, other in zip(replayed(kept), replayed(scored), strict=True):
        assert own["block_efficiency"] == pytest.approx(other["block_efficiency"], abs=1e-4)


def test_a_draft_that_proposes_greedily_needs_no_logprobs(run: Run) -> None:
    run.results(texts="engine")
    written = sorted((run.recipe().run.root / "evaluate" / "generations").glob("*.parquet"))
    rows = [row for path in written for row in read_rows(path)]
    log = log_of(rows, run.folder / "log.jsonl")
    texts = {"kind": "transcripts", "name": "log", "path": str(log)}
    greedy = replayed(run.results(texts=texts, draft_sampling="greedy"))
    assert {row["temperature"] for row in greedy} == {0.0, 0.7}
    assert replayed(run.results(texts={**texts, "logprobs": "processed"}, draft_temperature=0)) == greedy
    sampled = run.results(texts=texts)
    assert {row["temperature"] for row in replayed(sampled)} == {0.0}
    assert sampled["texts"]["left_out"] == {"no_logprobs": sum(row.temperature > 0 for row in rows)}


def test_prompts_that_were_trained_on_are_left_out_of_an_evaluation(run: Run) -> None:
    trained = list(read_all(pipeline.make_context(run.recipe(), _quiet()).require("synthesize"), "train"))
    log = log_of(trained, run.folder / "trained.jsonl")
    with pytest.raises(DataError, match="trained_on"):
        run.results(texts={"kind": "transcripts", "name": "log", "path": str(log), "logprobs": "processed"})


def test_training_rows_from_a_log_are_those_of_the_log(run: Run) -> None:
    rows = list(read_all(pipeline.make_context(run.recipe(), _quiet()).require("synthesize")))
    log = log_of(rows, run.folder / "all.jsonl")
    source = {"kind": "transcripts", "name": "asked", "path": str(log), "logprobs": "processed"}
    recipe = run.recipe("from-log", {"tokens": "1M", "batch_rows": 8, "prompts": [source]})
    shutil.copytree(run.recipe().run.root / "design", recipe.run.root / "design")
    shutil.copytree(run.recipe().run.root / "prepare", recipe.run.root / "prepare")
    artifact = pipeline.run(recipe, only=["synthesize"]).artifact("synthesize")
    assert sorted(read_all(artifact), key=lambda row: row.row_id) == sorted(rows, key=lambda row: row.row_id)
    assert artifact.manifest()["engine"] == "none"


def test_a_log_of_evaluation_prompts_is_refused_as_training_data(run: Run) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"Tell me about number {i} and the fox."}], "response": "y", "temperature": 0}
        for i in range(6)
    ]
    path = run.folder / "leak.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    recipe = run.recipe("leak", {"prompts": [{"kind": "transcripts", "name": "leak", "path": str(path)}]})
    shutil.copytree(run.recipe().run.root / "design", recipe.run.root / "design")
    shutil.copytree(run.recipe().run.root / "prepare", recipe.run.root / "prepare")
    with pytest.raises(DataError, match="6 evaluation"):
        pipeline.run(recipe, only=["synthesize"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": []}, "at least 1 task"),
        ({"draft_sampling": "greedy", "draft_temperature": 0.5}, "draft_sampling"),
        ({"texts": "nowhere"}, "kind|tag"),
        ({"texts": {"kind": "transcripts", "name": "x"}}, "required"),
    ],
)
def test_texts_that_make_no_sense_are_refused_in_one_line(run: Run, change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        run.recipe(**change)
    assert "\n" not in str(caught.value)


def test_sampled_texts_of_a_server_without_logprobs_are_refused(run: Run) -> None:
    quiet = {**run.synthesize, "engine": {**run.synthesize["engine"], "logprobs": "none"}}
    recipe = run.recipe("silent", quiet, texts="engine")
    for stage in ("design", "prepare", "pretrain"):
        shutil.copytree(run.recipe().run.root / stage, recipe.run.root / stage)
    pipeline.run(recipe, only=["synthesize", "align"])
    with pytest.raises(TargetError, match="without log-probs"):
        pipeline.run(recipe, only=["evaluate"])


def test_missing_weights_are_told_where_they_are_needed(run: Run) -> None:
    with pytest.raises(FastDraftError, match="safetensors"):
        run.results()
