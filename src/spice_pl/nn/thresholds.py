"""Thresholds of semi-supervised methods: which predictions on unlabelled images are trained on.

In each step a threshold first updates its statistics with the weak view's probabilities of the
whole batch, gathered from all ranks, and then gives a weight to each sample of its own rank. The
label of a sample is always the most probable cluster of its weak view.

Shapes: N images, U unlabelled images of a batch, K clusters.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spice_pl.functional.device import cluster_sizes


class Threshold(nn.Module):
    """Weight in [0, 1] of the label of each unlabelled sample.

    A new method is a subclass and a YAML file.

    Attributes:
        learns: whether `update` changes anything; if not, batches are not gathered over ranks.
        supports: names of the extra losses for which it keeps statistics.
        shares: running shares of the clusters, where `supports` has "fairness".
    """

    learns = True
    supports: frozenset[str] = frozenset()
    shares: "ClusterShares"

    def begin(self, num_images: int) -> None:
        """Allocate the statistics that are kept per image; called before training or resuming."""

    def update(self, index: Tensor, probs: Tensor) -> None:
        """Update the statistics with the batch of all ranks.

        Args:
            index: (U,), positions of the images in the data set, 0 to N - 1.
            probs: (U, K), probabilities of the weak view.
        """

    def forward(self, probs: Tensor) -> Tensor:
        """Return the weight (U,), in [0, 1], of each sample with probabilities probs (U, K)."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """Return the confidence (K,) that a label of each cluster needs at present."""
        raise NotImplementedError

    def negatives(self, probs: Tensor, kept: Tensor) -> Tensor:
        """Return the mask (U, K) of the clusters that are ruled out for each sample.

        Args:
            probs: (U, K), probabilities of the weak view; the most probable cluster is kept.
            kept: (U,), another cluster that is kept, -1 for none.
        """
        raise NotImplementedError


class FixedThreshold(Threshold):
    """One threshold for all clusters, constant during training.

    Niu et al. 2022 (SPICE), Eq. 8; Sohn et al. 2020 (FixMatch), Eq. 4.

    Args:
        confidence: η, smallest max p that makes a label, in [0, 1].

    Examples:
        >>> FixedThreshold(0.95)(torch.tensor([[0.96, 0.04], [0.6, 0.4]]))
        tensor([1., 0.])
    """

    learns = False

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__()
        self.confidence = confidence

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 for samples with max p ≥ η, else 0, (U,)."""
        return (probs.max(dim=1).values >= self.confidence).to(probs.dtype)


class ClusterShares(nn.Module):
    """Running mean prediction p̃ and running histogram h̃ of predicted clusters, (K,) each.

    Wang et al. 2023 (FreeMatch), Eqs. 7 and 11.

    Args:
        num_clusters: number of clusters K.
        momentum: share of the statistics that stays in an update.
    """

    mean_probs: Tensor
    histogram: Tensor

    def __init__(self, num_clusters: int, momentum: float = 0.999) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean_probs", torch.full((num_clusters,), 1 / num_clusters))
        self.register_buffer("histogram", torch.full((num_clusters,), 1 / num_clusters))

    @torch.no_grad()
    def update(self, probs: Tensor) -> None:
        """Update the statistics with the probabilities (U, K) of the batch of all ranks."""
        counts = cluster_sizes(probs.argmax(dim=1), probs.shape[1])  # (K,)
        self.mean_probs.lerp_(probs.mean(dim=0), 1 - self.momentum)
        self.histogram.lerp_(counts / len(probs), 1 - self.momentum)


