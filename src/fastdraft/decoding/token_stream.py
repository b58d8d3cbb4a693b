"""Tokens as text, each piece as soon as it is certain, marked as the draft's proposal or the target's own.

stream = TokenStream(tokenizer); text = stream.feed(token_id) + stream.finish()
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
_WINDOW = 6  # tokens decoded along before the new one, so that spaces and joined characters come out right


class TokenStream:
    """Turns tokens into text one by one, in constant time for each; special tokens are not shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # tokens of `_ids` whose text has been given out

    def feed(self, token_id: int) -> str:
        """The text that this token makes certain; empty when a character is still incomplete."""
        self._ids.append(token_id)
        return self._show()

    def finish(self) -> str:
        """Whatever was held back."""
        return self._show(final=True)

    def _show(self, final: bool = False) -> str:
        if self._shown == len(self._ids):
            return ""
        before, text = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if not final and text.endswith(_UNFINISHED) and len(self._ids) - self._shown < _WINDOW:
            return ""
        self._ids = self._ids[max(0, self._shown - _WINDOW) :]
        self._shown = len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int], accepted: Iterable[object]
) -> list[dict[str, str | bool]]:
    """`[{"text": ..., "accepted": ...}, ...]`: neighbours of the same kind joined."""
    stream, flags = TokenStream(tokenizer), [bool(flag) for flag in accepted]
    shown = [(flag, stream.feed(token_id)) for token_id, flag in zip(token_ids, flags, strict=True)]
    shown.append((flags[-1] if flags else False, stream.finish()))
    runs = groupby((each for each in shown if each[1]), key=itemgetter(0))
    return [{"text": "".join(text for _, text in run), "accepted": flag} for flag, run in runs]
