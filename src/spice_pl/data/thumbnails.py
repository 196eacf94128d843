"""Small pictures of image files in their own shape, for pages; nothing is trained on them.

Shapes: h height and w width of a picture in pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from spice_pl.data.decode import quiet_warnings
from spice_pl.data.formats import open_bytes, open_image
from spice_pl.data.images import ImageSet

EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
PARTS = 8  # widths are multiples of h / 8, so that tiles of 80 pixels begin at whole pixels
NARROWEST, WIDEST = 4, 20  # in these parts: half as wide as high, to 2.5 times as wide
FILE_PIXELS = 6_000_000_000  # of all files that are read for one page: 500 photographs of 12 MP
MAX_FILE_PIXELS = 60_000_000  # after JPEG's reduced decoding; larger files keep their square


def own_shapes(images: ImageSet, index: Sequence[int], height: int) -> dict[int, NDArray[np.uint8]]:
    """Return pictures (3, h, w) of the images at some positions that are not square.

    Square images are left out, since the stored pixels show all of them; so are images that are not
    files, or whose files have gone, have changed their size, hold more than 8 bits, or cannot be
    decoded. Files are read in this order until FILE_PIXELS are read.

    Args:
        images: the data set.
        index: positions; those that matter most come first.
        height: h.
    """
    if images.root is None or images.files is None:
        return {}
    files, left, chosen = images.files, FILE_PIXELS, []
    for i in index:
        width, tall = int(files["width"][i]), int(files["height"][i])
        left -= width * tall
        if left < 0:
            break
        if _parts(width, tall) != PARTS:
            chosen.append(int(i))
    with quiet_warnings(), ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        made = pool.map(lambda i: _thumbnail(images, i, height), chosen)
        return {i: picture for i, picture in zip(chosen, made, strict=True) if picture is not None}


def _thumbnail(images: ImageSet, i: int, height: int) -> NDArray[np.uint8] | None:
    """Return one picture (3, h, w), or None where the file does not give the same image."""
    if images.root is None or images.files is None:
        return None
    expected = int(images.files["width"][i]), int(images.files["height"][i])
    try:
        with open_bytes(images.root / images.keys[i]) as data, open_image(data) as opened:
            if opened.size != expected or opened.mode not in EIGHT_BITS:
                return None
            opened.draft(None, (2 * height, 2 * height))
            if opened.width * opened.height > MAX_FILE_PIXELS:
                return None
            opened.load()
            upright = ImageOps.exif_transpose(opened) or opened
            small = _on_white(upright)
    except Exception:  # Pillow raises many types; the stored square is shown instead
        return None
    width = _parts(*small.size) * height // PARTS
    fitted = ImageOps.fit(small, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(fitted).transpose(2, 0, 1)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, (0, 0), image)
        return opaque
    return image.convert("RGB")


def _parts(width: int, height: int) -> int:
    """Return the width in parts of the height, for one eighth of it."""
    return min(max(round(PARTS * width / max(height, 1)), NARROWEST), WIDEST)
