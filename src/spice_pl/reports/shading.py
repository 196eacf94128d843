"""Where the shown images look like their cluster, as small sheets of shade and in words.

Shapes: n images, h x w places of a map, S pixels a side of a tile.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TILE_PIXELS = 24  # a side; the browser scales and smooths the rest
DARKEST = 0.8  # opacity of the shade where a map is 0
LEVELS = 16  # of shade; more cost bytes and are not seen
ALIKE = 0.5  # a map that is nowhere below it looks at the whole image

Maps = NDArray[np.uint8]


@dataclass(frozen=True)
class Attention:
    """Maps of some images; none where the backbone keeps no map of places.

    Attributes:
        index: (n,) positions in the data set.
        maps: (n, h, w), 255 where the image looks most like its cluster.

    Raises:
        ValueError: their lengths or kinds do not fit.
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
        """Return the maps (m, h, w) of those leading images that have one."""
        place = {image: i for i, image in enumerate(self.index.tolist())}
        known = [place[image] for image in images if image in place]
        return self.maps[known]


def shade(maps: Maps) -> str:
    """Put maps side by side as a black sheet that is opaque where an image does not count.

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
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def where(attention: Maps) -> str:
    """Say of one map (h, w) where it is high, in thirds of the image.

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
