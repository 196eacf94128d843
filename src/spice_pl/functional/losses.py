"""Losses of the clustering heads of stage 2.

Shapes: H heads, B samples or slots, K clusters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spice_pl.functional.device import cluster_sizes


def double_softmax_cross_entropy(probs: Tensor, label: Tensor, *, balanced: bool = False) -> Tensor:
    """Compute the cross-entropy of a second softmax over probabilities.

    Niu et al. 2022 (SPICE), Eq. 5: CE(softmax(p'), label) with p' = softmax(logits). Where the head
    gives its label a low probability, it learns more slowly than with CE(p', label), because the
    label may be wrong (Appendix A). The loss cannot fall below `double_softmax_floor`.

    Args:
        probs: p', (..., K), rows sum to one.
        label: (...), or any shape that broadcasts to it; cluster ids 0 to K - 1.
        balanced: whether all clusters have the same weight, however many samples have their label;
            clusters without a sample are left out. Ours, for clusters of unequal size.

    Returns:
        Mean loss in nats, scalar; a mean over heads too, if there are any.

    Raises:
        ValueError: the shapes disagree.

    Examples:
        >>> probs = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> double_softmax_cross_entropy(probs, torch.tensor([0, 1]))
        tensor(0.3133)
    """
    losses = _cross_entropy(probs, label)
    if not balanced:
        return losses.mean()
    label = label.expand(losses.shape)
    sizes = cluster_sizes(label, probs.shape[-1])  # (K,)
    return (losses / sizes[label]).sum() / (sizes > 0).sum()


def double_softmax_cross_entropy_per_head(probs: Tensor, label: Tensor) -> Tensor:
    """Compute `double_softmax_cross_entropy` for each head separately.

    Args:
        probs: (H, B, K), rows sum to one.
        label: (H, B), or (B,) if the heads share their labels.

    Returns:
        Mean losses (H,) in nats; their mean is the loss of Eq. 5 over all heads.

    Raises:
        ValueError: the shapes disagree.

    Examples:
        >>> probs = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
        >>> double_softmax_cross_entropy_per_head(probs, torch.tensor([0]))
        tensor([0.3133, 0.6931])
    """
    return _cross_entropy(probs, label).mean(dim=-1)


def double_softmax_floor(num_clusters: int) -> float:
    """Return the smallest double-softmax cross-entropy that K clusters allow.

    SPICE, Appendix A: a one-hot p' gives log((e + K - 1) / e).

    Args:
        num_clusters: K, at least 1.

    Returns:
        The floor in nats.

    Examples:
        >>> [round(double_softmax_floor(num_clusters), 3) for num_clusters in (10, 20, 200)]
        [1.461, 2.078, 4.307]
    """
    return math.log((math.e + num_clusters - 1) / math.e)


def double_softmax_gradient_ratio(probs: Tensor, label: Tensor) -> Tensor:
    """Divide the gradient of the double-softmax loss by that of a single softmax, for each logit.

    SPICE, Appendix A, Eq. A-6 and Fig. A.1, with y the label and q = softmax(p). For the label's
    own logit the ratio is p_y [(1 - q_y) + sum of p_j q_j / (1 - p_y) over the other clusters],
    which is below 1, and near 0 if p_y is. For another logit i it is q_i + p_y - sum of p_j q_j.

    Args:
        probs: (..., K), rows sum to one, none of them one-hot.
        label: (...), cluster ids 0 to K - 1.

    Returns:
        Ratio (..., K).

    Examples:
        >>> double_softmax_gradient_ratio(torch.tensor([0.5, 0.5]), torch.tensor(0))
        tensor([0.5000, 0.5000])
    """
    own = F.one_hot(label, probs.shape[-1]).bool()  # (..., K)
    q = probs.softmax(dim=-1)
    agree = (probs * q).sum(dim=-1, keepdim=True)  # sum of p_j q_j, (..., 1)
    p_y, q_y = (each.gather(-1, label[..., None]) for each in (probs, q))  # (..., 1)
    at_label = p_y * ((1 - q_y) + (agree - p_y * q_y) / (1 - p_y))
    return torch.where(own, at_label, q + p_y - agree)


def tempered_cross_entropy_per_head(
    logits: Tensor, label: Tensor, temperature: float = 1.0
) -> Tensor:
    """Compute the cross-entropy of softmax(logits / temperature) for each head separately.

    SPICE, Table VII: TCE with temperature 0.2, and plain CE with temperature 1.

    Args:
        logits: (H, B, K), before any softmax.
        label: (H, B), or (B,) if the heads share their labels.
        temperature: number > 0; below 1 it sharpens the probabilities.

    Returns:
        Mean losses (H,) in nats.

    Raises:
        ValueError: temperature is not positive, or the shapes disagree.

    Examples:
        >>> logits = torch.tensor([[[0.8, 0.2]]]).log()
        >>> tempered_cross_entropy_per_head(logits, torch.tensor([0]))  # -log 0.8
        tensor([0.2231])
    """
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not positive; SPICE's TCE uses 0.2")
    return _cross_entropy(logits / temperature, label).mean(dim=-1)


def mean_prediction_entropy(probs: Tensor) -> Tensor:
    """Compute the entropy of the mean prediction; maximising it keeps clusters from being empty.

    SPICE, Table VII "Entropy" and Tiny-ImageNet (K = 200). The gradient is finite, also for a
    cluster whose mean prediction is 0.

    Args:
        probs: (..., B, K), rows sum to one.

    Returns:
        Entropy (...) in nats, between 0 and log K; (H,) for (H, B, K).

    Examples:
        >>> mean_prediction_entropy(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # log 2
        tensor(0.6931)
    """
    mean = probs.mean(dim=-2)  # (..., K)
    return -(mean * (mean + torch.finfo(mean.dtype).tiny).log()).sum(dim=-1)


def mutual_information(probs: Tensor) -> Tensor:
    """Compute the mutual information between samples and clusters, H(mean p) - mean H(p).

    Bridle et al. 1991; Krause et al. 2010 (RIM). It is high if clusters have equal sizes and each
    sample has one confident cluster. To select a head by it is ours; it needs no labels.

    Args:
        probs: (..., N, K), rows sum to one.

    Returns:
        Information (...) in nats, between 0 and log K.

    Examples:
        >>> mutual_information(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.5], [0.5, 0.5]]]))
        tensor([0.6931, 0.0000])
    """
    unsure: Tensor = torch.special.entr(probs).sum(dim=-1).mean(dim=-1)  # (...)
    return mean_prediction_entropy(probs) - unsure


def _cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy in nats of every sample: (..., K) and (...) give (...)."""
    num_clusters = logits.shape[-1]
    try:
        label = label.expand(logits.shape[:-1])
    except RuntimeError as error:
        raise ValueError(
            f"label {tuple(label.shape)} does not broadcast to {tuple(logits.shape[:-1])}, "
            f"one for each row of the (..., K) = {tuple(logits.shape)} predictions"
        ) from error
    if logits.ndim == 3:  # (H, K, B) is how heads make them: one vector per cluster, not per row
        return F.cross_entropy(logits.mT, label, reduction="none")
    loss = F.cross_entropy(logits.reshape(-1, num_clusters), label.reshape(-1), reduction="none")
    return loss.view(logits.shape[:-1])
