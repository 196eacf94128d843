"""List the image files below a folder, and find out whether they changed since the last scan.

Every file below the folder is either a candidate, which is decoded later, or left out with a
reason. A file is a candidate if its name has the suffix of an image or if its first bytes are those
of one. Hidden files and folders, folders of other software and results of runs are left out.

Scanning a million files takes seconds. A scan of many files therefore saves a note: the time of
change of every folder, which moves when a file is added, removed or renamed, and those of 10,000
evenly spaced files. While all of these are unchanged, the earlier scan is trusted. It misses a file
that was rewritten in place and is not among the 10,000; `dataset.scan=files` checks every file.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import logging
import os
import re
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spice_pl.data.formats import (
    ARCHIVE_SUFFIXES,
    HEAD_BYTES,
    OTHER_SUFFIXES,
    RAW_SUFFIXES,
    SUFFIXES,
    is_image,
)
from spice_pl.data.left_out import MARKS, LeftOut, unwanted
from spice_pl.data.retry import may_pass, try_again
from spice_pl.errors import UsageError
from spice_pl.system.files import atomic

logger = logging.getLogger(__name__)

SCAN = ("auto", "files", "folders")
SCAN_VERSION = 3
TRUST_ABOVE = 100_000  # files; fewer are scanned in a second or two
SAMPLED = 10_000  # files that are checked in any case
GONE, DENIED, UNREAD = -1, -2, -3
SETTLED_S = 2.0  # seconds; resolution of the coarsest clock of a file system (FAT)


@dataclass
class Found:
    """Candidates below a folder, sorted by path, and what is left out.

    Attributes:
        paths: paths relative to the folder, with "/".
        sizes: bytes of each file; GONE for a broken link, DENIED without permission to read, UNREAD
            after an error that may pass. These are part of the identity, so that a new store is
            made when the file can be read.
        times: times of change in nanoseconds.
        folders: time of change of every folder that was listed, by path.
        left_out: the other files, and folders that could not be listed.
        complete: False after an error that may pass: another scan may find more.
    """

    paths: list[str] = field(default_factory=list)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    times: array[int] = field(default_factory=lambda: array("q"))
    folders: dict[str, int] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    complete: bool = True

    @property
    def num_images(self) -> int:
        """Number of candidates."""
        return len(self.paths)

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
        num_images: number of candidates.
        left_out: as in `Found`.
    """

    identity: str
    num_images: int
    left_out: LeftOut


@dataclass(frozen=True)
class Search:
    """What to search for images.

    Attributes:
        root: folder to search.
        subfolders: its subfolders to search; "" is root itself.
        exclude: patterns of files and folders to leave out, matched with names and with paths
            relative to root; `*` also matches "/".
        cache_dir: folder of notes and image stores; left out if it is below root. None keeps no
            notes.
    """

    root: Path
    subfolders: Sequence[str] = ("",)
    exclude: Sequence[str] = ()
    cache_dir: Path | None = None

    @property
    def note(self) -> str:
        """Name of the note of a scan."""
        root = str(self.root.resolve())
        key = [SCAN_VERSION, root, list(self.subfolders), list(self.exclude)]
        text = json.dumps(key).encode("utf-8", "surrogateescape")
        return f"{hashlib.blake2b(text, digest_size=8).hexdigest()}.scan.json"


def look(search: Search, scan: str) -> Note | Found:
    """Return the note of an earlier scan if it can be trusted, else scan again.

    Args:
        search: what to search.
        scan: "files" checks every file, "folders" trusts a note, "auto" trusts a note of more than
            100,000 files.

    Raises:
        UsageError: scan is not one of these.
    """
    if scan not in SCAN:
        raise UsageError(f"dataset.scan {scan!r} is none of {SCAN}")
    if search.cache_dir is None:
        return scan_files(search)
    path = search.cache_dir / search.note
    if scan != "files" and path.is_file():
        note = _trusted(search.root, path, scan)
        if note is not None:
            return note
    begun = time.time_ns()
    found = scan_files(search)
    settled = max(found.folders.values(), default=0) < begun - SETTLED_S * 1e9
    # A folder that has just changed may change again within one tick of its clock.
    if settled and found.complete and (scan == "folders" or len(found.paths) > TRUST_ABOVE):
        _write_note(path, found)
    return found


