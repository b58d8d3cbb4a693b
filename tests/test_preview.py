"""What `fastdraft preview` shows: the prompt as it was asked and, marked, the very tokens that training
uses.
"""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastdraft import pipeline
from fastdraft.commands import preview
from fastdraft.commands.preview import batch_row, preview_row, spread_batch_rows
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, read_all, unit_name, write_rows
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder
from fastdraft.stages.align import training_batches
from fastdraft.training.batches import Sample, packed_batch, padded_batch


def make_row(number: int, prompt_ids: list[int], response_ids: list[int]) -> SyntheticRow:
    answer = Generation(prompt_ids, response_ids, [0.0] * len(response_ids), "stop")
    return replace(SyntheticRow.of(answer, "instructions", Sampling(0.6)), row_id=str(number))


@pytest.fixture
def tokenizer(tiny_target: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_target)


@pytest.fixture
def finished(tiny_recipe: Path, tokenizer: Any) -> Path:
    """A run's folder with 30 rows in 3 units."""
    recipe = load_recipe(str(tiny_recipe))
    root = recipe.run.root
    root.mkdir(parents=True)
    (root / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    prompt = tokenizer("<|user|>\nHello<|end|>\n<|assistant|>\n").input_ids
    for unit in range(3):
        texts = {i: f"Answer {i}<|end|>" for i in range(unit * 10, unit * 10 + 10)}
        rows = [make_row(i, prompt, tokenizer(text).input_ids) for i, text in texts.items()]
        write_rows(root / "synthesize" / unit_name(unit), rows)
    return root


def test_rows_are_spread_over_all_that_was_written_and_the_trained_tokens_are_told(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview.run(finished, 3, Console())
    shown = capsys.readouterr().out
    assert shown.count("---") == 3
    for i in (0, 10, 20):
        assert f"<|user|>\nHello<|end|>\n<|assistant|>\n[[Answer {i}<|end|>]]" in shown
    rows = preview.spread_rows(RunFolder(finished).folder("synthesize"), 100)
    assert len({row.row_id for row in rows}) == len(rows) == 30, "more than there are shows each once"
    trained, whole = len(rows[0].response_ids), len(rows[0].prompt_ids) + len(rows[0].response_ids)
    assert f"{trained} of {whole} tokens trained ({trained / whole:.0%})" in shown


def test_in_colour_exactly_the_response_is_green(tokenizer: Any) -> None:
    row = preview_row(make_row(1, tokenizer("Hello").input_ids, tokenizer(" there").input_ids))
    shown = preview.format_row(row, tokenizer, colour=True)
    assert "\x1b[2mHello\x1b[0m\x1b[32m there\x1b[0m" in shown


def test_a_text_cannot_drive_the_readers_terminal(tokenizer: Any) -> None:
    row = make_row(1, tokenizer("A\x1b[2J\tB\n").input_ids, tokenizer("C\r\x07").input_ids)
    shown = preview.format_row(preview_row(row), tokenizer, colour=False)
    assert "A\\x1b[2J\tB\n[[C\\x0d\\x07]]" in shown


def test_what_cannot_be_shown_is_one_line(finished: Path, tmp_path: Path) -> None:
    quiet = Console(quiet=True)
    with pytest.raises(FastDraftError, match="must be the folder of a run"):
        preview.run(tmp_path / "nowhere", 1, quiet)
    with pytest.raises(RecipeError, match="--count"):
        preview.run(finished, 0, quiet)
    with pytest.raises(FastDraftError, match="not finished"):
        preview.run(finished, 1, quiet, "align")
    shutil.rmtree(finished / "synthesize")
    with pytest.raises(FastDraftError, match="no synthetic rows"):
        preview.run(finished, 1, quiet)


def test_a_row_without_trained_tokens_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(FastDraftError, match="0 % trained tokens"):
        preview.format_row(preview_row(make_row(1, [5, 6], [])), tokenizer, colour=False)
    batch = padded_batch([Sample([5, 6], [7, 8]), Sample([5, 6, 9, 9], [7])])
    empty = replace(batch, labels=batch.labels[:2], index=batch.index[:2])  # type: ignore[index]
    assert batch_row(empty, 0, "row").trained == [False, False, True, True]
    with pytest.raises(FastDraftError, match="row 1: 0 % trained tokens"):
        preview.format_row(batch_row(empty, 1, "row 1"), tokenizer, colour=False)


def test_a_row_of_a_padded_batch_is_read_back_token_by_token() -> None:
    samples = [Sample([5, 6], [7, 8, 3]), Sample([9, 10, 11, 12], [7]), Sample([], [7, 8])]
    batch = padded_batch(samples)
    rows = [batch_row(batch, place, "") for place in range(3)]
    assert [row.token_ids for row in rows] == [[5, 6, 7, 8, 3], [9, 10, 11, 12, 7], [7, 8]]
    assert [row.trained for row in rows] == [[False] * 2 + [True] * 3, [False] * 4 + [True], [False, True]]


def test_packed_rows_are_trained_but_for_their_first_token() -> None:
    row = batch_row(packed_batch(np.array([[4, 5, 6, 7], [8, 9, 10, 11]])), 1, "")
    assert (row.token_ids, row.trained) == ([8, 9, 10, 11], [False, True, True, True])


def test_the_batches_of_align_are_shown_as_the_draft_reads_them(
    tiny_recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe(str(tiny_recipe), ["align.batch_tokens=128", "align.pretraining_share=0.3"])
    stages = ["design", "prepare", "pretrain", "continue_pretrain", "synthesize"]
    root = pipeline.run(recipe, only=stages).root
    preview.run(root, 4, Console(quiet=True), "align")
    shown = capsys.readouterr().out
    rows = shown.split("--- step")[1:]
    assert len(rows) == 4
    assert sum("pre-training mixture" in row for row in rows) >= 1
    assert any(", responses," in row for row in rows)
    assert all(row.count("[[") == row.count("]]") >= 1 for row in rows)
    written = {tuple(row.response_ids) for row in read_all(RunFolder(root).folder("synthesize"), "train")}
    source = training_batches(recipe.align, pipeline.make_context(recipe, Console(quiet=True)))  # type: ignore[arg-type]
    for row in spread_batch_rows(source, 6):
        if "responses" in row.about:
            assert tuple(itertools.compress(row.token_ids, row.trained)) in written
