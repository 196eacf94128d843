"""TURTLE: labels that linear classifiers can learn with a large margin.

Gadetsky et al. 2024, "Let Go of Your Labels with Unsupervised Transfer".

Shapes: N samples, B samples of a step, D feature width, H labelings that are searched in parallel,
K clusters, F folds.
"""

import torch
from torch import Tensor

from spice_pl.functional.losses import mean_prediction_entropy


def soft_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross-entropy of predictions with soft labels, the mean over samples.

    Args:
        logits: (..., B, K), before any softmax.
        labels: (..., B, K), rows sum to one.

    Returns:
        Losses (...) in nats, at least the mean entropy of the labels.

    Examples:
        >>> soft_cross_entropy(torch.zeros(2, 4), torch.eye(4)[:2])  # log 4
        tensor(1.3863)
    """
    return -(labels * logits.log_softmax(dim=-1)).sum(dim=-1).mean(dim=-1)


def turtle_loss(logits: Tensor, labels: Tensor, gamma: float = 10.0) -> Tensor:
    """Compute the outer objective of each labeling: how badly classifiers that learned it fit it.

    Gadetsky et al. 2024, Section 3, the objective of TURTLE: Σ over feature spaces of the mean
    cross-entropy of w_k φ_k(x) with the label τ_θ(x), minus γ times the entropy of the mean label,
    without which all samples would get one label. The gradient goes through the labels alone; that
    the classifiers depend on the labels too is left out (first-order hypergradient).

    Args:
        logits: (S, H, B, K), of the classifiers in S feature spaces, without gradient.
        labels: (H, B, K), τ_θ(x), rows sum to one.
        gamma: γ, at least 0.

    Returns:
        Losses (H,) in nats. For labels that are sure, even and fitted, −γ log K.

    Examples:
        >>> labels = torch.eye(2)[None]
        >>> turtle_loss(100 * labels[None], labels, gamma=1.0)  # -log 2
        tensor([-0.6931])
    """
    fit = soft_cross_entropy(logits, labels).sum(dim=0)  # (H,)
    return fit - gamma * mean_prediction_entropy(labels)


def generalization_scores(
    features: Tensor, clusters: Tensor, num_clusters: int, num_folds: int = 10, ridge: float = 1.0
) -> Tensor:
    """Measure how well a linear classifier predicts labels of samples that it did not learn from.

    Gadetsky et al. 2024, Section 4: cross-validation on the found labels, which needs no true
    label. The classifier here is a ridge regression on one-hot labels, which has a closed form, so
    that all labelings share the factorisation of a fold; the paper fits logistic regressions.

    Args:
        features: (N, D), centred.
        clusters: (H, N), labels 0 to K - 1 of each labeling.
        num_clusters: K.
        num_folds: F; sample i is in fold i mod F. At most N.
        ridge: penalty on the squared weights, in units of the mean variance of a feature, > 0.

    Returns:
        Accuracy (H,), float64, in [0, 1], the mean over samples.

    Raises:
        ValueError: fewer than two folds or samples, or the lengths disagree.

    Examples:
        >>> features = torch.tensor([[-1.0], [-1.1], [1.0], [1.1]])
        >>> labels = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
        >>> generalization_scores(features, labels, 2, num_folds=4)[0]
        tensor(1., dtype=torch.float64)
    """
    num_samples, width = features.shape
    if clusters.ndim != 2 or clusters.shape[1] != num_samples:
        raise ValueError(
            f"clusters {tuple(clusters.shape)} are not (H, N) with the N = {num_samples} of the "
            "features; give one row of labels per labeling"
        )
    num_folds = min(num_folds, num_samples)
    if num_folds < 2:
        raise ValueError(f"num_folds {num_folds} leaves nothing to learn from; use at least 2")
    inputs = torch.cat([features, features.new_ones(num_samples, 1)], dim=1).double()  # (N, D + 1)
    targets = torch.nn.functional.one_hot(clusters, num_clusters).double()  # (H, N, K)
    targets = targets.transpose(0, 1).flatten(1)  # (N, H·K)
    penalty = ridge * float(features.double().square().mean())
    fold = torch.arange(num_samples, device=features.device) % num_folds
    gram, moment = inputs.T @ inputs, inputs.T @ targets  # (D + 1, D + 1), (D + 1, H·K)
    eye = penalty * torch.eye(width + 1, dtype=torch.float64, device=features.device)
    right = torch.zeros(len(clusters), dtype=torch.float64, device=features.device)
    for held_out in range(num_folds):
        own = fold == held_out
        rest_gram = gram - inputs[own].T @ inputs[own]
        rest_moment = moment - inputs[own].T @ targets[own]
        weights = torch.linalg.solve(rest_gram + eye, rest_moment)  # (D + 1, H·K)
        scores = (inputs[own] @ weights).view(-1, len(clusters), num_clusters)  # (b, H, K)
        right += (clusters[:, own] == scores.argmax(dim=-1).T).sum(dim=1)
    return right / num_samples
