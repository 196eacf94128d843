"""Turn images of any kind into batches of pixels: files, folders, PIL images, arrays.

Shapes: N images, B images of a batch, S pixels a side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from spice_pl.data.decode import decode, square
from spice_pl.data.listing import image_files
from spice_pl.errors import UsageError

MAX_BATCH = 2**28  # bytes of pixels of a batch


def pixel_batches(
    images: Any,
    image_size: int,
    batch_size: int,
    skipped: list[tuple[str, str]],
    levels: Sequence[float] | None = None,
) -> Iterator[tuple[list[str], NDArray[np.uint8]]]:
    """Scale and cut images to one size; the next batch is prepared while the last one is used.

    Args:
        images: one image, many, or a folder, as `PortableModel.predict` takes them.
        image_size: S.
        batch_size: number of images that are decoded together.
        skipped: list to which the key and the reason of each undecodable image are appended.
        levels: as in `pixels_of`.

    Yields:
        Keys (B,) and pixels (B, 3, S, S) uint8, in the order given, without the skipped images; a
        batch of skipped images only is left out.

    Raises:
        UsageError: an array does not have the shape or type of an image.
    """
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        waiting: list[tuple[str, Future[NDArray[np.uint8] | str]]] = []
        each = named_images(images)
        batch_size = fitting_batch(batch_size, image_size)
        chunks = iter(lambda: list(islice(each, batch_size)), [])
        for chunk in chain(chunks, [[]]):
            ahead = [
                (key, pool.submit(pixels_of, image, image_size, levels)) for key, image in chunk
            ]
            made = [(key, future.result()) for key, future in waiting]
            waiting = ahead
            skipped += [(key, pixels) for key, pixels in made if isinstance(pixels, str)]
            good = [(key, pixels) for key, pixels in made if not isinstance(pixels, str)]
            if good:
                yield [key for key, _ in good], np.stack([pixels for _, pixels in good])


def fitting_batch(batch_size: int, image_size: int) -> int:
    """Return the largest batch, at most `batch_size`, whose pixels take at most MAX_BATCH bytes.

    >>> fitting_batch(256, 224), fitting_batch(256, 4096)
    (256, 5)
    """
    return min(batch_size, max(1, MAX_BATCH // (3 * image_size**2)))


def named_images(images: Any) -> Iterator[tuple[str, Any]]:
    """Yield the key and the image of each input: a path, or the position of what has no path.

    An array of three dimensions is one image if its first or its last dimension is 3.

    Examples:
        >>> [key for key, _ in named_images([np.zeros((8, 8), np.uint8), "photos/cat.png"])]
        ['0', 'photos/cat.png']
    """
    if isinstance(images, str | os.PathLike):
        path = Path(images).expanduser()
        if os.path.isdir(path):  # False, too, for a name that no file can have
            yield from ((name, path / name) for name in image_files(path))
        else:
            yield str(path), path
    elif isinstance(images, Image.Image):
        yield "0", images
    elif isinstance(images, np.ndarray | Tensor):
        array = images.numpy(force=True) if isinstance(images, Tensor) else images
        one = array.ndim == 2 or (array.ndim == 3 and 3 in (array.shape[0], array.shape[-1]))
        yield from ((str(i), image) for i, image in enumerate(array[None] if one else array))
    elif not isinstance(images, Iterable):
        raise UsageError(
            f"{type(images).__name__} is not an image; give a folder, a path, a PIL image, an "
            "array or a list of these"
        )
    else:
        for i, image in enumerate(images):
            is_path = isinstance(image, str | os.PathLike)
            yield (str(image), Path(image)) if is_path else (str(i), image)


def pixels_of(
    image: Any, image_size: int, levels: Sequence[float] | None = None
) -> NDArray[np.uint8] | str:
    """Return pixels (3, S, S) of one image, or the reason why it cannot be decoded.

    Args:
        image: path, PIL image, or uint8 array (H, W), (H, W, 3) or (3, H, W).
        image_size: S; the shorter side is scaled to it and the middle square is kept.
        levels: black and white of images of more than 8 bits; None chooses them for each image.

    Raises:
        UsageError: an array does not have the shape or type of an image.

    Examples:
        >>> grey = np.array([[0, 255], [9, 9]], np.uint8)
        >>> pixels_of(grey, image_size=2)[2].tolist()
        [[0, 255], [9, 9]]
    """
    if isinstance(image, Path):
        return decode(image, image_size, levels) if image.is_file() else "there is no such file"
    if isinstance(image, Image.Image):
        return square(image, image_size, levels)
    array = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)  # (H, W, 3)
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise UsageError(
            f"an image is {array.dtype} {array.shape}; give uint8 levels 0 to 255 as (H, W), "
            "(H, W, 3) or (3, H, W)"
        )
    return square(Image.fromarray(np.ascontiguousarray(array)), image_size)
