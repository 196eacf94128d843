"""List the image files below a folder, and find out whether they changed since the last scan.

Scanning a million files takes seconds. A scan of many files therefore saves a note: the time of
change of every folder, which moves when a file is added, removed or renamed, and those of 10,000
evenly spaced files. While all of these are unchanged, the earlier scan is trusted. It misses a file
that was rewritten in place and is not among the 10,000; `dataset.scan=files` checks every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spice_pl.data.decode import SUFFIXES
from spice_pl.errors import UsageError
from spice_pl.system.files import atomic

logger = logging.getLogger(__name__)

SCAN = ("auto", "files", "folders")
TRUST_ABOVE = 100_000  # files; fewer are scanned in a second or two
SAMPLED = 10_000  # files that are checked in any case
GONE, DENIED = -1, -2
SETTLED_S = 2.0  # seconds; resolution of the coarsest clock of a file system (FAT)


@dataclass
class Found:
    """Image files below a folder, sorted by path.

    Attributes:
        paths: paths relative to the folder, with "/".
        sizes: bytes of each file; GONE for a broken link, DENIED without permission to read. Both
            are part of the identity, so that a new store is made when the file can be read.
        times: times of change in nanoseconds.
        folders: time of change of every folder that was listed, by path.
        other: number of files whose names are not those of images.
        problems: path and reason of everything that could not be listed.
    """

    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    times: array[int] = field(default_factory=lambda: array("q"))
    folders: dict[str, int] = field(default_factory=dict)
    other: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def identity(self) -> str:
        """Digest of all paths, sizes and times of change."""
        digest = hashlib.blake2b(digest_size=16)
        for path in self.paths:
            digest.update(path.encode("utf-8", "surrogateescape") + b"\0")
        digest.update(self.sizes.tobytes())
        digest.update(self.times.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Note:
    """Summary of a scan.

    Attributes:
        identity: identity of its `Found`.
        num_images: number of files found.
        other: as in `Found`.
        problems: as in `Found`.
    """

    identity: str
    num_images: int
    other: int
    problems: list[tuple[str, str]]


def look(root: Path, cache_dir: Path, scan: str, subfolders: Sequence[str] = ("",)) -> Note | Found:
    """Return the note of an earlier scan if it can be trusted, else scan again.

    Args:
        root: folder to search.
        cache_dir: folder of the notes.
        scan: "files" checks every file, "folders" trusts a note, "auto" trusts a note of more than
            100,000 files.
        subfolders: subfolders of root to search; "" is root itself.

    Raises:
        UsageError: scan is not one of these.
    """
    if scan not in SCAN:
        raise UsageError(f"dataset.scan {scan!r} is none of {SCAN}")
    name = json.dumps([str(root.resolve()), list(subfolders)])
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    path = cache_dir / f"{digest}.scan.json"
    if scan != "files" and path.is_file():
        note = _trusted(root, json.loads(path.read_text()), scan)
        if note is not None:
            return note
    begun = time.time_ns()
    found = scan_files(root, subfolders)
    settled = max(found.folders.values(), default=0) < begun - SETTLED_S * 1e9
    # A folder that has just changed may change again within one tick of its clock.
    if settled and (scan == "folders" or len(found.paths) > TRUST_ABOVE):
        _write_note(path, found)
    return found


def scan_files(root: Path, subfolders: Sequence[str] = ("",)) -> Found:
    """List every file below a folder; links to folders are followed, each folder once."""
    found, pending, links = Found(), list(subfolders), list[str]()
    rows: list[tuple[str, int, int]] = []
    seen: set[tuple[int, int]] = set()
    while pending or links:
        # Links come last, so that a folder below root is found under its own path.
        below = pending.pop() if pending else links.pop(links.index(min(links)))
        try:
            stat = os.stat(root / below)
            if (stat.st_dev, stat.st_ino) in seen:
                found.problems.append((below, "a link to a folder that is searched already"))
                continue
            seen.add((stat.st_dev, stat.st_ino))
            found.folders[below] = stat.st_mtime_ns
            with os.scandir(root / below) as entries:
                for entry in entries:
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path)
                    elif entry.is_dir():
                        links.append(path)
                    elif os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
                        found.other += 1
                    else:
                        rows.append((path, *size_and_time(entry.path)))
                        if len(rows) % TRUST_ABOVE == 0:
                            logger.info("found %d images so far", len(rows))
        except OSError as error:
            found.problems.append((below or ".", f"cannot be listed: {error.strerror}"))
    rows.sort()
    for path, size, changed in rows:
        found.paths.append(path)
        found.sizes.append(size)
        found.times.append(changed)
    found.problems.sort()
    return found


def image_files(root: Path) -> list[str]:
    """Return the paths of all images relative to root, sorted."""
    return scan_files(root).paths


def leaves(path: str) -> bool:
    """Return whether a path named by a data set would leave its folder.

    >>> leaves("val/images/1.JPEG"), leaves("val/../../1.JPEG"), leaves("/etc/passwd")
    (False, True, True)
    """
    return Path(path).is_absolute() or ".." in Path(path).parts


def size_and_time(path: str | Path) -> tuple[int, int]:
    """Return size and time of change of a file; GONE or DENIED replace the size."""
    try:
        stat = os.stat(path)
    except OSError:
        return GONE, 0
    return stat.st_size if os.access(path, os.R_OK) else DENIED, stat.st_mtime_ns


def _write_note(path: Path, found: Found) -> None:
    step = max(1, len(found.paths) // SAMPLED)
    sample = [
        (found.paths[i], found.sizes[i], found.times[i]) for i in range(0, len(found.paths), step)
    ]
    note = {
        "identity": found.identity,
        "num_images": len(found.paths),
        "other": found.other,
        "problems": found.problems,
        "folders": found.folders,
        "sample": sample,
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(note))


def _trusted(root: Path, note: dict[str, Any], scan: str) -> Note | None:
    if scan == "auto" and note["num_images"] <= TRUST_ABOVE:
        return None
    try:
        for path, changed in note["folders"].items():
            if os.stat(root / path).st_mtime_ns != changed:
                return None
        for path, size, changed in note["sample"]:
            if size_and_time(root / path) != (size, changed):
                return None
    except OSError:
        return None
    logger.info(
        "trusting %d images in %d folders that have not changed; dataset.scan=files checks each",
        *(note["num_images"], len(note["folders"])),
    )
    problems = [(path, reason) for path, reason in note["problems"]]
    return Note(note["identity"], note["num_images"], note["other"], problems)
