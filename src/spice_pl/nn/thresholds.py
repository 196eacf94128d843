"""Whose guess is learnt: thresholds of semi-supervised methods, with their running statistics.

A threshold first learns from the weak view's probabilities of the whole batch, of all ranks, and
then weighs those of its own rank. Labels are always the weak view's most probable clusters.

Shapes: N images, U unlabelled images of a batch, K clusters.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Threshold(nn.Module):
    """A weight in [0, 1] for every guess; a new method is a subclass and a YAML file.

    Attributes:
        learns: whether `update` does anything; if not, ranks need not share their batches.
        supports: names of the extra losses whose statistics it keeps.
    """

    learns = True
    supports: frozenset[str] = frozenset()
    shares: "ClusterShares"

    def begin(self, num_images: int) -> None:
        """Make room for what is kept of every image, before training or resuming."""

    def update(self, index: Tensor, probs: Tensor) -> None:
        """Learn from a global batch: positions (U,) in the data set and probabilities (U, K)."""

    def forward(self, probs: Tensor) -> Tensor:
        """Return the weight (U,) of each sample's most probable cluster."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """Return the confidence (K,) that each cluster asks for now."""
        raise NotImplementedError

    def negatives(self, probs: Tensor, kept: Tensor) -> Tensor:
        """Return which clusters (U, K) are ruled out, never the most probable and never `kept`."""
        raise NotImplementedError


class FixedThreshold(Threshold):
    """Sohn et al. 2020 (FixMatch): one number for all clusters and times.

    Args:
        confidence: η.

    Examples:
        >>> FixedThreshold(0.95)(torch.tensor([[0.96, 0.04], [0.6, 0.4]]))
        tensor([1., 0.])
    """

    learns = False

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__()
        self.confidence = confidence

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 for the samples that are sure enough, else 0, (U,)."""
        return (probs.max(dim=1).values >= self.confidence).to(probs.dtype)


class ClusterShares(nn.Module):
    """Running mean prediction p̃ and running histogram h̃ of clusters (FreeMatch, Eqs. 7 and 11).

    Args:
        num_clusters: K.
        momentum: share that stays.
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
        """Learn from the probabilities (U, K) of a global batch."""
        counts = torch.bincount(probs.argmax(dim=1), minlength=probs.shape[1])  # (K,)
        self.mean_probs.lerp_(probs.mean(dim=0), 1 - self.momentum)
        self.histogram.lerp_(counts / len(probs), 1 - self.momentum)


class FreeMatchThreshold(Threshold):
    """Wang et al. 2023 (FreeMatch), Eqs. 5-8: a running global level, lower for rare clusters.

    Args:
        num_clusters: K.
        momentum: share of the statistics that stays.

    Examples:
        >>> threshold = FreeMatchThreshold(num_clusters=2, momentum=0.0)
        >>> threshold.update(torch.arange(2), torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
        >>> threshold.levels()  # mean confidence 0.8, times mean probability over its largest
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
        """Move level and shares towards the batch."""
        self.level.lerp_(probs.max(dim=1).values.mean(), 1 - self.momentum)
        self.shares.update(probs)

    def levels(self) -> Tensor:
        """Return τ·p̃/max p̃, (K,)."""
        return self.level * self.shares.mean_probs / self.shares.mean_probs.max()

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 where the confidence reaches its cluster's level, (U,)."""
        confidence, label = probs.max(dim=1)
        return (confidence >= self.levels()[label]).to(probs.dtype)


