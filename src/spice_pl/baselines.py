"""What every clustering is compared with: k-means.

Shapes: N samples, K clusters.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

logger = logging.getLogger(__name__)

FIT_AT_MOST = 20_000  # samples; a centre needs no more, and restarts stay within minutes


def kmeans_clusters(data: NDArray[Any], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Return (N,) clusters of k-means (k-means++, best inertia of 10 restarts).

    Args:
        data: (N, ...), flattened to rows; uint8 is scaled to [0, 1].
        num_clusters: K.
        seed: of restarts, and of the 20,000 samples it is fitted on when there are more.
    """
    scale = 1 / 255 if data.dtype == np.uint8 else 1.0
    fitted = np.arange(len(data))
    if len(data) > FIT_AT_MOST:
        fitted = np.sort(np.random.default_rng(seed).choice(len(data), FIT_AT_MOST, replace=False))
        logger.info("k-means is fitted on %d of %d samples", FIT_AT_MOST, len(data))
    model = KMeans(num_clusters, n_init=10, random_state=seed)
    model.fit(_rows(data[fitted], scale))
    chunks = range(0, len(data), FIT_AT_MOST)
    found = [model.predict(_rows(data[start : start + FIT_AT_MOST], scale)) for start in chunks]
    return np.concatenate(found).astype(np.int64)


def _rows(data: NDArray[Any], scale: float) -> NDArray[np.float32]:
    return np.asarray(data, dtype=np.float32).reshape(len(data), -1) * np.float32(scale)
