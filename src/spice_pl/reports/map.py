"""A run on a plane: which images are drawn, and where.

Shapes: N images, n drawn, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 5_000  # drawn, each with its picture
METHODS = ("pca", "tsne")


@dataclass(frozen=True)
class Map:
    """Where images lie.

    Attributes:
        index: (n,) which of the N images.
        places: (n, 2) in [0, 1], right and up.
        how: one sentence on what the plane is.
    """

    index: NDArray[np.intp]
    places: NDArray[np.float64]
    how: str


def feature_map(
    features: NDArray[np.floating[Any]], method: str = "pca", seed: int = 0, limit: int = MAX_POINTS
) -> Map:
    """Lay images out by their embeddings (features of length one).

    Args:
        features: (N, D).
        method: "pca", the plane of largest variance; "tsne" keeps neighbours together (van der
            Maaten and Hinton 2008) and needs the package openTSNE.
        seed: of the sample where N > limit, and of t-SNE.
        limit: most images drawn.

    Raises:
        ValueError: the method is unknown, or tsne without openTSNE.
    """
    if method not in METHODS:
        raise ValueError(f"map {method!r} is none of {METHODS}")
    index = np.arange(len(features))
    if len(index) > limit:
        index = np.sort(np.random.default_rng(seed).choice(len(index), limit, replace=False))
    rows = np.asarray(features[index], dtype=np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    places, share = _pca(rows)
    how = f"The plane of largest variance (PCA) of the features; it holds {share:.0%} of it."
    if method == "tsne" and len(rows) > 3:
        places = _tsne(rows, seed)
        how = "Neighbours in feature space lie together (t-SNE); sizes and gaps mean little."
    return Map(index, _unit(places), how)


def _pca(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Two principal components and their share of the variance."""
    if not len(rows):
        return np.zeros((0, 2)), 0.0
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)  # (D,), (D, D), ascending
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])] < 0, -1, 1)
    places = centred @ axes
    if places.shape[1] < 2:
        places = np.column_stack([places, np.zeros(len(places))])
    total = values.sum()
    return places, float(values[::-1][:2].sum() / total) if total > 0 else 0.0


def _tsne(rows: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    try:
        from openTSNE import TSNE
    except ImportError as error:
        raise ValueError(
            "map=tsne needs the package openTSNE; pip install 'spice-pl[plots]', or use map=pca"
        ) from error
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, random_state=seed, metric="cosine").fit(rows))


def _unit(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale both axes alike into [0, 1], the middle at .5; a few far points go to the border."""
    if not len(places):
        return places
    low, high = np.percentile(places, [0.25, 99.75], axis=0)
    side = max(float((high - low).max()), 1e-12)
    return np.asarray(np.clip((places - (low + high) / 2) / side + 0.5, 0.0, 1.0))
