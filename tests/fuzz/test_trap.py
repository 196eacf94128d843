"""The trap of the fuzzer finds what a case may not do, each planted once."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz.trap import Trapped, trapped

OUTSIDE = "/tmp/spice-pl-trap"  # noqa: S108 - never made


def on_socket(method: str, *args: Any) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as opened:
        getattr(opened, method)(*args)


VIOLATIONS: dict[str, Callable[[Path], Any]] = {
    "connection": lambda own: socket.create_connection(("127.0.0.1", 9), timeout=1),
    "connection without waiting": lambda own: on_socket("connect_ex", ("127.0.0.1", 9)),
    "datagram": lambda own: on_socket("sendto", b"x", ("127.0.0.1", 9)),
    "server": lambda own: on_socket("bind", ("127.0.0.1", 0)),
    "name": lambda own: socket.getaddrinfo("localhost", 80),
    "URL": lambda own: urllib.request.urlopen("http://127.0.0.1:9/"),
    "asynchronous": lambda own: asyncio.run(asyncio.open_connection("127.0.0.1", 9)),
    "shell": lambda own: os.system("true"),  # noqa: S605, S607
    "pipe": lambda own: os.popen("true"),  # noqa: S605, S607
    "program": lambda own: subprocess.run([sys.executable, "-c", ""], check=False),
    "fork": lambda own: os.fork() or os._exit(0),
    "spawn": lambda own: os.posix_spawn(sys.executable, [sys.executable, "-c", ""], {}),
    "exec": lambda own: os.execv(sys.executable, [sys.executable, "-c", ""]),  # noqa: S606
    "signal": lambda own: os.kill(os.getpid(), 0),
    "new file": lambda own: Path(OUTSIDE).write_bytes(b"x"),
    "appended": lambda own: Path(OUTSIDE).open("a"),  # noqa: SIM115
    "low-level": lambda own: os.open(OUTSIDE, os.O_CREAT | os.O_WRONLY),
    "a way out": lambda own: (own / ".." / "x").write_bytes(b"x"),
    "a neighbour": lambda own: Path(f"{own}2").write_bytes(b"x"),
    "folder": lambda own: os.mkdir(OUTSIDE),
    "link": lambda own: os.symlink("/", OUTSIDE),
    "hard link": lambda own: os.link(own / "file", OUTSIDE),
    "moved out": lambda own: os.rename(own / "file", OUTSIDE),
    "moved in": lambda own: os.rename(own.parent / "other", own / "other"),
    "copied out": lambda own: shutil.copyfile(own / "file", OUTSIDE),
    "removed": lambda own: os.remove(own.parent / "other"),
    "removed with all": lambda own: shutil.rmtree(own.parent),
    "cut": lambda own: os.truncate(own.parent / "other", 0),
    "rights": lambda own: os.chmod(own.parent / "other", 0o600),
    "through a link": lambda own: (own / "out" / "other").write_bytes(b"x"),
}


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_a_violation_is_caught(tmp_path: Path, kind: str) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "file").write_bytes(b"x")
    (tmp_path / "other").write_bytes(b"whole")
    (own / "out").symlink_to(tmp_path)
    before = os.getpid()
    with pytest.raises(Trapped), trapped(own):
        VIOLATIONS[kind](own)
    assert os.getpid() == before
    assert (tmp_path / "other").read_bytes() == b"whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "own"]
    assert not os.path.lexists(OUTSIDE)


def test_what_a_case_may_do_is_let_through(tmp_path: Path) -> None:
    with trapped(tmp_path):
        (tmp_path / "a").write_bytes(b"x")
        os.rename(tmp_path / "a", tmp_path / "b")
        Path(__file__).read_bytes()
        os.remove(tmp_path / "b")
    Path(tmp_path / "after").write_bytes(b"x")
