"""The messages of a job: a few plain lines on the terminal, and all of them in log.txt."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spice_pl.system.output import ESCAPED

FILE_NAME = "log.txt"
TOKEN = re.compile(r"token=[^\s&]+")  # of the address of a review; others may read the file
USER = "spice_pl.user"  # logger of lines that say what has been done, in the user's words
SHOWN = frozenset(  # loggers whose messages a user of `spice photos` reads; and all warnings
    {
        USER,
        "spice_pl.data.store_writer",
        "spice_pl.job.outlook",
        "spice_pl.system.desktop",
        "spice_pl.system.locks",
        "spice_pl.system.progress",
    }
)


class UserLines(logging.Filter):
    """Keeps warnings and the messages of the loggers in `SHOWN`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a user of `spice photos` reads the message."""
        return record.levelno >= logging.WARNING or record.name in SHOWN


class LogFile(logging.Handler):
    """Appends each message with its time to a file, once the folder of the file exists.

    Args:
        path: the file. Its folder is made by the job; messages before that are kept in memory. What
            cannot be written is left out, as a log must not stop a job.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._lines = path, list[str]()
        self.setFormatter(logging.Formatter("%(asctime)s  %(message)s"))
        self.addFilter(ESCAPED)

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message."""
        self._lines.append(TOKEN.sub("token=***", self.format(record)))
        if not self.path.parent.is_dir():
            return
        with suppress(OSError), self.path.open("a", encoding="utf-8", errors="replace") as file:
            file.write("\n".join([*self._lines, ""]))
        self._lines.clear()


@contextmanager
def job_log(path: Path, command: str, *, plain: bool) -> Iterator[None]:
    """Write the messages of a job to a file too, and the error that ends it.

    Args:
        path: the file.
        command: command line of the job, without secrets; the first line.
        plain: whether the terminal gets the messages of `UserLines` only. `hydra.verbose=true`
            shows all of them.
    """
    root, file = logging.getLogger(), LogFile(path)
    plain = plain and not root.isEnabledFor(logging.DEBUG)
    shown = [(handler, UserLines()) for handler in root.handlers if plain]
    for handler, lines in shown:
        handler.addFilter(lines)
    root.addHandler(file)
    file.emit(_record(logging.INFO, command))
    try:
        yield
    except Exception as error:
        file.emit(_record(logging.ERROR, f"stopped by an error: {error}"))
        raise
    finally:
        root.removeHandler(file)
        for handler, lines in shown:
            handler.removeFilter(lines)


def _record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord(USER, level, __file__, 0, message, None, None)
