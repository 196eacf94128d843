"""k-means by cosine, for features without a head, and by Euclidean distance, as a baseline.

Shapes: N samples, D features, K clusters.
"""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.neighbors import similarities, unit_rows

logger = logging.getLogger(__name__)

FIT_AT_MOST = 20_000  # samples; enough for the centres, and all restarts together take minutes
# Centres of all restarts together: 10 restarts with 100 centres; 1 with 1000, which varies less.
CENTRES_AT_MOST = 1_000
PIXELS_AT_MOST = 32  # side of an image; larger images are averaged down, which bounds the memory
ROWS_PER_CHUNK = 2**16  # bounds the memory beyond the embeddings to ROWS_PER_CHUNK * K numbers


def cosine_kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    num_restarts: int = 10,
    max_iterations: int = 300,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster features by their direction: each sample joins the centre with the largest cosine.

    k-means on the unit sphere, started by k-means++ (Arthur and Vassilvitskii 2007). A centre that
    loses all its samples takes the sample with the smallest cosine to its own centre.

    Args:
        features: (N, D), finite; l2-normalised here.
        num_clusters: K, 1 to N.
        num_restarts: number of restarts; the one with the largest sum of cosines is kept.
        max_iterations: largest number of iterations of a restart, which ends earlier if no sample
            changes its cluster.
        generator: CPU generator for the first centres; torch's default generator if None.
        start: clusters (N,), 0 to K - 1, whose means are the first centres, without restarts.

    Returns:
        Clusters (N,), and centres (K, D) of length one.

    Raises:
        ValueError: K is out of range or a feature is not finite.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [0.1, 1.0]])
        >>> clusters, _ = cosine_kmeans(rows, 2)
        >>> bool(clusters[0] == clusters[1] != clusters[2] == clusters[3])
        True
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters {num_clusters} is not between 1 and the {len(features)} samples; lower "
            "it or give more samples"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("a feature is NaN or infinite; compute the features again")
    embeddings = unit_rows(features)
    best: tuple[Tensor, Tensor] | None = None
    best_fit = -float("inf")
    for _ in range(num_restarts if start is None else 1):
        if start is None:
            centres = _first_centres(embeddings, num_clusters, generator)  # (K, D)
        else:
            centres = _centres(embeddings, start, embeddings.new_ones(len(start)), num_clusters)
        fit, clusters = _assign(embeddings, centres)  # (N,) each
        for _ in range(max_iterations):
            centres = _centres(embeddings, clusters, fit, num_clusters)
            fit, moved = _assign(embeddings, centres)
            if torch.equal(moved, clusters):
                break
            clusters = moved
        if (total := float(fit.double().sum())) > best_fit:
            best_fit, best = total, (clusters, centres)
    assert best is not None  # noqa: S101 - a sum of cosines is larger than minus infinity
    return best


def _first_centres(
    embeddings: Tensor, num_clusters: int, generator: torch.Generator | None
) -> Tensor:
    """k-means++: draw centres in proportion to the squared distance from the nearest one so far."""
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * len(embeddings))]
    nearest = torch.full((len(embeddings),), -1.0, device=embeddings.device)  # cosine
    for draw in draws[1:]:
        nearest = torch.maximum(nearest, embeddings @ embeddings[chosen[-1]])
        mass = (1 - nearest).clamp_min(0).double()  # half the squared distance
        mass[chosen] = 0
        if float(mass.sum()) == 0:  # fewer distinct samples than centres
            mass = torch.ones_like(mass).index_fill_(0, torch.tensor(chosen, device=mass.device), 0)
        reached = mass.cumsum(dim=0)
        place = torch.searchsorted(reached, reached[-1] * draw, right=True)
        chosen.append(int(place.clamp_max(len(embeddings) - 1)))
    return embeddings[chosen]


def _assign(embeddings: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    found = [
        similarities(rows, centres).max(dim=1) for rows in torch.split(embeddings, ROWS_PER_CHUNK)
    ]
    fit, clusters = zip(*found, strict=True)
    return torch.cat(fit), torch.cat(clusters)


def _centres(embeddings: Tensor, clusters: Tensor, fit: Tensor, num_clusters: int) -> Tensor:
    counts = torch.bincount(clusters, minlength=num_clusters)
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        clusters = clusters.clone()
        worst = fit.topk(len(empty), largest=False).indices
        clusters[worst] = empty
    sums = embeddings.new_zeros(num_clusters, embeddings.shape[1])
    for rows, ids in zip(
        torch.split(embeddings, ROWS_PER_CHUNK), torch.split(clusters, ROWS_PER_CHUNK), strict=True
    ):
        member = torch.nn.functional.one_hot(ids, num_clusters).to(rows.dtype)  # (n, K)
        sums += similarities(member.T, rows.T)
    return unit_rows(sums)


def kmeans_clusters(data: NDArray[Any], num_clusters: int, seed: int) -> NDArray[np.int64]:
    """Cluster features or images by Euclidean distance, with scikit-learn's k-means.

    It starts with k-means++ and keeps the restart with the smallest inertia, of 10 restarts for
    K up to 100 and of max(1, 1000 // K) for larger K.

    Args:
        data: (N, ...), flattened to rows; images (N, 3, S, S) uint8 are scaled to [0, 1], and
            averaged down to 32 pixels if S is larger.
        num_clusters: K.
        seed: seed of the restarts, and of the draw of 20,000 samples for the fit if N is larger.

    Returns:
        Clusters (N,).

    Examples:
        >>> clusters = kmeans_clusters(np.array([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0]]), 2, seed=0)
        >>> bool(clusters[0] == clusters[1] != clusters[2])
        True
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


def _pixels(images: Tensor) -> NDArray[np.float32]:
    levels = images.float() / 255
    if images.ndim == 4 and images.shape[-1] > PIXELS_AT_MOST:
        levels = F.interpolate(levels, size=(PIXELS_AT_MOST, PIXELS_AT_MOST), mode="area")
    rows: NDArray[np.float32] = levels.flatten(1).numpy()
    return rows
