"""Which samples get a label: selectors of semi-supervised methods.

Each maps the embeddings and probabilities of all training samples, as a clustering left them, to a
`SelectedLabels`. `OracleLabels` is different: it alone reads true labels.

Shapes: N samples, D embedding width, K clusters.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spice_pl.functional.kmeans import cosine_kmeans
from spice_pl.functional.reliability import Balance, local_consistency, select_reliable


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
    """Label the samples whose neighbours and head agree: SPICE, Eqs. 6-7.

    Args:
        embeddings: (N, D).
        probs: (N, K).
        num_clusters: K.
        generator: of the draw among reliable samples of large clusters.
        num_neighbors: N_s in `local_consistency`, the sample itself counted; N where there are
            fewer samples.
        agreement: λ in `select_reliable`.
        confidence: least max p in `select_reliable`, itself not enough.
        balance: number of reliable samples that a cluster keeps, see `select_reliable`.

    Returns:
        Labels, and how many samples pass each threshold before balancing.

    Raises:
        ValueError: embeddings or probs are missing.
    """
    probs = _needed("probs", probs)
    embeddings = _needed("embeddings", embeddings)
    num_neighbors = min(num_neighbors, len(embeddings))
    confidences, clusters = probs.max(dim=1)  # (N,) each
    agreements = local_consistency(embeddings, clusters, num_neighbors)  # Eq. 6
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
    """Label each cluster's surest samples: ClusMatch, both branches.

    Args:
        embeddings: (N, D), read by the feature branch.
        probs: (N, K), read by the head branch.
        num_clusters: K.
        generator: of k-means in the feature branch, and of the lot between equal samples.
        fraction: p; a cluster labels at most ⌊⌊N/K⌋·p⌋ samples.
        branch: "head" keeps the largest variance of the probabilities over clusters, in each
            predicted cluster; "features" runs k-means and keeps the nearest to each centre;
            "auto" is "head" where there are probabilities.

    Returns:
        Labels of the selected samples.

    Raises:
        ValueError: what the branch reads is missing, or the budget is 0 samples a cluster.

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
    """Label the samples of largest probability in each predicted cluster.

    Args:
        embeddings: not read.
        probs: (N, K).
        num_clusters: K.
        generator: of the lot between equal probabilities.
        fraction: a cluster labels at most ⌊⌊N/K⌋·fraction⌋ samples.

    Returns:
        Labels of the selected samples.

    Raises:
        ValueError: probs are missing, or the budget is 0 samples a cluster.
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
    """Label a random draw of each predicted cluster: what a selector is compared with.

    Args:
        embeddings: not read.
        probs: (N, K).
        num_clusters: K.
        generator: of the draw.
        fraction: a cluster labels at most ⌊⌊N/K⌋·fraction⌋ samples.

    Returns:
        Labels of the selected samples.

    Raises:
        ValueError: probs are missing, or the budget is 0 samples a cluster.
    """
    clusters = _needed("probs", probs).argmax(dim=1)
    score = torch.zeros(len(clusters))
    return SelectedLabels(best_of_each(score, clusters, num_clusters, fraction, generator))


@dataclass(frozen=True)
class OracleLabels:
    """True labels: ordinary semi-supervised learning, or the supervised upper line.

    No unsupervised method: whoever trains on it must say so.

    Attributes:
        num_labels: of all classes together, shared evenly; None labels every sample.
    """

    num_labels: int | None = None

    def __call__(self, truth: Tensor, generator: torch.Generator | None = None) -> SelectedLabels:
        """Return the labels of a class-balanced random draw; truth (N,) is -1 where unknown.

        Raises:
            ValueError: there are fewer labels than classes.
        """
        if self.num_labels is None:
            return SelectedLabels(truth)
        classes = torch.bincount(truth[truth >= 0]).nonzero()[:, 0]
        per_class = self.num_labels // max(1, len(classes))
        if not per_class:
            raise ValueError(
                f"num_labels {self.num_labels} gives none for each of {len(classes)} classes; ask "
                f"for at least {max(1, len(classes))}"
            )
        label = torch.full_like(truth, -1)
        tickets = torch.rand(len(truth), generator=generator)
        for each in classes:
            members = (truth == each).nonzero()[:, 0]
            label[members[tickets[members].argsort()[:per_class]]] = each
        return SelectedLabels(label)


def best_of_each(
    score: Tensor,
    clusters: Tensor,
    num_clusters: int,
    fraction: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Label the samples of largest score in each cluster, ⌊⌊N/K⌋·fraction⌋ of them.

    Equal scores go by lot: trained probabilities saturate at 1, and files are often in the order of
    their classes.

    Args:
        score: (N,), larger is surer.
        clusters: (N,), ids 0 to K - 1.
        num_clusters: K.
        fraction: p, in (0, 1].
        generator: of the lot; torch's default generator if None.

    Returns:
        Labels (N,), the cluster where selected and -1 elsewhere; a cluster smaller than the budget
        gives all it has, an empty one nothing.

    Raises:
        ValueError: the budget is 0 samples a cluster, or fraction is above 1.

    Examples:
        >>> best_of_each(torch.tensor([1.0, 3.0, 2.0, 0.0]), torch.tensor([0, 0, 0, 1]), 2, 0.5)
        tensor([-1,  0, -1,  1])
    """
    share = len(score) // num_clusters
    budget = math.floor(share * fraction + 1e-9)  # 0.29 · 100 is 28.999... in binary
    if budget < 1 or fraction > 1:
        raise ValueError(
            f"fraction {fraction} of {share} samples a cluster gives {budget} labels; choose a "
            f"fraction from {1 / max(1, share):.3g} to 1"
        )
    device = generator.device if generator is not None else "cpu"
    lot = torch.randperm(len(score), generator=generator, device=device).to(score.device)
    order = lot[score[lot].argsort(descending=True, stable=True)].to(clusters.device)
    label = torch.full_like(clusters, -1)
    for cluster in range(num_clusters):
        label[order[clusters[order] == cluster][:budget]] = cluster
    return label


def _needed(what: str, value: Tensor | None) -> Tensor:
    if value is None:
        raise ValueError(
            f"this selector reads {what} and the upstream has none; take another upstream or "
            "another selector"
        )
    return value
