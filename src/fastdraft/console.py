"""What the user sees while FastDraft works: lines, tables, progress with rate and time left; and the request
to stop.

Everything goes to stderr, since stdout belongs to results. Progress is a live bar on a terminal and a line
every ten seconds elsewhere.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import rich.console
import rich.live
import rich.text

from fastdraft.errors import Interrupted

PLAIN_SECONDS = 10.0
TABLE_WIDTH = 79


class Stop:
    """Whether the user asked to stop. Stages look at it where everything is saved."""

    def __init__(self) -> None:
        self.requested = False

    def check(self, where: object) -> None:
        """Raises Interrupted when a stop was requested."""
        if self.requested:
            raise Interrupted(f"{where}: stopped by a signal; progress is saved")

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Inside the block the first SIGINT or SIGTERM requests a stop; a second one acts as usual."""
        # Python takes handlers from the main thread only; what nohup or a shell's background has ignored
        # stays so.
        main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
        before = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def request(*_: object) -> None:
            self.requested = True
            restore()
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # the terminal may be what has gone
                print("\nstopping at the next safe point (once more to stop at once)", file=sys.stderr)

        for number in before:
            signal.signal(number, request)
        try:
            yield
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
            self._console.show(self.line())

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
            share = f"{min(1.0, self.completed / self.total):4.0%} "
            done += f"/{format_count(self.total)}"
            if ended:
                rest = f" in {format_seconds(self.seconds)}"
            elif self.rate > 0:
                rest = f" ETA {format_seconds((self.total - self.completed) / self.rate)}"
        text = f"  {self.title:<17} {share}{done} {self.unit} {format_count(self.rate)}/s{rest}"
        return f"{text}  {self.note}" if self.note else text


class Console:
    """Where every stage talks to the user; `quiet` silences all but warnings, `silent` those too."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet, self.silent, self.stop = quiet, False, Stop()
        self._rich = rich.console.Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self.live = not quiet and self._rich.is_terminal and not self._rich.is_dumb_terminal
        self._bar: rich.live.Live | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """On another machine nobody reads."""
        return Console, (True,)

    def say(self, text: str, warning: bool = False) -> None:
        """Prints a line; on a terminal broken between words."""
        if not self.silent and (warning or not self.quiet):
            with contextlib.suppress(
                OSError, ValueError
            ):  # a terminal that is gone must not end hours of work
                self._rich.print(text, soft_wrap=not self.live)

    def warn(self, text: str) -> None:
        """Prints a line that the user should not miss."""
        self.say(f"warning: {text}", warning=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.say("\n" + format_table(title, columns, rows))

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
            self.say(progress.line(ended=True))

    def show(self, line: str) -> None:
        """A line of progress: the live bar on a terminal."""
        if not self.live or self.silent:
            self.say(line)
            return
        if self._bar is None:
            self._bar = rich.live.Live(console=self._rich, auto_refresh=False, transient=True)
            self._bar.start()
        self._bar.update(rich.text.Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)


def format_count(count: float) -> str:
    """1_048_576 -> `"1.05M"`: three digits and a suffix."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size * 0.9995:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.3g}"


def format_seconds(seconds: float) -> str:
    """95 -> `"1:35"`, 4000 -> `"1:06:40"`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def format_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int = TABLE_WIDTH
) -> str:
    """Plain text: numbers to the right, headings broken where the table would be wider than `width`."""
    body = [[str(row[i]) for row in rows] for i in range(len(columns))]
    wide = [max(map(len, column), default=1) for column in body]
    heads = [[head] for head in columns]
    if sum(max(w, len(head)) + 2 for w, head in zip(wide, columns, strict=True)) - 2 > width:
        heads = [textwrap.wrap(h, w, break_long_words=False) for h, w in zip(columns, wide, strict=True)]
    height, padded = max(map(len, heads)), []
    for head, column in zip(heads, body, strict=True):
        cells = [*[""] * (height - len(head)), *head, "", *column]
        size, right = max(map(len, cells)), bool(column) and all(map(_is_number, column))
        cells[height] = "-" * size
        padded.append([cell.rjust(size) if right else cell.ljust(size) for cell in cells])
    lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    return "\n".join([title, *lines] if title else lines)


def _is_number(cell: str) -> bool:
    return not cell or cell in ("-", "nan") or cell.lstrip("+-.~<>")[:1].isdigit()
