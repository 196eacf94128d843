"""Load images from archives in place: nothing is unpacked, so no path can leave the archive.

WebDataset shards (plain tar files) and Hugging Face data sets on disk.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import functools
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spice_pl.data.decode import SUFFIXES, read_image
from spice_pl.data.images import ImageSet
from spice_pl.data.listing import leaves
from spice_pl.data.sources.table import class_labels
from spice_pl.data.store import Loaded, Source, Stored, open_store
from spice_pl.errors import UsageError

MAX_BYTES = 1 << 30  # largest encoded image


@dataclass(frozen=True)
class Member:
    """An image in a tar file: key, offset and size of its bytes, and its class."""

    key: str
    shard: Path
    start: int
    size: int
    label: str | None


def shards(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "shards",
    labels: str = "none",
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return the images of all tar files in a folder, in the order of shards and members.

    Args:
        root: folder with `*.tar`, or one tar file. They must not be compressed, since members are
            read in any order.
        image_size: side S in pixels; the shorter side is scaled, the middle square kept.
        cache_dir: folder of the image stores.
        name: name of the data set and of its folder of results.
        labels: "cls" reads the member `<sample>.cls` beside an image as its true class, for
            `truth/*` metrics only; "none" has no truth.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        protocol: "whole".

    Raises:
        UsageError: there is no tar file, no image in any, or one is compressed or damaged.
    """
    if labels not in ("none", "cls"):
        raise UsageError(f"dataset.labels {labels!r} is none of ('none', 'cls')")
    place = Path(root).expanduser()
    files = sorted(place.glob("*.tar")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise UsageError(f"dataset.root={root} holds no *.tar file")
    stats = [file.stat() for file in files]
    members = functools.cache(lambda: [member for file in files for member in read_index(file)])

    def source() -> Source:
        if not members():
            raise UsageError(f"no image in the {len(files)} tar files of dataset.root={root}")
        return Source(f"dataset.root={root}", [each.key for each in members()], load)

    def load(i: int) -> Loaded:
        member = members()[i]
        if member.size > MAX_BYTES:
            return f"{member.size / 1e9:.1f} GB; no image is that large"
        with member.shard.open("rb") as file:
            return read_image(os.pread(file.fileno(), member.size, member.start), image_size)

    stored = open_store(
        [
            [str(file.resolve()), stat.st_size, stat.st_mtime_ns]
            for file, stat in zip(files, stats, strict=True)
        ],
        image_size,
        cache_dir,
        source,
        on_bad_image,
    )
    given = [member.label for member in members()] if labels == "cls" else None
    return _image_set(stored, name, protocol, given)


def hugging_face(
    root: str,
    image_size: int,
    cache_dir: str,
    name: str = "hugging_face",
    image_column: str = "image",
    labels: str | None = None,
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return the images of a data set written by `save_to_disk` of Hugging Face datasets.

    Args:
        root: folder of one split.
        image_size: side S in pixels; the shorter side is scaled, the middle square kept.
        cache_dir: folder of the image stores.
        name: name of the data set and of its folder of results.
        image_column: name of the column of images.
        labels: name of the column of true classes, for `truth/*` metrics only; None has no truth.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        protocol: "whole".

    Raises:
        UsageError: the package is missing, or root has no such data set, split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            "dataset=hugging_face needs the package datasets; pip install 'spice-pl[hf]'"
        ) from error
    place = Path(root).expanduser()
    try:
        rows: Any = datasets.load_from_disk(str(place))
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"dataset.root={root} is not a data set on disk: {error}") from error
    if isinstance(rows, datasets.DatasetDict):
        raise UsageError(
            f"dataset.root={root} holds the splits {', '.join(rows)}; give the folder of one"
        )
    for column in (image_column, labels):
        if column is not None and column not in rows.column_names:
            there = ", ".join(rows.column_names)
            raise UsageError(f"dataset.root={root} has no column {column!r}; it has {there}")
    encoded = rows.cast_column(image_column, datasets.Image(decode=False))

    def load(i: int) -> Loaded:
        image = encoded[i][image_column]
        if image is None:
            return "no image"
        if image["bytes"] is not None:
            return read_image(image["bytes"], image_size)
        if leaves(image["path"]):
            return f"{image['path']} is outside the data set"
        return read_image(place / image["path"], image_size)

    stored = open_store(
        [str(place.resolve()), rows._fingerprint, image_column],
        image_size,
        cache_dir,
        lambda: Source(f"dataset.root={root}", [str(i) for i in range(len(rows))], load),
        on_bad_image,
    )
    given: Sequence[str | None] | None = None
    if labels is not None:
        feature, values = rows.features[labels], rows[labels]
        named = feature.int2str if isinstance(feature, datasets.ClassLabel) else str
        given = [None if value is None or value == -1 else named(value) for value in values]
    return _image_set(stored, name, protocol, given)


def read_index(file: Path) -> list[Member]:
    """Return the images of a tar file; links, devices and folders are ignored.

    Raises:
        UsageError: the file is compressed or damaged.
    """
    images: list[tuple[str, str, int, int]] = []
    classes: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as opened, file.open("rb") as raw:
            for member in opened:
                if not member.isreg() or member.issparse():
                    continue
                # WebDataset: the sample is the name up to the first dot after the last slash.
                folder, _, last = member.name.rpartition("/")
                sample, _, suffix = last.partition(".")
                sample = f"{folder}/{sample}"
                if f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES:
                    images.append((sample, member.name, member.offset_data, member.size))
                elif suffix == "cls":
                    data = os.pread(raw.fileno(), min(member.size, 1024), member.offset_data)
                    classes[sample] = data.decode("utf-8", "replace").strip()
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"{file} cannot be read as a plain tar file: {error}") from error
    return [
        Member(f"{file.name}/{name}", file, start, size, classes.get(sample))
        for sample, name, start, size in images
    ]


def _image_set(
    stored: Stored, name: str, protocol: str, given: Sequence[str | None] | None
) -> ImageSet:
    labels, class_names = None, None
    if given is not None:
        labels, class_names = class_labels(given[i] for i in stored.files["source"])
    return ImageSet(
        name=name,
        images=stored.images,
        keys=stored.keys,
        fingerprint=stored.fingerprint,
        labels=labels,
        class_names=class_names,
        protocol=protocol,
        skipped=stored.skipped,
        files=stored.files,
    )
