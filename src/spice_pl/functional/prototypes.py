"""Pseudo-labels from prototypes: the E-step of stage 2.

Niu et al. 2022 (SPICE), Eqs. 2-4. For each head separately:
probabilities → the confident images of each cluster → their mean, the prototype γ_k
→ the images nearest to γ_k, which get the label k. So each cluster gets the same number of labels,
or the number that follows from its share if shares are given.

Shapes: H heads (or none), M images in the buffer, K clusters, D embedding width,
C confident images per cluster, n pseudo-labels per cluster, S pseudo-labels of a head.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from spice_pl.functional.budgets import cluster_budgets
from spice_pl.functional.device import cluster_sizes, to_device
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
            "choose one in that range"
        )
    counts = torch.full((*probs.shape[:-2], probs.shape[-1]), num_confident)  # (H, K)
    index = _pick(_chunks(probs.mT, probs.shape[-2]), counts, overlap=True)
    return index.view(*counts.shape, num_confident)


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
    counts = torch.full(confident.shape[:-1], confident.shape[-1])  # (..., K)
    return _means(embeddings, confident.flatten(), counts)


def prototype_pseudo_labels(
    embeddings: Tensor,
    probs: Tensor,
    *,
    confident_ratio: float = 0.5,
    select_ratio: float = 1.0,
    overlap: bool = True,
    shares: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give each cluster's label to the images nearest to its prototype.

    SPICE, Eqs. 2-4, with n = int(select_ratio * (M // K)) labels per cluster, and
    C = int(confident_ratio * select_ratio * (M // K)) images per prototype. If shares are given,
    which is ours, `cluster_budgets` divides the same K * n labels by them, and the prototype of a
    cluster with n_k labels is the mean of max(1, int(confident_ratio * n_k)) images.

    Args:
        embeddings: (M, D), embeddings or raw features of the images; l2-normalised here.
        probs: (H, M, K) or (M, K), rows sum to one.
        confident_ratio: number of images in a prototype divided by n; 1.0 in the paper's toy
            example, 0.5 in the authors' code.
        select_ratio: number of labels per cluster divided by M // K.
        overlap: whether an image may have several labels, or none. If false, clusters pick in the
            order 0 to K - 1, and no image is in two prototypes or has two labels.
        shares: sizes of the clusters, (K,) or (H, K), at least 0 with a positive sum; equal sizes
            if None.

    Returns:
        Index (H, K * n) or (K * n,) into the M images, cluster-major and nearest first; and the
        label (K * n,), shared by the heads, or in the shape of the index if shares are given.
        Without overlap, an index of -1 marks a slot for which no image was left (only if
        select_ratio > 1).

    Raises:
        ValueError: the shapes disagree, M // K < 2, or a ratio or the shares ask for less than one
            image per cluster or for more images than there are.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5], [0.2, 0.8]])
        >>> prototype_pseudo_labels(embeddings, probs)
        (tensor([0, 1, 3, 2]), tensor([0, 0, 1, 1]))
    """
    _check_shapes(embeddings, probs)
    num_images, num_clusters = probs.shape[-2:]
    confident, labels = _slots(probs, confident_ratio, select_ratio, overlap, shares)  # (H, K) each
    embeddings = unit_rows(embeddings)
    prototypes = _prototypes(embeddings, probs, confident, overlap)  # (H, K, D)
    # A prototype's length is the same for all images, so the dot product ranks as the cosine does.
    nearness = (
        similarities(part.flatten(end_dim=-2), embeddings).view(*part.shape[:-1], num_images)
        for part in _chunks(prototypes, num_images)
    )  # (H, k, M) each
    index = _pick(nearness, labels, overlap).view(*labels.shape[:-1], -1)  # (H, S)
    counts = labels if shares is not None else labels.view(-1, num_clusters)[0]  # (H, K) or (K,)
    names = torch.arange(num_clusters).expand_as(counts)
    label = names.flatten().repeat_interleave(counts.flatten())
    label = to_device(label.view(*counts.shape[:-1], -1), probs.device)
    return index, label  # (H, S); (H, S) or (S,)


def prototype_shares(
    embeddings: Tensor,
    probs: Tensor,
    *,
    confident_ratio: float = 0.5,
    select_ratio: float = 1.0,
    overlap: bool = True,
    shares: Tensor | None = None,
) -> Tensor:
    """Estimate, without labels, which share of the images belongs to each cluster.

    Ours: an image counts for the cluster whose prototype is nearest to it by cosine. Prototypes,
    arguments and errors are those of `prototype_pseudo_labels`.

    Returns:
        Shares (H, K) or (K,); rows sum to one.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
        >>> probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]])
        >>> prototype_shares(embeddings, probs)
        tensor([0.7500, 0.2500])
    """
    _check_shapes(embeddings, probs)
    confident, _ = _slots(probs, confident_ratio, select_ratio, overlap, shares)
    embeddings = unit_rows(embeddings)
    prototypes = unit_rows(_prototypes(embeddings, probs, confident, overlap))  # (H, K, D)
    num_images, num_clusters = probs.shape[-2:]
    counts = [
        cluster_sizes(similarities(embeddings, each).argmax(dim=1), num_clusters)
        for each in prototypes.view(-1, *prototypes.shape[-2:])  # a head at a time: (M, K)
    ]
    return (torch.stack(counts) / num_images).view(prototypes.shape[:-1])


