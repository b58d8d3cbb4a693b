"""Text to the target's token ids, on all cores, in order.

`DocumentEncoder` adds nothing of the tokenizer's own, and a control token spelled out in a text stays text: a
web page that says `<|end|>` must not end anything.
"""

from __future__ import annotations

import itertools
import os
import re
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer

from fastdraft.errors import TargetError
from fastdraft.modeling.tokenizer import rowless_tokens

CONTROL = re.compile(r"<\|.*\|>", re.DOTALL)


def set_tokenizer_threads(threads: int) -> None:
    """How many threads the tokenizers library uses here (0: all cores); the ids never depend on it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if threads == 1 else "true"
    if threads > 1:
        # Its thread pool is made at first use and keeps its size.
        os.environ["RAYON_NUM_THREADS"] = str(threads)


def separator_id(bos_token_id: int | None, eos_token_ids: Sequence[int]) -> int:
    """The id before every document: BOS, or EOS for a tokenizer without BOS."""
    if bos_token_id is not None:
        return bos_token_id
    if eos_token_ids:
        return eos_token_ids[0]
    message = "tokenizer: neither BOS nor EOS; documents need a token between them"
    raise TargetError(message, "set eos_token in the target's tokenizer_config.json")


def added_words(tokenizer: Any) -> list[tuple[int, str]]:
    """(id, text) of the added tokens looked for in corpus text: not special, not like a control
    token, and with a row in the model.
    """
    special = {*tokenizer.all_special_ids, *rowless_tokens(tokenizer)}
    return [
        (int(token_id), token.content)
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if not (token.special or token_id in special or CONTROL.fullmatch(token.content))
    ]


class DocumentEncoder:
    """Encodes corpus text with a copy of a target's fast tokenizer; ids must be below `size`."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokenizer, self._size = _with_control_tokens_special(tokenizer), size
        # In this library the flag means: encode their text, do not look for them.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of each text, 1-D, in order; equal for any number of threads."""
        flat, ends = array("I"), [0]
        # encode_batch_fast leaves out the offsets
        for encoding in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
            flat.extend(encoding.ids)  # half the time of an array for each text
            ends.append(len(flat))
        ids = np.array(flat, dtype=np.uint32)
        top = int(ids.max(initial=0))
        if top >= self._size:
            message = f"tokenizer: gives id {top}; the model's vocabulary has {self._size}"
            raise TargetError(message, "use the tokenizer that belongs to the target")
        return [ids[start:end] for start, end in itertools.pairwise(ends)]


def _with_control_tokens_special(tokenizer: Any) -> Tokenizer:
    """A tokenizer of the same model and rules, to which all added tokens but words are special."""
    backend, words = tokenizer.backend_tokenizer, {token_id for token_id, _ in added_words(tokenizer)}
    copy = Tokenizer(backend.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        setattr(copy, part, getattr(backend, part))
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    added = []
    for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
        own = {flag: getattr(token, flag) for flag in flags}
        added.append(AddedToken(token.content, special=token_id not in words, **own))
    copy.add_tokens(added)
    return copy
