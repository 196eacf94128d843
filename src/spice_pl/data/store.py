"""Open image stores: every image is decoded once into pixels, which are memory-mapped afterwards.

Each store is one folder, named after a digest of everything that decides its content. Its files
are described in `spice_pl.data.store_files`, how they are written in `spice_pl.data.store_writer`.

An image that was skipped is tried again by a later run if it could not be read, or if the decoders
have changed. A store whose files do not fit its index is made again. One process writes, the others
wait for it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np

from spice_pl.data.decode import Decoded, Loaded, quiet_warnings
from spice_pl.data.formats import decoders
from spice_pl.data.store_files import Stored, StoreJob, is_whole, read_skipped, read_stored
from spice_pl.data.store_writer import Source, as_skipped, bad_image, loader, report, write_store
from spice_pl.errors import UsageError
from spice_pl.system import ranks
from spice_pl.system.files import atomic, is_disk_full
from spice_pl.system.locks import hold

logger = logging.getLogger(__name__)

STORE_VERSION = 3
BAD_IMAGE = ("skip", "raise")


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
    place = store_folder(identity, image_size, cache_dir)
    job = StoreJob(place, image_size, on_bad_image, [*decoders(), *limits])
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not is_whole(job, verify):
            with _only_writer(place):
                if not is_whole(job, verify):
                    if place.exists():
                        logger.warning("the image store %s is damaged and is made again", place)
                        shutil.rmtree(place)
                    images = _opened(source)
                    if write_store(job, images):
                        _try_again(job, images)
        elif _may_find_more(job):
            with _only_writer(place):
                _try_again(job, _opened(source))
    except OSError as error:
        raise UsageError(_disk(error, place.parent)) from error
    return _read(job)


def store_folder(identity: object, image_size: int, cache_dir: str) -> Path:
    """Return the folder of the store of some images; arguments as for `open_store`."""
    text = json.dumps([STORE_VERSION, image_size, identity])
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return Path(cache_dir).expanduser() / digest


def _opened(source: Callable[[], Source]) -> Source:
    try:
        return source()
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}") from error


def _may_find_more(job: StoreJob) -> bool:
    """Return whether images that were skipped may be decoded now."""
    if ranks.in_rank() or not os.access(job.place.parent, os.W_OK):  # ranks must not differ
        return False
    index = job.index()
    return any(index["rules"] != job.rules or image.unread for image in read_skipped(index))


def _try_again(job: StoreJob, source: Source) -> None:
    """Decode the images that were skipped once more, and make the store again if one can be."""
    index = job.index()
    skipped = {image.place: image for image in read_skipped(index)}
    places = [i for i, image in skipped.items() if index["rules"] != job.rules or image.unread]
    with quiet_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        loaded = dict(zip(places, pool.map(loader(source), places), strict=True))
    found = sum(isinstance(image, Decoded) for image in loaded.values())
    if not found:
        index["skipped"] = [
            astuple(as_skipped(i, image.key, loaded[i]) if i in loaded else image)
            for i, image in skipped.items()
        ]
        index["rules"] = job.rules
        with atomic(job.place / "index.json") as temporary:
            temporary.write_text(json.dumps(index), encoding="utf-8")
        return
    logger.info("%d images of %s that were skipped can be decoded now", found, source.name)
    stored = read_stored(job, index)

    def load(i: int) -> Loaded:
        if i in loaded:
            return loaded[i]
        if i in skipped:
            return skipped[i].reason
        row = int(np.searchsorted(stored.files["source"], i))  # sources are in rising order
        return Decoded(stored.images[row], *stored.files[row].tolist()[1:])

    write_store(job, replace(source, load=load))


def _read(job: StoreJob) -> Stored:
    index = job.index()
    stored = read_stored(job, index)
    if stored.skipped and job.on_bad_image == "raise":
        raise UsageError(bad_image(index["name"], *stored.skipped[0]))
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


@contextmanager
def _only_writer(place: Path) -> Iterator[None]:
    """Let one process at a time make a store."""
    file = place.with_name(f".{place.name}.lock")
    file.touch()
    with hold(file, "waiting for another run that decodes the same images"):
        yield


def _disk(error: OSError, cache_dir: Path) -> str:
    if is_disk_full(error):
        return (
            f"the disk that holds {cache_dir} is full; make room and start again, which continues "
            "where it stopped, or set dataset.cache_dir"
        )
    return f"{cache_dir} cannot be read or written ({error.strerror}); set dataset.cache_dir"
