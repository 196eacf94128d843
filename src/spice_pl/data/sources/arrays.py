"""Load images from an array in a `.npy` or `.npz` file.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spice_pl.data.decode import Decoded, Loaded, square
from spice_pl.data.images import ImageSet, fingerprint
from spice_pl.data.levels import CHUNK_PIXELS, black_and_white, scaled
from spice_pl.data.sources.table import class_labels
from spice_pl.data.store import open_store
from spice_pl.data.store_writer import Source
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

SAMPLED = 1000  # images whose levels decide what black and white are


def array(
    path: str,
    image_size: int,
    cache_dir: str,
    name: str = "array",
    images: str = "images",
    labels: str | None = None,
    on_bad_image: str = "skip",
    protocol: str = "whole",
) -> ImageSet:
    """Return the images of an array: grey (N, H, W), (N, H, W, 1, 3 or 4) or (N, 1 or 3, H, W).

    Levels other than uint8 are brought to 8 bits, all images by the same black and white, which are
    chosen from the whole array as `black_and_white` says: floats of 0 to 1 or 0 to 255, integers of
    8, 10, 12, 14 or 16 bits, true and false. A `.npy` file of uint8 (N, 3, S, S) is
    memory-mapped directly; anything else is converted once into the image store.

    Args:
        path: `.npy` or `.npz` file; pickled objects are refused.
        image_size: side S in pixels; the shorter side is scaled, the middle square kept.
        cache_dir: folder of the image stores.
        name: name of the data set and of its folder of results.
        images: name of the entry of a `.npz` file with the images.
        labels: name of the entry of the `.npz` file, or a `.npy` file, with (N,) true classes, for
            `truth/*` metrics only; None has no truth.
        on_bad_image: "skip" leaves out images with NaN or infinity and reports them, "raise" stops.
        protocol: "whole".

    Raises:
        UsageError: the file is missing, does not hold images, or the number of labels differs.
    """
    file = Path(path).expanduser()
    pixels = _open(file, images)
    rows = _channels_last(pixels, path)
    truth, class_names = None, None
    if labels is not None:
        given = _open(file, labels) if file.suffix == ".npz" else _open(Path(labels), labels)
        if given.shape != (len(pixels),):
            raise UsageError(
                f"dataset.labels={labels} has shape {given.shape}, not ({len(pixels)},); give one "
                "class per image"
            )
        truth, class_names = class_labels(str(each) for each in given.tolist())
    stored_as_is = pixels.dtype == np.uint8 and pixels.shape[1:] == (3, image_size, image_size)
    if stored_as_is and rows.shape[-1] == 3:
        return ImageSet(
            name=name,
            images=pixels,
            keys=[str(i) for i in range(len(pixels))],
            fingerprint=fingerprint(pixels),
            labels=truth,
            class_names=class_names,
            protocol=protocol,
        )

    levels = None if rows.dtype == np.uint8 else _levels(rows, path)

    def load(i: int) -> Loaded:
        row = np.asarray(rows[i])  # (H, W, channels)
        if levels is not None:
            if not np.isfinite(row).all():
                return "holds NaN or infinity"
            image = scaled(_flat(row), levels)[0]
        else:
            image = Image.fromarray(_flat(row))
        return Decoded(square(image, image_size), "array", image.width, image.height)

    stat = file.stat()
    stored = open_store(
        [str(file.resolve()), stat.st_size, stat.st_mtime_ns, images, levels],
        image_size,
        cache_dir,
        lambda: Source(f"dataset.path={path}", [str(i) for i in range(len(rows))], load),
        on_bad_image,
    )
    return ImageSet(
        name=name,
        images=stored.images,
        keys=stored.keys,
        fingerprint=stored.fingerprint,
        labels=None if truth is None else truth[stored.files["source"]],
        class_names=class_names,
        protocol=protocol,
        skipped=stored.skipped,
    )


def _flat(row: NDArray[Any]) -> NDArray[Any]:
    """View (H, W, 1) as (H, W)."""
    return row[..., 0] if row.shape[-1] == 1 else row


def _levels(rows: NDArray[Any], path: str) -> tuple[float, float]:
    """Return the levels of an array (N, H, W, C) that are shown as black and white."""
    num_images = max(1, min(SAMPLED, CHUNK_PIXELS // max(1, math.prod(rows.shape[1:]))))
    step = -(-len(rows) // num_images)
    try:
        black, white = black_and_white(rows[::step].astype(np.float32).ravel())
    except ValueError as error:
        raise UsageError(f"dataset.path={path}: {error}") from error
    if rows.dtype != np.bool_:
        logger.info("%s: levels %g to %g are shown as black to white", path, black, white)
    return black, white


def _open(file: Path, entry: str) -> NDArray[Any]:
    try:
        opened = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise UsageError(f"dataset.path={file} does not exist") from error
    except (ValueError, OSError, EOFError) as error:
        raise UsageError(f"dataset.path={file} is not a readable array: {error}") from error
    if isinstance(opened, np.lib.npyio.NpzFile):
        if entry not in opened:
            there = ", ".join(opened.files)
            raise UsageError(f"dataset.path={file} has no entry {entry!r}; it has {there}")
        opened = opened[entry]
    return np.asanyarray(opened)


def _channels_last(pixels: NDArray[Any], path: str) -> NDArray[Any]:
    """View (N, H, W), (N, H, W, C) or (N, C, H, W) as (N, H, W, C), without a copy."""
    if pixels.dtype.kind in "buif" and 0 not in pixels.shape:
        if pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4) and pixels.shape[1] > 4:
            raise UsageError(
                f"dataset.path={path} has the shape {pixels.shape} of one image; needed is one of "
                "several images, (N, H, W, 1|3|4)"
            )
        if pixels.ndim == 3:
            return pixels[..., None]
        if pixels.ndim == 4 and pixels.shape[-1] in (1, 3, 4):
            return pixels
        if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
            return pixels.transpose(0, 2, 3, 1)
    raise UsageError(
        f"dataset.path={path} is {pixels.dtype} {pixels.shape}; needed are integers, floats or "
        "true and false, of shape (N, H, W), (N, H, W, 1|3|4) or (N, 1|3, H, W)"
    )
