"""Where the heads of stage 2 start: at clusters of the images instead of random predictions.

Ours. With random heads, the clusters of the first cycles cut large classes and join small ones, and
later cycles keep that. K-means on embeddings that were smoothed for long does not presume sizes.

Shapes: N images, M images of a buffer, D features, d embedding width, K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.candidates import cluster_scores, vote_clusters, walk_clusters
from spice_pl.functional.embeddings import nearest_others
from spice_pl.functional.neighbors import unit_rows

NUM_NEIGHBORS = 10  # at most a quarter of the mean size of a cluster, and at least 3
START_AT_MOST = 20_000  # images that are clustered, so that their neighbours are found in seconds


def start_images(buffer: Tensor, train_index: Tensor, seed: int) -> Tensor:
    """Choose the images to cluster: the buffer, then other training images.

    Clusters of more images than the buffer vary less between seeds (docs/explanation/stage2.md).

    Args:
        buffer: ids of the buffer's images, (M,).
        train_index: ids of all training images.
        seed: seed of the draw.

    Returns:
        Ids, those of the buffer first and in their order; at most 20,000 unless M is larger.
    """
    others = train_index[~torch.isin(train_index, buffer)]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return torch.cat([buffer, others[order[: max(0, START_AT_MOST - len(buffer))]]])


def start_clusters(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Cluster images by k-means on embeddings smoothed for a few, for some and for many steps.

    `cluster_scores` chooses between the vote (`vote_clusters`) of k-means after 3, 10 and 30 steps,
    the vote after 10 and 30 steps, and k-means after 100 steps. Many steps suit unequal classes.
    A vote depends less than one k-means on the solution that k-means happens to find.

    Args:
        features: (N, D), raw.
        num_clusters: K, 1 to N.
        seed: seed of k-means.

    Returns:
        Clusters (N,), of any sizes. A cluster is empty only where fewer than K features differ.
    """
    features = features.cpu().float()
    k = min(NUM_NEIGHBORS, max(3, len(features) // (4 * num_clusters)))
    walked = walk_clusters(features, num_clusters, num_neighbors=k, seed=seed)  # (4, N)
    others = nearest_others(features, k)
    votes = [_vote(rows, others, num_clusters) for rows in (walked[:3], walked[1:3])]
    found = [*votes, walked[3]]
    scores = cluster_scores(features, others, torch.stack(found))
    return found[int(scores.argmax())]


def _vote(walked: Tensor, others: Tensor, num_clusters: int) -> Tensor:
    """Return the vote of clusterings (R, N), or the last of them where it empties a cluster."""
    vote = vote_clusters(walked, others, num_clusters)
    return vote if len(set(vote.tolist())) == num_clusters else walked[-1]


def start_probs(embeddings: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Rank the images of each cluster by their nearness to its mean, for Eq. 2.

    Args:
        embeddings: (M, d), l2-normalised here.
        clusters: (M,), ids 0 to K - 1.
        num_clusters: K.

    Returns:
        (M, K), 0 except in the image's own cluster: there (3 + cosine to the mean) / 4, in
        [0.5, 1]. Rows do not sum to one; Eq. 2 compares images of one cluster only.
    """
    own = F.one_hot(clusters, num_clusters).to(embeddings.dtype)  # (M, K)
    unit = unit_rows(embeddings)
    means = unit_rows(own.T @ unit)  # (K, d)
    nearness = (unit * means[clusters]).sum(dim=1, keepdim=True)  # (M, 1)
    return own * (3 + nearness) / 4
