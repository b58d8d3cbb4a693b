"""Data sets of the hub, streamed from a local folder: order, going on, what is wrong in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from fastdraft.data import corpora
from fastdraft.data.corpora import blocks, documents, hub_values, open_hub
from fastdraft.errors import DataError
from fastdraft.recipe.prepare import HubSource

FILES, ROWS = 4, 30


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubSource:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for file in range(FILES):
        texts = [f"file {file} row {row}" for row in range(ROWS)]
        (tmp_path / "data").mkdir(exist_ok=True)
        table = pyarrow.table({"text": texts, "count": list(range(ROWS))})
        parquet.write_table(table, tmp_path / "data" / f"{file}.parquet")
    return HubSource(name="h", kind="hub", dataset=str(tmp_path / "data"))


def test_files_come_in_an_order_of_the_seed_and_prompts_in_the_data_sets_own(source: HubSource) -> None:
    orders = [[str(text).split()[1] for _, _, text in documents(source, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    files = [str(file) for file in range(FILES) for _ in range(ROWS)]
    assert sorted(orders[2]) == sorted(orders[0]) == files
    values = list(hub_values(open_hub(source), "name", "text"))
    assert values == [(n + 1, f"file {n // ROWS} row {n % ROWS}") for n in range(FILES * ROWS)]


def test_reading_goes_on_behind_any_block(source: HubSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "BLOCK_CHARS", 250)
    found = [block.pieces for block in blocks(source, 1, (0, 0))]
    assert sum(map(len, found)) == FILES * ROWS
    for number, block in list(enumerate(blocks(source, 1, (0, 0))))[::2]:
        assert [later.pieces for later in blocks(source, 1, block.end)] == found[number + 1 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"field": "body"}, r"file \d of 4: row 1: no 'body'; has text, count"),
        ({"field": "count"}, r"file \d of 4: row 1: 'count' is a int; must be text"),
        ({"dataset": "/none"}, r"data set /none: \w+ after 0 rows"),
        ({"split": "trane"}, r"ValueError after 0 rows \(Bad split: trane"),
    ],
)
def test_what_is_wrong_is_one_line(source: HubSource, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as failure:
        list(documents(source.model_copy(update=change), 0))
    assert "\n" not in str(failure.value)


def test_a_broken_connection_tells_the_number_of_rows() -> None:
    def breaking() -> Iterator[dict[str, str]]:
        yield from ({"text": "some words"} for _ in range(3))
        raise ConnectionError("reset\nby peer")

    with pytest.raises(DataError, match=r"x/y: ConnectionError after 8 rows \(reset by peer\)"):
        list(hub_values(breaking(), "x/y", "text", after=5))
