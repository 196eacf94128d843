"""Losses of SCAN: neighbours in one cluster, then the model's own confident labels.

Shapes: B samples, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scan_loss(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float = 5.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Put neighbours into one cluster, and use all clusters.

    Van Gansbeke et al. 2020 (SCAN), Eq. 2: −mean log⟨p_a, p_n⟩ − λ H(mean p_a), the product stably
    from log-probabilities.

    Args:
        anchors: (B, K) logits.
        neighbors: (B, K) logits of one neighbour each.
        entropy_weight: λ.

    Returns:
        Loss, consistency and entropy in nats, scalars; one-hot and balanced gives −λ log K.

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
    """Teach the strong view what the plain view is sure of, each cluster alike.

    Van Gansbeke et al. 2020 (SCAN), Section 2.3: cross-entropy weighted by inverse cluster counts.

    Args:
        logits: (B, K) of the strong view.
        probs: (B, K) of the plain view, without gradient.
        threshold: a label needs more confidence than this.

    Returns:
        Weighted mean loss in nats, scalar, 0 where no sample is sure; and the mask (B,).

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
