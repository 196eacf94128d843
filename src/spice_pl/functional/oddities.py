"""What is odd about an image, by its pixels or its features, without labels.

Shapes: n images, N images of the data set, S side in pixels, D features, k neighbours.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spice_pl.functional.neighbors import nearest_neighbors, unit_rows

ONE_COLOUR = 4.0  # largest deviation of a channel, in levels of 255; less is hardly visible
BLURRED = 0.5  # largest sharpness of a blurred image, as a share of the median of the set
MAX_SHARPNESS = 0.45  # and in absolute terms: a Gaussian blur of some 2 pixels
MIN_GRADIENT = 0.5  # mean step in levels; below it an image has no edges to be sharp
FAR_OUT = 2.2  # interquartile ranges above the upper quartile; Hoaglin and Iglewicz 1987
NEIGHBOR = 5  # the neighbour whose distance counts, so that a few copies do not hide an outlier
REFERENCES = 2_000  # images that distances are compared with
LINES = 32  # rows and columns of pixels that are looked at, or more; all of a smaller image
MAX_STEP = 8  # from one row that is looked at to the next


def step(side: int) -> int:
    """Return the step from one row or column that is looked at to the next.

    >>> [step(side) for side in (8, 32, 96, 160, 1024)]
    [1, 1, 3, 5, 8]
    """
    return max(1, min(MAX_STEP, side // LINES))


def deviations(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the largest standard deviation of a channel (n,), in levels of 255.

    Args:
        images: (n, 3, S, S); rows and columns are read by `step`.
    """
    every = step(images.shape[-1])
    thinned = images[:, :, ::every, ::every].astype(np.float32)
    found: NDArray[np.float32] = thinned.std(axis=(2, 3)).max(axis=1)
    return found


def sharpness(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the mean second difference of neighbouring pixels over their mean first one (n,).

    Independent of contrast. White noise has √3 = 1.73. Five photographs had 1.0 to 1.5 in focus,
    0.6 to 0.8 after a Gaussian blur of 1 pixel, and 0.3 to 0.46 after one of 2 pixels. The smaller
    of the two directions counts, so that an image blurred by a movement counts too. Green pixels
    are read, on rows and columns by `step`. Images without edges have infinite sharpness.

    Args:
        images: (n, 3, S, S), S > 2.
    """
    green, every = images[:, 1], step(images.shape[-1])
    rows = green[:, ::every].astype(np.int16)  # (n, S / step, S)
    columns = np.ascontiguousarray(green[:, :, ::every].transpose(0, 2, 1)).astype(np.int16)
    return np.minimum(_sharpness(rows), _sharpness(columns))


def _sharpness(lines: NDArray[np.int16]) -> NDArray[np.float32]:
    first = np.diff(lines, axis=2)
    second = np.diff(first, axis=2)
    steps = np.abs(first).mean(axis=(1, 2), dtype=np.float32)
    bends = np.abs(second).mean(axis=(1, 2), dtype=np.float32)
    flat = steps < MIN_GRADIENT
    return np.where(flat, np.inf, bends / np.where(flat, 1, steps)).astype(np.float32)


def blurred(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which sharpness values (N,) are below 0.45 and below half of the set's median."""
    edged = values[np.isfinite(values)]
    if not len(edged):
        return np.zeros(len(values), np.bool_)
    return np.asarray(values < min(BLURRED * float(np.median(edged)), MAX_SHARPNESS))


def tiny(shorter: NDArray[np.integer[Any]], side: int) -> NDArray[np.bool_]:
    """Return which images are magnified more than twice and are half as large as is usual.

    Args:
        shorter: (N,), shorter side of each file in pixels.
        side: S, of the pixels that the network sees.
    """
    if not len(shorter):
        return np.zeros(0, np.bool_)
    return np.asarray(2 * shorter < min(side, float(np.median(shorter))))


def outliers(features: NDArray[np.float32], seed: int) -> tuple[NDArray[np.bool_], Tensor]:
    """Return which images (N,) are unlike all others, and the distances (N,) that say so.

    The distance of an image is √(2 - 2 cosine), that of l2-normalised features, to its fifth
    nearest other. An image is an outlier if its
    distance is more than 2.2 interquartile ranges above the upper quartile (Hoaglin and Iglewicz
    1987).
    In sets of more than 2,000 images the quartiles are those of 2,000 images among themselves, and
    an image that is far from these is compared with all.

    Args:
        features: (N, D), finite.
        seed: seed of that sample.
    """
    count = len(features)
    if count <= NEIGHBOR:
        return np.zeros(count, np.bool_), torch.zeros(count)
    chosen = np.arange(count)
    if count > REFERENCES:
        generator = np.random.default_rng(seed)
        chosen = np.sort(generator.choice(count, REFERENCES, replace=False))
    references = unit_rows(torch.from_numpy(np.array(features[chosen])))
    among = _distances(references, references, own=True)
    low, high = torch.quantile(among, torch.tensor([0.25, 0.75])).tolist()
    fence = high + FAR_OUT * max(high - low, 1e-6)
    distances = torch.empty(count)
    for start in range(0, count, REFERENCES):
        part = torch.from_numpy(np.array(features[start : start + REFERENCES]))
        distances[start : start + REFERENCES] = _distances(part, references, own=False)
    distances[chosen] = among
    far = torch.nonzero(distances > fence)[:, 0]
    if count > REFERENCES and len(far):
        distances[far] = _distances_to_all(features, far)
    return (distances > fence).numpy(), distances


def _distances_to_all(features: NDArray[np.float32], index: Tensor) -> Tensor:
    """Return the distances of some images among all; few features are in memory at a time."""
    queries = unit_rows(torch.from_numpy(np.array(features[index.numpy()])))
    nearest = torch.empty(len(queries), 0)
    for start in range(0, len(features), REFERENCES):
        keys = torch.from_numpy(np.array(features[start : start + REFERENCES]))
        found = nearest_neighbors(queries, keys, min(NEIGHBOR + 1, len(keys)))[0]
        nearest = torch.cat([nearest, found], dim=1)
        nearest = nearest.topk(min(NEIGHBOR + 1, nearest.shape[1]), dim=1).values
    return _chord(nearest[:, -1])


def _distances(queries: Tensor, keys: Tensor, *, own: bool) -> Tensor:
    """Return the distance to the fifth nearest key; with `own`, queries are keys themselves."""
    k = min(NEIGHBOR + own, len(keys))
    return _chord(nearest_neighbors(queries, keys, k)[0][:, -1])


def _chord(cosines: Tensor) -> Tensor:
    return (2 - 2 * cosines).clamp_min(0).sqrt()
