"""Losses of DCBoost, and the images whose neighbours are of the same cluster.

Li et al. 2025, "You Can Trust Your Clustering Model: A Parameter-free Self-Boosting Plug-in for
Deep Clustering" (DCBoost). Its third loss, the alignment of the views of an image, is
`contrastive.alignment`.

Shapes: B batch, D embedding width, K clusters.
"""

import torch
from torch import Tensor

from spice_pl.functional.scattering import batch_prototypes, members


def agreeing_images(
    embeddings: Tensor, clusters: Tensor, max_neighbors: int = 50
) -> tuple[Tensor, Tensor]:
    """Find the images of a batch whose k nearest neighbours are all of their cluster.

    Li et al. 2025 (DCBoost), Eqs. 1 and 2: of k = 1 to m, the k with the largest k n_k / B, where
    n_k images have k such neighbours; the smallest of several.

    Args:
        embeddings: (B, D), l2-normalised.
        clusters: (B,), of the images.
        max_neighbors: m; at most B - 1 of them exist.

    Returns:
        Whether an image is chosen (B,), and k as a scalar.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]])
        >>> agreeing_images(rows, torch.tensor([0, 0, 1, 1]))
        (tensor([True, True, True, True]), tensor(1))
    """
    batch = len(embeddings)
    itself = torch.eye(batch, dtype=torch.bool, device=embeddings.device)
    cosines = (embeddings @ embeddings.T).masked_fill(itself, -torch.inf)
    nearest = cosines.topk(min(max_neighbors, batch - 1)).indices  # (B, m)
    agrees = clusters[nearest] == clusters[:, None]
    run = agrees.long().cumprod(dim=1).sum(dim=1)  # (B,), neighbours before the first that differs
    tried = torch.arange(1, nearest.shape[1] + 1, device=run.device)  # (m,)
    chosen = run[:, None] >= tried  # (B, m)
    best = (tried * chosen.sum(dim=0)).argmax()
    return chosen.index_select(1, best[None])[:, 0], tried.index_select(0, best[None])[0]


def compactness_loss(online: Tensor, target: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Pull the images of a cluster together, with equal weight for each cluster.

    Li et al. 2025 (DCBoost), Eqs. 4 and 5: the mean over clusters c of
    w_c Σ_i Σ_j ‖z_i − z'_j‖², i and j of cluster c, where w_c = 1 / ‖Σ_i z_i‖² receives a gradient
    too. That z_i are those of the online network in w_c is our reading.

    Args:
        online: (B, D), l2-normalised embeddings of one view; the input that receives a gradient.
        target: (B, D), l2-normalised embeddings of the other view by the target network.
        clusters: (B,), 0 to K - 1; -1 for images that are left out.
        num_clusters: K.

    Returns:
        Scalar, at least 0; 0 if no image is left.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # (0 + 2 + 2 + 0) / ‖(1, 1)‖²
        >>> compactness_loss(rows, rows, torch.tensor([0, 0]), 1)
        tensor(2.)
    """
    member = members(clusters, num_clusters).to(online.dtype)  # (B, K)
    counts = member.sum(dim=0)  # (K,)
    own, other = member.T @ online, member.T @ target.detach()  # (K, D)
    # ‖z − z'‖² = 2 − 2 z·z' of rows of length one, so the double sum is one of sums.
    distances = 2 * (counts.square() - (own * other).sum(dim=1))  # (K,)
    tiny = torch.finfo(online.dtype).eps
    losses = distances / own.square().sum(dim=1).clamp_min(tiny)
    return losses.sum() / (counts > 0).sum().clamp_min(1)


def separation_loss(online: Tensor, target: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Push the prototypes of clusters apart.

    Li et al. 2025 (DCBoost), Eqs. 6 and 7: minus the mean of ‖v_c − v'_k‖² over all pairs of
    different clusters, v being the sum of a cluster's embeddings scaled to length one. The paper
    names a repulsion by Euclidean distance; the formula is our reading. Arguments as in
    `compactness_loss`.

    Returns:
        Scalar in [-4, 0]; 0 if fewer than two clusters have an image.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> separation_loss(rows, rows, torch.tensor([0, 1]), 2)  # both at distance √2
        tensor(-2.)
    """
    present = members(clusters, num_clusters).any(dim=0)  # (K,)
    own = batch_prototypes(online, clusters, num_clusters)  # (K, D)
    other = batch_prototypes(target.detach(), clusters, num_clusters)
    itself = torch.eye(num_clusters, dtype=torch.bool, device=online.device)
    pairs = (present[:, None] & present & ~itself).to(online.dtype)  # (K, K)
    distances = 2 - 2 * own @ other.T
    return -(distances * pairs).sum() / pairs.sum().clamp_min(1)
