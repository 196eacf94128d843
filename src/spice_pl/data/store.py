"""The image store: every image is decoded once into pixels, which are memory-mapped afterwards.

Each store is one folder, named after a digest of everything that decides its content:

    images.u8    (N, 3, S, S) uint8, rows in the order of the source
    files.npy    (N,) position in the source, format and size of every file
    keys.bin     N names; keys.npy says where each begins
    index.json   written last: shape, fingerprint, skipped images with reasons, decoders

An image that was skipped is tried again by a later run if it could not be read, or if the decoders
have changed. A store whose files do not fit its index is made again.

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
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from spice_pl.data import retry
from spice_pl.data.decode import Decoded, Unread, quiet_warnings, unread
from spice_pl.data.duplicates import num_copies, row_digests
from spice_pl.data.formats import decoders
from spice_pl.data.images import FILE_FACTS, fingerprint, printable
from spice_pl.data.left_out import LeftOut
from spice_pl.data.retry import may_pass
from spice_pl.errors import UsageError
from spice_pl.system import ranks
from spice_pl.system.files import atomic, is_disk_full, sync_folder

logger = logging.getLogger(__name__)

STORE_VERSION = 3
BAD_IMAGE = ("skip", "raise")
STEP_BYTES = 1 << 26  # bytes of pixels between two entries of the journal
STEP_IMAGES = (64, 8192)  # least and most images between two entries


SHOWN_LEVELS = 5
VERIFY_BYTES = 1 << 27  # of pixels, that are compared with their digest each time
UNREAD = (10, 0.01)  # images that a run may leave unread: so many, or this share of them

Loaded = Decoded | Unread | str


@dataclass(frozen=True)
class Source:
    """Images in a fixed order, not decoded yet.

    Attributes:
        name: name for messages.
        keys: one name per image.
        load: function from a position to the decoded image, or to the reason why there is none;
            called from several threads.
        left_out: files of the source that are not among these images.
    """

    name: str
    keys: Sequence[str]
    load: Callable[[int], Loaded]
    left_out: LeftOut = field(default_factory=LeftOut)


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
        _save(starts, lengths.cumsum())


def open_store(
    identity: object,
    image_size: int,
    cache_dir: str,
    source: Callable[[], Source],
    on_bad_image: str = "skip",
    *,
    limits: Sequence[str] = (),
    verify: bool = False,
) -> Stored:
    """Return the store of some images; make it if it does not exist or is damaged.

    Args:
        identity: everything that decides pixels and order, as a JSON value.
        image_size: side S in pixels.
        cache_dir: folder of the stores; one takes 3·S·S bytes per image.
        source: function that returns the images; called only if the store has to be made.
        on_bad_image: "skip" leaves out what cannot be decoded and reports it, "raise" stops.
        limits: what decides, beside the decoders, which images are skipped.
        verify: whether to read all pixels and compare their digest; done in any case up to 128 MB.

    Raises:
        UsageError: no image can be decoded; a bad image with `on_bad_image="raise"`; the disk is
            too small or cannot be written.
    """
    if on_bad_image not in BAD_IMAGE:
        raise UsageError(f"on_bad_image {on_bad_image!r} is none of {BAD_IMAGE}")
    text = json.dumps([STORE_VERSION, image_size, identity])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    place = Path(cache_dir).expanduser() / digest
    job = _Job(place, image_size, on_bad_image, [*decoders(), *limits])
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not _is_whole(job, verify):
            with _only_writer(place):
                if not _is_whole(job, verify):
                    if place.exists():
                        logger.warning("the image store %s is damaged and is made again", place)
                        shutil.rmtree(place)
                    images = _opened(source)
                    if _make(job, images):
                        _try_again(job, images)
        elif _may_find_more(job):
            with _only_writer(place):
                _try_again(job, _opened(source))
    except OSError as error:
        raise UsageError(_disk(error, place.parent)) from error
    return _read(job)


@dataclass(frozen=True)
class _Job:
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
        index: dict[str, Any] = json.loads((self.place / "index.json").read_text())
        return index


def _is_whole(job: _Job, verify: bool) -> bool:
    """Return whether a store is there and undamaged."""
    if not (job.place / "index.json").is_file():
        return False
    try:
        index = job.index()
        stored = _stored(job, index)
        found = len(stored.keys), len(stored.files), (job.place / "images.u8").stat().st_size
        count = index["num_images"]
        damage = found != (count, count, count * job.row_bytes)
        if not damage and (verify or found[2] <= VERIFY_BYTES):
            damage = fingerprint(stored.images) != stored.fingerprint
    except (FileNotFoundError, ValueError, LookupError, TypeError, EOFError):
        return False
    return not damage


def _opened(source: Callable[[], Source]) -> Source:
    try:
        return source()
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error


def _skipped(index: dict[str, Any]) -> list[Skipped]:
    return [Skipped(*each) for each in index["skipped"]]


def _may_find_more(job: _Job) -> bool:
    """Return whether images that were skipped may be decoded now."""
    if ranks.in_rank() or not os.access(job.place.parent, os.W_OK):  # ranks must not differ
        return False
    index = job.index()
    return any(index["rules"] != job.rules or image.unread for image in _skipped(index))


def _try_again(job: _Job, source: Source) -> None:
    """Decode the images that were skipped once more, and make the store again if one can be."""
    index = job.index()
    skipped = {image.place: image for image in _skipped(index)}
    places = [i for i, image in skipped.items() if index["rules"] != job.rules or image.unread]
    with quiet_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        loaded = dict(zip(places, pool.map(_loader(source), places), strict=True))
    found = sum(isinstance(image, Decoded) for image in loaded.values())
    if not found:
        index["skipped"] = [
            astuple(_as_skipped(i, image.key, loaded[i]) if i in loaded else image)
            for i, image in skipped.items()
        ]
        index["rules"] = job.rules
        with atomic(job.place / "index.json") as temporary:
            temporary.write_text(json.dumps(index))
        return
    logger.info("%d images of %s that were skipped can be decoded now", found, source.name)
    stored = _stored(job, index)

    def load(i: int) -> Loaded:
        if i in loaded:
            return loaded[i]
        if i in skipped:
            return skipped[i].reason
        row = int(np.searchsorted(stored.files["source"], i))  # sources are in rising order
        return Decoded(stored.images[row], *stored.files[row].tolist()[1:])

    _make(job, replace(source, load=load))


def _loader(source: Source) -> Callable[[int], Loaded]:
    """Return the function of a source that loads an image, without errors of the disk."""

    def load(i: int) -> Loaded:
        try:
            return source.load(i)
        except (OSError, MemoryError) as error:
            return unread(error) if may_pass(error) else f"{type(error).__name__}: {error}"

    return load


def _as_skipped(place: int, key: str, image: Loaded) -> Skipped:
    is_unread = isinstance(image, Unread)
    return Skipped(place, key, image.reason if isinstance(image, Unread) else str(image), is_unread)


def _read(job: _Job) -> Stored:
    index = job.index()
    stored = _stored(job, index)
    if stored.skipped and job.on_bad_image == "raise":
        raise UsageError(_bad_image(index["name"], *stored.skipped[0]))
    if stored.skipped:
        report(index["name"], stored.skipped)
    if index["levels"]:
        logger.info(
            "images whose levels are not 0 to 255: %s; dataset.levels=[black,white] sets them",
            "; ".join(index["levels"]),
        )
    copies, count = index["num_copies"], index["num_images"]
    if copies and copies == count - 1:
        logger.warning("all %d images of %s are the same, pixel by pixel", count, index["name"])
    elif copies:
        logger.info(
            "%d of %d images are exact copies of others; stage=inspect shows them", copies, count
        )
    return stored


def _stored(job: _Job, index: dict[str, Any]) -> Stored:
    shape = (index["num_images"], 3, job.image_size, job.image_size)
    return Stored(
        images=np.memmap(job.place / "images.u8", dtype=np.uint8, mode="r", shape=shape),
        keys=Names(job.place / "keys.bin", job.place / "keys.npy"),
        files=np.load(job.place / "files.npy", mmap_mode="r"),
        fingerprint=index["fingerprint"],
        skipped=[(image.key, image.reason) for image in _skipped(index)],
        left_out=LeftOut(*index["left_out"]),
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


def _make(job: _Job, source: Source) -> bool:
    """Make a store; return whether an interrupted run has left images unread."""
    place, row_bytes = job.place, job.row_bytes
    part = place.with_name(f".{place.name}.part")
    part.mkdir(exist_ok=True)
    journal = _Journal(part, row_bytes)
    left_unread = any(unread for *_, unread in journal.skipped)
    total, need = len(source.keys), (len(source.keys) - journal.done) * row_bytes
    free = shutil.disk_usage(part).free
    if need > free:
        raise UsageError(
            f"the images need {_size(need)} in {place.parent} and {_size(free)} are free; make "
            "room, or set dataset.cache_dir or a smaller dataset.image_size"
        )
    logger.info(
        "decoding %d images once into %s (%s)%s",
        *(total - journal.done, place.parent, _size(need)),
        f"; {journal.done} were done before" if journal.done else "",
    )
    least, most = STEP_IMAGES
    step = max(least, min(most, STEP_BYTES // row_bytes))
    load = _loader(source)
    with quiet_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(journal.done, total, step):
            places = range(start, min(start + step, total))
            images = list(pool.map(load, places))
            _read_again(source, load, journal, places, images)
            if job.on_bad_image == "raise":
                for i, image in zip(places, images, strict=True):
                    if not isinstance(image, Decoded):
                        shutil.rmtree(part)
                        reason = _as_skipped(i, "", image).reason
                        raise UsageError(_bad_image(source.name, source.keys[i], reason))
            journal.append(start, images)
            if start // 10_000 != journal.done // 10_000:
                logger.info("decoded %d of %d images", journal.done, total)
    if not journal.num_rows:
        shutil.rmtree(part)
        skipped = [(source.keys[i], reason) for i, reason, _ in journal.skipped]
        report(source.name, skipped)
        raise UsageError(
            f"none of the {total} images of {source.name} could be decoded; first: "
            f"{printable(': '.join(skipped[0]))}"
        )
    _finish(job, part, source, journal)
    return left_unread


def _read_again(
    source: Source,
    load: Callable[[int], Loaded],
    journal: _Journal,
    places: Sequence[int],
    images: list[Loaded],
) -> None:
    """Try the images again, one by one, that could not be read; in place.

    Raises:
        UsageError: too many of all images cannot be read: the disk is not well.
    """
    least, share = UNREAD
    num_unread = sum(unread for *_, unread in journal.skipped)
    for row, i in enumerate(places):
        image = images[row]
        for pause in retry.PAUSES_S:
            if isinstance(image, Unread) and image.soon:
                time.sleep(pause)
                image = images[row] = load(i)
        if isinstance(image, Unread) and image.soon:
            num_unread += 1
            if num_unread > max(least, share * len(source.keys)):
                last = printable(f"{source.keys[i]}: {image.reason}")
                raise UsageError(
                    f"{num_unread} images of {source.name} cannot be read, the last is {last}; "
                    "start again when the disk is well, which continues where this run stopped"
                )


def _levels(files: NDArray[Any]) -> list[str]:
    """Return what black and white are in images of other levels than 0 to 255, the most common."""
    pairs = np.stack([files["black"], files["white"]], axis=1)
    found, counts = np.unique(pairs[(pairs != (0, 255)).any(axis=1)], axis=0, return_counts=True)
    order = counts.argsort(kind="stable")[::-1]
    most = [f"{found[i][0]:g} to {found[i][1]:g} in {counts[i]}" for i in order[:SHOWN_LEVELS]]
    rest = int(counts[order[SHOWN_LEVELS:]].sum())
    return [*most, f"others in {rest}"] if rest else most


def _finish(job: _Job, part: Path, source: Source, journal: _Journal) -> None:
    files = np.fromfile(part / "files.part", dtype=FILE_FACTS)
    Names.write([source.keys[i] for i in files["source"]], part / "keys.bin", part / "keys.npy")
    _save(part / "files.npy", files)
    shape = (journal.num_rows, 3, job.image_size, job.image_size)
    images = np.memmap(part / "images.u8", dtype=np.uint8, mode="r", shape=shape)
    index = {
        "name": source.name,
        "num_images": len(images),
        "num_copies": num_copies(row_digests(images)),
        "fingerprint": fingerprint(images),
        "skipped": [(i, source.keys[i], *more) for i, *more in journal.skipped],
        "rules": job.rules,
        "levels": _levels(files),
        "left_out": [source.left_out.counts, source.left_out.names],
    }
    with atomic(part / "index.json") as temporary:  # also writes the folder's names to the disk
        temporary.write_text(json.dumps(index))
    old = job.place.with_name(f".{job.place.name}.old")
    if job.place.exists():  # a store that is made again; runs that have it open keep its files
        shutil.rmtree(old, ignore_errors=True)
        os.rename(job.place, old)
    os.rename(part, job.place)
    sync_folder(job.place.parent)
    shutil.rmtree(old, ignore_errors=True)
    for name in ("files.part", "journal.jsonl"):  # removed last: a part without them starts again
        (job.place / name).unlink()


class _Journal:
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


def _save(path: Path, array: NDArray[Any]) -> None:
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


def report(name: str, skipped: Sequence[tuple[str, str]], shown: int = 10) -> None:
    """Log which images were skipped and why."""
    logger.warning("skipped %d images of %s that cannot be used:", len(skipped), name)
    for key, reason in skipped[:shown]:
        logger.warning("  %s", printable(f"{key}: {reason}"))
    if len(skipped) > shown:
        logger.warning("  and %d more, all listed in the report", len(skipped) - shown)


def _bad_image(name: str, key: str, reason: str) -> str:
    said = printable(f"{key} of {name}: {reason}")
    return f"bad image {said}; repair or remove it, or use on_bad_image=skip"


def _size(count: int) -> str:
    """Return a number of bytes for people.

    >>> _size(48), _size(3_600_000)
    ('48 bytes', '3.6 MB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _disk(error: OSError, cache_dir: Path) -> str:
    if is_disk_full(error):
        return (
            f"the disk that holds {cache_dir} is full; make room and start again, which continues "
            "where it stopped, or set dataset.cache_dir"
        )
    return f"{cache_dir} cannot be read or written ({error.strerror}); set dataset.cache_dir"
