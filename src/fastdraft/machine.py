"""What a shared machine does to a run: disks fill, folders vanish, memory runs out. Each as one line for the user.

Decides which errors of the operating system and of the libraries mean the machine and not a fault in this program, how each
reads, and that work which runs out of memory is tried again in halves.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import re
from collections.abc import Iterator
from pathlib import Path

from fastdraft.errors import FastDraftError

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
def no_collection() -> Iterator[None]:
    """Lets Python's garbage collector rest while hundreds of thousands of lasting objects are made, which it would walk again and again."""
    working = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if working:
            gc.enable()
