"""Let one process at a time work in a place; the system frees the lock when the process ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)


@contextmanager
def hold(place: Path, waiting: str) -> Iterator[int]:
    """Lock a place for the `with` block; wait until another process frees it.

    Where the system locks open files (Linux, macOS), a child process that gets the handle holds the
    lock too, even if this process is killed. On Windows a file of the package `filelock` is locked.

    Args:
        place: folder or file that exists. A lock file is made in the folder, or beside the file.
        waiting: text for the log if another process has the lock.

    Yields:
        The handle that child processes may inherit; -1 on Windows, where none is needed.
    """
    if fcntl is None:
        folder = place if place.is_dir() else place.parent
        lock = FileLock(folder / f"{place.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info(waiting)
            lock.acquire()
        try:
            yield -1
        finally:
            lock.release()
        return
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info(waiting)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:  # some network disks have no locks
            logger.warning(
                "%s cannot be locked (%s); start one run at a time in it", place, error.strerror
            )
        yield handle
    finally:
        os.close(handle)
