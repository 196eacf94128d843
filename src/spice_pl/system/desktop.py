"""Open a page in the user's browser, where there is a desktop to show it on."""

from __future__ import annotations

import logging
import os
import sys
import webbrowser
from pathlib import Path

from spice_pl.system import ranks

logger = logging.getLogger(__name__)

REMOTE = ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")  # set by sshd: the desktop is elsewhere
SWEEP = "SPICE_PL_TRIALS"  # set while a sweep runs; a page per trial would be too many
DISPLAYS = ("DISPLAY", "WAYLAND_DISPLAY")


def has_desktop() -> bool:
    """Whether somebody sits at a desktop of this machine, and watches this process in a terminal.

    False in continuous integration (`CI`), over SSH, in a rank, in a trial of a sweep, where the
    output is not a terminal, and on Linux without a display.
    """
    if any(map(os.environ.get, ("CI", SWEEP, *REMOTE))) or ranks.in_rank():
        return False
    if not sys.stdout.isatty():
        return False
    return sys.platform in ("darwin", "win32") or any(map(os.environ.get, DISPLAYS))


def open_page(page: Path | str, wanted: bool | str) -> bool:
    """Open a page in the browser; return whether one was started.

    Args:
        page: file, or the address of a page.
        wanted: True opens it, False does not, "auto" opens it where there is a desktop.
    """
    if not (has_desktop() if wanted == "auto" else wanted):
        return False
    address = page.resolve().as_uri() if isinstance(page, Path) else page
    try:
        started = webbrowser.open(address)
    except (webbrowser.Error, OSError) as error:
        logger.info("no browser could be started (%s)", error)
        return False
    if not started:
        logger.info("no browser could be started; open %s yourself", page)
    return started
