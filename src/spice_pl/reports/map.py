"""Lay images out on a plane by their features, for the map of the report page.

Shapes: N images, n drawn, D features, c principal components, B images of a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 5_000  # most images drawn
MAX_FITTED = 2_000  # most images that t-SNE lays out; some 3 seconds on one core
NUM_COMPONENTS = 50
METHODS = ("tsne", "pca")


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
    features: NDArray[np.floating[Any]],
    method: str = "tsne",
    seed: int = 0,
    limit: int = MAX_POINTS,
    fitted: int = MAX_FITTED,
) -> Map:
    """Lay images out by their embeddings (features scaled to length one).

    Args:
        features: (N, D).
        method: "tsne", which keeps neighbours together (van der Maaten and Hinton 2008), on the
            first 50 principal components and from the first two of them; or "pca", the plane of
            largest variance.
        seed: seed of the sample, if N > limit, and of t-SNE.
        limit: largest number of images drawn.
        fitted: largest number of images that t-SNE lays out. The others are placed between those
            of them that are most similar.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in METHODS:
        raise ValueError(f"map {method!r} must be one of {METHODS}")
    index = np.arange(len(features))
    generator = np.random.default_rng(seed)
    if len(index) > limit:
        index = np.sort(generator.choice(len(index), limit, replace=False))
    rows = np.asarray(features[index], dtype=np.float64)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    components = _components(rows)
    points = components[:, :2]
    how = "Each dot is an image, placed on the plane of largest variance of its features (PCA). "
    if method == "tsne" and len(rows) > 3 and components[:, 0].std() > 1e-6:
        order = generator.permutation(len(rows))
        points = _tsne(components, order[:fitted], order[fitted:], seed)
        how = (
            "Each dot is an image. Images with similar features are placed together (t-SNE); the "
            "sizes of groups and the gaps between them mean little. "
        )
    return Map(index, _unit(points), how + _trust(rows, points, generator))


def _components(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the principal components (n, c), the largest first; 2 <= c <= 50."""
    if not len(rows):
        return np.zeros((0, 2))
    centred = rows - rows.mean(axis=0)
    if len(rows) < rows.shape[1]:  # the smaller of both matrices has the same eigenvalues
        values, vectors = np.linalg.eigh(centred @ centred.T)  # (n, n), by ascending variance
        made = vectors * np.sqrt(np.maximum(values, 0.0))
    else:
        made = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -NUM_COMPONENTS:]
    made = made[:, ::-1][:, :NUM_COMPONENTS]  # (n, c)
    made = made * np.where(made[np.abs(made).argmax(axis=0), range(made.shape[1])] < 0, -1, 1)
    return made if made.shape[1] > 1 else np.column_stack([made, np.zeros(len(made))])


def _tsne(
    components: NDArray[np.float64],
    fitted: NDArray[np.intp],
    others: NDArray[np.intp],
    seed: int,
) -> NDArray[np.float64]:
    """Return points (n, 2): t-SNE of the images `fitted`, the others between their nearest five.

    On one thread, as the order in which threads add would change the layout.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    start = components[fitted, :2] / components[fitted, 0].std() * 1e-4
    layout = TSNE(
        perplexity=min(30.0, (len(fitted) - 1) / 3),
        init=start,
        max_iter=500,
        n_iter_without_progress=150,
        random_state=seed,
        n_jobs=1,
    )
    points = np.zeros((len(components), 2))
    with threadpool_limits(1):
        points[fitted] = layout.fit_transform(components[fitted])
    if len(others):
        known = components[fitted]
        for part in np.array_split(others, -(-len(others) // 1000)):
            new = components[part]
            squared = (new**2).sum(1)[:, None] + (known**2).sum(1) - 2 * new @ known.T  # (B, n)
            nearest = np.argpartition(squared, min(5, len(known)) - 1, axis=1)[:, :5]
            weight = 1 / np.maximum(np.take_along_axis(squared, nearest, axis=1), 1e-9)
            weight /= weight.sum(axis=1, keepdims=True)
            points[part] = (weight[..., None] * points[fitted][nearest]).sum(axis=1)
    return points


def _trust(
    rows: NDArray[np.float64], points: NDArray[np.float64], generator: np.random.Generator
) -> str:
    """Return a sentence with the map's trustworthiness (Venna and Kaski 2001), on 2,000 images."""
    num_neighbors = min(10, (len(rows) - 1) // 2)
    if num_neighbors < 1:
        return ""
    from sklearn.manifold import trustworthiness

    sample = generator.permutation(len(rows))[:2000]
    found = trustworthiness(rows[sample], points[sample], n_neighbors=num_neighbors)
    return (
        f"Trustworthiness {found:.2f}: it is 1 if all nearest neighbours on the map are near by "
        "their features too, and about 0.5 for a random map."
    )


def _unit(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scale both axes by one factor into [0, 1]; a few far points are moved to the border."""
    if not len(points):
        return points
    low, high = np.percentile(points, [0.25, 99.75], axis=0)
    side = max(float((high - low).max()), 1e-12)
    return np.asarray(np.clip((points - (low + high) / 2) / side + 0.5, 0.0, 1.0))
