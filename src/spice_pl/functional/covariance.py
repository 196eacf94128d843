"""VICReg's loss: equal views, and embeddings that spread over all of their components.

Shapes: B images, P embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-4  # of Eq. 2; keeps the gradient of a deviation of 0 finite


def vicreg_loss(
    first: Tensor,
    second: Tensor,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Pull the views of each image together, and decorrelate the components of embeddings.

    Bardes et al. 2022 (VICReg), Eq. 6: λ s(Z, Z') + μ [v(Z) + v(Z')] + ν [c(Z) + c(Z')], with
    s of Eq. 5, `variance_hinge` v and `redundancy` c. As in the authors' code, s is the mean over
    components too, and v is the mean of both views.

    Args:
        first: Z, (B, P), not normalised, B >= 2.
        second: Z', (B, P), views of the same images.
        invariance_weight: λ.
        variance_weight: μ.
        covariance_weight: ν.

    Returns:
        Scalar, at least 0; both views receive a gradient.

    Raises:
        ValueError: the shapes disagree, or there are fewer than 2 images.

    Examples:
        >>> views = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])  # C has 2 everywhere: c = 2·2²/2
        >>> vicreg_loss(views, views)
        tensor(8.)
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(
            f"first {tuple(first.shape)} and second {tuple(second.shape)} must both be (B, P) with "
            "B >= 2: one image has no covariance"
        )
    views = torch.stack([first, second])
    views = views.to(torch.promote_types(views.dtype, torch.float32))  # (2, B, P)
    centred = views - views.mean(dim=1, keepdim=True)
    loss: Tensor = (
        invariance_weight * F.mse_loss(views[0], views[1])
        + variance_weight * variance_hinge(centred).mean()
        + covariance_weight * redundancy(centred).sum()
    )
    return loss


def variance_hinge(centred: Tensor) -> Tensor:
    """Compute the mean over components of max(0, 1 − √(Var + ε)), VICReg's Eqs. 1 and 2.

    Args:
        centred: (..., B, P), of mean 0 over B.

    Returns:
        (...), from 0 to 0.99; 0 where every component deviates by 1 or more.
    """
    variance = centred.square().sum(dim=-2) / (centred.shape[-2] - 1)  # (..., P)
    return F.relu(1 - (variance + EPSILON).sqrt()).mean(dim=-1)


def redundancy(centred: Tensor) -> Tensor:
    """Compute Σ_{i≠j} C_ij² / P of the covariance C, VICReg's Eqs. 3 and 4.

    Args:
        centred: (..., B, P), of mean 0 over B.

    Returns:
        (...), at least 0; 0 where no two components are correlated.
    """
    size, width = centred.shape[-2:]
    with torch.autocast(centred.device.type, enabled=False):  # squares of sums over images
        covariance = centred.mT @ centred / (size - 1)  # (..., P, P)
    off_diagonal = covariance - torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return off_diagonal.square().sum(dim=(-2, -1)) / width
