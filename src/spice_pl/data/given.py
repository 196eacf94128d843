"""Images given from Python: a folder, a list of any kinds of images, or one array.

torch is not imported; a tensor is known by its methods.

Shapes: N images, H, W height and width in pixels, c channels: 1 grey, 3 RGB, 4 RGB and opacity.
"""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # of Pillow, which PNG keeps as they are
TIFF_MODES = ("I", "F", "CMYK")


def is_path(given: Any) -> bool:
    """Whether this names a file or folder."""
    return isinstance(given, str | os.PathLike)


def given_images(images: Any) -> Any:
    """Return a path, a list of paths, PIL images and arrays, or what may become one array.

    Tensors become arrays. A list of arrays of one shape stays a list that makes one array.

    Raises:
        ValueError: one of a list is not an image.
    """
    if is_path(images):
        return images
    if isinstance(images, Image.Image):
        return [images]
    images = _array(images)
    if not isinstance(images, list | tuple | Iterator):
        return images
    each = [_array(image) for image in images]
    kinds = [is_path(image) or isinstance(image, Image.Image) for image in each]
    shapes = {getattr(image, "shape", None) for image in each}
    if not any(kinds) and (len(shapes) < 2 or None in shapes):
        return np.stack(each) if shapes and None not in shapes else each
    for i, (image, known) in enumerate(zip(each, kinds, strict=True)):
        if not known and not isinstance(image, np.ndarray):
            raise ValueError(
                f"image {i} of the list is a {type(image).__name__}; give paths, PIL images, "
                "arrays or tensors"
            )
    return each


def channels_last(array: NDArray[Any], what: str) -> NDArray[Any]:
    """View (N, H, W), (N, H, W, c) or (N, c, H, W) as (N, H, W, c).

    Args:
        array: any kind of numbers.
        what: name for the message.

    Raises:
        ValueError: it has another shape.
    """
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[1] in (1, 3, 4) and array.shape[3] not in (1, 3, 4):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{what} {array.shape} are not images; give (N, H, W), (N, H, W, 3) or (N, 3, H, W), "
            "with 1 in place of 3 for grey, 4 for RGB and opacity"
        )
    return array


def number_range(arrays: Sequence[NDArray[Any]]) -> tuple[float, float] | None:
    """Return the smallest and the largest number of those arrays that are not uint8.

    None without any.

    Raises:
        ValueError: a number is infinite or not a number.
    """
    numbers = [array for array in arrays if array.dtype.kind in "buif" and array.size]
    wide = [array for array in numbers if array.dtype != np.uint8]
    if not wide:
        return None
    low = min(float(array.min()) for array in wide)
    high = max(float(array.max()) for array in wide)
    if not np.isfinite(high - low):
        raise ValueError("the images hold NaN or infinite numbers; replace them")
    return low, high


def eight_bits(array: NDArray[Any], between: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Return RGB levels (..., 3) of images (..., c), with transparency laid on white.

    Args:
        array: uint8 is kept; of other numbers, `between` become 0 and 255.
        between: smallest and largest number, see `number_range`.

    Raises:
        ValueError: the numbers are not uint8 and `between` is None, or are not real numbers.
    """
    levels: NDArray[np.uint8]
    if array.dtype == np.uint8:
        levels = array
    elif array.dtype.kind not in "buif":
        raise ValueError(f"the images hold {array.dtype}; give uint8, or other real numbers")
    elif between is None:
        raise ValueError(
            f"the images hold {array.dtype}, and those given to fit had levels of 8 bits; give "
            "uint8, from 0 to 255"
        )
    else:
        low, high = between
        numbers = (array.astype(np.float64) - low) / (high - low or 1.0) * 255
        if np.isnan(numbers).any():
            raise ValueError("the images hold NaN or infinite numbers; replace them")
        levels = np.round(numbers).clip(0, 255).astype(np.uint8)
    if levels.shape[-1] == 1:
        return np.repeat(levels, 3, axis=-1)
    if levels.shape[-1] == 4:
        opacity = levels[..., 3:].astype(np.float32) / 255
        mixed = levels[..., :3] * opacity + 255 * (1 - opacity)
        return np.round(mixed).astype(np.uint8)
    return levels


def write_images(images: Sequence[Any], root: Path) -> None:
    """Write PIL images, uint8 arrays and files into a folder; their names keep the order.

    Raises:
        ValueError: a path does not name a file.
    """
    root.mkdir()
    for i, image in enumerate(images):
        if is_path(image):
            if not os.path.isfile(image):
                raise ValueError(f"{image} is not a file; in a list, give paths of image files")
            shutil.copyfile(image, root / f"{i:09}{Path(image).suffix}")
            continue
        shown = image if isinstance(image, Image.Image) else Image.fromarray(image)
        if shown.mode in TIFF_MODES:
            shown.save(root / f"{i:09}.tiff")
            continue
        if shown.mode not in PNG_MODES:
            shown = shown.convert("RGBA" if shown.mode.endswith(("A", "a")) else "RGB")
        shown.save(root / f"{i:09}.png", compress_level=1)


def write_paths(paths: Sequence[Path], file: Path) -> None:
    """Write a table of paths in their order, for `dataset.table`."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as lines:
        writer = csv.writer(lines)
        writer.writerow(["path"])
        writer.writerows([str(path)] for path in paths)


def absolute(path: Any) -> Path:
    """Return an absolute path, without following links."""
    return Path(os.path.abspath(Path(path).expanduser()))


def _array(image: Any) -> Any:
    """Return a tensor as an array, anything else as it is."""
    if not hasattr(image, "detach"):
        return image
    if "bfloat16" in str(image.dtype):  # which numpy has not
        image = image.float()
    return image.numpy(force=True)