def scan_files(search: Search) -> Found:
    """List every file; links to folders are followed, each folder once."""
    scan = _Scan(search)
    pending, links = list(search.subfolders), list[str]()
    while pending or links:
        # Links come last, so that a folder below root is found under its own path.
        below = pending.pop() if pending else links.pop(links.index(min(links)))
        for entry in scan.entries(below, given=below in search.subfolders):
            path = f"{below}/{entry.name}" if below else entry.name
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a loop of links, or a target with too long a name
                scan.left_out.add(path, f"broken link: {error.strerror}")
                continue
            reason = scan.unwanted(entry.name, path, is_folder=is_folder)
            if not is_folder:
                scan.add_file(entry, path, reason)
            elif reason:
                scan.leave_out_folder(path, reason)
            else:
                (links if entry.is_symlink() else pending).append(path)
    return scan.found()


class _Scan:
    """A scan of a folder, and what it has found so far."""

    def __init__(self, search: Search) -> None:
        self.left_out, self._root = LeftOut(), search.root
        self._folders: dict[str, int] = {}
        self._rows: list[tuple[str, int, int]] = []
        self._complete = True
        self._seen: set[tuple[int, int]] = set()
        cache = search.cache_dir
        self._cache = cache.stat() if cache is not None and cache.is_dir() else None
        patterns = "|".join(map(fnmatch.translate, search.exclude))
        self._excluded = re.compile(patterns) if patterns else None

    def entries(self, below: str, *, given: bool) -> list[os.DirEntry[str]]:
        """Return what a folder holds; nothing if it is left out, was searched or cannot be."""
        place = self._root / below
        try:
            stat = try_again(place.stat)
            key = stat.st_dev, stat.st_ino
            if key in self._seen:
                self.left_out.add(below, "a link to a folder that is searched already")
                return []
            if not given and self._cache and os.path.samestat(stat, self._cache):
                self.leave_out_folder(below, "in the cache_dir")
                return []
            self._seen.add(key)
            self._folders[below] = stat.st_mtime_ns
            entries = try_again(functools.partial(_entries, place))
        except OSError as error:
            self._complete &= not may_pass(error)
            self.left_out.add(below or ".", f"cannot be listed: {error.strerror}")
            return []
        marks = {entry.name for entry in entries} & MARKS.keys()
        if marks and not given:
            self.leave_out_folder(below, MARKS[min(marks)])
            return []
        return entries

    def unwanted(self, name: str, path: str, *, is_folder: bool) -> str | None:
        """Return why a file or folder is left out by its name or path, or None."""
        parent = path.split("/")[-2] if "/" in path else ""
        if reason := unwanted(name, is_folder=is_folder, parent=parent):
            return reason
        if self._excluded and (self._excluded.match(name) or self._excluded.match(path)):
            return "excluded by dataset.exclude"
        return None

    def leave_out_folder(self, path: str, reason: str) -> None:
        """Count all files below a folder; a link to a folder counts as one file."""
        if os.path.islink(self._root / path):
            self.left_out.add(path, reason)
            return

        def not_listed(error: OSError) -> None:
            self.left_out.add(self._relative(error.filename), f"cannot be listed: {error.strerror}")

        for folder, below, names in os.walk(self._root / path, onerror=not_listed):
            links = [name for name in below if os.path.islink(os.path.join(folder, name))]
            for name in (*names, *links):
                self.left_out.add(self._relative(os.path.join(folder, name)), reason)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._root).replace(os.sep, "/")

    def add_file(self, entry: os.DirEntry[str], path: str, reason: str | None) -> None:
        """Add a candidate, or leave the file out."""
        reason = reason or self._no_candidate(entry)
        if reason:
            self.left_out.add(path, reason)
            return
        row = (path, *size_and_time(entry.path))
        self._complete &= row[1] != UNREAD
        self._rows.append(row)
        if len(self._rows) % TRUST_ABOVE == 0:
            logger.info("found %d images so far", len(self._rows))

    def _no_candidate(self, entry: os.DirEntry[str]) -> str | None:
        """Return why a file is not a candidate, or None."""
        suffix = os.path.splitext(entry.name)[1].lower()
        if suffix in SUFFIXES:
            return None
        if suffix in RAW_SUFFIXES:  # most begin like a TIFF file, with a small preview
            return "a raw file of a camera; export it as JPEG, PNG or TIFF"
        try:
            if not entry.is_file():
                there = not entry.is_symlink() or os.path.exists(entry.path)
                return "not a file" if there else "broken link"
            if is_image(try_again(functools.partial(_head, entry.path))):
                return None
        except PermissionError:
            return "permission denied"
        except OSError as error:
            self._complete &= not may_pass(error)
            return f"cannot be read: {error.strerror}"
        if suffix in ARCHIVE_SUFFIXES:
            return "an archive; unpack it"
        if suffix in OTHER_SUFFIXES:
            return f"a format that is not read ({suffix}); export it as JPEG, PNG or TIFF"
        return "not an image"

    def found(self) -> Found:
        """Return everything found, sorted by path."""
        found = Found(folders=self._folders, left_out=self.left_out, complete=self._complete)
        self._rows.sort()
        for path, size, changed in self._rows:
            found.paths.append(path)
            found.sizes.append(size)
            found.times.append(changed)
        return found