class FreeMatchThreshold(Threshold):
    """Running mean confidence τ, lowered for clusters with a small mean probability.

    Wang et al. 2023 (FreeMatch), Eqs. 5-8.

    Args:
        num_clusters: number of clusters K.
        momentum: share of the statistics that stays in an update.

    Examples:
        >>> threshold = FreeMatchThreshold(num_clusters=2, momentum=0.0)
        >>> threshold.update(torch.arange(2), torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
        >>> threshold.levels()  # τ = 0.8, p̃ = 0.8 and 0.2
        tensor([0.8000, 0.2000])
    """

    supports = frozenset({"fairness"})
    level: Tensor

    def __init__(self, num_clusters: int, momentum: float = 0.999) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("level", torch.tensor(1 / num_clusters))  # τ
        self.shares = ClusterShares(num_clusters, momentum)

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> None:
        """Move τ, p̃ and h̃ towards the values of the batch."""
        self.level.lerp_(probs.max(dim=1).values.mean(), 1 - self.momentum)
        self.shares.update(probs)

    def levels(self) -> Tensor:
        """Return τ·p̃/max p̃, (K,)."""
        return self.level * self.shares.mean_probs / self.shares.mean_probs.max()

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 for samples whose max p reaches the level of their cluster, else 0, (U,)."""
        confidence, label = probs.max(dim=1)
        return (confidence >= self.levels()[label]).to(probs.dtype)


class FlexMatchThreshold(Threshold):
    """Threshold that is lower for clusters with few confident images.

    Zhang et al. 2021 (FlexMatch), Eqs. 5-11.

    Args:
        num_clusters: number of clusters K.
        confidence: η, largest threshold of a cluster; an image is confident if its max p reaches η.

    Examples:
        >>> threshold = FlexMatchThreshold(num_clusters=2)
        >>> threshold.begin(num_images=3)
        >>> sure = torch.tensor([[0.99, 0.01], [0.99, 0.01], [0.01, 0.99]])
        >>> threshold.update(torch.arange(3), sure)
        >>> threshold.levels()  # β = 1 and 1/2, β / (2 - β) = 1 and 1/3
        tensor([0.9500, 0.3167])
    """

    last_label: Tensor

    def __init__(self, num_clusters: int, confidence: float = 0.95) -> None:
        super().__init__()
        self.num_clusters, self.confidence = num_clusters, confidence

    def begin(self, num_images: int) -> None:
        """Allocate the last confident label of each image, (N,); -1 for none, as at the start."""
        self.register_buffer("last_label", torch.full((num_images,), -1))

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> None:
        """Store the labels of the confident images of the batch."""
        confidence, label = probs.max(dim=1)
        before = self.last_label[index]
        self.last_label[index] = torch.where(confidence >= self.confidence, label, before)

    def levels(self) -> Tensor:
        """Return η·β/(2 − β), (K,).

        β is the number of images whose last confident label is the cluster, divided by that of the
        largest cluster; images that were never confident count as one more cluster.
        """
        counts = cluster_sizes(self.last_label + 1, self.num_clusters + 1)
        status = counts[1:] / counts.max()  # (K,), β
        return self.confidence * status / (2 - status)

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 for samples whose max p reaches the level of their cluster, else 0, (U,)."""
        confidence, label = probs.max(dim=1)
        return (confidence >= self.levels()[label]).to(probs.dtype)


class SoftMatchThreshold(Threshold):
    """Weight that falls like a Gaussian for confidences below their running mean.

    Chen et al. 2023 (SoftMatch), Eqs. 6-9. Confidences are those of probabilities after uniform
    alignment, which changes weights but not labels.

    Args:
        num_clusters: number of clusters K.
        num_sigmas: n_σ; below μ the weight is exp(−(n_σ (confidence − μ) / σ)² / 2).
        momentum: share of the statistics that stays in an update.

    Examples:
        >>> threshold = SoftMatchThreshold(num_clusters=2, momentum=0.0)
        >>> probs = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.7, 0.3], [0.3, 0.7]])
        >>> threshold.update(torch.arange(4), probs)
        >>> threshold(probs)  # μ = 0.8; below it the weight falls
        tensor([1.0000, 1.0000, 0.2231, 0.2231])
    """

    mean_probs: Tensor
    mean: Tensor
    variance: Tensor

    def __init__(self, num_clusters: int, num_sigmas: float = 2.0, momentum: float = 0.999) -> None:
        super().__init__()
        self.num_clusters, self.num_sigmas, self.momentum = num_clusters, num_sigmas, momentum
        self.register_buffer("mean_probs", torch.full((num_clusters,), 1 / num_clusters))
        self.register_buffer("mean", torch.tensor(1 / num_clusters))  # μ
        self.register_buffer("variance", torch.tensor(1.0))  # σ²

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> None:
        """Move the mean prediction, then mean and variance of the aligned confidences."""
        self.mean_probs.lerp_(probs.mean(dim=0), 1 - self.momentum)
        confidence = self._aligned(probs).max(dim=1).values
        self.mean.lerp_(confidence.mean(), 1 - self.momentum)
        spread = confidence.var(correction=min(1, len(confidence) - 1))
        self.variance.lerp_(spread, 1 - self.momentum)

    def levels(self) -> Tensor:
        """Return μ for every cluster, (K,)."""
        return self.mean.expand(self.num_clusters)

    def forward(self, probs: Tensor) -> Tensor:
        """Return the weight of each sample, (U,), 1 at and above the mean confidence."""
        below = (self._aligned(probs).max(dim=1).values - self.mean).clamp_max(0)
        smallest = torch.finfo(probs.dtype).tiny  # if all confidences are equal, weights are 0 or 1
        scaled = below.square() * self.num_sigmas**2 / (2 * self.variance.clamp_min(smallest))
        return (-scaled).exp()

    def _aligned(self, probs: Tensor) -> Tensor:
        """Divide probabilities by the mean prediction and normalise the rows, (U, K)."""
        tiny = torch.finfo(probs.dtype).tiny
        return F.normalize(probs / self.mean_probs.clamp_min(tiny) / self.num_clusters, p=1, dim=1)


