"""Losses of the clustering heads of stage 2.

Shapes: H heads, B samples or slots, K clusters.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def double_softmax_cross_entropy(probs: Tensor, label: Tensor, *, balanced: bool = False) -> Tensor:
    """Cross-entropy of a second softmax over probabilities.

    Niu et al. 2022 (SPICE), Eq. 5: p' = softmax(logits) comes in, CE(softmax(p'), label) goes out.
    It learns more slowly than CE(p', label) from labels that may be wrong (Appendix A), and cannot
    fall under `double_softmax_floor`.

    Args:
        probs: (..., K), rows sum to one.
        label: (...), or any shape that broadcasts to it; cluster ids 0 to K - 1.
        balanced: whether clusters count alike, however many samples carry their label; those that
            no sample carries are left out.

    Returns:
        Mean loss in nats, scalar; over heads too, if there are any.

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
    sizes = torch.bincount(label.flatten(), minlength=probs.shape[-1])  # (K,)
    return (losses / sizes[label]).sum() / (sizes > 0).sum()


def double_softmax_cross_entropy_per_head(probs: Tensor, label: Tensor) -> Tensor:
    """Compute `double_softmax_cross_entropy` of each head by itself, in one call.

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
    """Give the smallest double-softmax cross-entropy that K clusters allow.

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
    """Gradient of the double-softmax loss over that of a single softmax, logit by logit.

    SPICE, Appendix A, Eq. A-6 and Fig. A.1, with y the label and q = softmax(p). For the label's
    own logit the ratio is p_y [(1 - q_y) + sum of p_j q_j / (1 - p_y) over the others], below 1 and
    near 0 where the head is not sure; for another logit i it is q_i + p_y - sum of p_j q_j.

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
    """Cross-entropy of softmax(logits / temperature) of each head by itself, in one call.

    SPICE, Table VII: TCE with temperature 0.2, and plain CE with temperature 1.

    Args:
        logits: (H, B, K), before any softmax.
        label: (H, B), or (B,) if the heads share their labels.
        temperature: > 0; below 1 sharpens.

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
    """Entropy of the mean prediction, to be maximised so that no cluster stays empty.

    SPICE, Table VII "Entropy" and Tiny-ImageNet (K = 200). The gradient is finite at a mean of 0.

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
    """Information that a sample gives of its cluster: H(mean p) - mean H(p).

    Bridle et al. 1991; Krause et al. 2010 (RIM). High where clusters are even and each sample is
    sure of its own. Ours for choosing a head; no label takes part.

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
    loss = F.cross_entropy(logits.reshape(-1, num_clusters), label.reshape(-1), reduction="none")
    return loss.view(logits.shape[:-1])
