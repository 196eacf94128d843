"""Pseudo-labels from prototypes: the E-step of stage 2.

Niu et al. 2022 (SPICE), Eqs. 2-4. For each head by itself:
probabilities → the confident images of each cluster → their mean, the prototype γ_k
→ the images nearest to γ_k, which get the label k. So the labels are exactly balanced.

Shapes: H heads (or none), M images in the buffer, K clusters, D embedding width,
C confident images per cluster, n pseudo-labels per cluster.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from spice_pl.functional.neighbors import SIMILARITIES_PER_CHUNK, similarities, unit_rows


def select_confident(probs: Tensor, num_confident: int) -> Tensor:
    """Select the images that are most probable for each cluster, whatever their argmax.

    SPICE, Eq. 2.

    Args:
        probs: (H, M, K) or (M, K), rows sum to one.
        num_confident: C, 1 to M.

    Returns:
        Index (H, K, C) or (K, C) into the M images, most confident first.

    Raises:
        ValueError: num_confident is not between 1 and M.

    Examples:
        >>> probs = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> select_confident(probs, num_confident=2)
        tensor([[0, 2],
                [1, 2]])
    """
    if not 1 <= num_confident <= probs.shape[-2]:
        raise ValueError(
            f"num_confident {num_confident} is not between 1 and the {probs.shape[-2]} images; "
            "choose one in there"
        )
    return _pick(_chunks(probs.mT, probs.shape[-2]), num_confident, overlap=True)


def prototype_means(embeddings: Tensor, confident: Tensor) -> Tensor:
    """Average the embeddings of each cluster's confident images.

    SPICE, Eq. 3.

    Args:
        embeddings: (M, D).
        confident: (..., K, C), index into the M images.

    Returns:
        Prototypes (..., K, D), not normalised.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> prototype_means(embeddings, torch.tensor([[0, 1], [2, 2]]))
        tensor([[ 0.5000,  0.5000],
                [-1.0000,  0.0000]])
    """
    # A bag averages without a copy of the C rows of every head and cluster.
    means = F.embedding_bag(confident.reshape(-1, confident.shape[-1]), embeddings, mode="mean")
    return means.view(*confident.shape[:-1], -1)  # (..., K, D)


def prototype_pseudo_labels(
    embeddings: Tensor,
    probs: Tensor,
    *,
    confident_ratio: float = 0.5,
    select_ratio: float = 1.0,
    overlap: bool = True,
) -> tuple[Tensor, Tensor]:
    """Give each cluster's label to the images nearest to its prototype.

    SPICE, Eqs. 2-4, with n = int(select_ratio * (M // K)) labels per cluster, and
    C = int(confident_ratio * select_ratio * (M // K)) images per prototype.

    Args:
        embeddings: (M, D), the images' features; l2-normalised here, if they are not yet.
        probs: (H, M, K) or (M, K), rows sum to one.
        confident_ratio: share of the n images that makes the prototype; the paper's toy example
            has 1.0, the authors' code 0.5.
        select_ratio: share of M // K images that a cluster labels.
        overlap: an image may carry several labels, or none. Otherwise clusters pick in the order
            0 to K - 1, and each image is used once for the prototypes and once for the labels.

    Returns:
        Index (H, K * n) or (K * n,) into the M images, cluster-major and nearest first; and the
        label (K * n,), shared by the heads. Without overlap, an index of -1 marks a slot for which
        no image was left (only where select_ratio > 1).

    Raises:
        ValueError: the shapes disagree, M // K < 2, or a ratio asks for less than one image per
            cluster or for more than there are.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8]])
        >>> prototype_pseudo_labels(embeddings, probs)
        (tensor([0, 1, 3, 2]), tensor([0, 0, 1, 1]))
    """
    _check_shapes(embeddings, probs)
    num_confident, num_labels = _slots(probs, confident_ratio, select_ratio, overlap)
    embeddings = unit_rows(embeddings)
    num_images = len(embeddings)
    confident = _pick(_chunks(probs.mT, num_images), num_confident, overlap)  # (H, K, C)
    prototypes = prototype_means(embeddings, confident)  # (H, K, D)
    # A prototype's length is the same for all images, so the dot product ranks as the cosine does.
    nearness = (
        similarities(part.flatten(end_dim=-2), embeddings).view(*part.shape[:-1], num_images)
        for part in _chunks(prototypes, num_images)
    )  # (H, k, M) each
    index = _pick(nearness, num_labels, overlap)  # (H, K, n)
    label = torch.arange(probs.shape[-1], device=probs.device).repeat_interleave(num_labels)
    return index.flatten(-2), label  # (H, K * n), (K * n,)


def _chunks(rows: Tensor, num_images: int) -> Iterator[Tensor]:
    """Split (..., K, ·) into clusters whose scores of all images fit a bounded memory."""
    heads = rows[..., 0, 0].numel()
    size = max(1, SIMILARITIES_PER_CHUNK // (heads * num_images))
    return iter(torch.split(rows, size, dim=-2))


def _pick(scores: Iterable[Tensor], num: int, overlap: bool) -> Tensor:
    """Index (..., K, num) of the largest scores of each cluster, which come as (..., k, M)."""
    if overlap:
        return torch.cat([part.topk(num, dim=-1).indices for part in scores], dim=-2)
    taken, picks = None, []
    for part in scores:
        for score in part.unbind(dim=-2):  # (..., M)
            if taken is None:
                taken = torch.zeros_like(score, dtype=torch.bool)
            left, index = score.masked_fill(taken, -torch.inf).topk(num, dim=-1)  # (..., num)
            taken.scatter_(-1, index, True)
            picks.append(index.where(left > -torch.inf, -1))
    return torch.stack(picks, dim=-2)


def _check_shapes(embeddings: Tensor, probs: Tensor) -> None:
    if embeddings.ndim != 2 or probs.ndim not in (2, 3) or probs.shape[-2] != len(embeddings):
        raise ValueError(
            f"embeddings (M, D) = {tuple(embeddings.shape)} and probs (H, M, K) or (M, K) = "
            f"{tuple(probs.shape)} do not fit; M is the same images in the same order in both"
        )


def _slots(
    probs: Tensor, confident_ratio: float, select_ratio: float, overlap: bool
) -> tuple[int, int]:
    """Numbers (C, n) of images per cluster."""
    num_images, num_clusters = probs.shape[-2:]
    share = num_images // num_clusters
    if share < 2:  # no image would be left for a prototype
        raise ValueError(
            f"{num_images} images are fewer than 2 for each of num_clusters {num_clusters}; "
            f"draw at least {2 * num_clusters}"
        )
    num_labels = _num("select_ratio", select_ratio, share, num_images)
    most = num_images if overlap else share
    ratio = confident_ratio * select_ratio
    return _num("confident_ratio * select_ratio", ratio, share, most), num_labels


def _num(name: str, ratio: float, share: int, most: int) -> int:
    num = int(ratio * share)
    if not 1 <= num <= most:
        raise ValueError(
            f"{name} {ratio:g} of {share} images per cluster takes {num} images, and 1 to {most} "
            f"are possible; choose it between 1/{share} and {most}/{share}"
        )
    return num
