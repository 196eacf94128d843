"""A command whose output is full, closed, or a pipe without a reader: one message or code."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tests.process import ROOT

from spice_pl.job.errors import quiet
from spice_pl.reports.tables import ResultRow, results_rich
from spice_pl.runs import compare
from spice_pl.system.output import PIPE_CODE

OPEN = "import sys; from spice_pl.system.output import open_output; open_output(); "
VERSION = "from spice_pl import cli; sys.argv[1:] = ['--version']; cli.main()"


def python(code: str, redirection: str) -> subprocess.CompletedProcess[str]:
    command = f'"$0" -c "$1" {redirection}'
    return subprocess.run(  # noqa: S603 - our own interpreter
        ["/bin/bash", "-c", command, sys.executable, code],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


HOSTILE = "\x1b[31mred \x1b]0;title\x07 \x9b2J \u202egpj.exe\nerror: forged"


def test_names_in_metrics_do_not_rewrite_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the tables of a run and of a comparison, and of their notes below."""
    row = ResultRow(HOSTILE, None, None, None, "whole", 0, 1.0, purity=0.5)
    Console(force_terminal=False, width=200).print(results_rich([row]))
    line = compare.Line("d", HOSTILE, {HOSTILE: HOSTILE}, "whole", (0,), (), (), ())
    compare.show([line], tmp_path, Console(force_terminal=False, width=400))
    said = capsys.readouterr().out
    assert said.count("\\x1b[31mred") >= 4
    assert not {letter for letter in said if not (letter.isprintable() or letter == "\n")}
    assert not any(each.lstrip().startswith("error: forged") for each in said.splitlines())


def test_messages_of_the_log_are_escaped() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        quiet()
        quiet()
        logging.getLogger("spice_pl").warning("%s: %d", "a\x1b[2J", 3)
    finally:
        logging.getLogger().removeHandler(handler)
    assert stream.getvalue() == "a\\x1b[2J: 3\n"
    assert len(handler.filters) == 1


pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")


@pytest.mark.parametrize("text", ["'x'", "'x' * 100_000"])
def test_full_output_is_one_message(text: str) -> None:
    done = python(f"{OPEN} print({text}); sys.stdout.flush(); print('more')", ">/dev/full")
    assert done.returncode == 2
    assert "standard output cannot be written to (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_the_command_says_it_for_text_that_is_written_last() -> None:
    done = python(f"import sys; {VERSION}", ">/dev/full")
    assert done.returncode == 2
    assert done.stderr.count("standard output cannot be written to") == 1
    assert "Traceback" not in done.stderr


def test_a_pipe_without_reader_ends_as_others_do() -> None:
    code = f"{OPEN} import time; time.sleep(0.5); print('x' * 100_000)"
    done = python(code, "| true; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (PIPE_CODE, "")


def test_messages_that_cannot_be_written_are_lost() -> None:
    done = python(f"{OPEN} print('a', file=sys.stderr); print('b')", "2>/dev/full")
    assert (done.returncode, done.stdout) == (0, "b\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_nowhere_and_no_file_gets_their_number(closed: str) -> None:
    code = f"{OPEN} print('a'); print('b', file=sys.stderr); assert open('/dev/null').fileno() > 2"
    done = python(code, closed)
    assert (done.returncode, done.stdout) == (0, "" if closed[:3] == ">&-" else "a\n")
