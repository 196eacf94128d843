"""Agreement of clusters with classes, all from one table of counts.

Shapes: N samples, K clusters, C classes; K and C may differ.
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def count_table(clusters: Tensor, labels: Tensor, num_clusters: int, num_classes: int) -> Tensor:
    """Count the samples of each cluster and class.

    Args:
        clusters: (N,), ids 0 to K - 1.
        labels: (N,), ids 0 to C - 1, or -1 for a sample without truth, which is not counted.
        num_clusters: K.
        num_classes: C.

    Returns:
        Table (K, C), int64. Tables of parts of a data set add up to the table of the whole.

    Raises:
        ValueError: the shapes disagree or an id is out of range.

    Examples:
        >>> count_table(torch.tensor([0, 0, 1]), torch.tensor([1, 1, -1]), 2, 2)
        tensor([[0, 2],
                [0, 0]])
    """
    if clusters.ndim != 1 or clusters.shape != labels.shape:
        raise ValueError(
            f"clusters (N,) = {tuple(clusters.shape)} and labels (N,) = {tuple(labels.shape)} "
            "differ; give one of each per sample"
        )
    _check_range("clusters", clusters, 0, num_clusters)
    _check_range("labels", labels, -1, num_classes)
    known = labels >= 0  # (N,)
    cell = clusters[known].long() * num_classes + labels[known].long()
    counts = torch.bincount(cell, minlength=num_clusters * num_classes)  # (K * C,)
    return counts.view(num_clusters, num_classes)


def match_clusters(table: Tensor) -> Tensor:
    """Match clusters with classes one to one, with the most samples in their cluster's class.

    Kuhn 1955, the Hungarian method.

    Args:
        table: (K, C), counts.

    Returns:
        Class of each cluster (K,), int64, on the CPU; -1 for the K - C clusters without a class if
        K > C.

    Examples:
        >>> match_clusters(torch.tensor([[0, 5], [1, 0], [7, 6]]))
        tensor([ 1, -1,  0])
    """
    rows, columns = linear_sum_assignment(table.cpu().numpy(), maximize=True)
    match = np.full(len(table), -1)
    match[rows] = columns
    return torch.from_numpy(match)


def scores_from_counts(table: Tensor) -> dict[str, float]:
    """Score clusters against classes in float64.

    acc is the share of samples in the class that `match_clusters` gives to their cluster. recall
    is the mean over classes of the share of their samples in that cluster, so that small classes
    count as much as large ones; a class without a cluster has 0. nmi is the mutual information
    divided by the geometric mean of the entropies, as in the SPICE paper (scikit-learn's default is
    the arithmetic mean). ari is the adjusted Rand index of Hubert and Arabie 1985. purity is the
    share of samples in the most frequent class of their cluster; it never falls when a cluster is
    split. It is for K > C, where acc leaves K - C clusters without a class.

    Args:
        table: (K, C), counts; empty rows and columns do not change the scores.

    Returns:
        acc, recall, nmi and purity in [0, 1] and ari in [-1, 1]; higher is better. One cluster and
        one class score 1, as in scikit-learn.

    Raises:
        ValueError: the table is empty.

    Examples:
        >>> scores_from_counts(torch.tensor([[0, 3], [2, 1]]))["acc"]
        0.8333333333333334
    """
    total = int(table.sum())
    if total == 0:
        raise ValueError("0 samples have a cluster and a label; ACC, NMI and ARI need at least 1")
    match = match_clusters(table)
    table = table.cpu()
    matched = match >= 0  # (K,)
    hits = int(table[matched, match[matched]].sum())
    purest = int(table.max(dim=1).values.sum())
    sizes = table.sum(dim=0)  # (C,)
    right = torch.zeros(len(sizes), dtype=torch.float64)
    right[match[matched]] = table[matched, match[matched]].double()
    return {
        "acc": hits / total,
        "recall": float((right[sizes > 0] / sizes[sizes > 0]).mean()),
        "nmi": _nmi(table),
        "ari": _ari(table),
        "purity": purest / total,
    }


def clustering_scores(clusters: Tensor, labels: Tensor) -> dict[str, float]:
    """Score clusters against classes; see `scores_from_counts`.

    Args:
        clusters: (N,), ids from 0.
        labels: (N,), ids from 0, or -1 for a sample without truth, which is not counted.

    Returns:
        acc, recall, nmi, ari, purity.

    Raises:
        ValueError: the shapes disagree, an id is out of range, or no sample has a label.

    Examples:
        >>> clustering_scores(torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1]))
        {'acc': 1.0, 'recall': 1.0, 'nmi': 1.0, 'ari': 1.0, 'purity': 1.0}
    """
    sizes = [int(ids.max()) + 1 if ids.numel() else 0 for ids in (clusters, labels)]
    return scores_from_counts(count_table(clusters, labels, *sizes))


def _nmi(table: Tensor) -> float:
    """Mutual information divided by the geometric mean of the entropies, of counts (K, C)."""
    # Sums of counts are exact, so a single cluster has share 1 and entropy 0, without rounding.
    shares = [counts.double() / table.sum() for counts in (table, table.sum(1), table.sum(0))]
    joint, rows, columns = shares  # (K, C), (K,), (C,)
    if (rows > 0).sum() == (columns > 0).sum() == 1:
        return 1.0
    some = joint > 0  # (K, C)
    log_ratio = joint[some].log() - torch.outer(rows, columns)[some].log()
    information = float((joint[some] * log_ratio).sum())
    entropies = float(torch.special.entr(rows).sum()) * float(torch.special.entr(columns).sum())
    return min(1.0, max(0.0, information) / math.sqrt(entropies)) if entropies > 0 else 0.0


def _ari(table: Tensor) -> float:
    """Adjusted Rand index of counts (K, C).

    In Python integers, because products of numbers of pairs exceed 2^63.
    """
    total = int(table.sum())
    both = _squares(table)
    same_cluster, same_class = _squares(table.sum(dim=1)), _squares(table.sum(dim=0))
    split, merged = same_class - both, same_cluster - both  # ordered pairs on which they differ
    together, apart = both - total, total**2 - same_cluster - same_class + both
    if split == merged == 0:
        return 1.0
    chance = (together + split) * (split + apart) + (together + merged) * (merged + apart)
    return 2 * (together * apart - split * merged) / chance


def _squares(counts: Tensor) -> int:
    return int(counts.long().square().sum())  # at most N^2: exact up to 3e9 samples


def _check_range(name: str, ids: Tensor, lowest: int, end: int) -> None:
    if ids.numel() and not (lowest <= int(ids.min()) and int(ids.max()) < end):
        raise ValueError(
            f"{name} lie in {int(ids.min())}..{int(ids.max())} and {lowest}..{end - 1} is allowed; "
            "number them from 0 and check the numbers of clusters and classes"
        )
