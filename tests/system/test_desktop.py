"""Where the report opens by itself, and where it does not."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path

import pytest

from spice_pl.system.desktop import DISPLAYS, REMOTE, SWEEP, has_desktop, open_page

RANKS = ("LOCAL_RANK", "SLURM_NTASKS")


@pytest.fixture
def desktop(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A terminal on a Linux desktop."""
    for name in ("CI", SWEEP, *REMOTE, *DISPLAYS, *RANKS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("DISPLAY", ":0")
    return monkeypatch


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that the browser was asked for; no browser starts."""
    asked: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: not asked.append(address))  # type: ignore[func-returns-value]
    return asked


def test_a_terminal_on_a_desktop_has_one(desktop: pytest.MonkeyPatch) -> None:
    assert has_desktop()
    desktop.delenv("DISPLAY")
    assert not has_desktop()
    desktop.setenv("WAYLAND_DISPLAY", "wayland-0")
    assert has_desktop()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_macos_and_windows_need_no_display(desktop: pytest.MonkeyPatch, platform: str) -> None:
    desktop.delenv("DISPLAY")
    desktop.setattr(sys, "platform", platform)
    assert has_desktop()


@pytest.mark.parametrize("name", ["CI", *REMOTE, SWEEP, "LOCAL_RANK"])
def test_not_in_ci_over_ssh_or_in_a_rank(
    desktop: pytest.MonkeyPatch, opened: list[str], name: str
) -> None:
    desktop.setenv(name, "1")
    assert not open_page(Path("report.html"), "auto")
    assert opened == []


def test_not_where_the_output_goes_to_a_file(
    desktop: pytest.MonkeyPatch, opened: list[str]
) -> None:
    desktop.setattr(sys.stdout, "isatty", lambda: False)
    assert not open_page(Path("report.html"), "auto")
    assert opened == []


def test_an_address_is_escaped_and_the_word_decides(
    desktop: pytest.MonkeyPatch, opened: list[str]
) -> None:
    assert open_page(Path("/photos of #1/report.html"), "auto")
    assert opened == ["file:///photos%20of%20%231/report.html"]
    assert not open_page(Path("/report.html"), False)
    desktop.delenv("DISPLAY")
    assert open_page("http://127.0.0.1:1/", True)
    assert opened[1:] == ["http://127.0.0.1:1/"]


def test_a_browser_that_does_not_start_is_no_failure(
    desktop: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(address: str) -> bool:
        raise webbrowser.Error("could not locate runnable browser")

    desktop.setattr(webbrowser, "open", broken)
    with caplog.at_level("INFO"):
        assert not open_page(Path("/report.html"), True)
    assert "could not locate runnable browser" in caplog.text
