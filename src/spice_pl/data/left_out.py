"""Say which files and folders are not searched for images, and count the files left out."""

from __future__ import annotations

from dataclasses import dataclass, field

LISTED = 10_000  # files per reason that are listed by name; the others are counted
RESULTS = ".hydra"  # is in every folder of results
# Folders of other software that are not hidden by a leading dot.
FOREIGN = {
    "@eaDir": "thumbnails of a Synology disk",
    "@Recycle": "a recycle bin",
    "#recycle": "a recycle bin",
    "$RECYCLE.BIN": "a recycle bin",
    "RECYCLER": "a recycle bin",
    "lost+found": "rescued parts of files",
    "System Volume Information": "a folder of Windows",
    "__MACOSX": "a folder of macOS",
    "__pycache__": "a folder of Python",
    "node_modules": "a folder of Node.js",
}


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
        """Return number and reason of all files, the largest numbers first."""
        most = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [f"{count:,} {reason}" for reason, count in most]

    def summary(self) -> str:
        """Return all reasons in brackets, or nothing."""
        return f" ({'; '.join(self.reasons())})" if self.counts else ""


def unwanted(name: str, *, is_folder: bool = False) -> str | None:
    """Return why a file or folder of this name is left out, or None.

    >>> unwanted(".git", is_folder=True), unwanted("photo.jpg")
    ('in .git, a hidden folder', None)
    """
    if name.startswith("."):
        return f"in {name}, a hidden folder" if is_folder else "hidden"
    return f"in {name}, {FOREIGN[name]}" if is_folder and name in FOREIGN else None
