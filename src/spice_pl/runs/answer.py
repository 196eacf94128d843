"""The clusters of the images at hand: those of the network, or others of the same features.

A network sees one image at a time. Clusterings that see all images at once are often better for
these images; the network is what clusters new ones. Which to keep is chosen without labels.

Shapes: N images, D features, K clusters, R candidates, k neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.candidates import (
    WALKS,
    cluster_scores,
    numbered_like,
    vote_clusters,
    walk_clusters,
)
from spice_pl.functional.embeddings import nearest_others

logger = logging.getLogger(__name__)

NUM_NEIGHBORS = 10
NETWORK = "network"
VOTE = "vote of network and k-means"
WALKS_VOTE = f"vote of k-means after {WALKS[1]} and {WALKS[2]} steps"


@dataclass(frozen=True)
class Answer:
    """The chosen clusters.

    Attributes:
        name: the candidate that was chosen; "network" for that of the head.
        scores: label-free score of each candidate without an empty cluster; the largest was chosen.
        probs: (N, K); its largest entry is the cluster and the confidence of an image.
    """

    name: str
    scores: Mapping[str, float]
    probs: Tensor


def choose_answer(features: Tensor, probs: Tensor, seed: int) -> Answer:
    """Choose between the network's clusters, two votes, and k-means on much smoothed embeddings.

    `cluster_scores` chooses between `candidates`. The chosen clusters get the numbers of the
    network's clusters that they share most images with. Their probability is ½ for the image's own
    cluster and ½ for the clusters of the image and its nearest others, one step of label
    propagation (Zhou et al. 2004).

    Args:
        features: (N, D), raw.
        probs: (N, K), of the network.
        seed: seed of k-means.
    """
    num_clusters, own = probs.shape[1], probs.argmax(dim=1)
    found, others = candidates(features, probs, seed)
    values = cluster_scores(features, others, torch.stack(list(found.values())))
    scores = dict(zip(found, values.tolist(), strict=True))
    name = max(scores, key=lambda each: scores[each])
    logger.info("kept: clusters of %s, the best score of %s", name, _listed(scores))
    if name == NETWORK:
        return Answer(name, scores, probs)
    clusters = numbered_like(found[name], own, num_clusters)
    return Answer(name, scores, _propagated(clusters, others, num_clusters))


def candidates(features: Tensor, probs: Tensor, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the clusterings to choose from, and the neighbours that they are scored with.

    k-means on embeddings smoothed for 3, 10, 30 and 100 steps (`walk_clusters`) gives four
    clusterings. One vote (`vote_clusters`) is that of the network and of 3 and 10 steps; the other,
    for unequal clusters, that of 10 and 30 steps. 100 steps are for very unequal clusters. A choice
    between the network and each k-means loses more than these votes, and spectral and Ward's
    clustering make it worse (benchmarks/choice.py).

    Args:
        features: (N, D), raw.
        probs: (N, K), of the network.
        seed: seed of k-means.

    Returns:
        Clusters (N,) of each candidate without an empty cluster, by its name, or of all candidates
        if each has one; neighbours (N, k).
    """
    num_clusters, own = probs.shape[1], probs.argmax(dim=1)
    num_neighbors = neighbors_for(len(probs), num_clusters)
    others = nearest_others(features, num_neighbors)
    short, middle, long, longest = walk_clusters(
        features, num_clusters, num_neighbors=num_neighbors, seed=seed
    )
    found = {
        NETWORK: own,
        VOTE: vote_clusters(torch.stack([own, short, middle]), others, num_clusters),
        WALKS_VOTE: vote_clusters(torch.stack([middle, long]), others, num_clusters),
        f"k-means after {WALKS[-1]} steps": longest,
    }
    # K clusters were asked for: a vote that empties one is kept only where all have an empty one.
    full = {name: row for name, row in found.items() if len(set(row.tolist())) == num_clusters}
    return full or found, others


def neighbors_for(num_images: int, num_clusters: int) -> int:
    """Return 10, or in small clusters the number of other images of a cluster of mean size.

    Examples:
        >>> neighbors_for(1000, 10), neighbors_for(30, 5), neighbors_for(6, 5)
        (10, 5, 1)
    """
    return min(NUM_NEIGHBORS, max(1, num_images // num_clusters - 1))


def _propagated(clusters: Tensor, others: Tensor, num_clusters: int) -> Tensor:
    """Return probabilities (N, K) of clusters (N,)."""
    probs = F.one_hot(clusters, num_clusters).float()
    votes = probs.clone()
    for column in others.T:
        votes += probs[column]
    return (probs + votes / (1 + others.shape[1])) / 2


def _listed(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
