"""Synthetic rows on disk: whole or not there, found again exactly, and split by prompt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastdraft.data.rows import (
    SyntheticRow,
    ids_hash,
    read_all,
    read_columns,
    read_facts,
    read_rows,
    unit_name,
    unit_paths,
    validation_keys,
    write_rows,
)
from fastdraft.errors import FastDraftError
from fastdraft.functional.generation import Generation, Sampling
from fastdraft.run_folder import StageFolder


def make_row(number: int, prompt: int | None = None) -> SyntheticRow:
    answer = Generation([1, number if prompt is None else prompt], [number, 3], [-0.5, -0.25], "stop")
    return SyntheticRow.of(answer, "instructions", Sampling(0.6))


def test_rows_and_facts_come_back_as_they_were_written(tmp_path: Path) -> None:
    long = replace(make_row(70_000), logprobs=[0.0, -12.5], temperature=0.0, finish_reason="length")
    for rows in ([make_row(1), long, make_row(2)], []):
        facts, path = {"source": "näme", "counts": {"asked": len(rows)}}, tmp_path / "rows.parquet"
        write_rows(path, rows, facts)
        assert (read_rows(path), read_facts(path)) == (rows, facts)
        assert read_columns(path, ["source"]) == {"source": ["instructions"] * len(rows)}


def test_equal_rows_make_equal_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_rows(tmp_path / name, [make_row(i) for i in range(20)], {"a": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "unit-00000.parquet"
    write_rows(path, [make_row(i) for i in range(50)])
    path.write_bytes(path.read_bytes()[:-20])
    for broken in (path, tmp_path / "unit-00001.parquet"):
        with pytest.raises(FastDraftError, match="unreadable.*delete it and run again"):
            read_rows(broken)


def test_the_hash_knows_where_prompt_and_response_part() -> None:
    assert ids_hash([1, 2], [3]) != ids_hash([1], [2, 3])
    assert ids_hash([1, 2], [3]) == ids_hash([1, 2], [3])


def test_the_splits_hold_every_row_once_in_the_order_of_writing_and_share_no_prompt(tmp_path: Path) -> None:
    rows, folder = [make_row(i, prompt=i % 100) for i in range(400)], StageFolder(tmp_path / "synthesize")
    for unit in range(40):
        write_rows(folder.path / unit_name(unit), rows[unit * 10 : unit * 10 + 10])
    assert len(unit_paths(folder)) == 40
    assert list(read_all(folder)) == rows
    train, validation = list(read_all(folder, "train")), list(read_all(folder, "validation"))
    assert {row.prompt_key for row in train}.isdisjoint(row.prompt_key for row in validation)
    assert sorted(row.row_id for row in train + validation) == sorted(row.row_id for row in rows)
    assert validation


def test_about_a_twentieth_of_the_prompts_is_held_back_and_stays_so() -> None:
    keys = [ids_hash([i]) for i in range(10_000)]
    held = validation_keys(keys)
    assert 400 < len(held) < 600
    assert validation_keys(keys[:5000]) <= held


def test_few_prompts_still_give_some_validation_but_never_more_than_half() -> None:
    counts = {n: len(validation_keys(ids_hash([i]) for i in range(n))) for n in (20, 3, 1)}
    assert counts == {20: 4, 3: 1, 1: 0}
