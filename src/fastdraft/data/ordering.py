"""The order in which training meets a source's documents.

Decides that long documents are cut at paragraph ends and that all pieces pass a shuffle window, so that a small token
budget is a spread over the corpus and not the first book of it, in memory that does not grow with the corpus.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Protocol

WINDOW_CHARS = 32_000_000
"""Text held for shuffling; the memory of a source is a small multiple of this, whatever its size."""
PIECE_CHARS = 20_000
"""Longest piece: about 5,000 tokens, a couple of rows, so that one book cannot fill a small budget."""


def split_document(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most `limit` characters that concatenate to the document; blank ones are left out.

    Cuts behind the last blank line in the second half of the window, else behind the last line end, else the last space,
    else at the limit. A blank document gives nothing.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        for mark in ("\n\n", "\n", " "):
            found = text.rfind(mark, start + limit // 2, end)
            if found >= 0:
                end = found + len(mark)
                break
        if not text[start:end].isspace():
            yield text[start:end]
        start = end
    if text[start:].strip():
        yield text[start:]


class Source(Protocol):
    """Anything that yields documents; sources.py has the recipe's kinds."""

    def documents(self, seed: int, skipped: Callable[[str], None]) -> Iterator[str]:
        """Whole documents in an order of the seed."""
        ...


def stream(
    source: Source, seed: int, skipped: Callable[[str], None] = lambda reason: None, window_chars: int = WINDOW_CHARS
) -> Iterator[str]:
    """The documents of a source as training meets them: pieces of moderate length out of a shuffle window.

    The order depends on the seed and the source alone. Empty documents are left out.

    Raises:
        DataError: from the source.
    """
    draw = random.Random(seed).random
    window: list[str] = []
    held = 0

    def take() -> str:
        nonlocal held
        place = int(draw() * len(window))
        window[place], window[-1] = window[-1], window[place]
        piece = window.pop()
        held -= len(piece)
        return piece

    for document in source.documents(seed, skipped):
        for piece in split_document(document):
            window.append(piece)
            held += len(piece)
        while held > window_chars:
            yield take()
    while window:
        yield take()
