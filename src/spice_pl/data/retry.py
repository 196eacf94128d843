"""Tell errors that may pass from those that stay, and try again.

Too many open files, a network disk that is away for a moment or too little memory say nothing about
a file. Such errors are tried again, and never kept as the reason why a file is left out.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EINTR", "EBUSY", "ENOMEM", "ENOBUFS", "EMFILE", "ENFILE", "ESTALE"),
        *("ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO"),
        *("ECONNRESET", "ECONNABORTED", "ENOTCONN", "ESHUTDOWN", "ENOLINK"),
    )
    if hasattr(errno, name)
)
PAUSES_S = (0.05, 0.5)  # seconds before the second and the third attempt


def may_pass(error: BaseException) -> bool:
    """Return whether an error tells of the machine's state and not of the file."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING)


def try_again(call: Callable[[], Result]) -> Result:
    """Return what a call returns; repeat it after errors that may pass, three attempts in all."""
    for pause in PAUSES_S:
        try:
            return call()
        except (OSError, MemoryError) as error:
            if not may_pass(error):
                raise
            time.sleep(pause)
    return call()
