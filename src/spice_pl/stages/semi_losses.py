"""Extra losses of semi-supervised methods, on the unlabelled images of a batch.

Shapes: U unlabelled images of a batch, K clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from spice_pl.functional.consistency import (
    negative_cross_entropy,
    self_adaptive_fairness,
    weighted_cross_entropy,
)
from spice_pl.nn.thresholds import Threshold


@dataclass
class Unlabelled:
    """What an extra loss reads of the unlabelled images of a batch.

    Attributes:
        logits: (U, K) of the strong view, float32; all gradients flow through it.
        probs: (U, K) of the weak view, without gradient.
        label: (U,) most probable cluster of the weak view.
        weight: (U,) weight that the threshold gives to that label, 0 to 1.
        kmeans_label: (U,) from k-means on the features of the averaged model, -1 where none.
        threshold: threshold, for its statistics.
    """

    logits: Tensor
    probs: Tensor
    label: Tensor
    weight: Tensor
    kmeans_label: Tensor
    threshold: Threshold


def _kmeans_loss(batch: Unlabelled) -> Tensor:
    """L_kpl of ClusMatch: confident images learn their k-means label too."""
    known = batch.kmeans_label >= 0  # extra images have no k-means label
    return weighted_cross_entropy(batch.logits, batch.kmeans_label, batch.weight * known)


def _negative_loss(batch: Unlabelled) -> Tensor:
    """L_npl of ClusMatch: no image is in the clusters that its weak view rules out."""
    ruled_out = batch.threshold.negatives(batch.probs, batch.kmeans_label)  # (U, K)
    return negative_cross_entropy(batch.logits, ruled_out)


def _fairness_loss(batch: Unlabelled) -> Tensor:
    """L_saf of FreeMatch, over the images whose label has a weight."""
    shares = batch.threshold.shares
    return self_adaptive_fairness(
        batch.logits.softmax(dim=1), batch.weight > 0, shares.mean_probs, shares.histogram
    )


LOSSES: Mapping[str, Callable[[Unlabelled], Tensor]] = {
    "kmeans": _kmeans_loss,
    "negative": _negative_loss,
    "fairness": _fairness_loss,
}
