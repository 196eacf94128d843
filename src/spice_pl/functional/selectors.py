"""Selectors of semi-supervised methods: which samples are labelled.

A selector maps the embeddings and probabilities of all training samples, the results of any
clustering, to a `SelectedLabels`: labels (N,), -1 for samples that stay unlabelled. Only
`OracleLabels` reads true labels instead.

Shapes: N samples, D embedding width, K clusters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.functional.reliability import (
    Balance,
    local_consistency,
    neighbors_for,
    select_reliable,
)


@dataclass(frozen=True)
class SelectedLabels:
    """The labels that a selector gives, and what each of its rules let pass.

    Attributes:
        label: (N,), the cluster; -1 for a sample that stays unlabelled.
        passed: rule in words to the number of samples that pass it; empty where the selector has
            no thresholds.
    """

    label: Tensor
    passed: Mapping[str, int] = field(default_factory=dict)


def reliable_labels(
    embeddings: Tensor | None,
    probs: Tensor | None,
    num_clusters: int,
    generator: torch.Generator | None = None,
    *,
    num_neighbors: int = 100,
    agreement: float = 0.95,
    confidence: float = 0.99,
    balance: Balance = "min",
) -> SelectedLabels:
    """Label the reliable samples with their most probable cluster.

    Niu et al. 2022 (SPICE), Eqs. 6-7.

    Args:
        embeddings: (N, D).
        probs: (N, K), rows sum to one.
        num_clusters: K.
        generator: random generator of the draw among the reliable samples of large clusters.
        num_neighbors: see `reliable_mask`; fewer for small clusters, see `neighbors_for` and,
            unless balance is "min", `by_size` of `local_consistency`.
        agreement: see `reliable_mask`.
        confidence: see `reliable_mask`.
        balance: see `reliable_mask`.

    Returns:
        Labels (N,), -1 for unreliable samples.

    Raises:
        ValueError: embeddings or probs are missing, or as in `reliable_mask`.

    Examples:
        >>> embeddings = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.1, 0.9], [0.0, 1.0]])
        >>> probs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.4], [0.0, 1.0]])
        >>> reliable_labels(embeddings, probs, 2, num_neighbors=2).label
        tensor([ 0,  0, -1, -1])
    """
    probs = _needed("probs", probs)
    embeddings = _needed("embeddings", embeddings)
    num_neighbors = neighbors_for(num_neighbors, len(embeddings), num_clusters)
    confidences, clusters = probs.max(dim=1)  # (N,) each
    by_size = balance != "min"  # with "min" a stray cluster of few would cut the labels of all
    agreements = local_consistency(embeddings, clusters, num_neighbors, by_size=by_size)  # Eq. 6
    reliable = select_reliable(
        agreements,
        confidences,
        clusters,
        agreement=agreement,
        confidence=confidence,
        balance=balance,
        generator=generator,
    )  # Eq. 7
    agrees, sure = agreements >= agreement, confidences > confidence
    passed = {
        f"agreement of {num_neighbors} neighbours ≥ {agreement}": int(agrees.sum()),
        f"confidence > {confidence}": int(sure.sum()),
        "both": int((agrees & sure).sum()),
    }
    return SelectedLabels(torch.where(reliable, clusters, -1), passed)


def clusmatch_labels(
    embeddings: Tensor | None,
    probs: Tensor | None,
    num_clusters: int,
    generator: torch.Generator | None = None,
    *,
    fraction: float = 0.1,
    branch: Literal["auto", "head", "features"] = "auto",
) -> SelectedLabels:
    """Label the most confident samples of each cluster, as ClusMatch selects them.

    Args:
        embeddings: (N, D), read by the branch "features".
        probs: (N, K), rows sum to one; read by the branch "head".
        num_clusters: K.
        generator: random generator of k-means and of the draw among samples of equal score.
        fraction: p, in (0, 1]; at most ⌊⌊N/K⌋·p⌋ samples per cluster are labelled.
        branch: "head" selects, in each predicted cluster, the samples with the largest variance of
            their probabilities over clusters; "features" runs k-means by cosine and selects the
            samples nearest to each centre; "auto" is "head" if there are probabilities, else
            "features".

    Returns:
        Labels (N,), -1 for samples that are not selected. In the branch "features" they are the
        clusters of k-means.

    Raises:
        ValueError: the input of the branch is missing, or fraction is above 1 or gives 0 labels
            per cluster.

    Examples:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]])
        >>> clusmatch_labels(None, probs, 2, fraction=0.5).label
        tensor([ 0, -1, -1,  1])
    """
    if branch not in ("auto", "head", "features"):
        raise ValueError(f"branch {branch!r} is unknown; choose auto, head or features")
    if branch == "head" or (branch == "auto" and probs is not None):
        probs = _needed("probs", probs)
        score, clusters = probs.var(dim=1), probs.argmax(dim=1)
        return SelectedLabels(best_of_each(score, clusters, num_clusters, fraction, generator))
    embeddings = _needed("embeddings", embeddings)
    clusters, centres = cosine_kmeans(embeddings, num_clusters, generator=generator)
    near = torch.nn.functional.cosine_similarity(embeddings, centres[clusters], dim=1)
    return SelectedLabels(best_of_each(near, clusters, num_clusters, fraction, generator))


def confident_labels(
    embeddings: Tensor | None,
    probs: Tensor | None,
    num_clusters: int,
    generator: torch.Generator | None = None,
    *,
    fraction: float = 0.1,
) -> SelectedLabels:
    """Label the samples with the largest max p in each predicted cluster.

    Args:
        embeddings: not read.
        probs: (N, K), rows sum to one.
        num_clusters: K.
        generator: random generator of the draw among samples of equal max p.
        fraction: number in (0, 1]; at most ⌊⌊N/K⌋·fraction⌋ samples per cluster are labelled.

    Returns:
        Labels (N,), -1 for samples that are not selected.

    Raises:
        ValueError: probs are missing, or fraction is above 1 or gives 0 labels per cluster.

    Examples:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.0, 1.0]])
        >>> confident_labels(None, probs, 2, fraction=0.5).label
        tensor([ 0, -1, -1,  1])
    """
    confidence, clusters = _needed("probs", probs).max(dim=1)
    return SelectedLabels(best_of_each(confidence, clusters, num_clusters, fraction, generator))


def random_labels(
    embeddings: Tensor | None,
    probs: Tensor | None,
    num_clusters: int,
    generator: torch.Generator | None = None,
    *,
    fraction: float = 0.1,
) -> SelectedLabels:
    """Label random samples of each predicted cluster, as a baseline for other selectors.

    Args:
        embeddings: not read.
        probs: (N, K), rows sum to one.
        num_clusters: K.
        generator: random generator of the draw.
        fraction: number in (0, 1]; at most ⌊⌊N/K⌋·fraction⌋ samples per cluster are labelled.

    Returns:
        Labels (N,), -1 for samples that are not selected.

    Raises:
        ValueError: probs are missing, or fraction is above 1 or gives 0 labels per cluster.

    Examples:
        >>> label = random_labels(None, torch.eye(2).repeat(50, 1), 2, fraction=0.1).label
        >>> label[label >= 0].bincount()
        tensor([5, 5])
    """
    clusters = _needed("probs", probs).argmax(dim=1)
    score = torch.zeros(len(clusters))
    return SelectedLabels(best_of_each(score, clusters, num_clusters, fraction, generator))


@dataclass(frozen=True)
class OracleLabels:
    """True labels, for ordinary semi-supervised learning or as the supervised upper bound.

    A method that trains on them is not unsupervised; results must say that they were used.

    Attributes:
        num_labels: number of labels over all classes, the same for each class (rounded down); None
            labels every sample.

    Examples:
        >>> label = OracleLabels(num_labels=4)(torch.arange(100) % 2).label
        >>> label[label >= 0].bincount()
        tensor([2, 2])
    """

    num_labels: int | None = None

    def __call__(self, truth: Tensor, generator: torch.Generator | None = None) -> SelectedLabels:
        """Return labels (N,) of a class-balanced random draw, -1 for samples that are not drawn.

        Args:
            truth: (N,), class ids, -1 if unknown.
            generator: random generator of the draw; torch's default generator if None.

        Raises:
            ValueError: there are fewer labels than classes.
        """
        if self.num_labels is None:
            return SelectedLabels(truth)
        classes = torch.bincount(truth[truth >= 0]).nonzero()[:, 0]
        per_class = self.num_labels // max(1, len(classes))
        if not per_class:
            raise ValueError(
                f"num_labels {self.num_labels} gives 0 labels for each of {len(classes)} classes; "
                f"raise it to at least {max(1, len(classes))}"
            )
        label = torch.full_like(truth, -1)
        draws = torch.rand(len(truth), generator=generator)
        for each in classes:
            members = (truth == each).nonzero()[:, 0]
            label[members[draws[members].argsort()[:per_class]]] = each
        return SelectedLabels(label)


def best_of_each(
    score: Tensor,
    clusters: Tensor,
    num_clusters: int,
    fraction: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Label the samples with the largest scores in each cluster, ⌊⌊N/K⌋·fraction⌋ per cluster.

    Among equal scores the draw is random: trained probabilities saturate at 1, and files are often
    in the order of their classes, so the first ones would be a biased choice.

    Args:
        score: (N,), larger is more confident.
        clusters: (N,), ids 0 to K - 1.
        num_clusters: K.
        fraction: p, in (0, 1].
        generator: random generator of the draw; torch's default generator if None.

    Returns:
        Labels (N,): the cluster of a selected sample, -1 for the others. In a cluster with fewer
        samples than that, all are selected.

    Raises:
        ValueError: fraction is above 1 or gives 0 labels per cluster.

    Examples:
        >>> best_of_each(torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]), 2, 0.5)
        tensor([-1,  0, -1,  1])
    """
    share = len(score) // num_clusters
    budget = math.floor(share * fraction + 1e-9)  # 0.29 · 100 is 28.999... in binary
    if budget < 1 or fraction > 1:
        raise ValueError(
            f"fraction {fraction} of {share} samples per cluster gives {budget} labels; choose a "
            f"fraction from {1 / max(1, share):.3g} to 1"
        )
    device = generator.device if generator is not None else "cpu"
    drawn = torch.randperm(len(score), generator=generator, device=device).to(score.device)
    order = drawn[score[drawn].argsort(descending=True, stable=True)].to(clusters.device)
    label = torch.full_like(clusters, -1)
    for cluster in range(num_clusters):
        label[order[clusters[order] == cluster][:budget]] = cluster
    return label


def _needed(what: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(
            f"this selector reads {what} and the upstream has none; choose another upstream or "
            "another selector"
        )
    return value
