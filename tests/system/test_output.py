"""A command whose output is full, closed, or a pipe without a reader: one message or code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.process import ROOT

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
