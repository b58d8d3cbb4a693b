"""Progress lines, tables, stop requests."""

import io
import signal
import time

import pytest
import rich.console

from fastdraft.console import Console, Progress, Stop, format_seconds, format_table
from fastdraft.errors import Interrupted

Patch = pytest.MonkeyPatch


def test_seconds_print_as_a_clock() -> None:
    assert [format_seconds(s) for s in (0, 95, 4000)] == ["0:00", "1:35", "1:06:40"]


def test_a_progress_line_shows_share_rate_and_eta() -> None:
    progress = Progress(Console(quiet=True), "pretrain", 2_000_000, "tokens", 0)
    progress.completed, progress.note, progress._start = 500_000, "loss 3.21", progress._start - 50
    assert progress.line() == "  pretrain           25% 500k/2M tokens 10k/s ETA 2:30  loss 3.21"


def test_a_table_aligns_numbers_right_and_words_left() -> None:
    assert format_table("T", ("task", "rate"), [("code", "0.5"), ("instructions", "10")]).splitlines() == [
        "T",
        "task          rate",
        "------------  ----",
        "code           0.5",
        "instructions    10",
    ]


def test_the_first_signal_asks_and_the_handlers_are_put_back() -> None:
    stop, before = Stop(), signal.getsignal(signal.SIGTERM)
    stop.check("nowhere")
    with stop.listen():
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert signal.getsignal(signal.SIGTERM) == before
        with pytest.raises(Interrupted, match="run the same command again"):
            stop.check("here")
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_ended_progress_line_tells_the_time_taken() -> None:
    progress = Progress(Console(quiet=True), "continue_pretrain", 61_400, "tokens", 0)
    progress.completed, progress.note, progress._start = 61_400, "loss 6.96", progress._start - 65
    assert " in 1:05  loss 6.96" in progress.line(ended=True)


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_no_line_is_broken(
    capsys: pytest.CaptureFixture[str], monkeypatch: Patch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    console = Console()
    console.say("word " * 40)
    with console.progress("pretrain", 100, "steps") as progress:
        for _ in range(25):
            now[0] += 1
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["10%", "20%", "25%"]
    assert lines[0].split() == ["word"] * 40


def test_on_a_terminal_the_bar_goes_and_its_last_line_stays(monkeypatch: Patch) -> None:
    written = io.StringIO()
    console = Console()
    console.live = True
    console._rich = rich.console.Console(file=written, force_terminal=True, width=40, highlight=False)
    with console.progress("pretrain", 100, "steps") as progress:
        monkeypatch.setattr(progress, "_shown", 0.0)
        progress.advance(50, note="loss 1")
    assert " 50% 50/100" in written.getvalue()
    assert written.getvalue().rpartition("\x1b[2K")[2].startswith("  pretrain")


def test_wide_headings_are_broken_over_lines_only_where_that_is_needed() -> None:
    columns = ["task", *(f"{name} tokens for each pass" for name in ("PT", "CP", "FT"))]
    rows = [["code", "1.01", "1.02", "1.03"]]
    assert "PT tokens for each pass" in format_table("", columns, rows, width=200)
    lines = format_table("", columns, rows, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[-3].split() == ["task", "pass", "pass", "pass"]
    assert lines[-1].split() == rows[0]
