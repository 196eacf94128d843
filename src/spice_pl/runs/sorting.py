"""Put image files into one folder per cluster. Nothing is ever moved, replaced or deleted.

Shapes: N images, K clusters.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError

PLACE: dict[str, Callable[[Path, Path], Any]] = {
    "copy": shutil.copy2,
    "hardlink": os.link,
    "symlink": lambda source, target: target.symlink_to(source),
}


class Sorter:
    """Put each file into the folder of its cluster.

    The target gets its name when it is complete. What an interrupted command left is replaced.

    Args:
        images: data set that the files are of.
        target: folder to make the clusters' folders in.
        names: (K,) names of the clusters.
        how: "copy", "hardlink" or "symlink".
        setting: the setting that says how, for messages.

    Raises:
        UsageError: the images are not files, or the target is not a new folder outside of root.
    """

    def __init__(
        self, images: ImageSet, target: Path, names: Sequence[str], how: str, setting: str
    ) -> None:
        root, target = images.root, target.resolve()
        if root is None:
            raise UsageError(
                f"{setting}={how} needs image files and {images.name} has none; use "
                "dataset=folder, or leave it out"
            )
        if target.is_relative_to(root):
            raise UsageError(
                f"{target} is inside dataset.root={root}, so sorted files would be "
                "clustered the next time; give another runs_dir"
            )
        if target.is_dir() and any(target.iterdir()):
            raise UsageError(
                f"{target} holds sorted files already and nothing is replaced or deleted here; "
                "remove it yourself"
            )
        self.root, self.target, self.folders = root, target, folder_names(names)
        self.how, self.setting = how, setting
        self.unfinished = target.with_name(f".{target.name}")
        if self.unfinished.is_dir():
            shutil.rmtree(self.unfinished)

    def place(
        self, keys: Sequence[str], clusters: NDArray[np.int64], not_sure: NDArray[np.bool_]
    ) -> None:
        """Place files; those that are not sure go one folder deeper. A taken name gets a number.

        Args:
            keys: (N,) names of images, paths relative to the root of the data set.
            clusters: (N,) cluster of each.
            not_sure: (N,) whether the cluster is not sure.

        Raises:
            UsageError: a file cannot be placed.
        """
        for key, cluster, doubtful in zip(keys, clusters, not_sure, strict=True):
            folder = self.unfinished / self.folders[cluster] / ("not sure" if doubtful else "")
            folder.mkdir(parents=True, exist_ok=True)
            source = self.root / key
            try:
                PLACE[self.how](source, _free(folder, source))
            except OSError as error:
                raise UsageError(
                    f"{source} cannot be placed in {folder} ({error.strerror}); use another "
                    f"{self.setting} (a hard link needs one file system), or make room"
                ) from error

    def finish(self) -> None:
        """Give the target its name."""
        if self.target.is_dir():  # it is empty
            self.target.rmdir()
        self.unfinished.rename(self.target)


def _free(folder: Path, source: Path) -> Path:
    """Return a free path in the folder: photo.jpg, photo (2).jpg, ..."""
    target, number = folder / source.name, 1
    while os.path.lexists(target):
        number += 1
        target = folder / f"{source.stem} ({number}){source.suffix}"
    return target


def folder_names(names: Sequence[str]) -> list[str]:
    """Turn names of clusters into distinct names of folders that any system accepts.

    >>> folder_names(["cats", "a/b: c", "Cats", "..", "CON"])
    ['cats', 'a_b_ c', 'Cats (2)', '_', 'CON_']
    """
    reserved = {"con", "prn", "aux", "nul", "not sure"}  # by Windows, and by Sorter
    reserved |= {f"{port}{i}" for port in ("com", "lpt") for i in range(10)}
    taken: set[str] = set()
    folders = []
    for name in names:
        plain = "".join("_" if c in '/\\:*?"<>|' or not c.isprintable() else c for c in name)
        plain = plain.strip(" .")[:100] or "_"
        if plain.casefold() in reserved:
            plain += "_"
        folder, number = plain, 1
        while folder.casefold() in taken:
            number += 1
            folder = f"{plain} ({number})"
        taken.add(folder.casefold())
        folders.append(folder)
    return folders
