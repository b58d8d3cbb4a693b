"""What the user sees while FastDraft works: lines, tables, progress with rate and time left; and the request to stop.

Everything goes to stderr, since stdout belongs to results. Progress is a live bar on a terminal and a line every ten seconds elsewhere.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import rich.console
import rich.live
import rich.text

from fastdraft.errors import Interrupted
from fastdraft.recipe.base import format_count

PLAIN_SECONDS = 10.0
TABLE_WIDTH = 79
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the user asked to stop. Stages look at it where everything is saved."""

    def __init__(self) -> None:
        self.requested = False

    def check(self, where: object) -> None:
        """Raises Interrupted when a stop was requested."""
        if self.requested:
            raise Interrupted(where)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Stop]:
        """Inside the block the first SIGINT or SIGTERM requests a stop; a second one acts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield self  # Python takes handlers from the main thread only
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def handle(number: int, frame: FrameType | None) -> None:
            self.requested = True
            restore()
            # The terminal may be the very thing that has gone.
            with contextlib.suppress(OSError, ValueError, RuntimeError):
                print("\nstopping at the next safe point (once more to stop at once)", file=sys.stderr)

        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):  # under nohup, in a shell's background: stays so
                signal.signal(number, handle)
        try:
            yield self
        finally:
            restore()


class Progress:
    """One piece of long work: how much is done, how fast, how long it still takes."""

    def __init__(
        self, console: Console, title: str, total: float | None, unit: str, completed: float
    ) -> None:
        self._console, self.title, self.total, self.unit, self.note = console, title, total, unit, ""
        self.completed, self._begin, self._start = completed, completed, time.monotonic()
        self._shown = self._start

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

    def line(self, ended: bool = False) -> str:
        """The state in one line; when `ended`, the time taken instead of the time left."""
        share, done, rest = "", format_count(self.completed), ""
        if self.total:
            share, done = (
                f"{min(1.0, self.completed / self.total):4.0%} ",
                f"{done}/{format_count(self.total)}",
            )
            if ended:
                rest = f" in {format_seconds(self.seconds)}"
            elif self.rate > 0:
                rest = f" ETA {format_seconds((self.total - self.completed) / self.rate)}"
        text = f"  {self.title:<17} {share}{done} {self.unit} {format_count(self.rate)}/s{rest}"
        return f"{text}  {self.note}" if self.note else text


class Console:
    """Where every stage talks to the user; `quiet` silences all but warnings."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.stop = quiet, Stop()
        self._rich = rich.console.Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self.live = not quiet and self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._bar: rich.live.Live | None = None
        self._silent = False

    def silence(self) -> None:
        """Says nothing from here on, not even warnings: another process says it."""
        self.quiet, self.live, self._silent = True, False, True

    def say(self, text: str) -> None:
        """Prints a line; on a terminal broken between words."""
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Prints a line that the user should not miss."""
        self._print(f"warning: {text}")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        if not self.quiet:
            self._print("\n" + format_table(title, columns, rows))

    @contextlib.contextmanager
    def progress(
        self, title: str, total: float | None, unit: str = "", completed: float = 0
    ) -> Iterator[Progress]:
        """Follows one piece of work; `completed` is what an earlier process already did."""
        progress = Progress(self, title, total, unit, completed)
        try:
            yield progress
        finally:
            if self._bar:
                self._bar.stop()
                self._bar = None
            if not self.quiet:
                self._print(progress.line(ended=True))

    def show_progress(self, progress: Progress) -> None:
        if self.live:
            if self._bar is None:
                self._bar = rich.live.Live(console=self._rich, auto_refresh=False, transient=True)
                self._bar.start()
            self._bar.update(rich.text.Text(progress.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
        elif not self.quiet:
            self._print(progress.line())

    def _print(self, text: str) -> None:
        if self._silent:
            return
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone must not end hours of work
            self._rich.print(text, soft_wrap=not self.live)


def format_seconds(seconds: float) -> str:
    """95 -> `"1:35"`, 4000 -> `"1:06:40"`."""
    total = max(0, round(seconds))
    hours, minutes = total // 3600, total % 3600 // 60
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes}:{total % 60:02}"


def format_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = TABLE_WIDTH
) -> str:
    """Plain text: columns parted by two spaces, those of numbers right-aligned, headings broken where the table would be wider."""
    cells = [[str(cell) for cell in row] for row in rows]
    body = [[row[i] for row in cells] for i in range(len(columns))]
    wide = [max(map(len, column), default=1) for column in body]
    heads = [[column] for column in columns]
    if sum(max(w, len(head)) + 2 for w, head in zip(wide, columns, strict=True)) - 2 > width:
        heads = [
            textwrap.wrap(head, w, break_long_words=False) or [""]
            for w, head in zip(wide, columns, strict=True)
        ]
    height = max(map(len, heads), default=0)
    heads = [[""] * (height - len(head)) + head for head in heads]
    wide = [max(w, *map(len, head)) for w, head in zip(wide, heads, strict=True)]
    right = [bool(cells) and all(map(_is_number, column)) for column in body]

    def line(row: Sequence[str]) -> str:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, wide, right, strict=True))
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * w for w in wide)
    return "\n".join(
        [*([title] if title else []), *map(line, zip(*heads, strict=True)), rule, *map(line, cells)]
    )


def _is_number(cell: str) -> bool:
    return not cell or cell in ("-", "nan") or cell.lstrip("+-.~<>")[:1].isdigit()
