"""Scans whose disk is not well: errors that pass are tried again, and no note of them is kept."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spice_pl.data import listing, retry
from spice_pl.data.listing import Note, Search, look, scan_files

PNG = b"\x89PNG\r\n\x1a\n" + bytes(24)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES_S", (0.0, 0.0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "deep").mkdir(parents=True)
    for name in ("1.png", "deep/2", "deep/3.png"):
        (folder / name).write_bytes(PNG)
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (1e9, 1e9))
    return folder


def failing(call: Callable[..., Any], name: str, code: int, times: int) -> Callable[..., Any]:
    """Let a call fail a number of times for paths that end in a name."""
    left = [times]

    def wrapped(path: Any, *more: Any, **settings: Any) -> Any:
        if str(path).endswith(name) and left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code), str(path))
        return call(path, *more, **settings)

    return wrapped


@pytest.mark.parametrize(
    ("where", "name"), [("_head", "deep/2"), ("_entries", "deep"), ("os.stat", "3.png")]
)
@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM])
def test_an_error_that_passes_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: str, code: int
) -> None:
    whole = scan_files(Search(root))
    call = os.stat if where == "os.stat" else getattr(listing, where)
    target = where if where == "os.stat" else f"{listing.__name__}.{where}"
    monkeypatch.setattr(target, failing(call, name, code, 2))
    assert scan_files(Search(root)) == whole
    assert whole.paths == ["1.png", "deep/2", "deep/3.png"]


@pytest.mark.parametrize(("where", "name"), [("_head", "deep/2"), ("_entries", "deep")])
def test_an_error_that_stays_is_said_and_leaves_no_note(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, name: str
) -> None:
    call = failing(getattr(listing, where), name, errno.EIO, 3)
    with monkeypatch.context() as patch:
        patch.setattr(listing, where, call)
        found = look(Search(root, cache_dir=tmp_path), "folders")
    assert "1.png" in found.paths  # type: ignore[union-attr]
    assert [path for path, _ in found.left_out.pairs()] == [name]
    assert "Input/output error" in found.left_out.pairs()[0][1]
    again = look(Search(root, cache_dir=tmp_path), "folders")
    assert not isinstance(again, Note)  # the damaged scan was not noted
    assert again.paths == ["1.png", "deep/2", "deep/3.png"]
    assert isinstance(look(Search(root, cache_dir=tmp_path), "folders"), Note)


def test_a_file_without_permission_is_not_tried_again(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = failing(listing._head, "deep/2", errno.EACCES, 1)
    monkeypatch.setattr(listing, "_head", call)
    found = scan_files(Search(root))
    assert found.left_out.pairs() == [("deep/2", "permission denied")]
    assert found.complete
