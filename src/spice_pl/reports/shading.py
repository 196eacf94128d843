"""Draw where images resemble their cluster, as sheets of shade over them and in words.

Shapes: n images, h x w cells of a map, S pixels a side of a tile.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spice_pl.reports.wall import data_uri

TILE_PIXELS = 24  # side of a tile; the browser scales and smooths it
DARKEST = 0.8  # opacity of the shade where a map is 0
LEVELS = 16  # levels of shade; more cost bytes and make no visible difference
ALIKE = 0.5  # a map that is never below it looks at the whole image

Maps = NDArray[np.uint8]


@dataclass(frozen=True)
class Attention:
    """Attention maps of some images; empty if the backbone has no feature map.

    Attributes:
        index: (n,) positions of the images in the data set.
        maps: (n, h, w) uint8, 255 where the image resembles its cluster most.

    Raises:
        ValueError: shapes or types do not fit.
    """

    index: NDArray[np.int64]
    maps: Maps

    def __post_init__(self) -> None:
        shape = self.maps.shape
        if self.maps.dtype != np.uint8 or len(shape) != 3 or self.index.shape != shape[:1]:
            raise ValueError(
                f"maps must be uint8 (n, h, w), one for each of {len(self.index)} images; got "
                f"{self.maps.dtype} {shape}"
            )

    def of(self, images: Sequence[int]) -> Maps:
        """Return the maps (m, h, w) of those of the images that have one, in their order."""
        position = {image: i for i, image in enumerate(self.index.tolist())}
        return self.maps[[position[image] for image in images if image in position]]


def shade(maps: Maps) -> str:
    """Put maps side by side as a black sheet, dark where an image does not resemble its cluster.

    Args:
        maps: (n, h, w), n > 0.

    Returns:
        A data URI of a PNG, n tiles wide and one high.
    """
    size = (TILE_PIXELS, TILE_PIXELS)
    tiles = [
        np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BICUBIC)) for each in maps
    ]
    level = np.rint(np.concatenate(tiles, axis=1) / 255 * (LEVELS - 1)).astype(np.uint8)  # (S, nS)
    sheet = Image.fromarray(level, "P")
    sheet.putpalette(bytes(3 * LEVELS))
    opacity = bytes(round(255 * DARKEST * (1 - each / (LEVELS - 1))) for each in range(LEVELS))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True, transparency=opacity, bits=4)
    return data_uri("png", buffer)


def where(attention: Maps) -> str:
    """Say in words where one map (h, w) is high, in thirds of the image.

    >>> where(np.array([[255, 0, 0], [0, 0, 0], [0, 0, 0]], np.uint8))
    'the upper left'
    >>> where(np.full((3, 3), 255, np.uint8))
    'the whole image'
    """
    weight = attention / 255
    if weight.min() >= ALIKE or weight.max() <= ALIKE:
        return "the whole image"
    weight = np.maximum(weight - ALIKE, 0)
    parts = []
    for axis, names in ((0, ("upper", "", "lower")), (1, ("left", "", "right"))):
        share = weight.sum(axis=1 - axis)
        centre = (share * (np.arange(len(share)) + 0.5)).sum() / share.sum() / len(share)
        parts.append(names[min(int(3 * centre), 2)])
    vertical, horizontal = parts
    if vertical and horizontal:
        return f"the {vertical} {horizontal}"
    if vertical or horizontal:
        return f"the {vertical or horizontal} part"
    return "the centre"
