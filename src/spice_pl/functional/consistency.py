"""Losses of semi-supervised methods on the strong view, each a pure function.

Shapes: U unlabelled samples, K clusters.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_cross_entropy(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of weighted samples, a mean over all of them.

    Sohn et al. 2020 (FixMatch), Eq. 4, with weights 0 and 1; Chen et al. 2023 (SoftMatch), Eq. 2.

    Args:
        logits: (U, K), before any softmax.
        label: (U,), cluster ids; those of samples of weight 0 may be -1.
        weight: (U,), 0 to 1.

    Returns:
        Loss in nats, scalar; 0 where no sample has a weight.

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
    """Push probability out of the clusters that a sample is not in.

    ClusMatch, L_npl: −log(1 − Σ_j N_ij q_ij), stably as logsumexp(all) − logsumexp(kept).

    Args:
        logits: (U, K), before any softmax; computed in float32.
        ruled_out: (U, K), N; never a whole row.

    Returns:
        Mean over all U in nats, scalar; a sample without a ruled out cluster counts 0.

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
    # Equal where nothing is ruled out: the loss and its gradient are 0 there.
    return (logits.logsumexp(dim=1) - kept.logsumexp(dim=1)).mean()


def self_adaptive_fairness(
    probs: Tensor, mask: Tensor, mean_probs: Tensor, histogram: Tensor
) -> Tensor:
    """Keep the batch's cluster shares from following the model's own bias.

    Wang et al. 2023 (FreeMatch), Eqs. 11-12: −H(SumNorm(p̃/h̃), SumNorm(p̄/h̄)), where p̄ and h̄ are
    mean prediction and histogram of the strong view's masked samples. Clusters that h̄ does not
    hold have no gradient and are left out of the sum.

    Args:
        probs: (U, K) of the strong view.
        mask: (U,) of the samples that have a label.
        mean_probs: (K,), p̃, the running mean of the weak view's probabilities.
        histogram: (K,), h̃, the running shares of the weak view's clusters.

    Returns:
        Σ a log b ≤ 0, scalar, in nats; 0 where the mask is empty.

    Examples:
        >>> uniform = torch.full((2,), 0.5)
        >>> probs = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
        >>> self_adaptive_fairness(probs, torch.tensor([True, True]), uniform, uniform)
        tensor(-0.6931)
    """
    weight = mask.to(probs.dtype)  # (U,); no indexing by the mask, which would wait for the device
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
