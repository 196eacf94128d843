"""Choose the pictures that represent a cluster, and put pictures into sheets.

Shapes: N images, K clusters, n pictures of one sheet, S pixels a side.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from spice_pl.functional.reliability import is_not_sure

Index = NDArray[np.intp]

READ = 256  # pictures that are read at a time; bounds the memory
PIXEL_ART = 32  # pixels a side; smaller pictures are kept and magnified by the browser


@dataclass(frozen=True)
class ClusterWall:
    """Pictures of one cluster, as positions among the N images; none appears twice.

    Attributes:
        cluster: id.
        size: number of images in the cluster.
        prototypes: images of highest confidence, best first.
        typical: images around the median confidence, higher first.
        borderline: images of lowest confidence, lowest first.
        not_sure: images with too few neighbours in the cluster, worst first; in no other group.
        num_not_sure: number of such images, shown or not.
    """

    cluster: int
    size: int
    prototypes: Index
    typical: Index
    borderline: Index
    not_sure: Index
    num_not_sure: int

    @property
    def shown(self) -> Index:
        """All shown pictures, in the order of the groups."""
        return np.concatenate([self.prototypes, self.typical, self.borderline, self.not_sure])


@dataclass(frozen=True)
class Wall:
    """The chosen pictures of a run.

    Attributes:
        clusters: one entry per cluster, by id, empty clusters included.
        num_not_sure: number of images that are "not sure", shown or not.
    """

    clusters: tuple[ClusterWall, ...]
    num_not_sure: int


def choose_wall(
    confidence: NDArray[np.floating[Any]],
    agreement: NDArray[np.floating[Any]],
    clusters: NDArray[np.integer[Any]],
    num_clusters: int,
    per_row: int = 12,
    *,
    num_neighbors: int = 0,
) -> Wall:
    """Choose the pictures to show, by confidence and agreement.

    Images that are "not sure" are kept apart. If fewer than 3 * per_row others are left in a
    cluster, they are divided into thirds. Images of equal confidence are ordered by agreement, then
    by a random key that is the same in every run: many probabilities are exactly 1, and files are
    often sorted by class.

    Args:
        confidence: (N,), in [0, 1].
        agreement: (N,), in [0, 1], share of an image's neighbours in the same cluster.
        clusters: (N,), in [0, num_clusters).
        num_clusters: K, > 0.
        per_row: largest number of pictures of each kind, > 0.
        num_neighbors: number of neighbours of the agreement, 0 where it is not known; which images
            are "not sure" depends on it, see `least_agreement`.

    Raises:
        ValueError: lengths differ, an id is outside [0, num_clusters), or per_row is below 1.
    """
    if not len(confidence) == len(agreement) == len(clusters):
        raise ValueError(
            f"confidence ({len(confidence)}), agreement ({len(agreement)}) and clusters "
            f"({len(clusters)}) must describe the same images"
        )
    if len(clusters) and not 0 <= clusters.min() <= clusters.max() < num_clusters:
        raise ValueError(
            f"cluster ids run from {clusters.min()} to {clusters.max()}; "
            f"num_clusters {num_clusters} allows 0 to {num_clusters - 1}"
        )
    if per_row < 1:
        raise ValueError(f"per_row {per_row} shows no picture; use at least 1")
    key = np.random.default_rng(0).permutation(len(clusters))  # (N,)
    # by cluster, most confident first
    order = np.lexsort((key, -agreement, -confidence, clusters))
    bounds = np.searchsorted(clusters[order], np.arange(1, num_clusters))
    ids = torch.from_numpy(np.asarray(clusters, dtype=np.int64))
    not_sure = is_not_sure(torch.from_numpy(np.asarray(agreement)), ids, num_neighbors).numpy()
    walls = []
    for cluster, members in enumerate(np.split(order, bounds)):
        apart = members[not_sure[members]]
        worst_first = apart[np.lexsort((key[apart], confidence[apart], agreement[apart]))]
        walls.append(_cluster_wall(cluster, members[~not_sure[members]], worst_first, per_row))
    return Wall(tuple(walls), int(not_sure.sum()))


def _cluster_wall(cluster: int, members: Index, not_sure: Index, per_row: int) -> ClusterWall:
    """Divide members, most confident first, into top, middle and bottom."""
    size = len(members)
    top = min(per_row, -(-size // 3))
    bottom = min(per_row, -(-(size - top) // 2))
    middle = min(per_row, size - top - bottom)
    start = min(max((size - middle) // 2, top), size - bottom - middle)
    return ClusterWall(
        cluster=cluster,
        size=size + len(not_sure),
        prototypes=members[:top],
        typical=members[start : start + middle],
        borderline=members[size - bottom :][::-1],
        not_sure=not_sure[:per_row],
        num_not_sure=len(not_sure),
    )


def sprite(images: NDArray[np.uint8], pixels: int | None = None) -> str:
    """Put pictures side by side into one image.

    Pictures of fewer than 32 pixels a side are kept pixel by pixel, as PNG, to be magnified with
    `image-rendering: pixelated`; larger ones become JPEG.

    Args:
        images: uint8, (n, 3, S, S), n > 0.
        pixels: side of each picture in the sheet; None keeps S.

    Returns:
        A data URI of a sheet n pictures wide and one high.

    Raises:
        ValueError: images is not uint8 of shape (n, 3, S, S) with n > 0.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or not images.size:
        raise ValueError(
            f"a sheet needs uint8 pictures (n, 3, S, S), n > 0; got {images.dtype} {images.shape}"
        )
    return _sheet(resized(images, pixels or images.shape[-1])[None], quality=85)