class ClusMatchThreshold(Threshold):
    """ClusMatch's positive and negative thresholds, from one matrix T (K, K).

    T[c, j], for j ≠ c, is the running mean probability of cluster j among the samples whose most
    probable cluster is c; the diagonal stays 0. It is the negative threshold τ⁻(c, j), below which
    j is ruled out. τ⁺(c) = 1 − Σ_j T[c, j] is the positive threshold: the confidence that makes a
    label.

    Args:
        num_clusters: number of clusters K.
        momentum: share of T that stays in an update.
        empty_rows: update of the row of a cluster without samples in the batch: "hold" leaves it;
            "decay", as in the authors' code, moves it towards 0 and so τ⁺ towards 1.

    Examples:
        >>> threshold = ClusMatchThreshold(num_clusters=4)
        >>> threshold.levels()  # 1 / K
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """

    supports = frozenset({"negative", "fairness"})
    matrix: Tensor

    def __init__(
        self,
        num_clusters: int,
        momentum: float = 0.999,
        empty_rows: Literal["hold", "decay"] = "hold",
    ) -> None:
        super().__init__()
        if empty_rows not in ("hold", "decay"):
            raise ValueError(f"empty_rows {empty_rows!r} is unknown; choose hold or decay")
        self.momentum, self.empty_rows = momentum, empty_rows
        self.register_buffer("matrix", (1 - torch.eye(num_clusters)) / num_clusters)  # (K, K)
        self.shares = ClusterShares(num_clusters, momentum)

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> None:
        """Move the rows of T towards the mean probabilities of the batch."""
        num_clusters = len(self.matrix)
        member = F.one_hot(probs.argmax(dim=1), num_clusters).to(probs.dtype)  # (U, K)
        counts = member.sum(dim=0)  # (K,)
        means = (member.T @ probs) / counts.clamp_min(1)[:, None]  # (K, K), V
        means.fill_diagonal_(0)
        if self.empty_rows == "hold":
            means = torch.where(counts[:, None] > 0, means, self.matrix)
        self.matrix.lerp_(means, 1 - self.momentum)
        self.shares.update(probs)

    def levels(self) -> Tensor:
        """Return the positive thresholds τ⁺, (K,)."""
        return 1 - self.matrix.sum(dim=1)

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 for samples whose max p reaches τ⁺ of their cluster, else 0, (U,)."""
        confidence, label = probs.max(dim=1)
        return (confidence >= self.levels()[label]).to(probs.dtype)

    def negatives(self, probs: Tensor, kept: Tensor) -> Tensor:
        """Return the mask N (U, K) of the clusters j with p_j < τ⁻, as in `Threshold.negatives`."""
        label = probs.argmax(dim=1)
        clusters = torch.arange(len(self.matrix), device=probs.device)
        is_kept = (clusters == label[:, None]) | (clusters == kept[:, None])  # (U, K)
        return (probs < self.matrix[label]) & ~is_kept
