"""Progress lines, tables, stop requests."""

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
        "T", "task          rate", "------------  ----", "code           0.5", "instructions    10"
    ]  # fmt: skip


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
