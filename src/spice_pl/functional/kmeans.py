"""k-means by cosine: the cluster labels of features that have no head.

Shapes: N samples, D features, K clusters.
"""

import torch
from torch import Tensor

from spice_pl.functional.neighbors import similarities, unit_rows

ROWS_PER_CHUNK = 2**16  # so that memory beyond the embeddings stays at ROWS_PER_CHUNK * K


def cosine_kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    num_restarts: int = 10,
    max_iterations: int = 300,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster directions: centres of length one, each sample with the centre of largest cosine.

    Arthur and Vassilvitskii 2007 (k-means++), on the sphere. A centre that loses all its samples
    takes the sample that fits its own centre least.

    Args:
        features: (N, D), finite; rows are l2-normalised here.
        num_clusters: K, 1 to N.
        num_restarts: of which the one with the largest sum of cosines is kept.
        max_iterations: of a restart, which also ends when no sample changes its cluster.
        generator: of the first centres, on the CPU; torch's default generator if None.

    Returns:
        Clusters (N,) and centres (K, D).

    Raises:
        ValueError: K is out of range or a feature is not finite.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [0.1, 1.0]])
        >>> clusters, _ = cosine_kmeans(rows, 2)
        >>> bool(clusters[0] == clusters[1] != clusters[2] == clusters[3])
        True
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"num_clusters {num_clusters} is not between 1 and the {len(features)} samples; lower "
            "it or give more samples"
        )
    if not bool(features.isfinite().all()):
        raise ValueError("a feature is NaN or infinite; make the features anew")
    embeddings = unit_rows(features)
    best: tuple[Tensor, Tensor] | None = None
    best_fit = -float("inf")
    for _ in range(num_restarts):
        centres = _first_centres(embeddings, num_clusters, generator)  # (K, D)
        fit, clusters = _assign(embeddings, centres)  # (N,) each
        for _ in range(max_iterations):
            centres = _centres(embeddings, clusters, fit, num_clusters)
            fit, moved = _assign(embeddings, centres)
            if torch.equal(moved, clusters):
                break
            clusters = moved
        if (total := float(fit.double().sum())) > best_fit:
            best_fit, best = total, (clusters, centres)
    assert best is not None  # noqa: S101 - a sum of cosines is larger than minus infinity
    return best


def _first_centres(
    embeddings: Tensor, num_clusters: int, generator: torch.Generator | None
) -> Tensor:
    """k-means++: each next centre is drawn with its squared distance from the nearest so far."""
    draws = torch.rand(num_clusters, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * len(embeddings))]
    nearest = torch.full((len(embeddings),), -1.0, device=embeddings.device)  # cosine
    for draw in draws[1:]:
        nearest = torch.maximum(nearest, embeddings @ embeddings[chosen[-1]])
        mass = (1 - nearest).clamp_min(0).double()  # half the squared distance
        mass[chosen] = 0
        if float(mass.sum()) == 0:  # fewer distinct samples than centres
            mass = torch.ones_like(mass).index_fill_(0, torch.tensor(chosen, device=mass.device), 0)
        reached = mass.cumsum(dim=0)
        place = torch.searchsorted(reached, reached[-1] * draw, right=True)
        chosen.append(int(place.clamp_max(len(embeddings) - 1)))
    return embeddings[chosen]


def _assign(embeddings: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    found = [
        similarities(rows, centres).max(dim=1) for rows in torch.split(embeddings, ROWS_PER_CHUNK)
    ]
    fit, clusters = zip(*found, strict=True)
    return torch.cat(fit), torch.cat(clusters)


def _centres(embeddings: Tensor, clusters: Tensor, fit: Tensor, num_clusters: int) -> Tensor:
    counts = torch.bincount(clusters, minlength=num_clusters)
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty):
        clusters = clusters.clone()
        worst = fit.topk(len(empty), largest=False).indices
        clusters[worst] = empty
    sums = embeddings.new_zeros(num_clusters, embeddings.shape[1])
    for rows, ids in zip(
        torch.split(embeddings, ROWS_PER_CHUNK), torch.split(clusters, ROWS_PER_CHUNK), strict=True
    ):
        member = torch.nn.functional.one_hot(ids, num_clusters).to(rows.dtype)  # (n, K)
        sums += similarities(member.T, rows.T)
    return unit_rows(sums)
