"""What every clustering is compared with: k-means.

Shapes: N samples, K clusters.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch.nn import functional as F

logger = logging.getLogger(__name__)

FIT_AT_MOST = 20_000  # samples; a centre needs no more, and restarts stay within minutes
CENTRES_AT_MOST = 1_000  # of all restarts together; ten of 100, one of 1000, which vary less
PIXELS_AT_MOST = 32  # a side of an image; larger ones are averaged down, and memory stays bounded


def kmeans_clusters(data: NDArray[Any], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Return (N,) clusters of k-means (k-means++, best inertia of 10 restarts; 1000/K for K > 100).

    Args:
        data: (N, ...), flattened to rows; images (N, 3, S, S) uint8 are scaled to [0, 1] and
            averaged down to 32 pixels where they are larger.
        num_clusters: K.
        seed: of restarts, and of the 20,000 samples it is fitted on when there are more.
    """
    fitted = np.arange(len(data))
    if len(data) > FIT_AT_MOST:
        fitted = np.sort(np.random.default_rng(seed).choice(len(data), FIT_AT_MOST, replace=False))
        logger.info("k-means is fitted on %d of %d samples", FIT_AT_MOST, len(data))
    restarts = min(10, max(1, CENTRES_AT_MOST // num_clusters))
    model = KMeans(num_clusters, n_init=restarts, random_state=seed)
    model.fit(_rows(data, fitted))
    chunks = np.array_split(np.arange(len(data)), -(-len(data) // FIT_AT_MOST))
    found = [model.predict(_rows(data, chunk)) for chunk in chunks]
    return np.concatenate(found).astype(np.int64)


def _rows(data: NDArray[Any], index: NDArray[np.int64]) -> NDArray[np.float32]:
    if data.dtype != np.uint8:
        return np.asarray(data[index], dtype=np.float32).reshape(len(index), -1)
    parts = np.array_split(index, -(-len(index) // 1000))  # float copies of few images at a time
    return np.concatenate([_pixels(torch.from_numpy(data[part])) for part in parts])


def _pixels(images: torch.Tensor) -> NDArray[np.float32]:
    levels = images.float() / 255
    if images.ndim == 4 and images.shape[-1] > PIXELS_AT_MOST:
        levels = F.interpolate(levels, size=(PIXELS_AT_MOST, PIXELS_AT_MOST), mode="area")
    rows: NDArray[np.float32] = levels.flatten(1).numpy()
    return rows
