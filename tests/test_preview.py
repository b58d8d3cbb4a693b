"""What `fastdraft preview` shows: the prompt as it was asked and, marked, the very tokens that training uses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fastdraft import pipeline
from fastdraft.commands import preview
from fastdraft.commands.preview import batch_row, preview_row, spread_batch_rows
from fastdraft.console import Console
from fastdraft.data.rows import SyntheticRow, ids_hash, read_all, unit_name, write_rows
from fastdraft.errors import FastDraftError, RecipeError
from fastdraft.recipe.recipe import load_recipe
from fastdraft.run_folder import RunFolder
from fastdraft.stages.align import training_batches
from fastdraft.training.batches import Sample, packed_batch, padded_batch


def make_row(number: int, prompt_ids: list[int], response_ids: list[int]) -> SyntheticRow:
    key = ids_hash([number])
    return SyntheticRow(
        key, "instructions", key, prompt_ids, response_ids, [0.0] * len(response_ids), 0.6, 0, 1.0, "stop"
    )


@pytest.fixture
def finished(tiny_recipe: Path, tiny_target: Path) -> Path:
    """A run's folder with 30 rows in 3 units."""
    recipe, tokenizer = load_recipe(str(tiny_recipe)), AutoTokenizer.from_pretrained(tiny_target)
    root = recipe.run.root
    root.mkdir(parents=True)
    (root / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    prompt = tokenizer("<|user|>\nHello<|end|>\n<|assistant|>\n").input_ids
    for unit in range(3):
        rows = [
            make_row(i, prompt, tokenizer(f"Answer {i}<|end|>").input_ids)
            for i in range(unit * 10, unit * 10 + 10)
        ]
        write_rows(root / "synthesize" / unit_name(unit), rows)
    return root


def test_rows_are_spread_over_all_that_was_written(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview.run(finished, 3, Console())
    shown = capsys.readouterr().out
    assert shown.count("---") == 3
    assert [f"[[Answer {i}<|end|>]]" in shown for i in (0, 10, 20)] == [True] * 3


def test_without_a_terminal_the_trained_tokens_stand_between_marks(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preview.run(finished, 1, Console())
    assert "<|user|>\nHello<|end|>\n<|assistant|>\n[[Answer 0<|end|>]]" in capsys.readouterr().out


def test_in_colour_exactly_the_response_is_green(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    row = make_row(1, tokenizer("Hello").input_ids, tokenizer(" there").input_ids)
    assert "\x1b[2mHello\x1b[0m\x1b[32m there\x1b[0m" in preview.format_row(
        preview_row(row), tokenizer, colour=True
    )


def test_a_text_cannot_drive_the_readers_terminal(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    row = make_row(1, tokenizer("A\x1b[2J\tB\n").input_ids, tokenizer("C\r\x07").input_ids)
    shown = preview.format_row(preview_row(row), tokenizer, colour=False)
    assert "A\\x1b[2J\tB\n[[C\\x0d\\x07]]" in shown


def test_more_rows_than_there_are_shows_each_once(finished: Path) -> None:
    rows = preview.spread_rows(RunFolder(finished).folder("synthesize"), 100)
    assert len({row.row_id for row in rows}) == len(rows) == 30


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FastDraftError, match="must be the folder of a run"):
        preview.run(tmp_path, 1, Console(quiet=True))


def test_a_run_without_rows_is_one_line(finished: Path) -> None:
    shutil.rmtree(finished / "synthesize")
    with pytest.raises(FastDraftError, match="no synthetic rows"):
        preview.run(finished, 1, Console(quiet=True))


def test_a_count_below_one_is_refused(finished: Path) -> None:
    with pytest.raises(RecipeError, match="--count"):
        preview.run(finished, 0, Console(quiet=True))


def test_the_share_of_trained_tokens_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview.run(finished, 1, Console())
    row = preview.spread_rows(RunFolder(finished).folder("synthesize"), 1)[0]
    whole = len(row.prompt_ids) + len(row.response_ids)
    assert (
        f"{len(row.response_ids)} of {whole} tokens trained ({len(row.response_ids) / whole:.0%})"
        in capsys.readouterr().out
    )


def test_a_row_without_trained_tokens_is_an_error(tiny_target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_target)
    with pytest.raises(FastDraftError, match="0 % trained tokens"):
        preview.format_row(preview_row(make_row(1, [5, 6], [])), tokenizer, colour=False)
    batch = padded_batch([Sample([5, 6], [7, 8]), Sample([5, 6, 9, 9], [7])], 0)
    empty = replace(batch, labels=batch.labels[:2], index=batch.index[:2])  # type: ignore[index]
    assert batch_row(empty, 0, "row").trained == [False, False, True, True]
    with pytest.raises(FastDraftError, match="row 1: 0 % trained tokens"):
        preview.format_row(batch_row(empty, 1, "row 1"), tokenizer, colour=False)


def test_a_row_of_a_padded_batch_is_read_back_token_by_token() -> None:
    samples = [Sample([5, 6], [7, 8, 3]), Sample([9, 10, 11, 12], [7]), Sample([], [7, 8])]
    batch = padded_batch(samples, 0)
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
    responses = [row for row in rows if ", responses," in row]
    assert responses
    assert all(row.count("[[") == row.count("]]") >= 1 for row in rows)
    written = {tuple(row.response_ids) for row in read_all(RunFolder(root).folder("synthesize"), "train")}
    source = training_batches(recipe.align, pipeline.make_context(recipe, Console(quiet=True)))  # type: ignore[arg-type]
    for row in spread_batch_rows(source, 6):
        if "responses" in row.about:
            assert (
                tuple(token for token, trained in zip(row.token_ids, row.trained, strict=True) if trained)
                in written
            )


def test_the_batches_of_a_run_without_align_are_refused(finished: Path) -> None:
    with pytest.raises(FastDraftError, match="not finished"):
        preview.run(finished, 1, Console(quiet=True), "align")
