"""What a shared machine does to a run: disks fill, folders vanish, memory runs out. Each as one line for the user.

Decides which errors of the operating system and of the libraries mean the machine and not a fault in this program, how each
reads, and that work which runs out of memory is tried again in halves.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from fastdraft.errors import FastDraftError, OutOfMemory

T = TypeVar("T")

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
"""What `artifacts` calls an unfinished file or folder."""

_AGAIN = "run the same command again"
_FULL = ("this file must fit", f"free some space and {_AGAIN}")
_RIGHTS = ("the run's folder must be writable and its inputs readable", "change its rights or set run.folder")
_GONE = ("it must stay where it is while a run works", f"put it back and {_AGAIN}")
_FAULTY = ("the disk must answer", f"look after the disk, then {_AGAIN}")
_LINES: dict[int, tuple[str, tuple[str, str]]] = {
    errno.ENOSPC: ("no space left on the disk", _FULL),
    errno.EDQUOT: ("no space left on the disk (its quota is used up)", _FULL),
    errno.EFBIG: ("larger than the disk allows", _FULL),
    errno.EROFS: ("cannot be written (a read-only disk)", _RIGHTS),
    errno.EACCES: ("cannot be read or written", _RIGHTS),
    errno.EPERM: ("cannot be read or written", _RIGHTS),
    errno.ENOENT: ("is gone", _GONE),
    errno.ENOTDIR: ("is gone: a file stands where a folder was", _GONE),
    errno.ESTALE: ("is gone from the file server", _GONE),
    errno.EIO: ("the disk failed to read or write", _FAULTY),
    errno.ENAMETOOLONG: ("too long a name", ("the disk must take the name", "use shorter names and folders")),
    errno.EMFILE: (
        "too many open files",
        ("a process may hold only so many", f"raise the limit (ulimit -n) and {_AGAIN}"),
    ),
    errno.ENFILE: (
        "too many open files on this machine",
        ("the machine must have room for more", f"close programs and {_AGAIN}"),
    ),
}
"""For an error number: what was found, and (the rule, the remedy)."""
_SAFETENSORS = re.compile(r"os error (\d+)")
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|failed to allocate|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""How libraries say it in errors of no kind of their own: torch's allocators on every system, cuBLAS, OpenVINO, C++ itself."""


def disk_error(error: OSError, path: object) -> FastDraftError | None:
    """The line for a failed call of the operating system; None for what is no disk's fault (a reader that has gone, a network).

    Args:
        error: Its own file name, where it has one that is not temporary, is what the line names.
        path: Named otherwise.
    """
    if error.errno is None or isinstance(
        error, (BrokenPipeError, ConnectionError, TimeoutError, InterruptedError)
    ):
        return None
    found, rest = _LINES.get(error.errno, (error.strerror or str(error), _FAULTY))
    named = (
        error.filename if isinstance(error.filename, str) and not TEMPORARY.search(error.filename) else None
    )
    if named is None and error.errno == errno.ENOENT:
        found = error.strerror or found  # for example: no usable temporary directory
    return FastDraftError(named or path, found, *rest)


@contextlib.contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Turns a full, read-only, failing or vanished disk into one line for the user."""
    try:
        yield
    except OSError as error:
        told = disk_error(error, path)
        if told is None:
            raise
        raise told from error


@contextlib.contextmanager
def machine_errors(place: Path, smaller: str) -> Iterator[None]:
    """Turns whatever the machine does to the work inside into one line.

    Args:
        place: What to name where an error names no file.
        smaller: What makes the work need less memory, as a remedy.

    Raises:
        FastDraftError: for errors of disks, folders and their names. OutOfMemory: when memory ran out.
    """
    try:
        with disk_errors(place):
            yield
    except FastDraftError:
        raise
    except UnicodeEncodeError as error:  # of a file's name: whatever is written into files is UTF-8
        words, rule = (
            f"{error.object!a:.80} has characters that '{error.encoding}' cannot write",
            "this system must be able to write names",
        )
        raise FastDraftError(
            place, words, rule, "set a UTF-8 locale such as LC_ALL=C.UTF-8, or use other names"
        ) from error
    except Exception as error:
        if isinstance(error, OSError) or not is_out_of_memory(error):
            found = _hidden_disk_error(error, place)
            if found is None:
                raise
            raise found from error
        raise OutOfMemory(
            place, "out of memory", "this work must fit into the memory that is free", smaller
        ) from error


def _hidden_disk_error(error: Exception, place: Path) -> FastDraftError | None:
    """For safetensors, which hides the system's error number in its text."""
    number = _SAFETENSORS.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return disk_error(OSError(int(number[1]), str(error)), place) if number else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as Python, torch, numpy, Arrow and OpenVINO say it; torch is not imported for the question."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


class Halving:
    """Work over rows that is tried again in halves where memory runs out, and stays small from then on.

    Args:
        where: The recipe key to lower.
        warn: Told once, when rows are first halved.
    """

    def __init__(self, where: str, warn: Callable[[str], None] | None = None) -> None:
        self.where, self.most = where, sys.maxsize
        self._warn = warn

    def __call__(self, rows: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
        """Calls `work` with all rows in order, in as few pieces as fit; a piece that failed is given again in halves.

        Raises:
            OutOfMemory: when a single row does not fit.
        """
        waiting = [rows]
        while waiting:
            piece = waiting.pop()
            if len(piece) > self.most:
                waiting += [piece[self.most :], piece[: self.most]]
                continue
            if piece and not self._fits(piece, work):
                self._lower(len(piece))
                waiting.append(piece)

    @staticmethod
    def _fits(piece: Sequence[T], work: Callable[[Sequence[T]], None]) -> bool:
        try:
            work(piece)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False  # outside this block nothing holds the failed pass's tensors any more
        return True

    def _lower(self, rows: int) -> None:
        if rows == 1:
            raise OutOfMemory(
                self.where,
                "out of memory for a single row",
                "one row must fit",
                "shorten the rows or free some memory",
            )
        if self.most == sys.maxsize and self._warn:
            self._warn(
                f"out of memory with {rows} rows at a time: going on with {rows // 2}; lower {self.where} to begin there"
            )
        self.most = rows // 2
        free_memory()


def free_memory() -> None:
    """Gives back what a failed pass left; looks for an accelerator only where torch is loaded."""
    gc.collect(1)  # what a pass leaves is young, and all else a long look
    torch = sys.modules.get("torch")
    accelerator = torch and torch.accelerator.current_accelerator(check_available=True)
    if torch and accelerator and hasattr(torch.get_device_module(accelerator), "empty_cache"):
        torch.get_device_module(accelerator).empty_cache()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Lets Python's garbage collector rest while hundreds of thousands of lasting objects are made, which it would walk again and again."""
    working = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if working:
            gc.enable()
