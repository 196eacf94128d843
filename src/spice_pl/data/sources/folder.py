"""Load any folder of images: list its files and decode them once into the image store.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spice_pl.data.decode import Decoding, Loaded, Unread, read_image
from spice_pl.data.formats import FORMATS
from spice_pl.data.images import ImageSet
from spice_pl.data.left_out import LeftOut
from spice_pl.data.listing import (
    DENIED,
    GONE,
    UNREAD,
    Found,
    Note,
    Search,
    look,
    scan_files,
    size_and_time,
)
from spice_pl.data.sources.table import class_labels, read_table
from spice_pl.data.store import open_store
from spice_pl.data.store_files import Stored
from spice_pl.data.store_writer import Source
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

LABELS = ("none", "folders", "csv")


def folder(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "folder",
    labels: str = "none",
    table: str | None = None,
    scan: str = "auto",
    exclude: Sequence[str] | None = None,
    levels: Sequence[float] | None = None,
    max_decode_mb: float | None = None,
    on_bad_image: str = "skip",
    protocol: str = "whole",
    found: Note | Found | None = None,
) -> ImageSet:
    """Return every image below `root`, in the order of the sorted paths, or those of a table.

    The shorter side is scaled to `image_size` and the middle square is kept. Pixels are decoded
    once into `cache_dir` and memory-mapped afterwards; a change of any path, size or time of change
    makes a new store.

    Every file below root is used or left out with a reason: it is not an image, cannot be decoded,
    is hidden, is in a folder of other software or of results, or `exclude` names it.

    Args:
        root: folder that is searched, with its subfolders.
        image_size: side S in pixels.
        cache_dir: folder of the image stores; one takes 3·S·S bytes per image.
        name: name of the data set and of its folder of results.
        labels: "folders" takes the first folder below root as the true class, "csv" the column
            `label` of the table, for `truth/*` metrics only; "none" has no truth.
        table: CSV or Parquet file with a column `path`, relative to root or absolute; images keep
            its order.
        scan: "auto", "files" or "folders", see `spice_pl.data.listing`.
        exclude: patterns of files and folders to leave out, matched with names and with paths
            relative to root; `*` also matches "/".
        levels: black and white of images of more than 8 bits; None chooses them for each image.
        max_decode_mb: megabytes of memory that decoding may take; None is 1024.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        protocol: "whole"; a folder has no test images.
        found: what a search of root has just found; None searches it.

    Raises:
        UsageError: root is missing, is not a folder, or has no image that can be decoded; the
            table does not fit; a bad image with `on_bad_image="raise"`; the disk is too small.
    """
    if labels not in LABELS:
        raise UsageError(f"dataset.labels {labels!r} is none of {LABELS}")
    if labels == "csv" and table is None:
        raise UsageError("dataset.labels=csv reads the column `label` of dataset.table; give it")
    directory = Path(root).expanduser()
    if not os.path.isdir(directory):  # False, too, for a name that no file can have
        state = "is a file, not a folder" if os.path.exists(directory) else "does not exist"
        looked = "" if directory.is_absolute() else f", looked for in {Path.cwd()}"
        raise UsageError(
            f"dataset.root={root} {state}{looked}; give dataset.root=PATH, the folder that "
            "holds the images"
        )
    if isinstance(exclude, str):
        raise UsageError(
            f"dataset.exclude={exclude} is not a list; write dataset.exclude=[{exclude}]"
        )
    cache = Path(cache_dir).expanduser()
    search = Search(directory, exclude=exclude or (), cache_dir=cache)
    truths: Sequence[str | None] | None = None
    if table is None:
        found = look(search, scan) if found is None else found
    else:
        paths, truths = read_table(Path(table).expanduser(), directory, labelled=labels == "csv")
        found = _listed(directory, paths)
    if not found.num_images:
        raise UsageError(
            f"no image below dataset.root={root}, {len(found.left_out)} other files"
            f"{found.left_out.summary()}; looked for {', '.join(FORMATS)}"
        )
    decoding = Decoding(image_size, levels, max_decode_mb)
    verify = scan == "files"
    stored = open_files(search, found, decoding, cache_dir, on_bad_image, verify=verify)
    truth, class_names = None, None
    if labels == "folders":
        truth, class_names = class_labels(
            (key.partition("/")[0] if "/" in key else None) for key in stored.keys
        )
    elif truths is not None:
        truth, class_names = class_labels(truths[i] for i in stored.files["source"])
    return add_left_out(
        ImageSet(
            name=name,
            images=stored.images,
            keys=stored.keys,
            fingerprint=stored.fingerprint,
            labels=truth,
            class_names=class_names,
            protocol=protocol,
            skipped=stored.skipped,
            root=directory.resolve(),
            files=stored.files,
        ),
        found.left_out,
    )


def open_files(
    search: Search,
    found: Note | Found,
    decoding: Decoding,
    cache_dir: str,
    on_bad_image: str,
    *,
    verify: bool = False,
) -> Stored:
    """Return the store of the files that a search found."""
    root = search.root

    def source() -> Source:
        files = scan_files(search) if isinstance(found, Note) else found
        if files.identity != found.identity:
            raise UsageError(f"{root} has changed since it was scanned; use dataset.scan=files")
        load = functools.partial(_load, root, files, decoding)
        return Source(f"dataset.root={root}", files.paths, load)

    return open_store(
        [str(root.resolve()), found.identity, decoding.levels],
        decoding.image_size,
        cache_dir,
        source,
        on_bad_image,
        limits=decoding.limits,
        verify=verify,
    )


def add_left_out(images: ImageSet, left_out: LeftOut) -> ImageSet:
    """Add the files that a search left out to those that were skipped, and log the sum."""
    bad, used = len(images.skipped), len(images)
    logger.info(
        "%s: of %s files %s are used, %s cannot be decoded and %s are left out%s",
        *(images.name, *(f"{count:,}" for count in (used + bad + len(left_out), used, bad))),
        *(f"{len(left_out):,}", left_out.summary()),
    )
    listed = left_out.pairs()
    return replace(
        images,
        skipped=[*images.skipped, *listed],
        unlisted=len(left_out) - len(listed),
    )


def _load(root: Path, files: Found, decoding: Decoding, i: int) -> Loaded:
    path = root / files.paths[i]
    if files.sizes[i] == UNREAD:
        return Unread("could not be looked at")
    if files.sizes[i] == DENIED:
        return "permission denied"
    if files.sizes[i] == GONE:
        return _gone(root, files.paths[i])
    if not path.is_file():  # opening a pipe would block
        return "vanished after the folder was listed" if not path.exists() else "not a file"
    image = read_image(path, decoding)
    now = size_and_time(path)
    if now[0] == GONE:
        return "vanished after the folder was listed"
    if now != (files.sizes[i], files.times[i]):
        return "changed after the folder was listed; run again when it is complete"
    return image


def _gone(root: Path, path: str) -> str:
    """Return why there is no file."""
    if (root / path).is_symlink():
        return "broken link"
    if "\\" in path and (root / path.replace("\\", "/")).exists():
        return "there is no such file, but there is one with / instead of \\"
    return "there is no such file"


def _listed(root: Path, paths: Sequence[str]) -> Found:
    """Return the files that a table names, in its order."""
    found = Found(paths=list(paths))
    for path in paths:
        size, changed = size_and_time(root / path)
        found.sizes.append(size)
        found.times.append(changed)
    return found
