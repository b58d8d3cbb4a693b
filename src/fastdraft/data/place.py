"""Where a source is being read: enough to go on later without reading again what was read before.

Decides that a place is plain data (it is stored with the progress of prepare), that it names a file by its number in the
seeded order and a document by its line or row, and that a hub data set adds what its own library needs to find the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Place:
    """Moves on as a source is read; documents up to and with `row` of file number `file` have been given."""

    file: int = 0
    row: int = 0
    """Line of a JSONL file, row of a table; 1 for a text that was given."""
    skipped: int = 0
    """Files passed over so far."""
    library: dict[str, Any] | None = None
    """What the library that reads a hub data set stored; its own affair."""
    ask_library: Callable[[], dict[str, Any] | None] = field(default=lambda: None, repr=False)
    """Set by the reader of a hub data set: its state now."""

    def state(self) -> dict[str, Any]:
        """This place as plain data."""
        library = self.ask_library()
        return {"file": self.file, "row": self.row, "skipped": self.skipped} | (
            {"library": library} if library else {}
        )

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Place:
        """The place that `state()` described; an empty mapping is the beginning."""
        return Place(state.get("file", 0), state.get("row", 0), state.get("skipped", 0), state.get("library"))