def image_files(root: Path) -> list[str]:
    """Return the paths of all candidates relative to root, sorted."""
    return scan_files(Search(root)).paths


def leaves(path: str) -> bool:
    """Return whether a path named by a data set would leave its folder, or is not one.

    >>> leaves("val/images/1.JPEG"), leaves("val/../../1.JPEG"), leaves("/etc/passwd")
    (False, True, True)
    """
    return Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path


def size_and_time(path: str | Path) -> tuple[int, int]:
    """Return size and time of change of a file; GONE, DENIED or UNREAD replace the size."""
    try:
        stat = try_again(functools.partial(os.stat, path))
    except PermissionError:
        return DENIED, 0
    except OSError as error:
        return UNREAD if may_pass(error) else GONE, 0
    return stat.st_size if os.access(path, os.R_OK) else DENIED, stat.st_mtime_ns


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _head(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read(HEAD_BYTES)


def _write_note(path: Path, found: Found) -> None:
    step = max(1, len(found.paths) // SAMPLED)
    sample = [
        (found.paths[i], found.sizes[i], found.times[i]) for i in range(0, len(found.paths), step)
    ]
    note = {
        "identity": found.identity,
        "num_images": len(found.paths),
        "left_out": [found.left_out.counts, found.left_out.names],
        "folders": found.folders,
        "sample": sample,
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(note), encoding="utf-8")


def _trusted(root: Path, path: Path, scan: str) -> Note | None:
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if scan == "auto" and note["num_images"] <= TRUST_ABOVE:
            return None
        for folder, changed in note["folders"].items():
            if os.stat(root / folder).st_mtime_ns != changed:
                return None
        for file, size, changed in note["sample"]:
            if size_and_time(root / file) != (size, changed):
                return None
        trusted = Note(note["identity"], note["num_images"], LeftOut(*note["left_out"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # changed, or damaged
        return None
    logger.info(
        "trusting %d images in %d folders that have not changed; dataset.scan=files checks each",
        *(trusted.num_images, len(note["folders"])),
    )
    return trusted
