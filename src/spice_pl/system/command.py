"""The command that starts a job, for the commands that messages suggest, and its version."""

import os
import re
from importlib.metadata import PackageNotFoundError, version

NAME = "SPICE_PL_COMMAND"  # set by cli.main; ranks, trials and workers inherit it


def command() -> list[str]:
    """Return the words before the settings: `python train.py`, or `spice` once installed."""
    return os.environ.get(NAME, "python train.py").split()


def version_of(package: str) -> str:
    """Return the version of a package; code may run from a clone that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def quoted(text: object) -> str:
    """Return a path or text as one value in the grammar of the command line.

    >>> print(quoted("50 %, a=b"))
    '50 %, a=b'
    """
    # A backslash is plain except before a quote, and the last one would be before the closing one.
    whole = re.sub(r"(\\*)'", lambda match: match[1] * 2 + r"\'", str(text).replace("${", r"\${"))
    ending = len(whole) - len(whole.rstrip("\\"))
    return f"'{whole}{ending * chr(92)}'"
