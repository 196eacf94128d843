"""Find odd images once, from the stored pixels and features, in bounded memory.

Shapes: N images, n images of a chunk, S side in pixels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.duplicates import copies, row_digests
from spice_pl.data.images import ImageSet
from spice_pl.functional.oddities import (
    ONE_COLOUR,
    blurred,
    deviations,
    outliers,
    sharpness,
    step,
    tiny,
)
from spice_pl.reports.oddities import RULES, Oddity
from spice_pl.runs.folder import RunFolder
from spice_pl.system.schema import parse_object, read_text

FILE_NAME = "oddities.json"
CHUNK = 256  # images that a thread looks at; bounds the memory
LISTED = 10_000  # images that the file names of each kind; the count is of all
VERSION = 2  # of the rules; a file of another version is made again


def find_oddities(
    folder: RunFolder, images: ImageSet, metrics: Mapping[str, Any]
) -> Sequence[Oddity]:
    """Return the odd images of a run, of each kind in RULES; oddities.json keeps them.

    They are found again where the file is missing, or belongs to other pixels or features.
    """
    about = {
        "version": VERSION,
        "fingerprint": images.fingerprint,
        "features": metrics.get("digests", {}).get("features.npy"),
    }
    kept = _read(folder, about, len(images))
    if kept is not None:
        return kept
    found = [
        replace(each, index=each.index[:LISTED])
        for each in look(images, folder.features, int(metrics["seed"]))
    ]
    folder.write_json(
        FILE_NAME,
        {
            **about,
            "kinds": {
                each.name: {
                    "rule": each.rule,
                    "count": each.count,
                    "images": [str(images.keys[i]) for i in each.index.tolist()],
                    "positions": each.index.tolist(),
                }
                for each in found
            },
        },
    )
    return found


def look(images: ImageSet, features: NDArray[np.float32], seed: int) -> list[Oddity]:
    """Look at all images once; an image can be odd in several ways.

    Tiny and plain images are not called blurred, since they cannot be sharp.
    """
    starts = range(0, len(images), CHUNK)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        looked = list(pool.map(lambda at: _look(images.images[at : at + CHUNK]), starts))
    varied, sharp, marks = (np.concatenate(column) for column in zip(*looked, strict=True))
    plain = varied < ONE_COLOUR
    small = np.zeros(len(images), np.bool_)
    shorter = np.zeros(len(images), np.int64)
    if images.files is not None:
        files = np.asarray(images.files)
        shorter = np.minimum(files["width"], files["height"]).astype(np.int64)
        small = tiny(shorter, images.images.shape[-1])
    far, distances = outliers(features, seed)
    groups = _equal(images.images, marks)
    equal = np.concatenate(groups) if groups else np.empty(0, np.int64)
    return [
        Oddity("exact copies", equal, len(equal) - len(groups)),
        _sorted("outliers", far, -distances.numpy()),
        _sorted("blurred", blurred(np.where(plain | small, np.inf, sharp)), sharp),
        _sorted("tiny", small, shorter),
        _sorted("one colour", plain, varied),
    ]


def _look(
    images: NDArray[np.uint8],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint64]]:
    """Return deviations, sharpness and a mark that equal images share, each (n,)."""
    sharp = np.full(len(images), np.inf, np.float32)
    if images.shape[-1] > 2:
        sharp = sharpness(images)
    every = step(images.shape[-1])
    return deviations(images), sharp, row_digests(images[:, :, ::every, ::every])


def _equal(images: NDArray[np.uint8], marks: NDArray[np.uint64]) -> list[NDArray[np.int64]]:
    """Return the groups of equal images; only those with equal marks are read in full."""
    found = []
    for group in copies(marks):
        whole = [hashlib.blake2b(images[i].tobytes(), digest_size=8).digest() for i in group]
        found += [group[each] for each in copies(np.frombuffer(b"".join(whole), np.uint64))]
    return sorted(found, key=lambda group: int(group[0]))


def _sorted(name: str, odd: NDArray[np.bool_], order: NDArray[Any]) -> Oddity:
    """Return the odd images with the smallest value of `order` first."""
    index = np.flatnonzero(odd)
    return Oddity(name, index[np.argsort(order[index], kind="stable")], len(index))


def _read(folder: RunFolder, about: Mapping[str, Any], count: int) -> list[Oddity] | None:
    """Return what the file holds; None if it is missing, damaged, or about another run."""
    file = folder.path / FILE_NAME
    if not file.is_file():
        return None
    try:
        held = parse_object(read_text(file))
        if any(held[key] != value for key, value in about.items()):
            return None
        found = []
        for name in RULES:
            kind = held["kinds"][name]
            index = np.array(kind["positions"], dtype=np.int64)
            if len(index) and not 0 <= index.min() <= index.max() < count:
                return None
            found.append(Oddity(name, index, int(kind["count"])))
    except (ValueError, KeyError, TypeError, OverflowError):
        return None
    return found
