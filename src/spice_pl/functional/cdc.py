"""Labels, targets, loss and initial weights of calibrated deep clustering.

Jia et al. 2025, "Towards Calibrated Deep Clustering Network" (CDC, ICLR).

Shapes: B batch, N images, D features, E hidden units, R regions of the feature space, K clusters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.functional.scattering import batch_prototypes, members


def confident_labels(probs: Tensor) -> Tensor:
    """Label the images of a batch that each cluster is most sure of.

    Jia et al. 2025 (CDC), Eq. 4, in our reading: cluster c takes its M_c images of the
    largest calibrated probability, where M_c is the sum of its B / K largest ones, rounded down
    and at least 1. It is the number of right ones among B / K images, if probabilities are
    calibrated. An image that several clusters take goes to the one of the largest probability.

    Args:
        probs: (B, K), calibrated; B at least K.

    Returns:
        Labels (B,), -1 where no cluster takes the image.

    Examples:
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
        >>> confident_labels(probs)  # M is ⌊.9 + .8⌋ and ⌊.7 + .6⌋
        tensor([ 0, -1, -1,  1])
    """
    batch, num_clusters = probs.shape
    values, order = probs.sort(dim=0, descending=True, stable=True)  # (B, K)
    counts = values[: batch // num_clusters].sum(dim=0).floor().clamp_min(1)  # (K,), M
    ranks = torch.arange(batch, device=probs.device)[:, None]
    taken = torch.zeros_like(probs).scatter(0, order, (ranks < counts).to(probs.dtype))
    best = (probs * taken).max(dim=1)
    return best.indices.where(taken.any(dim=1), -1)


def regions_of(embeddings: Tensor, num_regions: int, iterations: int = 10) -> Tensor:
    """Divide a batch into regions by k-means, a fixed number of iterations, on any device.

    Jia et al. 2025 (CDC), the mini-clusters of a batch. The first centres are the first R images,
    whose order in a batch is random; a centre that loses its images stays where it is.

    Args:
        embeddings: (B, D), l2-normalised.
        num_regions: R, 1 to B.
        iterations: number of iterations.

    Returns:
        Regions (B,), 0 to R - 1.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
        >>> regions_of(rows, 2)
        tensor([0, 1, 1, 0])
    """
    centres = embeddings[:num_regions]
    regions = (embeddings @ centres.T).argmax(dim=1)
    for _ in range(iterations):
        moved = batch_prototypes(embeddings, regions, num_regions)
        centres = moved.where((moved != 0).any(dim=1, keepdim=True), centres)
        regions = (embeddings @ centres.T).argmax(dim=1)
    return regions


def region_targets(probs: Tensor, regions: Tensor, num_regions: int) -> Tensor:
    """Average the predictions of each region.

    Jia et al. 2025 (CDC): the target of the calibration head. It is less sure than the
    clustering head where neighbours are in different clusters.

    Args:
        probs: (B, K), of the clustering head.
        regions: (B,), 0 to R - 1.
        num_regions: R.

    Returns:
        Targets (B, K).

    Examples:
        >>> region_targets(torch.eye(3), torch.tensor([0, 0, 1]), 2)
        tensor([[0.5000, 0.5000, 0.0000],
                [0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    member = members(regions, num_regions).to(probs.dtype)  # (B, R)
    means = member.T @ probs / member.sum(dim=0).clamp_min(1)[:, None]  # (R, K)
    return means[regions]


def calibration_loss(logits: Tensor, targets: Tensor, entropy_weight: float = 1.0) -> Tensor:
    """Compute the loss of the calibration head.

    Jia et al. 2025 (CDC): the cross-entropy with the targets of the regions, minus
    the entropy of the mean prediction times w_en, which keeps all clusters in use.

    Args:
        logits: (B, K), of the calibration head.
        targets: (B, K), of `region_targets`.
        entropy_weight: w_en.

    Returns:
        Loss in nats, scalar.

    Examples:
        >>> calibration_loss(torch.zeros(2, 2), torch.eye(2))  # log 2 - log 2
        tensor(0.)
    """
    mean = logits.softmax(dim=1).mean(dim=0)  # (K,)
    entropy: Tensor = torch.special.entr(mean).sum()
    return F.cross_entropy(logits, targets) - entropy_weight * entropy


def labelled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labelled images (B,); 0 if none has a label (not -1).

    Examples:
        >>> labelled_loss(torch.zeros(3, 2), torch.tensor([0, -1, 1]))  # log 2
        tensor(0.6931)
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp_min(1)


def prototype_head(
    features: Tensor,
    clusters: Tensor,
    num_clusters: int,
    hidden_dim: int,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Make the weights of a head whose first predictions are given clusters.

    Jia et al. 2025 (CDC): the rows of a layer are centres of k-means, its prototypes.
    Hidden unit e is the product of the centred features with centre e of k-means with E centres,
    standardised over the images, as BatchNorm would, then ReLU. An image is given to the cluster of
    the nearest mean of hidden units: its logits are the squared distances to the means, up to a sum
    that is the same for all clusters, times a negative factor. The factor is such that an image's
    cluster is K times as likely as the second one, in the geometric mean of all images; it is
    ours, the paper does not say.

    Args:
        features: (N, D), raw.
        clusters: (N,), 0 to K - 1.
        num_clusters: K, at least 2.
        hidden_dim: E, 1 to N.
        generator: CPU generator of k-means.

    Returns:
        State of a `ClusterHead`.
    """
    mean = features.mean(dim=0)  # (D,)
    _, centres = cosine_kmeans(
        features - mean, hidden_dim, num_restarts=1, max_iterations=20, generator=generator
    )
    products = (features - mean) @ centres.T  # (N, E), with mean 0
    tiny = torch.finfo(products.dtype).eps
    deviation = products.square().mean(dim=0).sqrt().clamp_min(tiny)
    hidden = (products / deviation).relu()  # (N, E)
    member = members(clusters, num_clusters).to(hidden.dtype)  # (N, K)
    means = member.T @ hidden / member.sum(dim=0).clamp_min(1)[:, None]  # (K, E)
    nearest = torch.cdist(hidden, means).square().topk(2, largest=False).values  # (N, 2)
    gap = (nearest[:, 1] - nearest[:, 0]).mean().clamp_min(tiny)
    factor = 2 * math.log(num_clusters) / gap
    weight = centres / deviation[:, None]  # (E, D)
    return {
        "hidden.weight": weight,
        "hidden.bias": -weight @ mean,
        "output.weight": factor * means,
        "output.bias": -factor * means.square().sum(dim=1) / 2,
    }
