"""From text to the target's token ids, on all cores, in order.

Decides that documents are encoded without the tokenizer's own additions, that a control token spelled out in a text
stays text (a web page that says `<|end|>` must not end anything), that a tokenizer's saved truncation and padding are
off, and which id parts documents.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdraft.errors import TargetError

CONTROL = re.compile(r"<\|.*\|>", re.DOTALL)


@contextlib.contextmanager
def parallel_tokenization(workers: int) -> Iterator[None]:
    """Lets the tokenizers library use `workers` threads inside the block (0: all cores, 1: none of its own).

    Its thread pool is made at first use and keeps its size for the life of the process; the ids never depend on it.
    """
    names = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"
    if workers > 1:
        os.environ["RAYON_NUM_THREADS"] = str(workers)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def separator_id(bos_token_id: int | None, eos_token_ids: Sequence[int]) -> int:
    """The id before every document: BOS, or EOS for a tokenizer without BOS.

    Raises:
        TargetError: when there is neither.
    """
    if bos_token_id is not None:
        return bos_token_id
    if eos_token_ids:
        return eos_token_ids[0]
    raise TargetError(
        "tokenizer",
        "neither BOS nor EOS",
        "documents need a token between them",
        "set eos_token in the target's tokenizer_config.json",
    )


def added_words(tokenizer: Any) -> list[tuple[int, str]]:
    """(id, text) of the added tokens that are looked for in corpus text: ordinary words, neither special nor of a control token's form."""
    special = set(tokenizer.all_special_ids)
    return [
        (int(token_id), token.content)
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if not (token.special or token_id in special or CONTROL.fullmatch(token.content))
    ]


class DocumentEncoder:
    """Encodes corpus text with a target's fast tokenizer.

    Args:
        tokenizer: A transformers fast tokenizer; it is copied, not changed.
        size: The vocabulary's size; ids must be below it.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self._tokenizer = _without_special_tokens(tokenizer)
        self._tokenizer.encode_special_tokens = (
            True  # in this library the flag means: encode their text, do not look for them
        )
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._size = size

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of each text, 1-D, in order; equal for any number of threads.

        Raises:
            TargetError: when the tokenizer gives an id that the model does not have.
        """
        fast = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)
        flat, ends = array("I"), [0]
        for encoding in fast(list(texts), add_special_tokens=False):
            flat.extend(encoding.ids)  # half the time of an array for each text
            ends.append(len(flat))
        ids = np.array(flat, dtype=np.uint32)
        top = int(ids.max(initial=0))
        if top >= self._size:
            raise TargetError(
                "tokenizer",
                f"gives id {top}",
                f"the model's vocabulary has {self._size}",
                "use the tokenizer that belongs to the target",
            )
        return [ids[start:end] for start, end in itertools.pairwise(ends)]


def _without_special_tokens(tokenizer: Any) -> Any:
    """A tokenizer of the same model and rules, to which all added tokens but words are special; the model itself is shared, not copied."""
    from tokenizers import Tokenizer

    backend, words = tokenizer.backend_tokenizer, {token_id for token_id, _ in added_words(tokenizer)}
    copy = Tokenizer(backend.model)
    copy.normalizer, copy.pre_tokenizer, copy.post_processor = (
        backend.normalizer,
        backend.pre_tokenizer,
        backend.post_processor,
    )
    added = sorted(backend.get_added_tokens_decoder().items())
    copy.add_tokens([_marked(token, token_id not in words) for token_id, token in added])
    return copy


def _marked(token: Any, special: bool) -> Any:
    """An added token, special or not."""
    from tokenizers import AddedToken

    same = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token.content, special=special, **same)
