"""Hub data sets with a stand-in for the library: order, resuming, what is read again, and what is never asked for."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdraft.data import build
from fastdraft.data.journal import Journal
from fastdraft.data.ordering import PieceStream
from fastdraft.data.place import Place
from fastdraft.data.sources import HubSource
from fastdraft.errors import DataError
from test_prepare import config_of, context_of, crash, execute, shards_of

FILES, ROWS = 5, 40


class Streamed:
    """Rows as `datasets.IterableDataset` gives them: files, state_dict, skip."""

    read: list[tuple[int, int]]
    stateful = True

    def __init__(self, files: list[int], log: list[tuple[int, int]], skipped: int = 0) -> None:
        self.files, self.read, self._skipped, self._at = files, log, skipped, (0, 0)
        if self.stateful:
            self.state_dict = lambda: {"file": self._at[0], "row": self._at[1]}
            self.load_state_dict = self._load

    @property
    def num_shards(self) -> int:
        return len(self.files)

    def _load(self, state: dict[str, Any]) -> None:
        self._at = (state["file"], state["row"])

    def shard(self, num_shards: int, index: int) -> Streamed:
        assert num_shards == len(self.files)
        return type(self)([self.files[index]], self.read)

    def skip(self, count: int) -> Streamed:
        return type(self)(self.files, self.read, count)

    def __iter__(self) -> Iterator[dict[str, str]]:
        passed = 0
        for number in range(self._at[0], len(self.files)):
            for row in range(self._at[1] if number == self._at[0] else 0, ROWS):
                self._at = (number, row + 1)
                self.read.append((self.files[number], row))
                passed += 1
                if passed > self._skipped:
                    yield {"text": f"file {self.files[number]} row {row} tells of the river and the fox"}


class Stateless(Streamed):
    """An old version of the library, which can only pass over rows."""

    stateful = False


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stand-in: what was asked for, and which rows were read."""
    seen: dict[str, Any] = {"read": [], "options": [], "kind": Streamed}

    def load_dataset(name: str, subset: str | None = None, **options: Any) -> Streamed:
        seen["options"].append(options)
        return seen["kind"](list(range(FILES)), seen["read"])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return seen


def test_files_come_in_an_order_of_the_seed_and_prompts_in_the_data_sets_own(library: dict[str, Any]) -> None:
    source = HubSource(name="h", dataset="x/y", revision="abc")
    orders = [[text.split()[1] for text in source.documents(seed)][::ROWS] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [str(i) for i in range(FILES)]
    assert [value.split()[1] for _, value in source.values()][::ROWS] == [str(i) for i in range(FILES)]
    assert all(
        options == {"split": "train", "revision": "abc", "streaming": True} for options in library["options"]
    )


@pytest.mark.parametrize("kind", [Streamed, Stateless])
@pytest.mark.parametrize("taken", [0, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 7])
def test_a_place_leads_to_the_next_row_in_the_file_where_reading_stopped(
    library: dict[str, Any], kind: type[Streamed], taken: int
) -> None:
    library["kind"] = kind
    source = HubSource(name="h", dataset="x/y")
    everything = list(source.documents(3))
    place = Place()
    documents = source.documents(3, place=place)
    for _ in range(taken):
        next(documents)
    state = json.loads(json.dumps(place.state()))
    library["read"].clear()
    rest = list(source.documents(3, place=Place.from_state(state)))
    assert rest == everything[taken:]
    again = len(library["read"]) - len(rest)
    assert again == 0 if kind is Streamed else again <= ROWS, "only rows of the file at which it stopped"


@pytest.mark.parametrize("window", [1500, 100_000])
def test_a_resumed_stream_gives_the_same_pieces_and_reads_one_block_again(
    library: dict[str, Any], window: int
) -> None:
    source = HubSource(name="h", dataset="x/y")
    everything = list(PieceStream(source, 1, window_chars=window))
    assert sorted(everything) == sorted(source.documents(0))
    for taken in (0, 1, 60, 61, 150, len(everything)):
        stream = PieceStream(source, 1, window_chars=window)
        for _ in range(taken):
            next(stream)
        state = json.loads(json.dumps(stream.state()))
        library["read"].clear()
        assert list(PieceStream(source, 1, state, window_chars=window)) == everything[taken:]
        again = len(library["read"]) - (len(everything) - taken)
        assert again * len(everything[0]) <= window + 2 * len(everything[0])


def test_killed_preparation_of_a_hub_data_set_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny_target: Path, library: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("BATCH_CHARS", 500), ("COMMIT_CHARS", 2000), ("WINDOW_CHARS", 1500)):
        monkeypatch.setattr(build, name, value)
    config = config_of({"name": "h", "kind": "hub", "dataset": "x/y"})
    expected = execute(config, context_of(tmp_path / "whole", tiny_target))
    with pytest.MonkeyPatch.context() as patch:
        crash(patch, Journal, "commit", 4, before=False)
        with pytest.raises(KeyboardInterrupt):
            execute(config, context_of(tmp_path / "killed", tiny_target))
    before = len(library["read"])
    resumed = execute(config, context_of(tmp_path / "killed", tiny_target))
    assert shards_of(tmp_path / "killed") == shards_of(tmp_path / "whole")
    assert resumed["corpora"] == expected["corpora"]
    assert len(library["read"]) - before < FILES * ROWS - 100, "what was committed is not read again"


def test_a_broken_connection_is_one_line_with_the_number_of_rows(library: dict[str, Any]) -> None:
    class Breaking(Streamed):
        def __iter__(self) -> Iterator[dict[str, str]]:
            for number, row in enumerate(super().__iter__()):
                if number == 3:
                    raise ConnectionError("reset by peer")
                yield row

    library["kind"] = Breaking
    with pytest.raises(DataError, match=r"data set x/y: ConnectionError after 3 rows \(reset by peer\)"):
        list(HubSource(name="h", dataset="x/y").documents(0))
