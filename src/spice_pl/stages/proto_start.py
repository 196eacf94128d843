"""Where the heads of stage 2 start: at clusters of the first buffer instead of random predictions.

Ours. With random heads, the clusters of the first cycles cut large classes and join small ones, and
later cycles keep that. K-means on embeddings that were smoothed for long does not presume sizes.

Shapes: M images of a buffer, D features, d embedding width, K clusters.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.candidates import cluster_scores, walk_clusters
from spice_pl.functional.embeddings import nearest_others
from spice_pl.functional.neighbors import unit_rows

# Steps of smoothing; many suit unequal classes. Heads that start after 3 steps end .01 to .04 lower
# in ACC than after 10 on CIFAR-10's test images.
WALKS = (10, 30, 100)
NUM_NEIGHBORS = 10  # at most a quarter of the mean size of a cluster, and at least 3


def start_clusters(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Cluster a buffer by k-means on smoothed embeddings; `cluster_scores` chooses how smooth.

    Args:
        features: (M, D), raw.
        num_clusters: K, 1 to M.
        seed: seed of k-means.

    Returns:
        Clusters (M,), of any sizes. A cluster is empty only where fewer than K features differ.
    """
    features = features.cpu().float()
    k = min(NUM_NEIGHBORS, max(3, len(features) // (4 * num_clusters)))
    walked = walk_clusters(features, num_clusters, walks=WALKS, num_neighbors=k, seed=seed)
    scores = cluster_scores(features, nearest_others(features, k), walked)
    return walked[int(scores.argmax())]


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
