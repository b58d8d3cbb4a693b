"""Data sets of the hub, by the library itself over a local folder and by a double: order, resuming, what is read again."""

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

FILES, ROWS = 5, 40
SOURCE = HubSource(name="h", kind="hub", dataset="x/y", revision="abc")


class Streamed:
    """Rows as `datasets.IterableDataset` gives them."""

    def __init__(self, files: list[int], log: list[tuple[int, int]], skipped: int = 0) -> None:
        self.files, self.read, self._skipped = files, log, skipped

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def shard(self, num_shards: int, index: int) -> Streamed:
        assert num_shards == len(self.files)
        return type(self)([self.files[index]], self.read)

    def skip(self, count: int) -> Streamed:
        return type(self)(self.files, self.read, count)

    def __iter__(self) -> Iterator[dict[str, str]]:
        rows = [(file, row) for file in self.files for row in range(ROWS)]
        for file, row in rows[self._skipped :]:
            self.read.append((file, row))
            yield {"text": f"file {file} row {row} tells of the river and the fox"}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The double: what was asked for, and which rows were read."""
    seen: dict[str, Any] = {"read": [], "options": [], "kind": Streamed}

    def load_dataset(name: str, subset: str | None = None, **options: Any) -> Streamed:
        seen["options"].append(options)
        return seen["kind"](list(range(FILES)), seen["read"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return seen


def test_files_come_in_an_order_of_the_seed_and_prompts_in_the_data_sets_own(library: dict[str, Any]) -> None:
    orders = [[str(text).split()[1] for _, _, text in documents(SOURCE, seed)][::ROWS] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [str(i) for i in range(FILES)]
    values = [value.split()[1] for _, value in hub_values(open_hub(SOURCE), "x/y", "text")]
    assert values[::ROWS] == [str(i) for i in range(FILES)]
    assert all(
        options == {"split": "train", "revision": "abc", "streaming": True} for options in library["options"]
    )


def test_a_block_leads_to_the_next_row_and_reads_no_earlier_file_again(
    library: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "BLOCK_CHARS", 1500)
    everything = list(blocks(SOURCE, 1, (0, 0)))
    assert sorted(piece for block in everything for piece in block.pieces) == sorted(
        str(text) for _, _, text in documents(SOURCE, 0)
    )
    for number, block in enumerate(everything):
        library["read"].clear()
        rest = list(blocks(SOURCE, 1, block.end))
        assert [later.pieces for later in rest] == [later.pieces for later in everything[number + 1 :]]
        assert len(library["read"]) == sum(len(later.pieces) for later in rest)


def test_a_broken_connection_is_one_line_with_the_number_of_rows(library: dict[str, Any]) -> None:
    class Breaking(Streamed):
        def __iter__(self) -> Iterator[dict[str, str]]:
            for number, row in enumerate(super().__iter__()):
                if number == 3:
                    raise ConnectionError("reset by peer")
                yield row

    library["kind"] = Breaking
    with pytest.raises(
        DataError, match=r"data set x/y: file \d of 5: ConnectionError after 3 rows \(reset by peer\)"
    ):
        list(documents(SOURCE, 0))


def test_the_library_itself_streams_a_folder_and_says_what_is_wrong(tmp_path: Path) -> None:
    for number in range(3):
        rows = {"text": [f"{number} {row}" for row in range(10)], "count": list(range(10))}
        parquet.write_table(pyarrow.table(rows), tmp_path / f"{number}.parquet")
    source = HubSource(name="h", kind="hub", dataset=str(tmp_path))
    found = list(documents(source, 0))
    assert sorted(text for _, _, text in found if text) == sorted(
        f"{n} {row}" for n in range(3) for row in range(10)
    )
    assert list(documents(source, 0, found[13][:2])) == found[14:]
    with pytest.raises(DataError, match="row 1: no 'body'; has text, count"):
        list(documents(source.model_copy(update={"field": "body"}), 0))
    with pytest.raises(DataError, match="row 1: 'count' is a int; must be text"):
        list(documents(source.model_copy(update={"field": "count"}), 0))
    with pytest.raises(DataError, match="after 0 rows"):
        list(documents(source.model_copy(update={"dataset": str(tmp_path / "none")}), 0))
