"""Tokens as pieces of text, each marked as proposed by the draft or written by the target.

Decides that text appears as soon as it is certain: a token that ends inside a character waits for the next one, and then
belongs to the token that completed it. Special tokens are not shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
_WINDOW = 6
"""Tokens before the new one that are decoded along, so that spaces and joined characters come out right."""


class PieceStream:
    """Turns tokens into text one by one, in constant time for each."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0
        """Tokens of `_ids` whose text has been given out."""

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty when a character is still incomplete."""
        self._ids.append(token_id)
        return self._show(final=False)

    def finish(self) -> str:
        """Whatever was held back."""
        return self._show(final=True)

    def _show(self, final: bool) -> str:
        if self._shown == len(self._ids):
            return ""
        before = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        if not final and text.endswith(_UNFINISHED) and len(self._ids) - self._shown < _WINDOW:
            return ""
        drop = max(0, self._shown - _WINDOW)
        self._ids = self._ids[drop:]
        self._shown = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], accepted: Iterable[bool]
) -> list[dict[str, str | bool]]:
    """`[{"text": ..., "accepted": ...}, ...]`: neighbours of the same kind joined."""
    stream, pieces = PieceStream(tokenizer), list[dict[str, str | bool]]()
    flag = False
    for token_id, flag in zip(token_ids, accepted, strict=True):
        _append(pieces, stream.feed(token_id), bool(flag))
    _append(pieces, stream.finish(), bool(flag))
    return pieces


def _append(pieces: list[dict[str, str | bool]], text: str, accepted: bool) -> None:
    if text and pieces and pieces[-1]["accepted"] == accepted:
        pieces[-1]["text"] = f"{pieces[-1]['text']}{text}"
    elif text:
        pieces.append({"text": text, "accepted": accepted})
