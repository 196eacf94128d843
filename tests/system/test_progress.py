"""Progress bars on a terminal and in a log."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest

from spice_pl.system.progress import Bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_at_once_and_every_tenth_with_the_time_left(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with Bar("moco", 20) as bar:
        for _ in range(20):
            clock[0] += 3
            bar.advance()
            bar.show("loss 1.5")
    assert len(caplog.messages) == 11
    assert caplog.messages[0] == "moco   0 %, 3 s, 57 s left  loss 1.5"
    assert caplog.messages[1] == "moco  10 %, 6 s, 54 s left  loss 1.5"
    assert caplog.messages[-1] == "moco 100 %, 60 s, 0 s left  loss 1.5"


def test_time_left_counts_this_part_of_a_job_only(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bar = Bar("moco", 100, done=50)
    clock[0] = 10.0
    bar.advance(10)
    bar.show()
    assert caplog.messages == ["moco  60 %, 10 s, 40 s left"]


def test_a_short_job_says_nothing_and_a_long_one_not_too_often(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bar = Bar("views", 10, pause=10)
    for _ in range(10):
        clock[0] += 0.5
        bar.advance()
        bar.show()
    assert caplog.messages == []
    bar = Bar("views", 10, pause=10)
    for _ in range(10):
        clock[0] += 6
        bar.advance()
        bar.show()
    assert [line.split(",")[0] for line in caplog.messages] == [
        f"views {percent:3d} %" for percent in (20, 40, 60, 80, 100)
    ]


def test_other_ranks_and_empty_jobs_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Bar("moco", 1, enabled=False) as bar:
        bar.advance()
        bar.show()
    with Bar("moco", 0) as bar:
        bar.show()
    assert caplog.messages == []


def test_a_terminal_gets_a_bar_that_ends_with_the_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("moco", 4) as bar:
        bar.advance(3)
        bar.show("loss 1.5")
    print("next", file=terminal)
    *_, last, following, _ = terminal.getvalue().split("\n")
    assert "moco" in last
    assert "75 %" in last
    assert "loss 1.5" in last
    assert "next" in following
    assert caplog.messages == []
