"""The benchmark stage in llama.cpp: a GGUF target with a GGUF draft, measured, killed, gone on with, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from conftest import write_recipe
from fastdraft import pipeline
from fastdraft.benchmark.rows import BenchmarkResults
from fastdraft.errors import FastDraftError, RecipeError, TargetError
from fastdraft.recipe.evaluation import BenchmarkConfig
from fastdraft.recipe.recipe import Recipe, load_recipe
from gguf_fixture import SIZE, write_gguf

LATER = ("prepare", "pretrain", "continue_pretrain", "synthesize", "align", "evaluate", "report")


def recipe_of(folder: Path, **llama_cpp: Any) -> Recipe:
    """Design, export and benchmark of a tiny pair, whose files lie in the folder."""
    (folder / "tasks.jsonl").write_text('{"prompt": "so it goes"}\n{"prompt": "a b c"}\n', encoding="utf-8")
    task = {"kind": "file", "name": "own", "path": str(folder / "tasks.jsonl"), "max_new_tokens": 12}
    measured = {
        "llamacpp": {"draft": str(folder / "d.gguf"), "threads": 1} | llama_cpp,
        "tasks": [task],
        "prompts": 2,
        "num_speculative_tokens": [2, 3],
        "lookup": [2],
        "temperatures": [0.0, 0.8],
        "repeats": 1,
        "sweep": {"prompt_tokens": [], "max_new_tokens": [], "concurrency": [2]},
    }
    values = {"export": {"formats": ["huggingface"]}, "benchmark": measured}
    return load_recipe(str(write_recipe(folder, folder / "t.gguf", **dict.fromkeys(LATER), **values)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_gguf(folder / "t.gguf")
    write_gguf(folder / "d.gguf", noise=0.02)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("FASTDRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_every_proposer_is_measured_and_told_with_its_runtime(folder: Path) -> None:
    run = pipeline.run(recipe_of(folder), only=["design", "export", "benchmark"])
    written = json.loads((run.folder("benchmark").path / "benchmark.json").read_text(encoding="utf-8"))
    results = BenchmarkResults.from_json(written)
    assert {row.key for row in results.rows} == {("llamacpp", "F32", "F32")}
    asked = {("draft", 2), ("draft", 3), ("lookup", 2), ("lookup_draft", 2)}
    for temperature in (0.0, 0.8):
        rows = [r for r in results.rows if r.part == "tasks" and r.temperature == temperature]
        assert {(row.proposer, row.num_speculative_tokens) for row in rows} == asked
        assert all(row.lossless and row.speedup for row in rows)
    greedy = [row for row in results.rows if row.part == "tasks" and row.temperature == 0]
    assert all(row.same_text == row.texts == 2 for row in greedy)
    # What the server counted is what replay of these files predicts, for sampled text too.
    for row in results.rows:
        if row.part == "tasks" and row.proposer == "draft":
            counted = row.num_accepted_tokens, row.block_efficiency
            assert counted == (row.replayed_accepted_tokens, row.replayed_block_efficiency)
    assert any(row.num_accepted_tokens for row in results.rows)
    assert [row.concurrency for row in results.rows if row.part == "concurrency"] == [2]
    assert results.runtime.name == "llamacpp"
    assert results.launches["llamacpp"].startswith("llama-server -m path/to/target-F32.gguf")
    assert {size.bytes for size in results.models} == {results.models[0].bytes}  # of one shape


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"draft": "none.gguf"}, RecipeError, r"benchmark\.llamacpp\.draft: none\.gguf: must be a GGUF file"),
        ({"server": "/no/llama-server"}, FastDraftError, "server: /no/llama-server: must be llama.cpp's"),
        ({"target": "none.gguf"}, RecipeError, r"benchmark\.llamacpp\.target: none\.gguf: must be a GGUF"),
    ],
)
def test_what_is_not_there_is_refused_before_any_stage(
    tmp_path: Path, changes: dict[str, str], error: type[FastDraftError], message: str
) -> None:
    write_gguf(tmp_path / "t.gguf")
    write_gguf(tmp_path / "d.gguf", noise=0.02)
    with pytest.raises(error, match=message):
        pipeline.run(recipe_of(tmp_path, **changes))
    assert not (tmp_path / "runs" / "tiny" / "design").exists()


def test_a_draft_of_another_vocabulary_is_refused_before_a_server_starts(tmp_path: Path) -> None:
    write_gguf(tmp_path / "t.gguf")
    other = write_gguf(tmp_path / "d.gguf", size=SIZE + 200)
    with pytest.raises(TargetError, match=rf"{other}: draft {SIZE + 200}, target {SIZE} tokens"):
        pipeline.run(recipe_of(tmp_path))


@pytest.mark.parametrize(
    ("values", "formats", "gguf", "expected"),
    [
        ({}, ["huggingface"], False, ["openvino"]),
        ({}, ["huggingface"], True, ["openvino"]),
        ({}, ["huggingface", "gguf"], True, ["llamacpp"]),
        ({}, ["huggingface", "gguf"], False, ["openvino"]),
        ({"llamacpp": {"draft": "d.gguf"}}, ["huggingface"], True, ["llamacpp"]),
        ({"runtimes": ["llamacpp", "openvino"]}, ["huggingface"], False, ["llamacpp", "openvino"]),
    ],
)
def test_the_runtime_follows_from_target_and_exports_unless_named(
    values: dict[str, Any], formats: list[str], gguf: bool, expected: list[str]
) -> None:
    assert BenchmarkConfig(**values).runtimes_of(formats, gguf=gguf) == expected
