"""Lay images out on a plane by their features, for the map of the report page.

Shapes: N images, n drawn, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 5_000  # most images drawn
METHODS = ("pca", "tsne")


@dataclass(frozen=True)
class Map:
    """Coordinates of the drawn images.

    Attributes:
        index: (n,) positions of the drawn images among the N.
        points: (n, 2) coordinates in [0, 1], to the right and upwards.
        how: one or two sentences that explain the map.
    """

    index: NDArray[np.intp]
    points: NDArray[np.float64]
    how: str


def feature_map(
    features: NDArray[np.floating[Any]], method: str = "pca", seed: int = 0, limit: int = MAX_POINTS
) -> Map:
    """Lay images out by their embeddings (features scaled to length one).

    Args:
        features: (N, D).
        method: "pca", the plane of largest variance; or "tsne", which keeps neighbours together
            (van der Maaten and Hinton 2008) and needs the package openTSNE.
        seed: seed of the sample, if N > limit, and of t-SNE.
        limit: largest number of images drawn.

    Raises:
        ValueError: the method is unknown, or tsne without openTSNE.
    """
    if method not in METHODS:
        raise ValueError(f"map {method!r} must be one of {METHODS}")
    index = np.arange(len(features))
    if len(index) > limit:
        index = np.sort(np.random.default_rng(seed).choice(len(index), limit, replace=False))
    rows = np.asarray(features[index], dtype=np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    points, share = _pca(rows)
    how = (
        "Each dot is an image, placed by its features: the two directions of largest variance "
        f"(PCA), which hold {share:.0%} of the variance."
    )
    if method == "tsne" and len(rows) > 3:
        points = _tsne(rows, seed)
        how = (
            "Each dot is an image. Images with similar features are placed together (t-SNE); the "
            "sizes of groups and the gaps between them mean little."
        )
    return Map(index, _unit(points), how)


def _pca(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the first two principal components (n, 2) and their share of the variance."""
    if not len(rows):
        return np.zeros((0, 2)), 0.0
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)  # (D,), (D, D), ascending
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])] < 0, -1, 1)
    points = centred @ axes
    if points.shape[1] < 2:
        points = np.column_stack([points, np.zeros(len(points))])
    total = values.sum()
    return points, float(values[::-1][:2].sum() / total) if total > 0 else 0.0


def _tsne(rows: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise ValueError(
            "map=tsne needs the package openTSNE; pip install 'spice-pl[plots]', or use map=pca"
        ) from error
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, random_state=seed, metric="cosine").fit(rows))


def _unit(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale both axes by one factor into [0, 1]; a few far points are moved to the border."""
    if not len(points):
        return points
    low, high = np.percentile(points, [0.25, 99.75], axis=0)
    side = max(float((high - low).max()), 1e-12)
    return np.asarray(np.clip((points - (low + high) / 2) / side + 0.5, 0.0, 1.0))
