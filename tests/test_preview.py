"""What `fastdraft preview` shows: the prompt as it was asked and, marked, the very tokens that training uses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fastdraft.artifacts import RunDirectory
from fastdraft.commands import preview
from fastdraft.console import Console
from fastdraft.data.responses import SyntheticRow, ids_hash, unit_path, write_rows
from fastdraft.errors import ArtifactError, RecipeError
from fastdraft.recipe import load_recipe


def make_row(number: int, prompt_ids: list[int], response_ids: list[int]) -> SyntheticRow:
    key = ids_hash([number])
    return SyntheticRow(key, "instructions", key, prompt_ids, response_ids, [0.0] * len(response_ids), 0.6, 0, 1.0, "stop")


@pytest.fixture
def finished(tiny_recipe: Path, tiny_target: Path) -> Path:
    """A run's folder with 30 rows in 3 units."""
    recipe, tokenizer = load_recipe(str(tiny_recipe)), AutoTokenizer.from_pretrained(tiny_target)
    root = recipe.run.root
    root.mkdir(parents=True)
    (root / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    prompt = tokenizer("<|user|>\nHello<|end|>\n<|assistant|>\n").input_ids
    for unit in range(3):
        rows = [make_row(i, prompt, tokenizer(f"Answer {i}<|end|>").input_ids) for i in range(unit * 10, unit * 10 + 10)]
        write_rows(unit_path(RunDirectory(root).artifact("synthesize"), unit), rows)
    return root


def test_rows_are_spread_over_all_that_was_written(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview.run(finished, 3, Console())
    shown = capsys.readouterr().out
    assert shown.count("---") == 3
    assert [f"[[Answer {i}<|end|>]]" in shown for i in (0, 10, 20)] == [True] * 3


def test_without_a_terminal_the_trained_tokens_stand_between_marks(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview.run(finished, 1, Console())
    assert "<|user|>\nHello<|end|>\n<|assistant|>\n[[Answer 0<|end|>]]" in capsys.readouterr().out


def test_in_colour_exactly_the_response_is_green(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    row = make_row(1, tokenizer("Hello").input_ids, tokenizer(" there").input_ids)
    assert "\x1b[2mHello\x1b[0m\x1b[32m there\x1b[0m" in preview.format_row(row, tokenizer, colour=True)


def test_more_rows_than_there_are_shows_each_once(finished: Path) -> None:
    rows = preview.spread_rows(RunDirectory(finished).artifact("synthesize"), 100)
    assert len({row.row_id for row in rows}) == len(rows) == 30


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="must be the folder of a run"):
        preview.run(tmp_path, 1, Console(quiet=True))


def test_a_run_without_rows_is_one_line(finished: Path) -> None:
    shutil.rmtree(finished / "synthesize")
    with pytest.raises(ArtifactError, match="no synthetic rows"):
        preview.run(finished, 1, Console(quiet=True))


def test_a_count_below_one_is_refused(finished: Path) -> None:
    with pytest.raises(RecipeError, match="--count"):
        preview.run(finished, 0, Console(quiet=True))
