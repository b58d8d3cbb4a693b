"""What the user sees while FastDraft works: lines, tables, progress with rate and ETA; and the wish to stop.

Decides that everything goes to stderr (stdout belongs to results), that progress is a live bar on a terminal and a line
every few seconds elsewhere, and that the first Ctrl-C, SIGTERM or hang-up asks stages to save and stop while the second kills; and
that work goes on unseen where nobody can read the news any more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from fastdraft.errors import Interrupted
from fastdraft.recipe.base import format_count

PLAIN_SECONDS = 10.0
TABLE_WIDTH = 79
_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stop:
    """A wish to stop, set by the first SIGINT, SIGTERM or SIGHUP; stages look at it between two safe points."""

    def __init__(self) -> None:
        self.requested = False

    def check(self, where: object) -> None:
        """Raises:
        Interrupted: when a stop was asked for. Call it only where everything is saved.
        """
        if self.requested:
            raise Interrupted(where)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Stop]:
        """Catches SIGINT, SIGTERM and SIGHUP inside the block; a second signal acts as usual.

        What the caller has set to be ignored (nohup, a shell's background) stays ignored.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        names = [number for number in _SIGNALS if before[number] not in (signal.SIG_IGN, None)]

        def handle(number: int, frame: FrameType | None) -> None:
            self.requested = True
            for name in names:
                signal.signal(name, before[name])
            # The terminal may be the very thing that has gone, or be in the middle of a line.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                print("\nstopping at the next safe point (once more to stop at once)", file=sys.stderr)

        for name in names:
            signal.signal(name, handle)
        try:
            yield self
        finally:
            for name in names:
                signal.signal(name, before[name])


def format_seconds(seconds: float) -> str:
    """95 -> `"1:35"`, 4000 -> `"1:06:40"`."""
    total = max(0, round(seconds))
    hours, minutes = total // 3600, total % 3600 // 60
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


class Progress:
    """One piece of long work: how much is done, how fast, how long it still takes."""

    def __init__(
        self, console: Console, title: str, total: float | None, unit: str, completed: float
    ) -> None:
        self._console, self.title, self.total, self.unit = console, title, total, unit
        self.completed, self._begin, self._start, self.note = completed, completed, time.monotonic(), ""
        self._shown = (
            0.0 if console.live else self._start
        )  # in a file, work of seconds is told by its last line alone

    def advance(self, amount: float = 1, note: str = "") -> None:
        self.update(self.completed + amount, note)

    def update(self, completed: float, note: str = "") -> None:
        self.completed, self.note = completed, note or self.note
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._console.live else PLAIN_SECONDS):
            self._shown = now
            self._console.show_progress(self)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def rate(self) -> float:
        """Units per second since this process began the work."""
        return (self.completed - self._begin) / max(self.seconds, 1e-9)

    def line(self, width: int, ended: bool = False) -> str:
        """The state in one line of at most `width` characters; when `ended`, the time taken instead of the time left."""
        done = format_count(self.completed)
        share, eta = "", ""
        if self.total:
            done += f"/{format_count(self.total)}"
            share = f"{min(1.0, self.completed / self.total):4.0%} "
            if ended:
                eta = f" in {format_seconds(self.seconds)}"
            elif self.rate > 0:
                eta = f" ETA {format_seconds((self.total - self.completed) / self.rate)}"
        text = f"  {self.title:<17} {share}{done} {self.unit} {format_count(self.rate)}/s{eta}"
        return (f"{text}  {self.note}" if self.note else text)[:width]


class Console:
    """Where every stage talks to the user; `quiet` silences all but warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.stop = quiet, Stop()
        self.live = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._open_line = False

    def say(self, text: str) -> None:
        """One line of news; a terminal gets it broken between words."""
        if not self.quiet:
            self._write(self._wrapped(text))

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        self._write(self._wrapped(f"warning: {text}"))

    def _wrapped(self, text: str) -> str:
        if not self.live:
            return text
        return "\n".join(_wrap(line, self._width()) for line in text.split("\n"))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A small table, numbers right-aligned, made to fit 80 columns (headings broken where that helps)."""
        if not self.quiet:
            self._write("\n" + format_table(title, columns, rows))

    @contextlib.contextmanager
    def progress(
        self, title: str, total: float | None, unit: str = "", completed: float = 0
    ) -> Iterator[Progress]:
        """Follows one piece of work; `completed` is what an earlier process already did."""
        progress = Progress(self, title, total, unit, completed)
        try:
            yield progress
        finally:
            if not self.quiet:
                self._write(progress.line(self._width() if self.live else 200, ended=True))

    def show_progress(self, progress: Progress) -> None:
        if self.quiet:
            return
        if self.live:
            _print("\r\x1b[2K" + progress.line(self._width()), end="")
            self._open_line = True
        else:
            self._write(progress.line(200))

    def _width(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            return max(20, columns - 1) if columns else 79  # a container's terminal may not know its width
        return 79

    def _write(self, text: str) -> None:
        prefix = "\r\x1b[2K" if self._open_line else ""
        self._open_line = False
        _print(prefix + text)


def _print(text: str, end: str = "\n") -> None:
    """News that nobody can read (the terminal is gone, the log's disk is full) must not end hours of work."""
    with contextlib.suppress(OSError, ValueError):
        print(text, end=end, file=sys.stderr, flush=True)


def _wrap(line: str, width: int) -> str:
    """Breaks between words only, so that paths and commands stay whole; indents what follows."""
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return (
        textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        if line
        else line
    )


def format_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = TABLE_WIDTH
) -> str:
    """Plain text, columns parted by two spaces; a column whose cells all start with a digit or sign is right-aligned.

    Headings of several words are broken over lines when the table is wider than `width` characters otherwise.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    heads = [[str(column)] for column in columns]
    body = [max((len(row[i]) for row in cells), default=0) for i in range(len(columns))]
    if sum(max(wide, len(head[0])) + 2 for wide, head in zip(body, heads, strict=True)) - 2 > width:
        heads = [
            textwrap.wrap(head[0], max(wide, 1), break_long_words=False) or [""]
            for wide, head in zip(body, heads, strict=True)
        ]
    widths = [max(wide, *map(len, head)) for wide, head in zip(body, heads, strict=True)]
    right = [
        bool(cells)
        and all(
            not row[i] or row[i].lstrip("+-.~<>")[:1].isdigit() or row[i] in ("-", "nan") for row in cells
        )
        for i in range(len(columns))
    ]

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)
        ).rstrip()

    height = max((len(head) for head in heads), default=0)
    head_lines = [
        line(row) for row in zip(*([""] * (height - len(head)) + head for head in heads), strict=True)
    ]
    head_lines.append("  ".join("-" * w for w in widths))
    return "\n".join(([title] if title else []) + head_lines + [line(row) for row in cells])
