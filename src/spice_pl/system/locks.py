"""Let one process at a time work in a place; the system frees the lock when the process ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from spice_pl.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextmanager
def hold(
    place: Path, waiting: str, *, shared: bool = False, busy: str | None = None
) -> Iterator[int]:
    """Lock a place for the `with` block; wait until another process frees it.

    Where the system locks open files (Linux, macOS), a child process that gets the handle holds the
    lock too, even if this process is killed. On Windows a file of the package `filelock` is locked.

    Args:
        place: folder or file that exists. A lock file is made in the folder, or beside the file.
        waiting: text for the log if another process has the lock.
        shared: whether others that share the lock may hold it too. On Windows such a lock is not
            taken.
        busy: text of the error if another process has the lock; None waits for it.

    Yields:
        The handle that child processes may inherit; -1 on Windows, where none is needed.

    Raises:
        UsageError: another process has the lock, and there is a text for it.
    """
    if fcntl is None:
        if shared:
            yield -1
            return
        folder = place if place.is_dir() else place.parent
        lock = FileLock(folder / f"{place.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            if busy is not None:
                raise UsageError(busy) from error
            logger.info(waiting)
            lock.acquire()
        try:
            yield -1
        finally:
            lock.release()
        return
    handle, kind = os.open(place, os.O_RDONLY), fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if busy is not None:
                raise UsageError(busy) from error
            logger.info(waiting)
            fcntl.flock(handle, kind)
        except OSError as error:  # some network disks have no locks
            logger.warning(
                "%s cannot be locked (%s); start one run at a time in it", place, error.strerror
            )
        yield handle
    finally:
        os.close(handle)
