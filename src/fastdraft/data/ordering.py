"""The order in which training meets a source's documents.

Decides that long documents are cut at paragraph ends, that pieces are shuffled within blocks of one window each, and that as
much is read into the next block as is taken from this one: a small token budget is a spread over the source and not the first
book of it, memory does not grow with the source, and a resumed run reads one block again instead of everything before it.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator
from typing import Any

from fastdraft.data.place import Place
from fastdraft.data.sources import documents

WINDOW_CHARS = 32_000_000
"""Text held for shuffling; the memory of a source is a small multiple of this (and of its longest document), whatever its size."""
PIECE_CHARS = 20_000
"""Longest piece: about 5,000 tokens, a couple of rows, so that one book cannot fill a small budget."""
CHARS_PER_ROW_TOKEN = 8
"""Pieces for long rows are at least this many characters for each token of a row: one or two rows."""


def piece_chars(row_length: int) -> int:
    """Longest piece for rows of up to `row_length` tokens."""
    return max(PIECE_CHARS, CHARS_PER_ROW_TOKEN * row_length)


def split_document(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most `limit` characters that concatenate to the document; blank ones are left out.

    Cuts behind the last blank line in the second half of the window, else behind the last line end, else before the last space, each
    where a word or sign follows; else at the limit, but never inside a run of combining marks. So a tokenizer that ends its tokens at
    line ends and begins them at spaces (Llama 3, Qwen) gives the pieces the ids that it gives the whole document; others may differ
    in the ids beside a cut. A blank document gives nothing.
    """
    start = 0
    while len(text) - start > limit:
        end = _cut(text, start, limit)
        if not text[start:end].isspace():
            yield text[start:end]
        start = end
    if text[start:].strip():
        yield text[start:]


def _cut(text: str, start: int, limit: int) -> int:
    """The end of the piece that begins at `start`; more than `limit` characters are left."""
    low, high = start + (limit + 1) // 2, start + limit
    for mark, behind in (("\n\n", 2), ("\n", 1), (" ", 0)):
        found = text.rfind(mark, low, high)
        while (
            found >= 0 and text[found + len(mark)].isspace()
        ):  # there is more text than the limit: the index exists
            found = text.rfind(mark, low, found + len(mark) - 1)
        if found >= 0:
            return found + behind
    end = high
    while end > low and (
        unicodedata.combining(text[end]) or text[end] in "\u200d\ufe0f" or text[end - 1] == "\u200d"
    ):
        end -= 1
    return end if end > low else high


Source = Any


class PieceStream:
    """The documents of a source as training meets them: pieces of moderate length, each block of a window's size shuffled.

    The order depends on the seed and the source alone. Empty documents are left out.

    Args:
        source: Where documents come from.
        seed: Of the order of files and pieces.
        state: An earlier stream's `state()`, to go on behind the piece that it gave last.
        window_chars: Size of a block.
        limit: Longest piece.

    Raises:
        DataError: from the source, while reading.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        state: dict[str, Any] | None = None,
        window_chars: int = WINDOW_CHARS,
        limit: int = PIECE_CHARS,
    ) -> None:
        state = state or {"block": 0, "taken": 0, "place": {}}
        self._place = Place.from_state(state["place"])
        self._documents = documents(source, seed, self._skip, self._place)
        self._seed, self._window, self._limit = seed, window_chars, limit
        self._giving: list[str] = []
        self._filling: list[str] = []
        self._chars_given = self._chars_read = 0
        self._block, self._taken, self._start = int(state["block"]) - 1, 0, dict(state["place"])
        self._given_start, self._skipped = dict(state["place"]), 0
        self._to_repeat = int(state["taken"])

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while self._to_repeat:
            self._to_repeat -= 1
            self._take()
        return self._take()

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as plain data."""
        return {
            "block": max(self._block, 0),
            "taken": self._taken + self._to_repeat,
            "place": self._given_start,
        }

    @property
    def skipped(self) -> int:
        """Files that the source passed over up to the end of the present block."""
        return self._skipped

    def _skip(self, reason: str) -> None:
        self._place.skipped += 1

    def _take(self) -> str:
        if not self._giving:
            self._next_block()
        if not self._giving:
            self._skipped = self._place.skipped
            raise StopIteration
        pieces = self._giving
        place = int(self._draw() * len(pieces))
        pieces[place], pieces[-1] = pieces[-1], pieces[place]
        piece = pieces.pop()
        self._taken += 1
        self._chars_given += len(piece)
        self._fill(min(self._chars_given, self._window))
        return piece

    def _next_block(self) -> None:
        """What was read becomes the block that is given, once it is whole."""
        self._fill(self._window)
        if not self._filling:
            return
        self._giving, self._filling = self._filling, []
        self._block, self._taken, self._given_start = self._block + 1, 0, self._start
        self._start, self._skipped = self._place.state(), self._place.skipped
        self._chars_given = self._chars_read = 0
        self._draw = random.Random(self._seed + (self._block << 32)).random

    def _fill(self, chars: int) -> None:
        """Reads on until the next block holds so many characters, or the source ends."""
        while self._chars_read < chars:
            document = next(self._documents, None)
            if document is None:
                return
            for piece in split_document(document, self._limit):
                self._filling.append(piece)
                self._chars_read += len(piece)
