"""The image store: every image is decoded once into pixels, which are memory-mapped afterwards.

Each store is one folder, named after a digest of everything that decides its content:

    images.u8    (N, 3, S, S) uint8, rows in the order of the source
    files.npy    (N,) position in the source, format and size of every file
    keys.bin     N names; keys.npy says where each begins
    index.json   written last: shape, fingerprint, skipped images with reasons

A store is written in a temporary folder, in steps that are recorded in a journal, and renamed when
it is complete. A run that is killed leaves no store or a part that the next run continues. One
process writes, the others wait for it.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.decode import Decoded, quiet_warnings
from spice_pl.data.duplicates import num_copies, row_digests
from spice_pl.data.images import FILE_FACTS, fingerprint
from spice_pl.errors import UsageError
from spice_pl.system.files import is_disk_full

logger = logging.getLogger(__name__)

STORE_VERSION = 2
BAD_IMAGE = ("skip", "raise")
STEP_BYTES = 1 << 26  # bytes of pixels between two entries of the journal
STEP_IMAGES = (64, 8192)  # least and most images between two entries


@dataclass(frozen=True)
class Source:
    """Images in a fixed order, not decoded yet.

    Attributes:
        name: name for messages.
        keys: one name per image.
        load: function from a position to the decoded image, or to the reason why there is none;
            called from several threads.
    """

    name: str
    keys: Sequence[str]
    load: Callable[[int], Decoded | str]


@dataclass(frozen=True)
class Stored:
    """A complete store.

    Attributes:
        images: (N, 3, S, S) uint8, memory-mapped.
        keys: (N,) names.
        files: (N,) position in the source (`source`), format, width and height of every file.
        fingerprint: digest of pixels and order.
        skipped: name and reason of every image of the source that was left out.
    """

    images: NDArray[np.uint8]
    keys: Sequence[str]
    files: NDArray[Any]
    fingerprint: str
    skipped: list[tuple[str, str]]


class Names(Sequence[str]):
    """Names that are read from disk on access, so that a million of them take no memory."""

    def __init__(self, blob: Path, starts: Path) -> None:
        self._blob = np.memmap(blob, dtype=np.uint8, mode="r")
        self._starts = np.load(starts, mmap_mode="r")

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
        np.save(starts, lengths.cumsum())


def open_store(
    identity: object,
    image_size: int,
    cache_dir: str,
    source: Callable[[], Source],
    on_bad_image: str = "skip",
) -> Stored:
    """Return the store of some images; make it if it does not exist.

    Args:
        identity: everything that decides pixels and order, as a JSON value.
        image_size: side S in pixels.
        cache_dir: folder of the stores; one takes 3·S·S bytes per image.
        source: function that returns the images; called only if the store has to be made.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.

    Raises:
        UsageError: no image can be decoded; a bad image with `on_bad_image="raise"`; the disk is
            too small or cannot be written.
    """
    if on_bad_image not in BAD_IMAGE:
        raise UsageError(f"on_bad_image {on_bad_image!r} is none of {BAD_IMAGE}")
    text = json.dumps([STORE_VERSION, image_size, identity])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    place = Path(cache_dir).expanduser() / digest
    if not (place / "index.json").is_file():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _only_writer(place):
                if not (place / "index.json").is_file():
                    _make(place, source(), image_size, on_bad_image)
        except OSError as error:
            raise UsageError(_disk(error, place.parent)) from error
    return _read(place, image_size, on_bad_image)


def _read(place: Path, image_size: int, on_bad_image: str) -> Stored:
    index = json.loads((place / "index.json").read_text())
    skipped = [(key, reason) for key, reason in index["skipped"]]
    if skipped and on_bad_image == "raise":
        raise UsageError(_bad_image(index["name"], *skipped[0]))
    if skipped:
        report(index["name"], skipped)
    if index["num_copies"]:
        logger.info(
            "%d of %d images are exact copies of others; stage=inspect shows them",
            *(index["num_copies"], index["num_images"]),
        )
    shape = (index["num_images"], 3, image_size, image_size)
    return Stored(
        images=np.memmap(place / "images.u8", dtype=np.uint8, mode="r", shape=shape),
        keys=Names(place / "keys.bin", place / "keys.npy"),
        files=np.load(place / "files.npy", mmap_mode="r"),
        fingerprint=index["fingerprint"],
        skipped=skipped,
    )


@contextmanager
def _only_writer(place: Path) -> Iterator[None]:
    """Let one process at a time make a store; the system frees the lock when a process ends."""
    with place.with_name(f".{place.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another run that decodes the same images")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(place: Path, source: Source, image_size: int, on_bad_image: str) -> None:
    part = place.with_name(f".{place.name}.part")
    part.mkdir(exist_ok=True)
    journal = _Journal(part, 3 * image_size**2)
    total, need = len(source.keys), (len(source.keys) - journal.done) * 3 * image_size**2
    free = shutil.disk_usage(part).free
    if need > free:
        raise UsageError(
            f"the images need {need / 1e9:.2f} GB in {place.parent} and {free / 1e9:.2f} GB are "
            "free; make room, or set dataset.cache_dir or a smaller dataset.image_size"
        )
    logger.info(
        "decoding %d images once into %s (%.0f MB)%s",
        *(total - journal.done, place.parent, need / 1e6),
        f"; {journal.done} were done before" if journal.done else "",
    )
    least, most = STEP_IMAGES
    step = max(least, min(most, STEP_BYTES // (3 * image_size**2)))
    with quiet_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(journal.done, total, step):
            images = list(pool.map(source.load, range(start, min(start + step, total))))
            if on_bad_image == "raise":
                for i, image in enumerate(images, start):
                    if isinstance(image, str):
                        shutil.rmtree(part)
                        raise UsageError(_bad_image(source.name, source.keys[i], image))
            journal.append(start, images)
            if start // 10_000 != journal.done // 10_000:
                logger.info("decoded %d of %d images", journal.done, total)
    skipped = [(source.keys[i], reason) for i, reason in journal.skipped]
    if not journal.num_rows:
        shutil.rmtree(part)
        report(source.name, skipped)
        raise UsageError(
            f"none of the {total} images of {source.name} could be decoded; "
            f"first: {skipped[0][0]}: {skipped[0][1]}"
        )
    _finish(place, part, source, journal, skipped, image_size)


def _finish(
    place: Path,
    part: Path,
    source: Source,
    journal: _Journal,
    skipped: Sequence[tuple[str, str]],
    image_size: int,
) -> None:
    files = np.fromfile(part / "files.part", dtype=FILE_FACTS)
    keys = [source.keys[i] for i in files["source"]]
    Names.write(keys, part / "keys.bin", part / "keys.npy")
    np.save(part / "files.npy", files)
    shape = (journal.num_rows, 3, image_size, image_size)
    images = np.memmap(part / "images.u8", dtype=np.uint8, mode="r", shape=shape)
    index = {
        "name": source.name,
        "num_images": len(images),
        "num_copies": num_copies(row_digests(images)),
        "fingerprint": fingerprint(images),
        "skipped": skipped,
    }
    with (part / "index.json").open("w") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(part, place)
    for name in ("files.part", "journal.jsonl"):  # removed last: a part without them starts again
        (place / name).unlink()


class _Journal:
    """Record of the steps of a store that are safely on disk; an unfinished step is repeated.

    Attributes:
        done: number of images of the source that were processed.
        num_rows: number of images that were kept.
        skipped: position in the source and reason of the others.
    """

    def __init__(self, part: Path, row_bytes: int) -> None:
        self.done, self.num_rows = 0, 0
        self.skipped: list[tuple[int, str]] = []
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
                self.skipped += [(i, reason) for i, reason in step["skipped"]]
        for path, size in (
            (self._pixels, self.num_rows * row_bytes),
            (self._files, self.num_rows * FILE_FACTS.itemsize),
            (self._lines, whole),
        ):
            path.touch()
            os.truncate(path, size)

    def append(self, start: int, images: Sequence[Decoded | str]) -> None:
        """Write the images from position `start`; the line of the journal is written last."""
        kept = [(i, image) for i, image in enumerate(images, start) if isinstance(image, Decoded)]
        skipped = [(i, image) for i, image in enumerate(images, start) if isinstance(image, str)]
        facts = [(i, image.format, image.width, image.height) for i, image in kept]
        _append(self._pixels, [image.pixels for _, image in kept])
        _append(self._files, [np.array(facts, dtype=FILE_FACTS)])
        self.done, self.num_rows = start + len(images), self.num_rows + len(kept)
        self.skipped += skipped
        step = {"done": self.done, "num_rows": self.num_rows, "skipped": skipped}
        _append(self._lines, [np.frombuffer(json.dumps(step).encode() + b"\n", np.uint8)])


def _append(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    with path.open("ab") as file:
        for array in arrays:
            file.write(array.tobytes())
        file.flush()
        os.fsync(file.fileno())


def report(name: str, skipped: Sequence[tuple[str, str]], shown: int = 10) -> None:
    """Log which images were skipped and why."""
    logger.warning("skipped %d images of %s that cannot be used:", len(skipped), name)
    for key, reason in skipped[:shown]:
        logger.warning("  %s: %s", key, reason)
    if len(skipped) > shown:
        logger.warning("  and %d more, all listed in the report", len(skipped) - shown)


def _bad_image(name: str, key: str, reason: str) -> str:
    return f"bad image {key} of {name}: {reason}; repair or remove it, or use on_bad_image=skip"


def _disk(error: OSError, cache_dir: Path) -> str:
    if is_disk_full(error):
        return (
            f"the disk that holds {cache_dir} is full; make room and start again, which continues "
            "where it stopped, or set dataset.cache_dir"
        )
    return f"{cache_dir} cannot be written ({error.strerror}); set dataset.cache_dir"
