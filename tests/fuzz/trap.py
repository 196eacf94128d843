"""Trap what a case may not do: connect, start a process, or write outside its folder."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REACHING = {
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname"),
    *("socket.sendto", "socket.sendmsg", "urllib.Request", "http.client.connect"),
    *("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"),
    *("os.spawn", "os.startfile", "pty.spawn", "os.kill"),
}
CHANGING = {
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move", "shutil.copyfile"),
}
TWO_PATHS = {"os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"}
MOVING = {"os.rename", "shutil.move"}  # the source goes
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Trapped(BaseException):
    """A case reached out; not an Exception, so that nothing can hide it."""


class _State(threading.local):
    own: str | None = None


_state = _State()


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    own = _state.own
    if own is None:
        return
    if event in REACHING:
        raise Trapped(f"{event} {arguments!r:.200}")
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str | bytes) or not flags & WRITING:
            return
    elif event in CHANGING:
        path = arguments[1] if event in TWO_PATHS else arguments[0]
        if event in MOVING and not _inside(arguments[0], own):
            raise Trapped(f"{event} {arguments!r:.200}")
    else:
        return
    if not _inside(path, own):
        raise Trapped(f"{event} {path!r:.200}")


def _inside(path: Any, own: str) -> bool:
    """Whether a path is below the folder, links to elsewhere counted as elsewhere."""
    if isinstance(path, int):  # of a file that is open already
        return True
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    whole = os.path.join(os.path.realpath(folder), name)
    return whole == "/dev/null" or "__pycache__" in whole or f"{whole}/".startswith(f"{own}/")


sys.addaudithook(_watch)  # a hook cannot be removed again


@contextmanager
def trapped(own: Path) -> Iterator[None]:
    """Raise `Trapped` on anything that reaches outside a folder, in this thread."""
    _state.own = f"{own.resolve()}"
    try:
        yield
    finally:
        _state.own = None
