"""The pictures of the report page: which images are shown, and the sheets that hold them.

Shapes: N images, n images of a sheet, S pixels a side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spice_pl.reports.report_data import FloatArray, IntArray, ReportData
from spice_pl.reports.shading import Attention, shade, where
from spice_pl.reports.wall import PIXEL_ART, Index, Wall, choose_wall, resized, sprite

SHEETS_BYTES = 6_500_000  # most bytes of all sheets; with map and list below 15 MB, a mail
MAX_PICTURES = 2_400  # about so many in all; every wall of every cluster still shows one


@dataclass(frozen=True)
class Picture:
    """One shown image: its position in a sheet, and what is known about it."""

    image: int
    sheet: int
    offset: float  # percent, as CSS background-position counts it
    key: str
    confidence: str
    agreement: str
    truth: str | None
    shade: float | None = None  # percent, in the sheet of shades; None without a map
    looks_at: str = ""


@dataclass(frozen=True)
class Sheet:
    """Pictures of one cluster, side by side in one image."""

    number: int
    uri: str
    num_pictures: int
    shades: str = ""
    num_shades: int = 0


def shown_wall(
    confidence: FloatArray, agreement: FloatArray, clusters: IntArray, num_clusters: int
) -> Wall:
    """Choose the pictures of the page; arguments as in `choose_wall`."""
    per_row = max(1, min(12, MAX_PICTURES // (4 * num_clusters)))
    return choose_wall(confidence, agreement, clusters, num_clusters, per_row=per_row)


def sheets_of(
    images: Callable[[NDArray[np.intp]], NDArray[np.uint8]],
    groups: Sequence[Index],
    attention: Attention | None,
) -> tuple[list[Sheet], int]:
    """Return one sheet per group, with the largest pictures that fit into SHEETS_BYTES, and S."""
    limit = 128 if sum(map(len, groups)) <= MAX_PICTURES else 64  # bounds the memory
    tiles = [_fitted(images(index), limit) if len(index) else None for index in groups]
    first = next((group.shape[-1] for group in tiles if group is not None), limit)
    for side in [first, *(smaller for smaller in (96, 64, 48, 32) if smaller < first)]:
        uris = ["" if group is None else sprite(group, side) for group in tiles]
        if sum(map(len, uris)) <= SHEETS_BYTES:
            break
    sheets = []
    for number, (uri, index) in enumerate(zip(uris, groups, strict=True)):
        maps = None if attention is None else attention.of(index.tolist())
        if maps is None or not len(maps):
            sheets.append(Sheet(number, uri, len(index)))
        else:
            sheets.append(Sheet(number, uri, len(index), shade(maps), len(maps)))
    return sheets, side


def pictures_of(data: ReportData, index: Index, sheet: int) -> list[Picture]:
    """Describe the images `index` (n,) of one sheet."""
    maps = () if data.attention is None else data.attention.of(index.tolist())
    return [
        Picture(
            image=int(i),
            sheet=sheet,
            offset=_percent(position, len(index)),
            key=str(data.keys[i]),
            confidence=f"{data.confidence[i]:.2f}",
            agreement=f"{data.agreement[i]:.2f}",
            truth=data.truth(int(i)),
            shade=_percent(position, len(maps)) if position < len(maps) else None,
            looks_at=where(maps[position]) if position < len(maps) else "",
        )
        for position, i in enumerate(index)
    ]


def _fitted(images: NDArray[np.uint8], limit: int) -> NDArray[np.uint8]:
    """Keep pixel art as it is; give other pictures 96 pixels or more, sharp on a dense screen."""
    side = images.shape[-1]
    return images if side < PIXEL_ART else resized(images, min(max(side, 96), limit))


def _percent(position: int, num_tiles: int) -> float:
    """Return the background-position at which CSS shows this tile of a sheet."""
    return round(100 * position / max(num_tiles - 1, 1), 4)
