"""Rows of a hub data set, streamed: nothing but the rows asked for is downloaded, and no file is kept on disk.

Decides that the data set's files are visited in an order drawn from the seed (a small budget would otherwise see only the first
files of a data set that is sorted by date or site), and that a resumed run opens only the file at which it stopped and lets the
library find the row there.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastdraft.data.place import Place
from fastdraft.errors import DataError, MissingExtra

if TYPE_CHECKING:
    from fastdraft.data.sources import HubSource


def open_dataset(source: HubSource) -> Any:
    """The data set as the library streams it.

    Raises:
        MissingExtra: without the library. DataError: when the data set cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtra("datasets", "datasets") from None
    try:
        return load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=True
        )
    except Exception as error:
        raise unreachable(source, error, 0) from error


def rows_in_order(source: HubSource) -> Iterator[tuple[str, Any]]:
    """(data set and row, value of the column) of each row, as the data set orders them.

    Raises:
        DataError: when the data set cannot be reached or has no such column.
    """
    place = Place()
    for value in _rows(source, open_dataset(source), place, f"data set {source.dataset}"):
        yield f"data set {source.dataset} row {place.row}", value


def rows_from(source: HubSource, seed: int, place: Place) -> Iterator[tuple[str, Any]]:
    """The same with the data set's files in an order of the seed, from `place` on, which moves with each row.

    Raises:
        DataError: when the data set cannot be reached or has no such column.
    """
    data = open_dataset(source)
    count = _num_files(data)
    order = list(range(count))
    random.Random(seed).shuffle(order)
    for position in range(place.file, count):
        if position > place.file:
            place.file, place.row, place.library = position, 0, None
        part = data.shard(num_shards=count, index=order[position]) if count > 1 else data
        name = f"data set {source.dataset}" + (f" file {order[position] + 1} of {count}" if count > 1 else "")
        for value in _rows(source, _moved(part, place), place, name):
            yield f"{name} row {place.row}", value


def _num_files(data: Any) -> int:
    """How many files the library can open one by one; 1 where it does not say."""
    if not hasattr(data, "shard"):
        return 1
    count: Any = getattr(data, "num_shards", None) or getattr(data, "n_shards", 1)
    return int(count)


def _moved(part: Any, place: Place) -> Any:
    """`part` ready to give the row behind `place`: by the library's own state, else by passing over rows of this file."""
    if hasattr(part, "load_state_dict") and (place.library or not place.row):
        if place.library:
            part.load_state_dict(place.library)
        place.ask_library = part.state_dict
        return part
    return part.skip(place.row) if place.row else part


def _rows(source: HubSource, part: Any, place: Place, name: str) -> Iterator[Any]:
    rows = iter(part)
    while True:
        try:
            row = next(rows, None)
        except (
            Exception
        ) as error:  # the library raises dozens of types, all of them the network's or the id's fault
            raise unreachable(source, error, place.row) from error
        if row is None:
            return
        place.row += 1
        if source.field not in row:
            raise DataError(
                f"{name} row {place.row}",
                f"no text under '{source.field}'",
                f"has {', '.join(list(row)[:8])}",
                "set `field` to the one that holds the text",
            )
        yield row[source.field]


def unreachable(source: HubSource, error: Exception, rows: int) -> DataError:
    """One line for what the library raised."""
    text = " ".join(str(error).split())[:160]
    return DataError(
        f"data set {source.dataset}",
        f"{type(error).__name__} after {rows} rows ({text})",
        "must be reachable on the hub",
        "check id, subset, split and network, then run again",
    )
