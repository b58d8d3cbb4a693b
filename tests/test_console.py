"""Progress lines, tables, stop requests."""

import os
import signal

import pytest

from fastdraft.console import Console, Progress, Stop, format_seconds, format_table
from fastdraft.errors import Interrupted


def test_seconds_print_as_a_clock() -> None:
    assert [format_seconds(s) for s in (0, 95, 4000)] == ["0:00", "1:35", "1:06:40"]


def test_a_progress_line_shows_share_rate_and_eta_and_fits_the_width() -> None:
    progress = Progress(Console(quiet=True), "pretrain", 2_000_000, "tokens", 0)
    progress.completed, progress.note, progress._start = 500_000, "loss 3.21", progress._start - 50
    assert progress.line(79).startswith("  pretrain           25% 500k/2M tokens 10k/s ETA 2:30  loss 3.21")
    assert len(progress.line(30)) == 30


def test_the_rate_counts_only_what_this_process_did() -> None:
    progress = Progress(Console(quiet=True), "pretrain", 100, "steps", 90)
    progress.completed, progress._start = 95, progress._start - 5
    assert progress.rate == pytest.approx(1, rel=0.01)


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


def test_an_ended_progress_line_tells_the_time_taken_and_still_fits() -> None:
    progress = Progress(Console(quiet=True), "continue_pretrain", 61_400, "tokens", 0)
    progress.completed, progress.note, progress._start = 61_400, "loss 6.96", progress._start - 65
    assert " in 1:05  loss 6.96" in progress.line(79, ended=True)
    assert len(progress.line(40, ended=True)) == 40


def test_news_on_a_terminal_are_broken_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console()
    console.live = True
    monkeypatch.setattr(console, "_width", lambda: 30)
    console.say("  one two three four five six seven eight /a/path/that/is/longer/than/the/terminal")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "    /a/path/that/is/longer/than/the/terminal"
    assert max(map(len, lines[:-1])) <= 30


def test_a_terminal_that_does_not_know_its_width_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console()
    monkeypatch.setattr("os.get_terminal_size", lambda number: os.terminal_size((0, 0)))
    monkeypatch.setattr("sys.stderr.fileno", lambda: 2)
    assert console._width() == 79


def test_news_in_a_file_stay_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.live = False
    console.say("word " * 40)
    assert capsys.readouterr().err.count("\n") == 1


def test_wide_headings_are_broken_over_lines_only_where_that_is_needed() -> None:
    columns = ["task", *(f"{name} tokens for each pass" for name in ("PT", "CP", "FT"))]
    rows = [["code", "1.01", "1.02", "1.03"]]
    assert "PT tokens for each pass" in format_table("", columns, rows, width=200)
    lines = format_table("", columns, rows, width=40).splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[-3].split() == ["task", "pass", "pass", "pass"]
    assert lines[-1].split() == rows[0]
