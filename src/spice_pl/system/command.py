"""The command that starts a job, for the commands that messages suggest."""

import os

NAME = "SPICE_PL_COMMAND"  # set by cli.main; ranks, trials and workers inherit it


def command() -> list[str]:
    """Return the words before the settings: `python train.py`, or `spice` once installed."""
    return os.environ.get(NAME, "python train.py").split()
