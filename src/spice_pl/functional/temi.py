"""Losses of TEMI: neighbours share a cluster by weighted pointwise mutual information.

Adaloglou et al. 2023, "Exploring the Limits of Deep Image Clustering using Pretrained Models",
Section 3. A student head learns from a teacher head, which is its moving average.

Shapes: H heads, B pairs of an image x and one of its neighbours x', K clusters.
"""

import torch
from torch import Tensor


def pointwise_information_loss(
    student: Tensor, teacher: Tensor, shares: Tensor, beta: float = 0.6
) -> Tensor:
    """Compute minus the pointwise mutual information of pairs, L_pmi(x, x').

    Adaloglou et al. 2023, Section 3.1: −log Σ_c (q_s(c|x) q_t(c|x'))^β / q_t(c). With β = 1 this is
    minus the pointwise mutual information itself, whose optimum may leave clusters empty; β < 1
    avoids that.

    Args:
        student: (H, B, K), log-probabilities log q_s(c|x).
        teacher: (H, B, K), log-probabilities log q_t(c|x').
        shares: (H, K), share q_t(c) of each cluster by the teacher, positive.
        beta: β, in (0, 1].

    Returns:
        Losses (H, B) in nats. For equal one-hot rows they are log q_t(c) of their cluster, so
        −log K if clusters are even.

    Raises:
        ValueError: β is out of range, or the shapes disagree.

    Examples:
        >>> sure = (1000 * torch.eye(4)).log_softmax(dim=1)[None]
        >>> pointwise_information_loss(sure, sure, torch.full((1, 4), 0.25))[0, 0]  # -log 4
        tensor(-1.3863)
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta {beta} is not above 0 and at most 1; TEMI uses 0.6")
    if student.shape != teacher.shape or shares.shape != (len(student), student.shape[-1]):
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and shares "
            f"{tuple(shares.shape)} differ; give (H, B, K), (H, B, K) and (H, K)"
        )
    # In logarithms, so that sure predictions lose no gradient.
    return -torch.logsumexp(beta * (student + teacher) - shares.log()[:, None], dim=-1)


def pair_weights(one: Tensor, other: Tensor) -> Tensor:
    """Weigh pairs by how likely the teachers think that both images share a cluster.

    Adaloglou et al. 2023, Section 3.2: w(x, x') = Σ_c q_t(c|x) q_t(c|x'), the mean over all heads.
    It is small for neighbours that are probably of different classes.

    Args:
        one: (H, B, K), log-probabilities of x by the teachers.
        other: (H, B, K), log-probabilities of x'.

    Returns:
        Weights (B,), in [0, 1].

    Examples:
        >>> sure, even = torch.tensor([[[1.0, 0.0]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
        >>> float(pair_weights(sure, sure)), float(pair_weights(sure, even))
        (1.0, 0.5)
    """
    return (one + other).exp().sum(dim=-1).mean(dim=0)


def temi_loss(student: Tensor, teacher: Tensor, shares: Tensor, beta: float = 0.6) -> Tensor:
    """Compute the loss of each head on a batch of pairs.

    Adaloglou et al. 2023, Section 3.2: the mean over pairs of w(x, x') times
    ½ (L_pmi(x, x') + L_pmi(x', x)).

    Args:
        student: (2, H, B, K), log-probabilities of x and x' by the students; the only input that
            receives a gradient.
        teacher: (2, H, B, K), log-probabilities of x and x' by the teachers.
        shares: (H, K), see `pointwise_information_loss`.
        beta: β.

    Returns:
        Losses (H,) in nats.

    Raises:
        ValueError: as in `pointwise_information_loss`.
    """
    forward = pointwise_information_loss(student[0], teacher[1], shares, beta)  # (H, B)
    backward = pointwise_information_loss(student[1], teacher[0], shares, beta)
    return (pair_weights(teacher[0], teacher[1]) * (forward + backward) / 2).mean(dim=-1)
