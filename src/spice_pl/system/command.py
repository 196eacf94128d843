"""What a person types to start a job, for the commands in our messages."""

import os

NAME = "SPICE_PL_COMMAND"  # set where a job starts; ranks, trials and workers inherit it


def command() -> list[str]:
    """Return the words before any setting: `python train.py`, or `spice` once installed."""
    return os.environ.get(NAME, "python train.py").split()
