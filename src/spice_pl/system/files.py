"""Write files atomically: complete or not at all."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spice_pl.errors import UsageError

# How a cell begins that a spreadsheet may run (OWASP, "CSV injection"), and our own mark.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
UMASK = os.umask(0o077)  # the only way to read it is to set it
os.umask(UMASK)
CHUNK = 1 << 24  # bytes
# EDQUOT: the quota of a user; not every system knows it.
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success the file written there replaces `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync_file(temporary)
        temporary.chmod(0o666 & ~UMASK)
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(file: Path) -> None:
    """Write a file's content to the disk."""
    with file.open("r+b") as written:  # Windows refuses a handle that only reads
        os.fsync(written.fileno())


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk; otherwise a power cut may undo a rename in it."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def allocate(file: Path) -> None:
    """Give a sparse file of zeros its place on the disk.

    Raises:
        OSError: the disk is too small.
    """
    size = file.stat().st_size
    with file.open("r+b") as opened:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(opened.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
        # macOS, Windows, and disks that cannot allocate: write what is there once more.
        for start in range(0, size, CHUNK):
            opened.seek(start)
            part = opened.read(CHUNK)
            opened.seek(start)
            opened.write(part)


def for_spreadsheet(text: str) -> str:
    """Return a text with a leading ' if a spreadsheet would take it for a formula.

    A text that begins with ' gets another one, so that `from_spreadsheet` is exact.

    >>> for_spreadsheet("=1+1.png"), for_spreadsheet("a=1.png")
    ("'=1+1.png", 'a=1.png')
    """
    return f"'{text}" if text[:1] in FORMULA else text


def from_spreadsheet(text: str) -> str:
    """Return the text that `for_spreadsheet` was given."""
    return text.removeprefix("'")


def size_text(num_bytes: float) -> str:
    """Return a size in the unit that shows it.

    >>> size_text(300), size_text(290_000), size_text(2_400_000), size_text(13e9)
    ('300 B', '290 kB', '2.4 MB', '13.0 GB')
    """
    for limit, unit, digits in ((1e9, "GB", 1), (1e6, "MB", 1), (1e3, "kB", 0)):
        if abs(num_bytes) >= limit:
            return f"{num_bytes / limit:,.{digits}f} {unit}"
    return f"{num_bytes:.0f} B"


def is_unwritable(error: OSError) -> bool:
    """Whether a file could not be written because of its folder: no permission, or no folder."""
    return error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def check_folder(key: str, value: str, folder: Path | None = None) -> None:
    """Try whether a folder can be written to, or made; nothing is left behind.

    Args:
        key: setting that names a folder.
        value: its value.
        folder: the folder to try, below that one; None tries that one.

    Raises:
        UsageError: it cannot; the message names the setting.
    """
    place = (folder or Path(value)).expanduser().absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=place, prefix=".spice-pl-"))
    except OSError as error:
        raise unwritable(key, value, error) from error


def check_temporary() -> None:
    """Try whether the system's folder of temporary files can be written to.

    Raises:
        UsageError: it cannot.
    """
    try:
        folder = tempfile.gettempdir()
    except OSError as error:  # none of the usual places can
        raise unwritable("TMPDIR", os.environ.get("TMPDIR", ""), error) from error
    check_folder("TMPDIR", folder)


def unwritable(key: str, value: Any, error: OSError) -> UsageError:
    """Return the error of a setting that names a folder which cannot be written to."""
    file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return UsageError(
        f"{key}={value} cannot be written to ({file}{error.strerror}); give another {key}=PATH, or "
        "change its permissions"
    )


def is_disk_full(error: OSError) -> bool:
    """Whether a file could not be written because the disk, a quota or a size limit is full."""
    return error.errno in FULL
