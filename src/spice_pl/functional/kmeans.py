"""k-means by cosine, for features without a head, and by Euclidean distance, as a baseline.

Shapes: N samples, D features, K clusters.
"""

import logging
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.device import cluster_sizes
from spice_pl.functional.neighbors import similarities, unit_rows

logger = logging.getLogger(__name__)

FIT_AT_MOST = 20_000  # samples; enough for the centres, and all restarts together take minutes
# Centres of all restarts together: 10 restarts with 100 centres; 1 with 1000, which varies less.
CENTRES_AT_MOST = 1_000
PIXELS_AT_MOST = 32  # side of an image; larger images are averaged down, which bounds the memory
FIRST_WAIT = 4  # iterations of a GPU before the processor asks whether anything still changes
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
    on_gpu = features.device.type != "cpu"
    # A GPU takes all restarts together, so that the processor waits for them together.
    together, every = (num_restarts, FIRST_WAIT) if on_gpu else (1, 1)
    found: list[tuple[Tensor, Tensor, Tensor]] = []  # sum of cosines, clusters, centres
    if start is None:
        first_centres = partial(_first_centres, embeddings, num_clusters, generator)
    else:
        num_restarts, ones = 1, embeddings.new_ones(len(start))
        first_centres = partial(_centres, embeddings, start, ones, num_clusters)
    for first in range(0, num_restarts, together):
        restarts = [
            _Restart(embeddings, first_centres())
            for _ in range(min(together, num_restarts - first))
        ]
        _converge(restarts, max_iterations, every)
        found += [(each.fit.double().sum(), each.clusters, each.centres) for each in restarts]
        found = [reduce(_better, found)]
    _, clusters, centres = found[0]
    return clusters, centres


def _better(
    one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result of the larger sum, the first of equal ones; the device chooses."""
    larger = other[0] > one[0]
    total, clusters, centres = (
        torch.where(larger, new, old) for new, old in zip(other, one, strict=True)
    )
    return total, clusters, centres


class _Restart:
    """Clusters and centres of one start of k-means; once nothing changes they stay as they are.

    Args:
        embeddings: (N, D).
        centres: (K, D), the first ones.
    """

    def __init__(self, embeddings: Tensor, centres: Tensor) -> None:
        self.embeddings, self.centres = embeddings, centres
        self.fit, self.clusters = _assign(embeddings, centres)  # (N,) each
        self.moves = torch.ones((), dtype=torch.bool, device=embeddings.device)

    def iterate(self) -> None:
        """Move the centres and assign the samples again, unless the last iteration moved none."""
        centres = _centres(self.embeddings, self.clusters, self.fit, len(self.centres))
        fit, clusters = _assign(self.embeddings, centres)
        moves = self.moves & (clusters != self.clusters).any()
        self.fit = torch.where(self.moves, fit, self.fit)
        self.centres = torch.where(self.moves, centres, self.centres)
        self.clusters = torch.where(self.moves, clusters, self.clusters)
        self.moves = moves


def _converge(restarts: list[_Restart], max_iterations: int, every: int) -> None:
    """Iterate until no restart moves a sample.

    The processor asks after `every` iterations; with more than one, after twice as many the next
    time, so that it waits few times however long it takes.
    """
    done = 0
    while restarts and done < max_iterations:
        every = min(every, max_iterations - done)
        for each in restarts:
            for _ in range(every):
                each.iterate()
        moves = torch.stack([each.moves for each in restarts]).tolist()
        restarts = [each for each, moving in zip(restarts, moves, strict=True) if moving]
        done, every = done + every, every if every == 1 else 2 * every


def _first_centres(
    embeddings: Tensor, num_clusters: int, generator: torch.Generator | None
) -> Tensor:
    """k-means++: draw centres in proportion to the squared distance from the nearest one so far."""
    device, num_samples = embeddings.device, len(embeddings)
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    chosen = torch.full((1,), int(draws[0] * num_samples), device=device)
    nearest = torch.full((num_samples,), -1.0, device=device)  # cosine
    for draw in draws[1:]:
        last = embeddings.index_select(0, chosen[-1:])[0]
        nearest = torch.maximum(nearest, embeddings @ last)
        mass = (1 - nearest).clamp_min(0).double()  # half the squared distance
        mass.index_fill_(0, chosen, 0)
        others = torch.ones_like(mass).index_fill_(0, chosen, 0)
        mass = torch.where(mass.sum() == 0, others, mass)  # fewer distinct samples than centres
        reached = mass.cumsum(dim=0)
        place = torch.searchsorted(reached, reached[-1:] * draw, right=True)
        chosen = torch.cat([chosen, place.clamp_max(num_samples - 1)])
    return embeddings.index_select(0, chosen)


def _assign(embeddings: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    found = [
        similarities(rows, centres).max(dim=1) for rows in torch.split(embeddings, ROWS_PER_CHUNK)
    ]
    fit, clusters = zip(*found, strict=True)
    return torch.cat(fit), torch.cat(clusters)


def _centres(embeddings: Tensor, clusters: Tensor, fit: Tensor, num_clusters: int) -> Tensor:
    empty = cluster_sizes(clusters, num_clusters) == 0  # (K,)
    if clusters.device.type != "cpu" or bool(empty.any()):
        clusters = _filled(clusters, fit, empty)
    sums = embeddings.new_zeros(num_clusters, embeddings.shape[1])
    for rows, ids in zip(
        torch.split(embeddings, ROWS_PER_CHUNK), torch.split(clusters, ROWS_PER_CHUNK), strict=True
    ):
        member = torch.nn.functional.one_hot(ids, num_clusters).to(rows.dtype)  # (n, K)
        sums += similarities(member.T, rows.T)
    return unit_rows(sums)


def _filled(clusters: Tensor, fit: Tensor, empty: Tensor) -> Tensor:
    """Give each empty cluster one of the samples with the smallest cosine, without asking which."""
    worst = fit.topk(len(empty), largest=False).indices  # (K,)
    rank = empty.cumsum(dim=0) - 1
    nowhere = torch.full_like(worst, len(clusters))  # one place more, for clusters with samples
    place = torch.where(empty, worst[rank.clamp_min(0)], nowhere)
    names = torch.arange(len(empty), device=clusters.device)
    return torch.cat([clusters, nowhere[:1]]).scatter(0, place, names)[:-1]


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
