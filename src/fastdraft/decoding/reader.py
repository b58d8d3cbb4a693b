"""What decoding needs of a model, whatever library runs it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Reader(Protocol):
    """A model while it reads one text. Suffixes: T positions, V vocabulary."""

    length: int  # tokens read so far and not taken back

    def read(self, ids_T: Tensor, keep: int = 1) -> Tensor:
        """Reads T more tokens; the logits after each of the last `keep`, [keep, V], which the caller may
        change.
        """
        ...

    def take_back(self, length: int) -> None:
        """Keeps the first `length` tokens only; nothing happens when fewer were read."""
        ...


class Readable(Protocol):
    """A model that can read texts. Implementations: decoding/cache.py, runtimes/."""

    @property
    def context_length(self) -> int:
        """Tokens that it can read in all."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its readers take ids and give logits."""
        ...

    @property
    def columns(self) -> Tensor | None:
        """The ids, rising, int64 on its device, whose logits its readers give; None: those of all."""
        ...

    def reader(self, capacity: int) -> Reader:
        """A reader before a text of at most `capacity` tokens; texts do not disturb each other."""
        ...