def _prototypes(embeddings: Tensor, probs: Tensor, confident: Tensor, overlap: bool) -> Tensor:
    """Eqs. 2 and 3: means (H, K, D) of the most probable images, `confident` (H, K) of them."""
    picked = _pick(_chunks(probs.mT, len(embeddings)), confident, overlap)
    return _means(embeddings, picked, confident)


def _chunks(rows: Tensor, num_images: int) -> Iterator[Tensor]:
    """Split (..., K, ·) into groups of clusters whose scores of all images fit into memory."""
    heads = rows[..., 0, 0].numel()
    size = max(1, SIMILARITIES_PER_CHUNK // (heads * num_images))
    return iter(torch.split(rows, size, dim=-2))


def _means(embeddings: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """Means (..., K, D) of the rows that `_pick` chose, `counts` (..., K) of them per cluster."""
    # An embedding bag averages rows without first copying those of all heads and clusters.
    starts = to_device(_starts(counts).flatten(), index.device)
    means = F.embedding_bag(index, embeddings, starts, mode="mean")
    return means.view(*counts.shape, -1)


def _pick(scores: Iterable[Tensor], counts: Tensor, overlap: bool) -> Tensor:
    """Find the images with the largest scores of each cluster.

    Args:
        scores: (..., k, M) for k clusters at a time, K clusters in all.
        counts: (..., K), number of images to pick for each cluster.
        overlap: whether clusters may pick the same image.

    Returns:
        Flat index of all picks: those of one cluster are together, then the clusters of a head,
        then the heads.
    """
    most = int(counts.max())
    if overlap and bool((counts == most).all()):  # as without shares: no slot to leave out
        parts = [part.topk(most, dim=-1).indices for part in scores]  # (..., k, most) each
        return torch.cat(parts, dim=-2).flatten()
    starts, first = _starts(counts), 0
    picks = taken = torch.empty(0)
    rows = (row for part in scores for row in torch.split(part, 1, dim=-2))  # (..., 1, M) each
    for part in scores if overlap else rows:
        if not first:
            picks = torch.empty(int(counts.sum()), dtype=torch.long, device=part.device)
        here = slice(first, first := first + part.shape[-2])
        rank = torch.arange(int(counts[..., here].max()))
        wanted = rank < counts[..., here, None]  # (..., k, most)
        place = starts[..., here, None] + rank
        if overlap:
            index = part.topk(len(rank), dim=-1).indices  # (..., k, most)
        else:
            if here.start == 0:
                taken = torch.zeros_like(part, dtype=torch.bool)  # (..., 1, M)
            left, index = part.masked_fill(taken, -torch.inf).topk(len(rank), dim=-1)
            new = to_device(wanted, part.device)
            taken.scatter_(-1, index, new | taken.gather(-1, index))
            index = index.where(left > -torch.inf, -1)
        # Positions, not a mask of the device, whose number of True the processor would wait for.
        chosen = to_device(wanted.flatten().nonzero().squeeze(1), part.device)
        picks[to_device(place[wanted], part.device)] = index.flatten()[chosen]
    return picks


def _starts(counts: Tensor) -> Tensor:
    """Positions (..., K) of the first pick of each cluster in the flat index of `_pick`."""
    ends = counts.flatten().cumsum(dim=0)
    return (ends - counts.flatten()).view_as(counts)


def _check_shapes(embeddings: Tensor, probs: Tensor) -> None:
    if embeddings.ndim != 2 or probs.ndim not in (2, 3) or probs.shape[-2] != len(embeddings):
        raise ValueError(
            f"embeddings (M, D) = {tuple(embeddings.shape)} and probs (H, M, K) or (M, K) = "
            f"{tuple(probs.shape)} do not fit; both need the same M images in the same order"
        )


def _slots(
    probs: Tensor,
    confident_ratio: float,
    select_ratio: float,
    overlap: bool,
    shares: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Numbers of images in each prototype and with each label, (H, K) or (K,) each."""
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
    num_confident = _num("confident_ratio * select_ratio", ratio, share, most)
    shape = (*probs.shape[:-2], num_clusters)
    if shares is None:
        return torch.full(shape, num_confident), torch.full(shape, num_labels)
    labels = cluster_budgets(shares.cpu(), num_clusters * num_labels, min(2, num_labels))
    confident = (confident_ratio * labels.double()).long().clamp_min(1)
    largest = int(max(confident.max(), labels.max()))
    if largest > num_images or (not overlap and int(confident.sum(dim=-1).max()) > num_images):
        raise ValueError(
            f"with these shares one cluster takes {largest} of {num_images} images, or all "
            "prototypes together take more images than there are, which overlap=False does not "
            "allow; lower select_ratio or confident_ratio"
        )
    return confident.expand(shape), labels.expand(shape)


def _num(name: str, ratio: float, share: int, most: int) -> int:
    num = int(ratio * share)
    if not 1 <= num <= most:
        raise ValueError(
            f"{name} {ratio:g} of {share} images per cluster takes {num} images, and 1 to {most} "
            f"are possible; choose it between 1/{share} and {most}/{share}"
        )
    return num
