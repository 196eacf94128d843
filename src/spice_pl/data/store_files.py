"""Read, check and append to the files of an image store.

Each store is one folder:

    images.u8    (N, 3, S, S) uint8, rows in the order of the source
    files.npy    (N,) position in the source, format and size of every file
    keys.bin     N names; keys.npy says where each begins
    index.json   written last: shape, fingerprint, skipped images with reasons, decoders

While a store is written, journal.jsonl records its steps, and files.part has what becomes
files.npy.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.decode import Decoded, Loaded, Unread
from spice_pl.data.images import FILE_FACTS, fingerprint
from spice_pl.data.left_out import LeftOut

VERIFY_BYTES = 1 << 27  # of pixels, that are compared with their digest each time


@dataclass(frozen=True)
class Skipped:
    """An image of a source that is not in the store.

    Attributes:
        place: position in the source.
        key: name.
        reason: why it is left out.
        unread: whether it could not be read and may be a healthy image.
    """

    place: int
    key: str
    reason: str
    unread: bool


@dataclass(frozen=True)
class Stored:
    """A complete store.

    Attributes:
        images: (N, 3, S, S) uint8, memory-mapped.
        keys: (N,) names.
        files: (N,) position in the source (`source`), format, width and height of every file.
        fingerprint: digest of pixels and order.
        skipped: name and reason of every image of the source that is not here.
        left_out: as in `Source`.
    """

    images: NDArray[np.uint8]
    keys: Sequence[str]
    files: NDArray[Any]
    fingerprint: str
    skipped: list[tuple[str, str]]
    left_out: LeftOut


class Names(Sequence[str]):
    """Names that are read from disk on access, so that a million of them take no memory.

    Raises:
        ValueError: the two files do not fit each other.
    """

    def __init__(self, blob: Path, starts: Path) -> None:
        self._blob = np.memmap(blob, dtype=np.uint8, mode="r")
        self._starts = np.load(starts, mmap_mode="r")
        if len(self._blob) != self._starts[-1]:
            raise ValueError(f"{blob} has {len(self._blob)} bytes, not {self._starts[-1]}")

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """Return one name, or a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises IndexError, takes negative numbers
        start, end = int(self._starts[place]), int(self._starts[place + 1])
        return self._blob[start:end].tobytes().decode("utf-8", "surrogateescape")

    @staticmethod
    def write(keys: Sequence[str], blob: Path, starts: Path) -> None:
        """Write names; bytes that are not valid UTF-8 are kept."""
        lengths = np.zeros(len(keys) + 1, dtype=np.int64)
        with blob.open("wb") as file:
            for i, key in enumerate(keys):
                lengths[i + 1] = file.write(key.encode("utf-8", "surrogateescape"))
            file.flush()
            os.fsync(file.fileno())
        save_array(starts, lengths.cumsum())


@dataclass(frozen=True)
class StoreJob:
    """A store to be opened.

    Attributes:
        place: its folder.
        image_size: side S in pixels.
        on_bad_image: "skip" or "raise".
        rules: what decides which images are skipped.
    """

    place: Path
    image_size: int
    on_bad_image: str
    rules: list[str]

    @property
    def row_bytes(self) -> int:
        """Bytes of the pixels of an image."""
        return 3 * self.image_size**2

    def index(self) -> dict[str, Any]:
        """Return what index.json says."""
        index: dict[str, Any] = json.loads((self.place / "index.json").read_text(encoding="utf-8"))
        return index


def is_whole(job: StoreJob, verify: bool) -> bool:
    """Return whether a store is there and undamaged."""
    if not (job.place / "index.json").is_file():
        return False
    try:
        index = job.index()
        stored = read_stored(job, index)
        found = len(stored.keys), len(stored.files), (job.place / "images.u8").stat().st_size
        count = index["num_images"]
        damage = found != (count, count, count * job.row_bytes)
        if not damage and (verify or found[2] <= VERIFY_BYTES):
            damage = fingerprint(stored.images) != stored.fingerprint
    except (FileNotFoundError, ValueError, LookupError, TypeError, EOFError):
        return False
    return not damage


def read_stored(job: StoreJob, index: dict[str, Any]) -> Stored:
    """Open the files of a complete store."""
    shape = (index["num_images"], 3, job.image_size, job.image_size)
    return Stored(
        images=np.memmap(job.place / "images.u8", dtype=np.uint8, mode="r", shape=shape),
        keys=Names(job.place / "keys.bin", job.place / "keys.npy"),
        files=np.load(job.place / "files.npy", mmap_mode="r"),
        fingerprint=index["fingerprint"],
        skipped=[(image.key, image.reason) for image in read_skipped(index)],
        left_out=LeftOut(*index["left_out"]),
    )


def read_skipped(index: dict[str, Any]) -> list[Skipped]:
    """Return the images that an index names as skipped."""
    return [Skipped(*each) for each in index["skipped"]]


class Journal:
    """Record of the steps of a store that are safely on disk; an unfinished step is repeated.

    Attributes:
        done: number of images of the source that were processed.
        num_rows: number of images that were kept.
        skipped: of the others position in the source, reason, and whether it is an `Unread`.
    """

    def __init__(self, part: Path, row_bytes: int) -> None:
        self.done, self.num_rows = 0, 0
        self.skipped: list[tuple[int, str, bool]] = []
        self._pixels, self._files = part / "images.u8", part / "files.part"
        self._lines = part / "journal.jsonl"
        whole = 0
        if self._lines.is_file():
            for line in self._lines.read_bytes().splitlines(keepends=True):
                try:
                    step = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self.done, self.num_rows = step["done"], step["num_rows"]
                self.skipped += [tuple(each) for each in step["skipped"]]
        for path, size in (
            (self._pixels, self.num_rows * row_bytes),
            (self._files, self.num_rows * FILE_FACTS.itemsize),
            (self._lines, whole),
        ):
            path.touch()
            os.truncate(path, size)

    def append(self, start: int, images: Sequence[Loaded]) -> None:
        """Write the images from position `start`; the line of the journal is written last."""
        kept = [(i, image) for i, image in enumerate(images, start) if isinstance(image, Decoded)]
        skipped = [
            (i, image.reason, True) if isinstance(image, Unread) else (i, image, False)
            for i, image in enumerate(images, start)
            if not isinstance(image, Decoded)
        ]
        facts = [
            (i, image.format, image.width, image.height, image.black, image.white)
            for i, image in kept
        ]
        _append(self._pixels, [image.pixels for _, image in kept])
        _append(self._files, [np.array(facts, dtype=FILE_FACTS)])
        self.done, self.num_rows = start + len(images), self.num_rows + len(kept)
        self.skipped += skipped
        step = {"done": self.done, "num_rows": self.num_rows, "skipped": skipped}
        _append(self._lines, [np.frombuffer(json.dumps(step).encode() + b"\n", np.uint8)])


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as a .npy file, safely on disk when this returns."""
    with path.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _append(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    with path.open("ab") as file:
        for array in arrays:
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())
