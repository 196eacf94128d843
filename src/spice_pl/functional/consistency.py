"""Losses of semi-supervised methods on the strong view.

Shapes: U unlabelled samples, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Compute the weighted cross-entropy, as a mean over all samples.

    With weights 0 and 1: Niu et al. 2022 (SPICE), Eq. 9, second term without λ_u, and Sohn et al.
    2020 (FixMatch), Eq. 4. With weights between: Chen et al. 2023 (SoftMatch), Eq. 2.

    Args:
        logits: (U, K), before any softmax.
        label: (U,), cluster ids; samples of weight 0 may have -1.
        weight: (U,), 0 to 1.

    Returns:
        Loss in nats, scalar: the sum divided by U, whatever the weights; 0 if all weights are 0.

    Raises:
        ValueError: the shapes disagree.

    Examples:
        >>> weighted_cross_entropy(torch.zeros(2, 2), torch.tensor([0, -1]), torch.tensor([1.0, 0]))
        tensor(0.3466)
    """
    if not len(logits) == len(label) == len(weight):
        raise ValueError(
            f"logits {tuple(logits.shape)}, label {tuple(label.shape)} and weight "
            f"{tuple(weight.shape)} differ in length; they are of one batch"
        )
    loss = F.cross_entropy(logits, label.clamp_min(0), reduction="none")  # (U,)
    return (loss * weight).mean()


def negative_cross_entropy(logits: Tensor, ruled_out: Tensor) -> Tensor:
    """Lower the probability of the clusters that are ruled out for a sample.

    ClusMatch, L_npl: −log(1 − Σ_j N_ij q_ij), with q the softmax of the logits and N the mask of
    the ruled-out clusters; computed stably as logsumexp(all logits) − logsumexp(kept logits).

    Args:
        logits: (U, K), before any softmax; converted to float32.
        ruled_out: N, (U, K), bool; each row keeps at least one cluster.

    Returns:
        Mean over all U samples in nats, scalar; a sample without a ruled-out cluster adds 0.

    Raises:
        ValueError: the shapes disagree.

    Examples:
        >>> negative_cross_entropy(torch.zeros(1, 4), torch.tensor([[False, True, False, True]]))
        tensor(0.6931)
    """
    if logits.shape != ruled_out.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and ruled_out {tuple(ruled_out.shape)} differ; both "
            "are (U, K)"
        )
    logits = logits.float()
    kept = logits.masked_fill(ruled_out, -torch.inf)  # (U, K)
    # Where nothing is ruled out, both terms are equal, so the loss and its gradient are 0.
    return (logits.logsumexp(dim=1) - kept.logsumexp(dim=1)).mean()


def self_adaptive_fairness(
    probs: Tensor, mask: Tensor, mean_probs: Tensor, histogram: Tensor
) -> Tensor:
    """Encourage predictions of all clusters in a batch (self-adaptive fairness).

    Wang et al. 2023 (FreeMatch), Eqs. 11-12: −H(a, b) = Σ a log b with a = SumNorm(p̃/h̃) and
    b = SumNorm(p̄/h̄). SumNorm divides by the sum; p̄ and h̄ are the mean prediction and the
    histogram of predicted clusters of the strong view, over the samples that have a label.
    Clusters with h̄ = 0 have no gradient and are left out of the sum.

    Args:
        probs: (U, K), of the strong view.
        mask: (U,), bool, whether a sample has a label.
        mean_probs: p̃, (K,), running mean of the weak view's probabilities.
        histogram: h̃, (K,), running shares of the clusters that the weak view predicts.

    Returns:
        Σ a log b ≤ 0, scalar, in nats; 0 if no sample has a label.

    Examples:
        >>> uniform = torch.full((2,), 0.5)
        >>> probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> self_adaptive_fairness(probs, torch.tensor([True, True]), uniform, uniform)
        tensor(-0.6931)
    """
    weight = mask.to(probs.dtype)  # (U,); indexing by the mask would wait for the device
    count = weight.sum().clamp_min(1)
    batch_mean = (probs * weight[:, None]).sum(dim=0) / count  # (K,), p̄
    shares = (F.one_hot(probs.argmax(dim=1), probs.shape[1]) * weight[:, None]).sum(dim=0) / count
    wanted = _sum_to_one(_over(mean_probs, histogram))  # (K,)
    found = _sum_to_one(_over(batch_mean, shares))  # (K,)
    log_found = torch.where(shares > 0, found, torch.ones_like(found)).log()
    return (wanted * log_found).sum()


def _over(above: Tensor, below: Tensor) -> Tensor:
    """Quotient, 0 where the divisor is 0."""
    some = below > 0
    return torch.where(some, above / torch.where(some, below, torch.ones_like(below)), 0.0)


def _sum_to_one(values: Tensor) -> Tensor:
    return values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
