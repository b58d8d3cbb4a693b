"""The errors that FastDraft raises on purpose, and the one place where a full disk and exhausted memory
become one.

Each is one line: the key or file, what stands there and the rule, then what to do. The command line prints it
and exits with `exit_code`.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
# Control characters, and those that turn the direction of writing: a damaged file must not steer the
# terminal.
_STEERING = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# How torch's allocators, cuBLAS, OpenVINO and C++ say it in errors of no kind of their own.
_MEMORY = "out of memory|can.?.?t allocate memory|not enough memory|failed to allocate|bad_alloc|ALLOC_FAILED"


class FastDraftError(Exception):
    """A failure that the user can mend: what is wrong (key or file, value, rule), and what to do about it."""

    exit_code = 2

    def __init__(self, message: object, fix: object = "") -> None:
        self.message, self.fix = _one_line(message), _one_line(fix)
        super().__init__(self.message, self.fix)

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message


class RecipeError(FastDraftError):
    """A recipe key or argument is unknown, of the wrong type, out of range or not possible on this
    machine.
    """


class DataError(FastDraftError):
    """A corpus, prompt, log or task file is missing, empty or damaged."""


class TargetError(FastDraftError):
    """A model directory or hub id cannot be loaded, is not supported, or does not fit the other one."""


class OutOfMemory(FastDraftError):
    """The memory of the machine or of its accelerator does not suffice."""


class MissingExtra(FastDraftError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, command: str = "") -> None:
        self.library = library
        message = f"{library} is not installed; this needs the extra '{extra}'"
        super().__init__(message, command or f"pip install 'fastdraft[{extra}]'")
        self.args = (library, extra, command)  # what it is made of again on another machine


class Interrupted(FastDraftError):
    """Stopped by a signal after everything was saved; the same command goes on from here."""

    exit_code = 130

    def __init__(self, message: object, fix: object = "run the same command again to go on") -> None:
        super().__init__(message, fix)


def _one_line(text: object) -> str:
    line = _STEERING.sub(
        lambda found: found[0].encode("unicode_escape").decode(), " ".join(str(text).split())
    )
    return line if len(line) <= 600 else f"{line[:450]} ... {line[-150:]}"


@contextlib.contextmanager
def machine_errors(where: object, smaller: str) -> Iterator[None]:
    """Inside the block a failed file and exhausted memory become one line; `smaller`: what would need less
    memory.
    """
    try:
        yield
    except (FastDraftError, BrokenPipeError):
        raise
    except Exception as error:
        # safetensors hides the system's number in its text.
        full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
        if full or isinstance(error, OSError):
            found = "no space left on the disk" if full else getattr(error, "strerror", None) or error
            message = f"{getattr(error, 'filename', None) or where}: {found}"
            fix = "free some space" if full else "mend it"
            raise FastDraftError(message, f"{fix} and run the same command again") from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{where}: out of memory", smaller) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, torch, numpy, Arrow and OpenVINO say it."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or (isinstance(error, RuntimeError) and bool(re.search(_MEMORY, str(error), re.IGNORECASE)))


class Halving:
    """Work over rows that is tried again in halves where memory runs out, and stays small; `key` is the
    recipe key to lower.
    """

    def __init__(self, key: str, warn: Callable[[str], None] | None = None) -> None:
        self.key, self.most, self._warn = key, sys.maxsize, warn

    def __call__(self, rows: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
        """Calls `work` with all rows in order, in as few pieces as fit."""
        done = 0
        while done < len(rows):
            piece = rows[done : done + self.most]
            if _fits(piece, work):
                done += len(piece)
                continue
            if len(piece) == 1:
                raise OutOfMemory(f"{self.key}: out of memory for a single row", "shorten the rows")
            if self.most == sys.maxsize and self._warn:
                self._warn(f"out of memory with {len(piece)} rows: going on with half; lower {self.key}")
            self.most = len(piece) // 2
            free_memory()


def _fits(piece: Sequence[T], work: Callable[[Sequence[T]], None]) -> bool:
    """Does the work; on its return nothing holds the tensors of a failed pass any more."""
    try:
        work(piece)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def free_memory() -> None:
    """Gives back what a failed pass left; looks for an accelerator only where torch is loaded."""
    gc.collect(1)  # what a pass leaves is young, and all else a long look
    torch = sys.modules.get("torch")
    accelerator = torch and torch.accelerator.current_accelerator(check_available=True)
    if torch and accelerator and hasattr(torch.get_device_module(accelerator), "empty_cache"):
        torch.get_device_module(accelerator).empty_cache()