def strip(pictures: Sequence[NDArray[np.uint8]], pixels: int) -> tuple[str, list[float]]:
    """Put pictures of any shape side by side into one image.

    Args:
        pictures: uint8, (3, h, w) each; one at least. Widths should be multiples of h / 8.
        pixels: height of the sheet; widths are scaled with it.

    Returns:
        A data URI of the sheet, and the width of each picture in heights of the sheet.
    """
    scaled = [_high(picture, pixels) for picture in pictures]
    widths = [picture.shape[-1] / pixels for picture in scaled]
    return _encoded(np.concatenate(scaled, axis=2).transpose(1, 2, 0), quality=85), widths


def _high(picture: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Scale a picture (3, h, w) to a height; its width stays a whole number of eighths."""
    height, width = picture.shape[1:]
    if height == pixels:
        return picture
    wide = round(8 * width / height) * pixels // 8
    image = Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0)))
    return np.asarray(image.resize((wide, pixels), Image.Resampling.LANCZOS)).transpose(2, 0, 1)


def atlas(
    images: Callable[[Index], NDArray[np.uint8]], index: Index, pixels: int
) -> tuple[str, int]:
    """Put many small pictures into one image with several rows of equal length.

    Args:
        images: function from positions (m,) to pictures, uint8 (m, 3, S, S).
        index: (n,) positions, n > 0; few are read at a time.
        pixels: side of each picture in the sheet.

    Returns:
        A data URI, and the number of pictures per row; picture i is in row i // that number.
    """
    per_row = int(np.ceil(np.sqrt(len(index))))
    rows = -(-len(index) // per_row)
    tiles = np.zeros((rows * per_row, 3, pixels, pixels), np.uint8)
    for start in range(0, len(index), READ):
        part = resized(images(index[start : start + READ]), pixels)
        tiles[start : start + len(part)] = part
    return _sheet(tiles.reshape(rows, per_row, 3, pixels, pixels), quality=70), per_row


def _sheet(tiles: NDArray[np.uint8], quality: int) -> str:
    """Encode rows of tiles (rows, per_row, 3, S, S) as one image."""
    side = tiles.shape[-1]
    pixels = tiles.transpose(0, 3, 1, 4, 2)  # (rows, S, per_row, S, 3)
    whole = np.ascontiguousarray(pixels).reshape(len(tiles) * side, -1, 3)
    return _encoded(whole, quality, art=side < PIXEL_ART)


def _encoded(pixels: NDArray[np.uint8], quality: int, *, art: bool | None = None) -> str:
    """Return (h, w, 3) as JPEG; pixel art as PNG, with one channel if it is grey."""
    sheet = Image.fromarray(np.ascontiguousarray(pixels))
    buffer = io.BytesIO()
    if not (len(pixels) < PIXEL_ART if art is None else art):
        sheet.save(buffer, "JPEG", quality=quality, optimize=True)
        return data_uri("jpeg", buffer)
    grey = bool((pixels == pixels[..., :1]).all())
    (sheet.convert("L") if grey else sheet).save(buffer, "PNG", optimize=True)
    return data_uri("png", buffer)


def data_uri(kind: str, buffer: io.BytesIO) -> str:
    """Return the address that holds an encoded image itself; kind is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def resized(images: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Scale pictures (n, 3, S, S) to (n, 3, pixels, pixels)."""
    if images.shape[-1] == pixels:
        return images
    scaled: Sequence[NDArray[np.uint8]] = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize(
                (pixels, pixels), Image.Resampling.LANCZOS, reducing_gap=2.0
            )
        )
        for image in images
    ]
    return np.stack(scaled).transpose(0, 3, 1, 2)
