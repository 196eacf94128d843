"""Losses of SCAN: first neighbours share a cluster, then the model trains on confident labels.

Shapes: B samples, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_loss(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float = 5.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss that puts neighbours into the same cluster and keeps all clusters in use.

    Van Gansbeke et al. 2020 (SCAN), Eq. 2: −mean log⟨p_a, p_n⟩ − λ H(mean p_a), with the inner
    product computed stably from log-probabilities.

    Args:
        anchors: (B, K), logits of the anchors.
        neighbors: (B, K), logits of one neighbour of each anchor.
        entropy_weight: λ.

    Returns:
        Loss, consistency −mean log⟨p_a, p_n⟩ and entropy H(mean p_a) in nats, scalars. The loss is
        at least −λ log K, its value for equal one-hot predictions in balanced clusters.

    Raises:
        ValueError: the shapes disagree.

    Examples:
        >>> sure = 100 * torch.eye(4)
        >>> loss, _, _ = scan_loss(sure, sure)
        >>> loss / 5  # -log 4
        tensor(-1.3863)
    """
    if anchors.shape != neighbors.shape:
        raise ValueError(
            f"anchors {tuple(anchors.shape)} and neighbors {tuple(neighbors.shape)} differ; both "
            "are (B, K)"
        )
    log_anchor, log_neighbor = anchors.log_softmax(dim=1), neighbors.log_softmax(dim=1)
    consistency = -(log_anchor + log_neighbor).logsumexp(dim=1).mean()
    entropy = torch.special.entr(log_anchor.exp().mean(dim=0).clamp_min(1e-8)).sum()
    return consistency - entropy_weight * entropy, consistency, entropy


def self_label_loss(
    logits: Tensor, probs: Tensor, threshold: float = 0.99
) -> tuple[Tensor, Tensor]:
    """Compute the cross-entropy of the strong view with the confident labels of the plain view.

    Van Gansbeke et al. 2020 (SCAN), Section 2.3: samples are weighted by the inverse count of their
    cluster among the confident ones, so that all clusters have the same weight.

    Args:
        logits: (B, K), of the strong view, before any softmax.
        probs: (B, K), of the plain view, without gradient.
        threshold: threshold on max p; a confident sample has a larger one.

    Returns:
        Weighted mean loss in nats, scalar, 0 if no sample is confident; and the mask (B,) of the
        confident samples.

    Examples:
        >>> loss, mask = self_label_loss(torch.zeros(2, 4), torch.full((2, 4), 0.25))
        >>> float(loss), mask.any().item()
        (0.0, False)
    """
    confidence, label = probs.max(dim=1)
    mask = confidence > threshold  # (B,)
    sure = mask.to(logits.dtype)
    counts = (F.one_hot(label, logits.shape[1]) * sure[:, None]).sum(dim=0)  # (K,)
    weight = sure / counts[label].clamp_min(1)  # (B,)
    loss = F.cross_entropy(logits, label, reduction="none")
    return (loss * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny), mask