class FlexMatchThreshold(Threshold):
    """Zhang et al. 2021 (FlexMatch), Eqs. 5-11: lower for clusters that few images are sure of.

    Args:
        num_clusters: K.
        confidence: η, of the clusters that are learnt best.

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
        """Remember the last label that each image was sure of; -1 for none, all at the start."""
        self.register_buffer("last_label", torch.full((num_images,), -1))

    @torch.no_grad()
    def update(self, index: Tensor, probs: Tensor) -> None:
        """Note the labels of the batch's sure images."""
        confidence, label = probs.max(dim=1)
        before = self.last_label[index]
        self.last_label[index] = torch.where(confidence >= self.confidence, label, before)

    def levels(self) -> Tensor:
        """Return η·β/(2 − β), (K,), with images that were never sure counted as a cluster."""
        counts = torch.bincount(self.last_label + 1, minlength=self.num_clusters + 1)
        status = counts[1:] / counts.max()  # (K,), β
        return self.confidence * status / (2 - status)

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 where the confidence reaches its cluster's level, (U,)."""
        confidence, label = probs.max(dim=1)
        return (confidence >= self.levels()[label]).to(probs.dtype)


class SoftMatchThreshold(Threshold):
    """Chen et al. 2023 (SoftMatch), Eqs. 6-9: a truncated Gaussian weight of aligned confidences.

    Uniform alignment changes weights alone, never labels.

    Args:
        num_clusters: K.
        num_sigmas: n_σ; the weight falls with (n_σ (confidence − μ) / σ)² / 2 below μ.
        momentum: share of the statistics that stays.

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
        """Move mean prediction, then mean and variance of the aligned confidence."""
        self.mean_probs.lerp_(probs.mean(dim=0), 1 - self.momentum)
        confidence = self._aligned(probs).max(dim=1).values
        self.mean.lerp_(confidence.mean(), 1 - self.momentum)
        spread = confidence.var(correction=min(1, len(confidence) - 1))
        self.variance.lerp_(spread, 1 - self.momentum)

    def levels(self) -> Tensor:
        """Return μ for every cluster, (K,)."""
        return self.mean.expand(self.num_clusters)

    def forward(self, probs: Tensor) -> Tensor:
        """Return the weight of each sample, 1 above the mean confidence, (U,)."""
        below = (self._aligned(probs).max(dim=1).values - self.mean).clamp_max(0)
        smallest = torch.finfo(probs.dtype).tiny  # all confidences equal: a weight of 0 or 1
        scaled = below.square() * self.num_sigmas**2 / (2 * self.variance.clamp_min(smallest))
        return (-scaled).exp()

    def _aligned(self, probs: Tensor) -> Tensor:
        """Scale clusters so that their mean would be uniform, (U, K)."""
        tiny = torch.finfo(probs.dtype).tiny
        return F.normalize(probs / self.mean_probs.clamp_min(tiny) / self.num_clusters, p=1, dim=1)


class ClusMatchThreshold(Threshold):
    """ClusMatch's positive and negative thresholds, from one matrix T (K, K).

    T[c, j] is the running mean probability of cluster j among the samples of cluster c: below it
    j is ruled out; 1 − Σ_j T[c, j] is the confidence that makes a label. The diagonal stays 0.

    Args:
        num_clusters: K.
        momentum: share of T that stays.
        empty_rows: "hold" leaves the row of a cluster that the batch does not hold; "decay", as
            the authors' code, moves it towards 0 and so its positive threshold towards 1.

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
        """Move the rows of T towards the batch's mean probabilities."""
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
        """Return the positive thresholds (K,)."""
        return 1 - self.matrix.sum(dim=1)

    def forward(self, probs: Tensor) -> Tensor:
        """Return 1 where the confidence reaches its cluster's positive threshold, (U,)."""
        confidence, label = probs.max(dim=1)
        return (confidence >= self.levels()[label]).to(probs.dtype)

    def negatives(self, probs: Tensor, kept: Tensor) -> Tensor:
        """Return N (U, K); kept (U,) is -1 for samples without a second label."""
        label = probs.argmax(dim=1)
        clusters = torch.arange(len(self.matrix), device=probs.device)
        is_kept = (clusters == label[:, None]) | (clusters == kept[:, None])  # (U, K)
        return (probs < self.matrix[label]) & ~is_kept
