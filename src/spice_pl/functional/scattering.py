"""Loss of ProPos that keeps the prototypes of a batch apart.

Huang et al. 2022, "Learning Representation for Clustering via Prototype Scattering and Positive
Sampling" (ProPos). Its other loss, the alignment of positive samples, is
`contrastive.alignment`.

Shapes: B batch, P projection, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_prototypes(embeddings: Tensor, clusters: Tensor, num_clusters: int) -> Tensor:
    """Sum the embeddings of each cluster of a batch, scaled to length one.

    Huang et al. 2022 (ProPos): μ_k = Σ p(k|x) f(x) / ‖Σ p(k|x) f(x)‖, with the labels
    of k-means as p(k|x).

    Args:
        embeddings: (B, P), l2-normalised.
        clusters: (B,), 0 to K - 1; -1 for images without one.
        num_clusters: K.

    Returns:
        Prototypes (K, P); zeros for clusters that the batch lacks.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> batch_prototypes(rows, torch.tensor([0, 0, -1]), 2)
        tensor([[0.7071, 0.7071],
                [0.0000, 0.0000]])
    """
    return F.normalize(members(clusters, num_clusters).to(embeddings.dtype).T @ embeddings)


def scattering_loss(
    online: Tensor, target: Tensor, clusters: Tensor, num_clusters: int, temperature: float
) -> Tensor:
    """Contrast each prototype with that of the target network, and with all other prototypes.

    Huang et al. 2022 (ProPos), L_psl: the mean over clusters k of
    −log [exp(μ_k·μ'_k / τ) / (exp(μ_k·μ'_k / τ) + Σ_{j≠k} exp(μ_k·μ_j / τ))]. Clusters that the
    batch lacks are left out of both sums. Only whole clusters are pushed apart, so images of one
    class never are.

    Args:
        online: (B, P), l2-normalised embeddings of one view; the input that receives a gradient.
        target: (B, P), l2-normalised embeddings of another view by the target network.
        clusters: (B,), labels of k-means, 0 to K - 1; -1 for images without one.
        num_clusters: K.
        temperature: τ, > 0.

    Returns:
        Mean loss in nats, scalar; 0 if the batch has at most one cluster.

    Raises:
        ValueError: temperature is not positive, or the shapes disagree.

    Examples:
        >>> rows = torch.eye(2)  # two clusters of one image each, orthogonal
        >>> scattering_loss(rows, rows, torch.tensor([0, 1]), 2, temperature=1.0)  # log(1 + 1 / e)
        tensor(0.3133)
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive; ProPos uses 0.5")
    if online.shape != target.shape or clusters.shape != online.shape[:1]:
        raise ValueError(
            f"online {tuple(online.shape)}, target {tuple(target.shape)} and clusters "
            f"{tuple(clusters.shape)} disagree; give (B, P), (B, P) and (B,)"
        )
    own = batch_prototypes(online, clusters, num_clusters)  # (K, P)
    other = batch_prototypes(target.detach(), clusters, num_clusters)  # (K, P)
    present = members(clusters, num_clusters).any(dim=0)  # (K,)
    itself = torch.eye(num_clusters, dtype=torch.bool, device=online.device)
    positive = (own * other).sum(dim=1)  # (K,)
    logits = torch.where(itself, positive[:, None], own @ own.T) / temperature  # (K, K)
    logits = logits.masked_fill(~(present | itself), -torch.inf)  # a mask of columns
    losses = logits.logsumexp(dim=1) - positive / temperature  # (K,), 0 where only itself is left
    weight = present.to(losses.dtype)
    return (losses * weight).sum() / weight.sum().clamp_min(1)


def members(clusters: Tensor, num_clusters: int) -> Tensor:
    """Return whether each image (B,) is in each cluster, (B, K); -1 is in none."""
    return clusters[:, None] == torch.arange(num_clusters, device=clusters.device)
