"""Estimate the number of clusters from features, without labels: a curve over K.

Shapes: N images, n of them sampled, D features, d principal components, K clusters.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.preprocessing import normalize
from torch import Tensor

from spice_pl.errors import UsageError
from spice_pl.functional.candidates import modularity, neighbor_agreement
from spice_pl.functional.embeddings import nearest_others, smoothed_embeddings
from spice_pl.reports.lines import line_figure
from spice_pl.system.files import atomic
from spice_pl.tasks.base import Context, sample

logger = logging.getLogger(__name__)

IMAGES_PER_CLUSTER = 8  # least n / K: four images per cluster in each half
STABLE = 0.8  # least adjusted Rand; as prediction strength in Tibshirani and Walther 2005
ABOUT_AS_WELL = 0.9  # share of the largest score from which another K fits about as well
WIDE = 2  # an answer is unclear if such K differ by this factor
NUM_NEIGHBORS = 10  # of the walk that smooths the embeddings, and of modularity
RESTARTS = 3  # starts of each k-means on a half
RESTARTS_WHOLE = 10  # starts of k-means on all images; fewer miss small groups


@dataclass(frozen=True)
class Point:
    """Measures of one K.

    Attributes:
        num_clusters: K.
        stability: mean adjusted Rand index of k-means on two halves, over the splits.
        spread: standard deviation of that index over the splits.
        null: stability of clouds of points without groups.
        silhouette: mean silhouette, by the principal components, of k-means on smoothed embeddings
            of all sampled images.
        modularity: see `functional.candidates.modularity`, of the same clusters.
        agreement: share of an image's neighbours that are in its cluster.
    """

    num_clusters: int
    stability: float
    spread: float
    null: float
    silhouette: float
    modularity: float
    agreement: float

    @property
    def score(self) -> float:
        """Silhouette times modularity times agreement; the largest decides.

        Not positive where silhouette or modularity is not.
        """
        product = self.silhouette * self.modularity * self.agreement
        return min(self.silhouette, self.modularity, product)


@dataclass(frozen=True)
class EstimateK:
    """Write k.csv, k.svg and metrics.json about the features of the upstream stage.

    Attributes:
        largest: largest K on the curve, which begins at 2.
        num_splits: number of random splits into halves at each K.
        num_samples: n, the largest number of images used.
        num_components: largest d.
    """

    largest: int = 20
    num_splits: int = 3
    num_samples: int = 2000
    num_components: int = 32

    def __call__(self, context: Context) -> Mapping[str, Any]:
        """Compute the curve, draw it and say what it shows.

        Raises:
            UsageError: a setting is out of range, or the features hold NaN or are all the same.
        """
        if self.num_splits < 2 or self.num_components < 1:
            raise UsageError(
                f"estimate_k.task.num_splits {self.num_splits} must be 2 or more and "
                f"num_components {self.num_components} 1 or more"
            )
        folder = context.upstream[0]
        features = sampled(folder.features, self.num_samples, context.seed)
        rows = principal_components(features, self.num_components)
        if self.largest < 2:
            raise UsageError(
                f"estimate_k.task.largest={self.largest} is less than 2, the smallest number of "
                "clusters; give 2 or more"
            )
        if len(rows) < 2 * IMAGES_PER_CLUSTER:
            raise UsageError(
                f"the number of clusters is estimated from {2 * IMAGES_PER_CLUSTER} images or "
                f"more, and there are {len(rows)}; choose it, for example dataset.num_clusters=2"
            )
        largest = min(self.largest, len(rows) // IMAGES_PER_CLUSTER)
        num_neighbors = max(1, min(NUM_NEIGHBORS, len(rows) // (2 * largest)))
        embeddings = smoothed(features, num_neighbors)
        others = nearest_others(torch.from_numpy(features), num_neighbors)
        curve = [
            look(rows, embeddings, others, num_clusters, self.num_splits, context.seed)
            for num_clusters in range(2, largest + 1)
        ]
        found, candidates = choose(curve)
        doubts = doubts_of(found, curve, candidates)
        text = sentence(found, doubts, candidates)
        write_curve(context, curve)
        for point in curve:
            logger.info(
                "K = %2d  stability %.3f ± %.3f, without groups %.3f, silhouette %.3f, "
                "modularity %.3f",
                *(point.num_clusters, point.stability, point.spread, point.null),
                *(point.silhouette, point.modularity),
            )
        logger.info("%s\n%s", text, context.folder.path / "k.svg")
        return {
            "read": f"{folder.path.parent.name}/{folder.path.name}",
            "num_sampled": len(rows),
            "estimated_num_clusters": found.num_clusters,
            "clear": not doubts,
            "sentence": text,
            "k_estimate": {
                "num_clusters": found.num_clusters,
                "clear": not doubts,
                "candidates": [point.num_clusters for point in curve],
                "scores": [point.score for point in curve],
            },
            "about_as_well": candidates,
            "curve": [asdict(point) for point in curve],
        }


def sampled(features: NDArray[np.float32], limit: int, seed: int) -> NDArray[np.float64]:
    """Return at most `limit` rows (n, D); of a memory-mapped array only these are read.

    Raises:
        UsageError: the rows hold NaN, or are all the same.
    """
    rows = np.asarray(features[sample(len(features), limit, seed)], dtype=np.float64)
    if not np.isfinite(rows).all():
        raise UsageError("the features hold NaN; run their stage again with overwrite=true")
    if not len(rows) or (rows == rows[0]).all():
        raise UsageError(
            "every image has the same feature, so no number of clusters fits better than another; "
            "if a stage trained them, train it again with another seed or a lower lr; if they are "
            "of a pretrained network, give another encoder=NAME"
        )
    return rows


def principal_components(rows: NDArray[np.float64], num_components: int) -> NDArray[np.float64]:
    """Return the first principal components (n, d) of rows (n, D), scaled to length one."""
    unit = normalize(rows)
    pca = PCA(min(num_components, *unit.shape), svd_solver="full")
    scores: NDArray[np.float64] = pca.fit_transform(unit)
    return scores


def smoothed(features: NDArray[np.float64], num_neighbors: int) -> NDArray[np.float32]:
    """Return smoothed embeddings (n, d) of features (n, D)."""
    found = smoothed_embeddings(torch.from_numpy(features), num_neighbors=num_neighbors)
    embeddings: NDArray[np.float32] = found.numpy()
    return embeddings


def look(
    rows: NDArray[np.float64],
    embeddings: NDArray[np.float32],
    others: Tensor,
    num_clusters: int,
    num_splits: int,
    seed: int,
) -> Point:
    """Measure one K on the same images' principal components, embeddings and neighbours.

    The silhouette (Rousseeuw 1987) is not taken in the space that is clustered: smoothing makes
    clumps, and their silhouette rises with K. By itself it is largest where a few large clusters
    take in the small ones. Modularity grows with K as long as neighbours stay together, so small
    clusters count; by itself it cuts large clusters, since it is at most 1 − 1/K. Agreement falls
    where clusters are cut. Stability as in Lange et al. 2004: if there
    are K groups, k-means finds the same ones in two halves of the images. The cloud without groups
    is a Gaussian with the same variances. It is needed for comparison, because a small K is stable
    without groups too, along the axes in which the cloud is long.

    Args:
        rows: (n, d), principal components of the features.
        embeddings: (n, d'), smoothed.
        others: (n, k), neighbours by the cosine of the features.
        num_clusters: K.
        num_splits: number of random splits into halves.
        seed: seed of the splits and of k-means.
    """
    generator = np.random.default_rng([seed, num_clusters])
    found, without = [], []
    for _ in range(num_splits):
        found.append(agreement_of_halves(rows, num_clusters, generator))
        cloud = generator.normal(size=rows.shape) * rows.std(axis=0)
        without.append(agreement_of_halves(cloud, num_clusters, generator))
    whole = _kmeans(num_clusters, generator, RESTARTS_WHOLE).fit_predict(embeddings)
    clusters = torch.from_numpy(whole.astype(np.int64))
    groups = len(np.unique(whole))  # fewer than K where images are copies
    return Point(
        num_clusters,
        float(np.mean(found)),
        float(np.std(found)),
        float(np.mean(without)),
        float(silhouette_score(rows, whole)) if 1 < groups < len(rows) else 0.0,
        modularity(others, clusters),
        float(neighbor_agreement(others, clusters[None])[0]),
    )


def agreement_of_halves(
    rows: NDArray[np.float64], num_clusters: int, generator: np.random.Generator
) -> float:
    """Return the adjusted Rand index, over all rows, of k-means fitted on each half of them."""
    order = generator.permutation(len(rows))
    one, other = (
        _kmeans(num_clusters, generator).fit(rows[half]).predict(rows)
        for half in np.array_split(order, 2)
    )
    return float(adjusted_rand_score(one, other))


def _kmeans(num_clusters: int, generator: np.random.Generator, starts: int = RESTARTS) -> KMeans:
    return KMeans(num_clusters, n_init=starts, random_state=int(generator.integers(2**31)))


def choose(curve: Sequence[Point]) -> tuple[Point, list[int]]:
    """Return the K of the largest score, the smallest of equal ones, and all that fit as well."""
    best = max(curve, key=lambda point: point.score)
    enough = min(best.score, ABOUT_AS_WELL * best.score)
    return best, [point.num_clusters for point in curve if point.score >= enough]


def doubts_of(found: Point, curve: Sequence[Point], candidates: Sequence[int]) -> list[str]:
    """Return the reasons against a clear K; none where K is clear."""
    doubts = []
    if found.stability < STABLE:
        doubts.append(f"halves of the images agree to {found.stability:.2f}, less than {STABLE}")
    if max(candidates) >= WIDE * min(candidates):
        doubts.append(f"from {min(candidates)} to {max(candidates)} clusters fit about as well")
    if found.silhouette <= 0:
        doubts.append(f"the silhouette {found.silhouette:.2f} is not positive")
    if found is curve[-1]:
        doubts.append("the curve ends there; raise estimate_k.task.largest")
    return doubts


def sentence(found: Point, doubts: Sequence[str], candidates: Sequence[int]) -> str:
    """Return the result in one or two sentences."""
    others = [str(each) for each in candidates if each != found.num_clusters]
    near = f"; about as well fit {', '.join(others)}" if others else ""
    if doubts:
        return (
            f"the images show no clear number of clusters: {' and '.join(doubts)}. The best guess "
            f"is {found.num_clusters}{near}. Choose the number by what you need the clusters for"
        )
    return (
        f"the images show {found.num_clusters} clusters: halves of the images agree to "
        f"{found.stability:.2f}, halves of points without groups to {found.null:.2f}; silhouette "
        f"{found.silhouette:.2f}, modularity {found.modularity:.2f}{near}"
    )


def write_curve(context: Context, curve: Sequence[Point]) -> None:
    """Write k.csv and k.svg."""
    with (
        atomic(context.folder.path / "k.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, [*asdict(curve[0])])
        writer.writeheader()
        writer.writerows(asdict(point) for point in curve)
    curves = {
        "stability": [(point.num_clusters, point.stability) for point in curve],
        "without groups": [(point.num_clusters, point.null) for point in curve],
        "silhouette": [(point.num_clusters, point.silhouette) for point in curve],
        "modularity": [(point.num_clusters, point.modularity) for point in curve],
        "score": [(point.num_clusters, point.score) for point in curve],
    }
    with atomic(context.folder.path / "k.svg") as temporary:
        temporary.write_text(line_figure(curves, "K", "score"), encoding="utf-8")
