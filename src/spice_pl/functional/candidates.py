"""Several clusterings of one feature set, and which of them to keep, without labels.

Shapes: N samples, D feature width, d components, K clusters, k neighbours, R candidates.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.assignment import count_table, match_clusters
from spice_pl.functional.embeddings import (
    Whitening,
    coordinates,
    fit_projection,
    neighbor_graph,
    project,
    walk_states,
)
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.functional.neighbors import SIMILARITIES_PER_CHUNK, similarities, unit_rows

WALKS = (3, 10, 30, 100)  # steps; few suit even classes, many suit unequal ones
COMPONENTS = 32  # of the silhouette, as in stage=estimate_k
SILHOUETTES = 2000  # samples whose silhouette is taken, at most
SAME = 1e-6  # distance of copies; that of float32 rows of length one is rounded by some 1e-7
DENSE_UP_TO = 200  # samples whose eigenvectors are found without iteration


def walk_clusters(
    features: Tensor,
    num_clusters: int,
    *,
    walks: Sequence[int] = WALKS,
    num_components: int = 64,
    num_neighbors: int = 10,
    whitening: Whitening = "half",
    seed: int = 0,
) -> Tensor:
    """Cluster embeddings that were smoothed for a few, for some and for many steps.

    k-means after t steps of `neighbor_walk`, with one projection and one graph for all t. K-means
    on little smoothed embeddings cuts large classes and merges small ones, because equally large
    clusters have the smallest squared distances. A long walk contracts each dense group first,
    whatever its size; where groups are not well separated, it also contracts several into one.
    `cluster_scores` chooses between them.

    Args:
        features: (N, D), any floating type.
        num_clusters: K, 1 to N.
        walks: numbers of steps t, rising.
        num_components: see `smoothed_embeddings`.
        num_neighbors: see `smoothed_embeddings`.
        whitening: see `smoothed_embeddings`.
        seed: seed of k-means.

    Returns:
        Clusters (R, N), one row per walk. A cluster may be empty where fewer than K embeddings
        differ.

    Raises:
        ValueError: K or the walks are out of range, or as in `fit_projection`.
    """
    _check_num_clusters(num_clusters, len(features))
    if not walks or min(walks) < 0 or list(walks) != sorted(set(walks)):
        raise ValueError(f"walks {list(walks)} do not rise from 0 or more; give at least one")
    starts = project(features, fit_projection(features, num_components, whitening))
    graph = neighbor_graph(starts, num_neighbors)
    found = [
        _kmeans(unit_rows(torch.from_numpy(state)).numpy(), num_clusters, seed)
        for steps, state in zip(range(walks[-1] + 1), walk_states(starts, graph), strict=False)
        if steps in walks
    ]
    return torch.stack(found)


def spectral_clusters(
    embeddings: Tensor, graph: sparse.csr_array, num_clusters: int, seed: int = 0
) -> Tensor:
    """Cut the neighbour graph where it is thin, with sparse eigenvectors.

    Ng, Jordan and Weiss 2002: the K largest eigenvectors of D^-½ W D^-½, rows of length one,
    k-means. Lanczos iterations from a fixed start (scipy's eigsh); memory grows with N (k + K).

    Args:
        embeddings: (N, d); used only to join a graph in several parts, see `connect`.
        graph: symmetric weights W (N, N), from `neighbor_graph`.
        num_clusters: K, 1 to N.
        seed: seed of k-means.

    Returns:
        Clusters (N,).

    Raises:
        ValueError: K is out of range.
    """
    num_samples = len(embeddings)
    _check_num_clusters(num_clusters, num_samples)
    weights = connect(graph, embeddings).astype(np.float64)
    scales = sparse.diags_array(weights.sum(axis=1) ** -0.5)
    normalised = scales @ weights @ scales
    if num_samples <= max(DENSE_UP_TO, 2 * num_clusters + 1):
        vectors = np.linalg.eigh(normalised.toarray())[1][:, -num_clusters:]
    else:
        first = np.random.default_rng(0).standard_normal(num_samples)
        vectors = eigsh(normalised, num_clusters, which="LA", v0=first, tol=1e-6)[1]
    return _kmeans(unit_rows(torch.from_numpy(vectors)).float().numpy(), num_clusters, seed)


def connect(graph: sparse.csr_array, embeddings: Tensor) -> sparse.csr_array:
    """Join the parts of a graph by one weak edge per part.

    The sample nearest to the mean of its part stands for it. From the second largest part on, each
    part is joined to the larger part whose sample is nearest by cosine.

    Args:
        graph: symmetric weights (N, N).
        embeddings: (N, d).

    Returns:
        The graph with an edge more per part beyond the first, of the smallest weight in the graph.

    Examples:
        >>> pairs = sparse.csr_array(np.kron(np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])))
        >>> connect(pairs, torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])).nnz
        6
    """
    num_parts, part = connected_components(graph, directed=False)
    if num_parts == 1:
        return graph
    part = np.argsort(np.argsort(-np.bincount(part), kind="stable"))[part]  # 0 is the largest
    unit = unit_rows(embeddings).cpu()
    sums = torch.zeros(num_parts, unit.shape[1], dtype=unit.dtype)
    sums.index_add_(0, torch.from_numpy(part), unit)
    fit = (unit * unit_rows(sums)[part]).sum(dim=1).numpy()
    order = np.lexsort((-fit, part))  # by part, and the sample nearest to the mean first
    centres = order[np.searchsorted(part[order], np.arange(num_parts))]  # (parts,)
    ends, parents = unit[centres], []
    ids = torch.arange(num_parts)
    for rows in torch.split(ids, max(1, SIMILARITIES_PER_CHUNK // num_parts)):
        likeness = similarities(ends[rows], ends)
        not_larger = ids >= rows.unsqueeze(1)
        parents.append(likeness.masked_fill(not_larger, -torch.inf).argmax(dim=1))
    one, other = centres[1:], centres[torch.cat(parents)[1:].numpy()]
    weights = np.full(len(one), graph.data.min(), dtype=graph.dtype)
    added = sparse.csr_array((weights, (one, other)), shape=graph.shape)
    return (graph + added + added.T).tocsr()


def vote_clusters(found: Tensor, others: Tensor, num_clusters: int) -> Tensor:
    """Give each sample the cluster that most clusterings give to it and to its neighbours.

    Ours: a consensus of clusterings (Strehl and Ghosh 2002, by relabelling) with one step of label
    propagation (Zhou et al. 2004). Clusters are renumbered to share most samples with the last
    clustering. A sample has one vote per clustering, and the mean votes of its neighbours count as
    much as its own.

    Args:
        found: (R, N), clusters of R clusterings, ids 0 to K - 1.
        others: (N, k), neighbours, from `nearest_others`; k may be 0.
        num_clusters: K.

    Returns:
        Clusters (N,), with the numbers of the last clustering; of equal votes the smaller number
        wins. A cluster may be empty.

    Examples:
        >>> found = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]])
        >>> vote_clusters(found, torch.tensor([[1], [0], [3], [2]]), 2)
        tensor([0, 0, 1, 1])
    """
    votes = torch.zeros(found.shape[1], num_clusters, device=found.device)
    for row in found:
        votes += F.one_hot(numbered_like(row, found[-1], num_clusters), num_clusters)
    total = votes.clone()
    for column in others.T:
        total += votes[column] / others.shape[1]
    return total.argmax(dim=1)


def numbered_like(clusters: Tensor, reference: Tensor, num_clusters: int) -> Tensor:
    """Return the same clusters (N,) under the numbers of a reference that shares most samples.

    Examples:
        >>> numbered_like(torch.tensor([2, 2, 0, 1]), torch.tensor([0, 0, 1, 2]), 3)
        tensor([0, 0, 1, 2])
    """
    number = match_clusters(count_table(clusters, reference, num_clusters, num_clusters))
    return number.to(clusters.device)[clusters]


def neighbor_agreement(others: Tensor, candidates: Tensor) -> Tensor:
    """Measure how often a sample and its nearest others are in one cluster.

    The mean over samples of r in SPICE, Eq. 6, but without the sample itself, whose own cluster
    says nothing.

    Args:
        others: (N, k), neighbours of each sample, from `nearest_others`.
        candidates: (R, N), clusters of each candidate.

    Returns:
        Share (R,), float64, in [0, 1]; 1 for a single sample, which has no others.

    Raises:
        ValueError: the lengths disagree.

    Examples:
        >>> others = torch.tensor([[1], [0], [3], [2]])
        >>> neighbor_agreement(others, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    if candidates.ndim != 2 or candidates.shape[1] != len(others):
        raise ValueError(
            f"candidates {tuple(candidates.shape)} are not (R, N) with the N = {len(others)} of "
            "the neighbours; give one row of clusters per candidate"
        )
    if not others.shape[1]:
        return torch.ones(len(candidates), dtype=torch.float64)
    others = others.to(candidates.device)
    shares = [(row[others] == row.unsqueeze(1)).double().mean() for row in candidates]
    return torch.stack(shares).cpu()


def modularity(others: Tensor, clusters: Tensor) -> float:
    """Measure how much more often neighbours share a cluster than the sizes alone would give.

    Newman 2004, on the graph of nearest others with equal degrees: a − Σ_j p_j², with the agreement
    a of `neighbor_agreement` and the shares p of the clusters. It compares different K: of equally
    large groups that no edge connects it is largest where K is their number.

    Args:
        others: (N, k), neighbours of each sample, from `nearest_others`.
        clusters: (N,), ids from 0.

    Returns:
        A number in [-1, 1]; 0 for one cluster.

    Raises:
        ValueError: as in `neighbor_agreement`.

    Examples:
        >>> others = torch.tensor([[1], [0], [3], [2]])
        >>> [modularity(others, torch.tensor(each)) for each in ([0, 0, 0, 0], [0, 0, 1, 1])]
        [0.0, 0.5]
    """
    shares = torch.bincount(clusters).double() / len(clusters)
    return float(neighbor_agreement(others, clusters[None])[0] - shares.square().sum())


def evenness(clusters: Tensor, num_clusters: int) -> float:
    """Entropy of cluster sizes over log K: 1 for equal sizes, 0 for one cluster.

    Args:
        clusters: (N,), ids 0 to K - 1.
        num_clusters: K; 1 gives 1.

    Examples:
        >>> evenness(torch.tensor([0, 0, 1, 1]), 2), evenness(torch.tensor([0, 0, 0]), 2)
        (1.0, 0.0)
    """
    if num_clusters == 1:
        return 1.0
    shares = torch.bincount(clusters, minlength=num_clusters).double() / len(clusters)
    return abs(float(torch.special.entr(shares).sum())) / float(np.log(num_clusters))


def cluster_scores(features: Tensor, others: Tensor, candidates: Tensor) -> Tensor:
    """Score candidates without labels; the largest is the one to keep.

    The mean silhouette (Rousseeuw 1987) of the principal components plus the assortativity
    (Newman 2003) of the neighbour graph, `silhouettes` and `assortativity`. Both are at most 1, and
    0 for one cluster. A long walk makes neighbours agree, right or wrong, and k-means makes compact
    clusters: the silhouette is taken in features that were not smoothed, and the assortativity
    without centres.

    Candidates have to share K and the features. The score does not choose K, and it tells close
    candidates apart badly. benchmarks/choice.py measures what its choices lose.

    Args:
        features: (N, D), raw.
        others: (N, k), neighbours by the cosine of the features, from `nearest_others`.
        candidates: (R, N), clusters of each candidate, ids from 0.

    Returns:
        Scores (R,), float64, in [-2, 2].

    Raises:
        ValueError: as in `neighbor_agreement`, or a feature is not finite.

    Examples:
        >>> rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> others = torch.tensor([[1], [0], [3], [2]])
        >>> candidates = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 1]])
        >>> cluster_scores(rows, others, candidates).argmax()
        tensor(1)
    """
    linked = assortativity(neighbor_agreement(others, candidates), candidates)
    rows = coordinates(features, fit_projection(features, COMPONENTS, "none"))
    return linked + silhouettes(rows, candidates)


def assortativity(agreements: Tensor, candidates: Tensor) -> Tensor:
    """Measure how much more often neighbours share a cluster than chance, as a share of the most.

    Newman 2003, "Mixing patterns in networks", Eq. 2, on the graph of nearest others with equal
    degrees: (a − Σ_j p_j²) / (1 − Σ_j p_j²), with the agreement a of `neighbor_agreement` and the
    shares p of the clusters.

    Args:
        agreements: a of each candidate, (R,), float64.
        candidates: (R, N), clusters of each candidate, ids from 0.

    Returns:
        (R,), float64: 1 where all neighbours share a cluster, 0 as by chance and for one cluster.

    Examples:
        >>> candidates = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1]])
        >>> assortativity(torch.ones(2, dtype=torch.float64), candidates)
        tensor([0., 1.], dtype=torch.float64)
    """
    shares = [torch.bincount(row).double().cpu() / len(row) for row in candidates]
    chance = torch.stack([each.square().sum() for each in shares])
    return torch.where(chance < 1, (agreements - chance) / (1 - chance), 0)


def silhouettes(rows: Tensor, candidates: Tensor) -> Tensor:
    """Measure how much nearer samples are to their own cluster than to the next one.

    Rousseeuw 1987: the mean over samples of (b - a) / max(a, b), with the mean Euclidean distance a
    to the other samples of the sample's cluster, and b to those of the nearest other cluster. A
    sample that is alone in its cluster has 0. Above 2,000 samples, every n-th is looked at, with
    its distances to all.

    Args:
        rows: (N, d).
        candidates: (R, N), clusters of each candidate, ids from 0.

    Returns:
        (R,), float64, in [-1, 1]; 0 for one cluster.

    Examples:
        >>> rows = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
        >>> silhouettes(rows, torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]))
        tensor([0.8885, 0.0000], dtype=torch.float64)
    """
    rows, candidates = rows.double().cpu(), candidates.cpu()
    picked = torch.arange(0, len(rows), max(1, -(-len(rows) // SILHOUETTES)))
    totals = torch.zeros(len(candidates), dtype=torch.float64)
    for some in torch.split(picked, max(1, SIMILARITIES_PER_CHUNK // (4 * len(rows)))):
        distances = torch.cdist(rows, rows[some])  # (N, n)
        distances.masked_fill_(distances < SAME, 0)
        for place, clusters in enumerate(candidates):
            totals[place] += _silhouettes(distances, clusters, clusters[some]).sum()
    return totals / len(picked)


def _silhouettes(distances: Tensor, clusters: Tensor, own: Tensor) -> Tensor:
    """Silhouettes (n,) of n samples, from their distances (N, n) to all and their clusters (n,)."""
    counts = torch.bincount(clusters).double()  # (K,)
    sums = distances.new_zeros(len(counts), distances.shape[1])
    sums.index_add_(0, clusters, distances)
    columns = torch.arange(len(own))
    within = sums[own, columns] / (counts[own] - 1).clamp_min(1)
    means = sums / counts.clamp_min(1).unsqueeze(1)
    means[counts == 0] = torch.inf
    means[own, columns] = torch.inf
    between = means.min(dim=0).values
    defined = (counts[own] > 1) & between.isfinite() & (torch.maximum(within, between) > 0)
    return torch.where(defined, (between - within) / torch.maximum(within, between), 0)


def _kmeans(rows: NDArray[np.float32], num_clusters: int, seed: int) -> Tensor:
    with warnings.catch_warnings():  # fewer distinct rows than clusters: some stay empty
        warnings.simplefilter("ignore", ConvergenceWarning)
        return torch.from_numpy(kmeans_clusters(rows, num_clusters, seed))


def _check_num_clusters(num_clusters: int, num_samples: int) -> None:
    if not 1 <= num_clusters <= num_samples:
        raise ValueError(
            f"num_clusters {num_clusters} is not between 1 and the {num_samples} samples; lower it "
            "or give more samples"
        )
