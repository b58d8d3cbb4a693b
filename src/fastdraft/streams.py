"""The process's own output streams, in whatever state it was started.

Decides that a closed stream, a small character set or a reader who has gone never ends a run half-way. Imports the standard library
alone, since it comes before everything else.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys


def open_closed_streams() -> None:
    """Gives a process that was started with stdout or stderr closed (`>&-`, some services) one that leads nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end of the process)


def take_any_character() -> None:
    """A terminal or file of a small character set gets escapes for what it cannot show, never an error half-way."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower().replace("-", "") != "utf8":
            stream.reconfigure(errors="backslashreplace")


def forget_stdout() -> None:
    """Lets the interpreter's own last flush go nowhere; it would complain otherwise."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
