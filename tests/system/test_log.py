"""What a user reads in the terminal, and log.txt."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from spice_pl.system.log import USER, job_log


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def terminal() -> Iterator[Heard]:
    root, heard = logging.getLogger(), Heard()
    level = root.level
    root.addHandler(heard)
    root.setLevel(logging.INFO)
    yield heard
    root.removeHandler(heard)
    root.setLevel(level)


def say() -> None:
    logging.getLogger("spice_pl.stages.proto").info("a detail")
    logging.getLogger("spice_pl.stages.proto").warning("a warning")
    logging.getLogger(USER).info("a result")


def test_details_are_in_the_file_only(terminal: Heard, tmp_path: Path) -> None:
    with job_log(tmp_path / "log.txt", "spice photos", plain=True):
        say()
    assert terminal.lines == ["a warning", "a result"]
    said = [line.partition("  ")[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert said == ["spice photos", "a detail", "a warning", "a result"]
    say()  # after the job all is as it was
    assert terminal.lines[2:] == ["a detail", "a warning", "a result"]


def test_other_jobs_show_everything(terminal: Heard, tmp_path: Path) -> None:
    with job_log(tmp_path / "log.txt", "", plain=False):
        say()
    assert terminal.lines == ["a detail", "a warning", "a result"]


def test_the_file_waits_for_its_folder_and_makes_none(terminal: Heard, tmp_path: Path) -> None:
    file = tmp_path / "photos" / "log.txt"
    with job_log(file, "first", plain=True):
        say()
        assert not file.parent.exists()
        file.parent.mkdir()
        logging.getLogger(USER).info("later")
    assert [line.rpartition("  ")[2] for line in file.read_text().splitlines()] == [
        *("first", "a detail", "a warning", "a result", "later")
    ]


def test_an_error_is_noted_and_raised(terminal: Heard, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no such thing"),
        job_log(tmp_path / "log.txt", "x", plain=True),
    ):
        raise ValueError("no such thing")
    assert "stopped by an error: no such thing" in (tmp_path / "log.txt").read_text()


def test_a_file_that_cannot_be_written_stops_nothing(terminal: Heard, tmp_path: Path) -> None:
    (tmp_path / "log.txt").mkdir()
    with job_log(tmp_path / "log.txt", "x", plain=True):
        say()
    assert terminal.lines == ["a warning", "a result"]


def test_the_token_of_a_review_is_not_in_the_file(terminal: Heard, tmp_path: Path) -> None:
    with job_log(tmp_path / "log.txt", "", plain=False):
        logging.getLogger("spice_pl.tasks.review").info("open http://127.0.0.1:1/?token=aB-3_x now")
    assert "token=aB-3_x now" in terminal.lines[0]
    text = (tmp_path / "log.txt").read_text()
    assert "aB-3" not in text
    assert "?token=*** now" in text
