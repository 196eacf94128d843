"""Which pictures stand for a cluster, and sheets of them.

Shapes: N images, K clusters, n pictures of one sheet, S pixels a side.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Index = NDArray[np.intp]

PIXEL_ART = 32  # pixels a side; smaller pictures keep their pixels and are magnified by the browser


@dataclass(frozen=True)
class ClusterWall:
    """Pictures of one cluster as indices into the N images; none appears twice.

    Attributes:
        cluster: id.
        size: images in the cluster.
        prototypes: highest confidence, best first.
        typical: around the median confidence, higher first.
        borderline: lowest confidence, lowest first.
        not_sure: most of their neighbours lie in other clusters, worst first; in no other group.
        num_not_sure: how many there are, shown or not.
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
        """All of them, in this order."""
        return np.concatenate([self.prototypes, self.typical, self.borderline, self.not_sure])


@dataclass(frozen=True)
class Wall:
    """The chosen pictures of a run.

    Attributes:
        clusters: one entry a cluster, in order of id, empty clusters included.
        num_not_sure: how many images are below the threshold, shown or not.
        agreement_threshold: an image is "not sure" below it.
    """

    clusters: tuple[ClusterWall, ...]
    num_not_sure: int
    agreement_threshold: float


def choose_wall(
    confidence: NDArray[np.floating[Any]],
    agreement: NDArray[np.floating[Any]],
    clusters: NDArray[np.integer[Any]],
    num_clusters: int,
    per_row: int = 12,
    *,
    agreement_threshold: float = 0.5,
) -> Wall:
    """Choose the pictures a person should see, by the model's own numbers alone.

    Images that are "not sure" stand apart. The others of a cluster, where they are fewer than
    3 * per_row, are divided into thirds. Equal confidence goes by agreement, then by a lot that is
    the same in every run: many probabilities are exactly 1, and files are often in the order of
    their classes.

    Args:
        confidence: (N,), in [0, 1].
        agreement: (N,), in [0, 1], share of an image's neighbours in the same cluster.
        clusters: (N,), in [0, num_clusters).
        num_clusters: K, > 0.
        per_row: most pictures of each kind, > 0.
        agreement_threshold: in [0, 1]; strictly below it an image is "not sure". With 0.5, most
            of its neighbours are in other clusters.

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
    lot = np.random.default_rng(0).permutation(len(clusters))  # (N,)
    # by cluster, most confident first
    order = np.lexsort((lot, -agreement, -confidence, clusters))
    bounds = np.searchsorted(clusters[order], np.arange(1, num_clusters))
    doubtful = agreement < agreement_threshold  # (N,)
    walls = []
    for cluster, members in enumerate(np.split(order, bounds)):
        doubted = members[doubtful[members]]
        worst = doubted[np.lexsort((lot[doubted], confidence[doubted], agreement[doubted]))]
        walls.append(_cluster_wall(cluster, members[~doubtful[members]], worst, per_row))
    return Wall(tuple(walls), int(doubtful.sum()), agreement_threshold)


def _cluster_wall(cluster: int, members: Index, doubted: Index, per_row: int) -> ClusterWall:
    """Divide members, most confident first, into top, middle and bottom; add the doubted."""
    size = len(members)
    top = min(per_row, -(-size // 3))
    bottom = min(per_row, -(-(size - top) // 2))
    middle = min(per_row, size - top - bottom)
    start = min(max((size - middle) // 2, top), size - bottom - middle)
    return ClusterWall(
        cluster=cluster,
        size=size + len(doubted),
        prototypes=members[:top],
        typical=members[start : start + middle],
        borderline=members[size - bottom :][::-1],
        not_sure=doubted[:per_row],
        num_not_sure=len(doubted),
    )


def sprite(images: NDArray[np.uint8], pixels: int | None = None) -> str:
    """Put pictures side by side into one image.

    Pictures below 32 pixels stay as they are, as PNG, to be magnified with
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
    side = pixels or images.shape[-1]
    tiles = resized(images, side).transpose(2, 0, 3, 1)  # (S, n, S, 3)
    sheet = Image.fromarray(np.ascontiguousarray(tiles).reshape(side, -1, 3))
    buffer = io.BytesIO()
    if side < PIXEL_ART:
        kind = "png"
        grey = bool((tiles == tiles[..., :1]).all())
        (sheet.convert("L") if grey else sheet).save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        sheet.save(buffer, "JPEG", quality=85, optimize=True)
    return _data_uri(kind, buffer)


def atlas(images: NDArray[np.uint8], pixels: int) -> tuple[str, int]:
    """Put many small pictures into one image of equal rows.

    Args:
        images: uint8, (n, 3, S, S), n > 0.
        pixels: side of each picture in the sheet.

    Returns:
        A data URI, and how many pictures stand in a row; picture i is in row i // that.
    """
    tiles = resized(images, pixels)
    per_row = int(np.ceil(np.sqrt(len(tiles))))
    rows = -(-len(tiles) // per_row)
    sheet = np.zeros((rows * per_row, 3, pixels, pixels), np.uint8)
    sheet[: len(tiles)] = tiles
    sheet = sheet.reshape(rows, per_row, 3, pixels, pixels).transpose(0, 3, 1, 4, 2)
    picture = Image.fromarray(np.ascontiguousarray(sheet).reshape(rows * pixels, -1, 3))
    buffer = io.BytesIO()
    kind = "png" if pixels < PIXEL_ART else "jpeg"
    if kind == "png":
        grey = bool((tiles == tiles[:, :1]).all())
        (picture.convert("L") if grey else picture).save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=70, optimize=True)
    return _data_uri(kind, buffer), per_row


def _data_uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def resized(images: NDArray[np.uint8], pixels: int) -> NDArray[np.uint8]:
    """Pictures (n, 3, S, S) as (n, 3, pixels, pixels)."""
    if images.shape[-1] == pixels:
        return images
    scaled: Sequence[NDArray[np.uint8]] = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).resize(
                (pixels, pixels), Image.Resampling.LANCZOS
            )
        )
        for image in images
    ]
    return np.stack(scaled).transpose(0, 3, 1, 2)
