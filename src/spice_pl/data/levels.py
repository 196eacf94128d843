"""Bring images of more than 8 bits per level to 8 bits.

Shapes: H, W height and width in pixels.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

WHITES = (1.0, 255.0, 1023.0, 4095.0, 16383.0, 65535.0)  # of 1, 8, 10, 12, 14 and 16 bits
OUTLIERS = 1e-3  # share of the pixels at each end that do not decide what black and white are
OVERSHOOT = 0.05  # by how much an image may exceed its white
DARK = 1 / 16  # share of white that the brightest pixels reach at least
CHUNK_PIXELS = 1 << 18  # pixels that are looked at to choose black and white, or scaled, at once
MISSING = 1e30  # files mark missing data with the largest numbers they can hold
BITS, PLANES, SAMPLE_FORMAT = 258, 284, 339  # tags of TIFF
UPPER_HALF = 16  # colours of 12 bits or fewer stay below this in the upper byte of 16


def black_and_white(levels: NDArray[np.float32]) -> tuple[float, float]:
    """Choose the levels that are shown as black and white.

    White is the first of 1, 255, 1023, 4095, 16383 and 65535 that the brightest pixels do not
    exceed by more than 5 %. If they exceed all of these, or stay below 1/16 of it, the brightest
    pixels are white. Black is 0. If the darkest pixels are below 0 by more than 5 % of the
    brightest, black is the darkest and white the brightest. A thousandth of the pixels at each end,
    and at least one, has no influence, nor has a level beyond ±1e30 or one that is not a number.

    >>> black_and_white(np.array([0, 0, 200, 3000, 65535], np.float32))  # 12 bits, a hot pixel
    (0.0, 4095.0)

    Raises:
        ValueError: no level is a finite number.
    """
    finite = levels[np.abs(levels) < MISSING]  # False for NaN
    if not len(finite):
        raise ValueError("no level is a finite number")
    darkest = float(np.quantile(finite, OUTLIERS, method="higher"))
    brightest = float(np.quantile(finite, 1 - OUTLIERS, method="lower"))
    if darkest >= brightest:  # hardly any pixel differs from the others
        darkest, brightest = float(finite.min()), float(finite.max())
    if darkest < -OVERSHOOT * abs(brightest):
        return darkest, max(brightest, math.nextafter(darkest, math.inf))
    white = next((each for each in WHITES if brightest <= (1 + OVERSHOOT) * each), brightest)
    return 0.0, brightest if 0 < brightest < DARK * white else white


def is_wide(image: Image.Image) -> bool:
    """Return whether an image has one channel of more than 8 bits."""
    return image.mode == "F" or image.mode.startswith("I")


def wide_levels(image: Image.Image) -> NDArray[Any]:
    """Return the levels (H, W) of an image with one channel of more than 8 bits."""
    levels: NDArray[Any] = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(BITS) == (32,) and tags.get(SAMPLE_FORMAT, (1,)) == (1,):
        return levels.view(np.uint32)  # Pillow takes these for signed
    return levels


def scaled(levels: NDArray[Any], given: Sequence[float] | None) -> tuple[Image.Image, float, float]:
    """Return levels (H, W) or (H, W, 3) as an image of 8 bits, with black and white.

    Args:
        levels: levels of any kind of number.
        given: black and white; None chooses them.
    """
    height, width = levels.shape[:2]
    step = max(1, math.isqrt(height * width // CHUNK_PIXELS))
    sample = levels[::step, ::step].astype(np.float32)
    black, white = black_and_white(sample) if given is None else given
    made = np.empty(levels.shape, dtype=np.uint8)
    rows = max(1, CHUNK_PIXELS // width)
    for start in range(0, height, rows):  # so that few pixels are floats at a time
        part: NDArray[Any] = levels[start : start + rows].astype(np.float32)
        np.nan_to_num(part, copy=False, nan=black, posinf=white, neginf=black)
        part = (part.clip(black, white) - black) * (255 / (white - black))
        made[start : start + rows] = part.round()
    return Image.fromarray(made), black, white


def is_deep(opened: ImageFile.ImageFile) -> bool:
    """Return whether a file that is not loaded yet has several channels of 16 bits."""
    modes = [_raw_mode(tile) for tile in opened.tile]
    return bool(modes) and not is_wide(opened) and all(mode[-4:-1] == ";16" for mode in modes)


def name_planes(opened: ImageFile.ImageFile) -> None:
    """Tell Pillow that the planes of a TIFF file have 16 bits, if it takes them for 8."""
    tags: Any = getattr(opened, "tag_v2", {})
    if set(tags.get(BITS, ())) == {16} and all(len(_raw_mode(tile)) == 1 for tile in opened.tile):
        order = "B" if tags.prefix == b"MM" else "L"
        _set_raw_modes(opened, lambda mode: f"{mode};16{order}")


def deep_levels(
    upper: ImageFile.ImageFile, lower: ImageFile.ImageFile, *, dark: bool
) -> NDArray[np.uint16] | None:
    """Return the levels (H, W, 3) of a file that `is_deep`.

    Pillow keeps the upper byte of 16 bits, in which colours of 12 bits are nearly black. It keeps
    the lower byte if it is told the other order of bytes.

    Args:
        upper: the file, loaded.
        lower: the same file, opened again and not loaded.
        dark: whether to return None unless the upper bytes are nearly black.
    """
    colours: Any = upper.getextrema()[:3]
    if dark and max(high for _, high in colours) >= UPPER_HALF:
        return None
    levels = np.asarray(upper)[..., :3].astype(np.uint16)
    levels <<= 8
    modes = {_raw_mode(tile).partition(";")[0] for tile in lower.tile}
    planes = getattr(lower, "tag_v2", {}).get(PLANES) == 2
    if modes <= set("RGBA") or (modes <= {"RGB", "RGBA", "RGBX"} and not planes):
        other = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
        _set_raw_modes(lower, lambda mode: mode[:-1] + other[mode[-1]])
        lower.load()
        levels |= np.asarray(lower)[..., :3]
    return levels


def _raw_mode(tile: Any) -> str:
    """Return how a part of a file holds its levels."""
    args: Any = tile[3]
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _set_raw_modes(opened: ImageFile.ImageFile, change: Callable[[str], str]) -> None:
    tiles: list[Any] = []
    for tile in opened.tile:
        args: Any = tile[3]
        mode = change(_raw_mode(tile))
        changed = (*tile[:3], mode if isinstance(args, str) else (mode, *args[1:]))
        tiles.append(getattr(type(tile), "_make", tuple)(changed))  # Pillow 10 has plain tuples
    opened.tile = tiles
