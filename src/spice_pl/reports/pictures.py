"""The pictures of the report page: which images are shown, and the sheets that hold them.

Shapes: N images, n images of a sheet, S pixels a side, h height and w width of a picture.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spice_pl.reports.report_data import FloatArray, IntArray, ReportData, Shapes
from spice_pl.reports.shading import Attention, shade, where
from spice_pl.reports.wall import PIXEL_ART, Index, Wall, choose_wall, resized, strip

SHEETS_BYTES = 6_500_000  # most bytes of all sheets; with map and list below 15 MB, a mail
MAX_PICTURES = 2_400  # about so many in all; every wall of every cluster still shows one
SIDES = (128, 96, 64, 48, 32)  # heights of pictures; the largest that fits is used


@dataclass(frozen=True)
class Picture:
    """One shown image: its position in a sheet, and what is known about it."""

    image: int
    sheet: int
    left: float  # where it begins in the sheet, and how wide it is; in heights of the sheet
    width: float
    key: str
    confidence: str
    agreement: str
    truth: str | None
    shade: float | None = None  # percent, in the sheet of shades; None without a map
    looks_at: str = ""


@dataclass(frozen=True)
class Sheet:
    """Pictures of one group, side by side in one image.

    Attributes:
        number: number of the sheet on the page.
        uri: address that holds the image itself; "" without pictures.
        widths: width of each picture, in heights.
        shades: address of the shades over the first pictures; "" without any.
        num_shades: number of these.
    """

    number: int
    uri: str
    widths: Sequence[float]
    shades: str = ""
    num_shades: int = 0


def shown_wall(
    confidence: FloatArray,
    agreement: FloatArray,
    clusters: IntArray,
    num_clusters: int,
    num_neighbors: int = 0,
) -> Wall:
    """Choose the pictures of the page; arguments as in `choose_wall`."""
    per_row = max(1, min(12, MAX_PICTURES // (4 * num_clusters)))
    values = (confidence, agreement, clusters, num_clusters)
    return choose_wall(*values, per_row=per_row, num_neighbors=num_neighbors)


def sheets_of(
    images: Callable[[NDArray[np.intp]], NDArray[np.uint8]],
    groups: Sequence[Index],
    attention: Attention | None,
    shapes: Shapes | None = None,
    num_walls: int | None = None,
) -> tuple[list[Sheet], int]:
    """Return one sheet per group, with the largest pictures that fit into SHEETS_BYTES, and S.

    Args:
        images: function from positions to pictures.
        groups: images of each sheet.
        attention: attention maps of some images.
        shapes: function that gives pictures in their own shape, see `ReportData`.
        num_walls: number of groups at the start that get shades; in these, images with an attention
            map come first. All if None.
    """
    limit = SIDES[0] if sum(map(len, groups)) <= MAX_PICTURES else SIDES[2]  # bounds the memory
    tiles = [_fitted(images(index), limit) if len(index) else None for index in groups]
    first = next((group.shape[-1] for group in tiles if group is not None), limit)
    own: Mapping[int, NDArray[np.uint8]] = {}
    if shapes is not None and first >= PIXEL_ART:
        own = shapes(_in_turn(groups), first)
    size, tried = 0, first
    for side in [first, *(smaller for smaller in SIDES if smaller < first)]:
        # Bytes shrink more slowly than areas, so such a side would not fit either.
        if side > SIDES[-1] and size * (side / tried) ** 2 > SHEETS_BYTES:
            continue
        strips = [
            ("", [])
            if group is None
            else strip([own.get(i, group[at]) for at, i in enumerate(index.tolist())], side)
            for group, index in zip(tiles, groups, strict=True)
        ]
        size, tried = sum(len(uri) for uri, _ in strips), side
        if size <= SHEETS_BYTES:
            break
    sheets = []
    for number, ((uri, widths), index) in enumerate(zip(strips, groups, strict=True)):
        shaded = attention is not None and (num_walls is None or number < num_walls)
        maps = attention.of(index.tolist()) if attention is not None and shaded else None
        if maps is None or not len(maps):
            sheets.append(Sheet(number, uri, widths))
        else:
            sheets.append(Sheet(number, uri, widths, shade(maps), len(maps)))
    return sheets, side


def pictures_of(data: ReportData, index: Index, sheet: Sheet) -> list[Picture]:
    """Describe the images `index` (n,) of one sheet."""
    shaded = data.attention is not None and sheet.num_shades
    maps = data.attention.of(index.tolist()) if data.attention is not None and shaded else ()
    lefts = np.cumsum([0.0, *sheet.widths])
    return [
        Picture(
            image=int(i),
            sheet=sheet.number,
            left=round(float(lefts[position]), 4),
            width=round(sheet.widths[position], 4),
            key=str(data.keys[i]),
            confidence=f"{data.confidence[i]:.2f}",
            agreement=f"{data.agreement[i]:.2f}",
            truth=data.truth(int(i)),
            shade=_percent(position, len(maps)) if position < len(maps) else None,
            looks_at=where(maps[position]) if position < len(maps) else "",
        )
        for position, i in enumerate(index)
    ]


def _in_turn(groups: Sequence[Index]) -> list[int]:
    """Return the images of all groups, the first of each group first."""
    longest = max(map(len, groups), default=0)
    return [int(group[at]) for at in range(longest) for group in groups if at < len(group)]


def _fitted(images: NDArray[np.uint8], limit: int) -> NDArray[np.uint8]:
    """Keep pixel art as it is; give other pictures 96 pixels or more, sharp on a dense screen."""
    side = images.shape[-1]
    return images if side < PIXEL_ART else resized(images, min(max(side, 96), limit))


def _percent(position: int, num_tiles: int) -> float:
    """Return the background-position at which CSS shows this tile of a sheet of shades."""
    return round(100 * position / max(num_tiles - 1, 1), 4)
