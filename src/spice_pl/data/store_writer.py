"""Decode the images of a source into an image store, in steps that an interrupted run continues.

A store is written in a temporary folder, in steps that are recorded in a journal, and renamed when
it is complete. A run that is killed leaves no store or a part that the next run continues.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.data import retry
from spice_pl.data.decode import Decoded, Loaded, Unread, quiet_warnings, unread
from spice_pl.data.duplicates import num_copies, row_digests
from spice_pl.data.images import FILE_FACTS, fingerprint
from spice_pl.data.left_out import LeftOut
from spice_pl.data.retry import may_pass
from spice_pl.data.store_files import Journal, Names, Skipped, StoreJob, save_array
from spice_pl.errors import UsageError
from spice_pl.system.files import atomic, sync_folder
from spice_pl.system.output import printable

logger = logging.getLogger(__name__)

STEP_BYTES = 1 << 26  # bytes of pixels between two entries of the journal
STEP_IMAGES = (64, 8192)  # least and most images between two entries
SHOWN_LEVELS = 5
UNREAD = (10, 0.01)  # images that a run may leave unread: so many, or this share of them


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


def write_store(job: StoreJob, source: Source) -> bool:
    """Make a store; return whether an interrupted run has left images unread."""
    place, row_bytes = job.place, job.row_bytes
    part = place.with_name(f".{place.name}.part")
    part.mkdir(exist_ok=True)
    journal = Journal(part, row_bytes)
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
    load = loader(source)
    with quiet_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(journal.done, total, step):
            places = range(start, min(start + step, total))
            images = list(pool.map(load, places))
            _read_again(source, load, journal, places, images)
            if job.on_bad_image == "raise":
                for i, image in zip(places, images, strict=True):
                    if not isinstance(image, Decoded):
                        shutil.rmtree(part)
                        reason = as_skipped(i, "", image).reason
                        raise UsageError(bad_image(source.name, source.keys[i], reason))
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
    journal: Journal,
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


def _finish(job: StoreJob, part: Path, source: Source, journal: Journal) -> None:
    files = np.fromfile(part / "files.part", dtype=FILE_FACTS)
    Names.write([source.keys[i] for i in files["source"]], part / "keys.bin", part / "keys.npy")
    save_array(part / "files.npy", files)
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
    del images  # Windows cannot rename a folder whose files are open
    with atomic(part / "index.json") as temporary:  # also writes the folder's names to the disk
        temporary.write_text(json.dumps(index), encoding="utf-8")
    old = job.place.with_name(f".{job.place.name}.old")
    if job.place.exists():  # a store that is made again; runs that have it open keep its files
        shutil.rmtree(old, ignore_errors=True)
        os.rename(job.place, old)
    os.rename(part, job.place)
    sync_folder(job.place.parent)
    shutil.rmtree(old, ignore_errors=True)
    for name in ("files.part", "journal.jsonl"):  # removed last: a part without them starts again
        (job.place / name).unlink()


def _levels(files: NDArray[Any]) -> list[str]:
    """Return what black and white are in images of other levels than 0 to 255, the most common."""
    pairs = np.stack([files["black"], files["white"]], axis=1)
    found, counts = np.unique(pairs[(pairs != (0, 255)).any(axis=1)], axis=0, return_counts=True)
    order = counts.argsort(kind="stable")[::-1]
    most = [f"{found[i][0]:g} to {found[i][1]:g} in {counts[i]}" for i in order[:SHOWN_LEVELS]]
    rest = int(counts[order[SHOWN_LEVELS:]].sum())
    return [*most, f"others in {rest}"] if rest else most


def loader(source: Source) -> Callable[[int], Loaded]:
    """Return the function of a source that loads an image, without errors of the disk."""

    def load(i: int) -> Loaded:
        try:
            return source.load(i)
        except (OSError, MemoryError) as error:
            return unread(error) if may_pass(error) else f"{type(error).__name__}: {error}"

    return load


def as_skipped(place: int, key: str, image: Loaded) -> Skipped:
    """Return the entry of the index for an image that is not decoded."""
    is_unread = isinstance(image, Unread)
    return Skipped(place, key, image.reason if isinstance(image, Unread) else str(image), is_unread)


def report(name: str, skipped: Sequence[tuple[str, str]], shown: int = 10) -> None:
    """Log which images were skipped and why."""
    logger.warning("skipped %d images of %s that cannot be used:", len(skipped), name)
    for key, reason in skipped[:shown]:
        logger.warning("  %s", printable(f"{key}: {reason}"))
    if len(skipped) > shown:
        logger.warning("  and %d more, all listed in the report", len(skipped) - shown)


def bad_image(name: str, key: str, reason: str) -> str:
    """Return the message about one bad image."""
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
