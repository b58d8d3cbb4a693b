"""The errors that FastDraft raises on purpose, and what becomes one at a single place: a full disk, and memory that does not suffice.

Each is one line for the user: the recipe key or file, what stands there, the rule, then what to do about it. The command line
prints it and exits with `exit_code`; the Python API raises it.
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
# Control characters that are no white space, and those that turn the direction of writing: a damaged file must not steer the terminal.
_STEERING = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LONGEST = 600
# How torch's allocators, cuBLAS, OpenVINO and C++ itself say it in errors of no kind of their own.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can.?.?t allocate memory|not enough memory|failed to allocate|bad_alloc|ALLOC_FAILED", re.I
)


class FastDraftError(Exception):
    """A failure that the user can understand and mend.

    Args:
        message: Names the recipe key or the file, the value found and the rule that it breaks.
        fix: What to do about it.
    """

    exit_code = 2

    def __init__(self, message: object, fix: object = "") -> None:
        self.message, self.fix = _one_line(message), _one_line(fix)
        super().__init__(f"{self.message}; {self.fix}" if self.fix else self.message)

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str, str]]:
        return type(self), (self.message, self.fix)


class RecipeError(FastDraftError):
    """A recipe key or command-line argument is unknown, of the wrong type, out of range or not possible on this machine."""


class DataError(FastDraftError):
    """A corpus, prompt, log or task file is missing, empty or damaged."""


class TargetError(FastDraftError):
    """A model directory or hub id cannot be loaded, is not supported, or does not fit the other one."""


class OutOfMemory(FastDraftError):
    """The memory of the machine or of its accelerator does not suffice."""


class MissingExtra(FastDraftError):
    """An optional library is not installed."""

    def __init__(self, library: str, extra: str, command: str = "") -> None:
        self.library, self.extra, self.command = library, extra, command
        message = f"{library} is not installed; this needs the extra '{extra}'"
        super().__init__(message, command or f"pip install 'fastdraft[{extra}]'")

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.library, self.extra, self.command)


class Interrupted(FastDraftError):
    """Stopped by a signal after everything was saved; the same command goes on from here."""

    exit_code = 130

    def __init__(self, where: object) -> None:
        self.stopped_at = where
        super().__init__(
            f"{where}: stopped by a signal; progress is saved", "run the same command again to go on"
        )

    def __reduce__(self) -> tuple[type[FastDraftError], tuple[str]]:  # type: ignore[override]
        return type(self), (str(self.stopped_at),)


def _one_line(text: object) -> str:
    shown = _STEERING.sub(
        lambda found: found[0].encode("unicode_escape").decode(), " ".join(str(text).split())
    )
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST * 3 // 4]} ... {shown[-_LONGEST // 4 :]}"


@contextlib.contextmanager
def machine_errors(where: object, smaller: str) -> Iterator[None]:
    """Turns what the machine does to the work inside into one line: its disk is full or gone, its memory does not suffice.

    Args:
        where: What to name where an error names no file.
        smaller: What makes the work need less memory.
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
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


class Halving:
    """Work over rows that is tried again in halves where memory runs out, and stays small from then on.

    Args:
        key: The recipe key to lower.
        warn: Told once, when rows are first halved.
    """

    def __init__(self, key: str, warn: Callable[[str], None] | None = None) -> None:
        self.key, self.most, self._warn = key, sys.maxsize, warn

    def __call__(self, rows: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
        """Calls `work` with all rows in order, in as few pieces as fit."""
        waiting = [rows] if len(rows) else []
        while waiting:
            piece = waiting.pop()
            if len(piece) > self.most:
                waiting += [piece[self.most :], piece[: self.most]]
                continue
            try:
                work(piece)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = True
            else:
                failed = False
            if failed:  # outside the block above nothing holds the failed pass's tensors any more
                self._lower(len(piece))
                waiting.append(piece)

    def _lower(self, rows: int) -> None:
        if rows == 1:
            message = f"{self.key}: out of memory for a single row"
            raise OutOfMemory(message, "shorten the rows or free some memory")
        if self.most == sys.maxsize and self._warn:
            self._warn(f"out of memory with {rows} rows at a time: going on with half; lower {self.key}")
        self.most = rows // 2
        free_memory()


def free_memory() -> None:
    """Gives back what a failed pass left; looks for an accelerator only where torch is loaded."""
    gc.collect(1)  # what a pass leaves is young, and all else a long look
    torch = sys.modules.get("torch")
    accelerator = torch and torch.accelerator.current_accelerator(check_available=True)
    if torch and accelerator and hasattr(torch.get_device_module(accelerator), "empty_cache"):
        torch.get_device_module(accelerator).empty_cache()
