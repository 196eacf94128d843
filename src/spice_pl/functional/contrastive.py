"""Contrastive losses of stage 1, and measures of its progress that need no labels.

Shapes: B batch, D embedding width, Q queue length.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Contrast each query with its key and a queue of negatives.

    He et al. 2020 (MoCo), Eq. 1.

    Args:
        query: (B, D), l2-normalised; the only input that receives a gradient.
        key: (B, D), l2-normalised view of the same images.
        queue: (D, Q), l2-normalised negatives.
        temperature: tau in Eq. 1, > 0.

    Returns:
        Mean loss in nats, scalar.

    Raises:
        ValueError: temperature is not positive, or the shapes disagree.

    Examples:
        >>> query = torch.tensor([[1.0, 0.0]])
        >>> info_nce(query, query, torch.tensor([[1.0], [0.0]]), temperature=0.2)  # log 2
        tensor(0.6931)
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive; MoCo v2 uses 0.2")
    if query.shape != key.shape or queue.ndim != 2 or queue.shape[0] != query.shape[-1]:
        raise ValueError(
            f"query (B, D) = {tuple(query.shape)}, key (B, D) = {tuple(key.shape)} and "
            f"queue (D, Q) = {tuple(queue.shape)} disagree; the queue holds one key per column"
        )
    positive = (query * key.detach()).sum(dim=-1, keepdim=True)  # (B, 1)
    negative = query @ queue.detach()  # (B, Q)
    logits = torch.cat([positive, negative], dim=-1) / temperature  # (B, 1 + Q)
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


def alignment(query: Tensor, key: Tensor) -> Tensor:
    """Compute the mean squared distance between the two views of each image.

    Wang and Isola 2020 ("Understanding contrastive representation learning through alignment and
    uniformity"), Eq. 4 with alpha = 2. Smaller values mean better alignment.

    Args:
        query: (B, D), l2-normalised.
        key: (B, D), l2-normalised.

    Returns:
        Scalar in [0, 4].

    Examples:
        >>> alignment(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(2.)
    """
    return (query - key).square().sum(dim=-1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Compute the log of the mean Gaussian potential over all pairs of different images.

    Wang and Isola 2020, Eq. 5 with t = 2. Smaller values mean embeddings that are spread more
    evenly over the sphere.

    Args:
        embeddings: (B, D), l2-normalised, B >= 2.

    Returns:
        Scalar in [-8, 0]; 0 if all embeddings are equal.

    Examples:
        >>> uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # one pair at distance 2
        tensor(-8.)
    """
    # torch.pdist has no bfloat16 kernel. On the sphere |a - b|^2 = 2 - 2ab.
    size = len(embeddings)
    row, column = torch.triu_indices(size, size, 1, device=embeddings.device)  # not a mask: that
    distance = 2 - 2 * (embeddings @ embeddings.T)[row, column]  # (B (B - 1) / 2,)  # would wait
    return (-2 * distance).exp().mean().log()


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Contrast both views of each image with the views of all other images of the batch.

    Chen et al. 2020 (SimCLR), Eq. 1, as a mean over all 2B views.

    Args:
        first: (B, D), l2-normalised.
        second: (B, D), l2-normalised views of the same images.
        temperature: tau in Eq. 1, > 0.

    Returns:
        Mean loss in nats, scalar; both views receive a gradient.

    Raises:
        ValueError: temperature is not positive, or the shapes disagree.

    Examples:
        >>> views = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> nt_xent(views, views, temperature=1.0)  # log((e + 2) / e)
        tensor(0.5514)
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive; SimCLR uses 0.1 to 0.5")
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"first {tuple(first.shape)} and second {tuple(second.shape)} must both be (B, D); row "
            "i of each is a view of image i"
        )
    views = torch.cat([first, second])  # (2B, D)
    logits = views @ views.T / temperature  # (2B, 2B)
    itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
    other_view = torch.arange(len(views), device=views.device).roll(len(first))
    return F.cross_entropy(logits.masked_fill(itself, -torch.inf), other_view)


def cluster_contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Contrast the clusters of two views: a cluster is its column of the predictions of a batch.

    Li et al. 2021 (Contrastive Clustering), L_clu: NT-Xent over the 2K columns, each of which is
    contrasted with its column in the other view, minus the entropy of the mean prediction of both
    views, H(Y), without which all images would get one cluster.

    Args:
        first: (B, K), probabilities of one view; rows sum to one.
        second: (B, K), probabilities of the other view of the same images.
        temperature: tau_C, > 0.

    Returns:
        Loss in nats, scalar; both views receive a gradient.

    Raises:
        ValueError: as `nt_xent`.

    Examples:
        >>> sure = torch.eye(2)  # two images, each in a cluster of its own
        >>> cluster_contrast(sure, sure, temperature=1.0)  # log((e + 2) / e) - 2 log 2
        tensor(-0.8348)
    """
    contrast = nt_xent(F.normalize(first.T), F.normalize(second.T), temperature)
    shares = torch.stack([first.mean(dim=0), second.mean(dim=0)])  # (2, K)
    loss: Tensor = contrast - torch.special.entr(shares).sum()
    return loss
