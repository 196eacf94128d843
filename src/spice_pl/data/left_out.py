"""Say which files and folders are not searched for images, and count the files left out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

LISTED = 10_000  # files per reason that are listed by name; the others are counted
RESULTS = ".hydra"  # is in every folder of results
SHOWN = 8  # reasons in a summary
# A folder with one of these files is left out.
MARKS = {
    RESULTS: "among the results of a run",
    "pyvenv.cfg": "an environment of Python",
    "CACHEDIR.TAG": "a cache, as its CACHEDIR.TAG says",  # https://bford.info/cachedir
}
# Folders of other software that are not hidden by a leading dot; in small letters.
FOREIGN = {
    "@eadir": "thumbnails of a Synology disk",
    "@tmp": "a folder of a Synology disk",
    "@synoresource": "a folder of a Synology disk",
    "#snapshot": "older versions of the files",
    "~snapshot": "older versions of the files",
    "@snapshots": "older versions of the files",
    "@recently-snapshot": "older versions of the files",
    "@recycle": "a recycle bin",
    "#recycle": "a recycle bin",
    "$recycle.bin": "a recycle bin",
    "recycler": "a recycle bin",
    "recycled": "a recycle bin",
    "network trash folder": "a recycle bin",
    "lost+found": "rescued parts of files",
    "lost.dir": "rescued parts of files",
    "system volume information": "a folder of Windows",
    "msdownld.tmp": "a folder of Windows",
    "wpsystem": "a folder of Windows",
    "__macosx": "a folder of macOS",
    "temporary items": "a folder of macOS",
    "__pycache__": "a folder of Python",
    "site-packages": "packages of Python",
    "node_modules": "a folder of Node.js",
}
FOREIGN_NAMES = re.compile(r"found\.\d{3}$")  # rescued by Windows, FOUND.000
PREVIEWS = (".lrdata", ".cocatalogpreviews")  # of Lightroom and Capture One
# A library of Apple Photos, iPhoto or Aperture holds each photo and smaller copies of it.
LIBRARIES = (".photoslibrary", ".photolibrary", ".migratedphotolibrary", ".aplibrary")
ORIGINALS = ("originals", "masters", "original")


@dataclass
class LeftOut:
    """Files that are not used, with the reason of each.

    Attributes:
        counts: number of files by reason.
        names: at most 10,000 paths by reason.
    """

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, path: str, reason: str) -> None:
        """Count a file."""
        count = self.counts[reason] = self.counts.get(reason, 0) + 1
        if count <= LISTED:
            self.names.setdefault(reason, []).append(path)

    def pairs(self) -> list[tuple[str, str]]:
        """Return path and reason of each file that is listed by name, sorted."""
        return sorted((path, reason) for reason, paths in self.names.items() for path in paths)

    def update(self, other: LeftOut) -> None:
        """Add the files of another one."""
        for reason, count in other.counts.items():
            names = self.names.setdefault(reason, [])
            names += other.names[reason][: LISTED - len(names)]
            self.counts[reason] = self.counts.get(reason, 0) + count

    def reasons(self) -> list[str]:
        """Return number and reason of all files, the largest numbers first; rare ones as a sum."""
        most = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        said = [f"{count:,} {reason}" for reason, count in most[:SHOWN]]
        rest = most[SHOWN:]
        if len(rest) < 2:
            return said + [f"{count:,} {reason}" for reason, count in rest]
        return [*said, f"{sum(count for _, count in rest):,} for {len(rest)} other reasons"]

    def summary(self) -> str:
        """Return all reasons in brackets, or nothing."""
        return f" ({'; '.join(self.reasons())})" if self.counts else ""


def unwanted(name: str, *, is_folder: bool = False, parent: str = "") -> str | None:
    """Return why a file or folder of this name is left out, or None.

    Args:
        name: its name.
        is_folder: whether it is a folder.
        parent: name of the folder that it is in.

    >>> unwanted(".git", is_folder=True), unwanted("photo.jpg")
    ('in .git, a hidden folder', None)
    >>> unwanted("resources", is_folder=True, parent="My.photoslibrary")
    'in My.photoslibrary/resources, smaller copies of a library of photos'
    """
    if name.startswith("."):
        return f"in {name}, a hidden folder" if is_folder else "hidden"
    if not is_folder:
        return None
    small = name.lower()
    if small in FOREIGN:
        return f"in {name}, {FOREIGN[small]}"
    if FOREIGN_NAMES.match(small):
        return f"in {name}, rescued parts of files"
    if small.endswith(PREVIEWS):
        return f"in {name}, previews of other software"
    if parent.lower().endswith(LIBRARIES) and small not in ORIGINALS:
        return f"in {parent}/{name}, smaller copies of a library of photos"
    return None
