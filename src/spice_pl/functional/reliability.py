"""Select the reliable labels between stages 2 and 3: neighbours agree and the head is confident.

Niu et al. 2022 (SPICE), Eqs. 6-7.

Shapes: N samples, D embedding width, K clusters.
"""

from typing import Literal

import torch
from torch import Tensor

from spice_pl.functional.device import cluster_sizes
from spice_pl.functional.neighbors import neighbor_chunks

ROUNDING = 5e-5  # agreements in tables have four decimals
Balance = Literal["none", "min", "cap"]


def neighbors_for(num_neighbors: int, num_samples: int, num_clusters: int) -> int:
    """Return how many neighbours clusters of this size can have in common.

    A sample of a cluster of n has at most n neighbours in it, so agreement (Eq. 6) cannot exceed
    n / N_s. Where the mean size N / K is below N_s, half of it is taken instead. Ours; the data
    sets of the paper have at least 300 images per cluster and N_s = 100.

    Args:
        num_neighbors: N_s.
        num_samples: N.
        num_clusters: K, at least 1.

    Examples:
        >>> neighbors_for(100, 60_000, 10), neighbors_for(100, 120, 4), neighbors_for(100, 3, 2)
        (100, 15, 2)
    """
    if num_samples >= num_neighbors * num_clusters:
        return num_neighbors
    return min(num_samples, max(2, num_samples // (2 * num_clusters)))


def least_agreement(sizes: Tensor, num_neighbors: int) -> Tensor:
    """Return the agreement below which an image of each cluster is "not sure".

    It is half of what the cluster allows: of N_s neighbours, at most as many as it has images can
    be in it. One or two images count as three, so that an image without another of its cluster
    among its neighbours is "not sure". Ours.

    Args:
        sizes: (K,), images of each cluster, of those among which neighbours are searched.
        num_neighbors: N_s, at least 2; 0 where it is not known, for half of all neighbours.

    Returns:
        (K,), above 0 and at most 0.5.

    Examples:
        >>> least_agreement(torch.tensor([0, 1, 4, 10, 500]), 10)
        tensor([0.1500, 0.1500, 0.2000, 0.5000, 0.5000])
    """
    allowed = sizes.clamp(min=3).float() / max(num_neighbors, 1)
    return allowed.clamp(max=1) / 2


def is_not_sure(agreement: Tensor, clusters: Tensor, num_neighbors: int) -> Tensor:
    """Return which images have a lower agreement than `least_agreement` of their cluster.

    Args:
        agreement: (N,), in [0, 1], exact or to four decimals.
        clusters: (N,), all images among which neighbours were searched.
        num_neighbors: N_s; 0 where it is not known.

    Returns:
        (N,), bool.
    """
    ids = clusters.long()
    least = least_agreement(torch.bincount(ids), num_neighbors)
    return agreement < least[ids] - ROUNDING


def local_consistency(
    embeddings: Tensor,
    clusters: Tensor,
    num_neighbors: int = 100,
    chunk_size: int | None = None,
    *,
    by_size: bool = False,
) -> Tensor:
    """Compute the share of each sample's nearest neighbours that are in its own cluster.

    SPICE, Eq. 6, over the whole data set, by cosine. The sample itself is one of its neighbours,
    as in the authors' code.

    Args:
        embeddings: (N, D), embeddings or raw features of the samples; l2-normalised here.
        clusters: (N,), predicted cluster ids.
        num_neighbors: N_s, 1 to N.
        chunk_size: samples per chunk; memory grows with chunk_size * N, never with N * N. By
            default an exact chunk has at most 2^26 similarities.
        by_size: whether a sample of a cluster of n < N_s samples is compared with only its
            max(2, n // 2) nearest, so that small clusters can agree too. Ours.

    Returns:
        Agreement (N,), float32, in [0, 1].

    Raises:
        ValueError: the lengths disagree, or num_neighbors is not between 1 and N.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> local_consistency(embeddings, torch.tensor([0, 0, 0, 1]), num_neighbors=2)
        tensor([1.0000, 1.0000, 0.5000, 0.5000])
    """
    _check_lengths(embeddings=embeddings, clusters=clusters)
    if not 1 <= num_neighbors <= len(embeddings):
        raise ValueError(
            f"num_neighbors {num_neighbors} is not between 1 and the {len(embeddings)} samples; "
            f"lower it to at most {len(embeddings)}"
        )
    compared = torch.full_like(clusters, num_neighbors)  # (N,)
    if by_size and len(clusters):
        sizes = cluster_sizes(clusters, int(clusters.max()) + 1)[clusters]  # (N,)
        few = (sizes // 2).clamp_min(2).clamp_max(num_neighbors)
        compared = torch.where(sizes < num_neighbors, few, compared)
    ranks = torch.arange(num_neighbors, device=clusters.device)
    agreements, start = torch.empty(len(clusters), device=clusters.device), 0
    for _, index in neighbor_chunks(embeddings, embeddings, num_neighbors, chunk_size):
        rows = slice(start, start := start + len(index))
        same = clusters[index] == clusters[rows].unsqueeze(-1)  # (b, N_s), nearest first
        same &= ranks < compared[rows].unsqueeze(-1)
        agreements[rows] = same.sum(dim=-1).float() / compared[rows]
    return agreements


def reliable_mask(
    embeddings: Tensor,
    probs: Tensor,
    *,
    num_neighbors: int = 100,
    agreement: float = 0.95,
    confidence: float = 0.99,
    balance: Balance = "min",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select the samples whose predicted cluster is reliable.

    SPICE, Eqs. 6-7: `local_consistency` of the most probable clusters, then `select_reliable`.

    Args:
        embeddings: (N, D), embeddings or raw features of the samples; l2-normalised here.
        probs: (N, K), rows sum to one.
        num_neighbors: N_s, 1 to N.
        agreement: λ, see `select_reliable`.
        confidence: see `select_reliable`.
        balance: see `select_reliable`.
        generator: see `select_reliable`.

    Returns:
        Mask (N,); all False is a possible result.

    Raises:
        ValueError: as in `local_consistency` and `select_reliable`.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.0, 1.0]])
        >>> reliable_mask(embeddings, probs, num_neighbors=2)
        tensor([ True,  True, False, False])
    """
    _check_lengths(embeddings=embeddings, probs=probs)
    confidences, clusters = probs.max(dim=-1)  # (N,) each
    return select_reliable(
        local_consistency(embeddings, clusters, num_neighbors),
        confidences,
        clusters,
        agreement=agreement,
        confidence=confidence,
        balance=balance,
        generator=generator,
    )


def select_reliable(
    agreements: Tensor,
    confidences: Tensor,
    clusters: Tensor,
    *,
    agreement: float = 0.95,
    confidence: float = 0.99,
    balance: Balance = "min",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Select the reliable samples by given agreements and confidences.

    SPICE, Eq. 7. The threshold on max p and the equal numbers per cluster are from the authors'
    code.

    Args:
        agreements: (N,), from `local_consistency`.
        confidences: (N,), max p.
        clusters: (N,), predicted cluster ids.
        agreement: λ; a reliable sample has an agreement >= λ.
        confidence: threshold on max p; a reliable sample has a larger one.
        balance: number of samples that a cluster keeps: "none" keeps all; "min" as many as the
            smallest cluster has, "cap" at most the (lower) median. Clusters without a reliable
            sample do not count for either. From a larger cluster a random draw is kept, as in the
            authors' code, so that training sees more than its centre.
        generator: random generator of that draw; torch's default generator if None.

    Returns:
        Mask (N,); all False is a possible result.

    Raises:
        ValueError: the lengths disagree or balance is unknown.

    Examples:
        >>> ones, clusters = torch.ones(4), torch.tensor([0, 0, 2, 2])
        >>> select_reliable(ones, torch.tensor([1.0, 1.0, 1.0, 0.5]), clusters).sum()
        tensor(2)
    """
    _check_lengths(agreements=agreements, confidences=confidences, clusters=clusters)
    if balance not in ("none", "min", "cap"):
        raise ValueError(f"balance {balance!r} is unknown; choose none, min or cap")
    reliable = (agreements >= agreement) & (confidences > confidence)  # (N,)
    if balance == "none" or not reliable.any():
        return reliable
    counts = clusters[reliable].bincount()
    counts = counts[counts > 0]  # (clusters that have any,)
    limit = counts.min() if balance == "min" else counts.median()
    return _keep_at_most(int(limit), reliable, clusters, generator)


def _keep_at_most(
    limit: int, reliable: Tensor, clusters: Tensor, generator: torch.Generator | None
) -> Tensor:
    # Draw one random number per sample first, so renumbering clusters cannot change the selection.
    device = generator.device if generator is not None else "cpu"
    draws = torch.rand(len(clusters), generator=generator, device=device).to(clusters.device)
    kept = torch.zeros_like(reliable)
    for cluster in clusters[reliable].bincount().nonzero():
        members = (reliable & (clusters == cluster)).nonzero().squeeze(-1)
        kept[members[draws[members].argsort()[:limit]]] = True
    return kept


def _check_lengths(**tensors: Tensor) -> None:
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{shapes} differ in length; row i is sample i in each of them")
