"""FastSiam's loss: each view predicts the mean of the others.

Shapes: V views, B images, P embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def averaged_target_loss(predictions: Tensor, projections: Tensor) -> Tensor:
    """Compute the mean of −cos(p_v, mean_{u≠v} z_u) over views and images.

    Pototzky et al. 2022 (FastSiam), Section 3: SimSiam's loss (Chen and He 2021, Eq. 1) with a
    target that several views share, which varies less. With two views it is SimSiam's, Eq. 2.

    Args:
        predictions: p, (V, B, P), the predictor's outputs, of any length.
        projections: z, (V, B, P), the projections of the same views; they receive no gradient here.

    Returns:
        Scalar in [-1, 1].

    Raises:
        ValueError: the shapes disagree, or there are fewer than 2 views.

    Examples:
        >>> views = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]])  # three of one image
        >>> averaged_target_loss(views, views)  # −(√½ + 0 + √½) / 3
        tensor(-0.4714)
    """
    if predictions.shape != projections.shape or predictions.ndim != 3 or len(predictions) < 2:
        raise ValueError(
            f"predictions {tuple(predictions.shape)} and projections {tuple(projections.shape)} "
            "must both be (V, B, P) with V >= 2 views"
        )
    targets = projections.detach().to(torch.promote_types(projections.dtype, torch.float32))
    others = targets.sum(dim=0) - targets  # (V - 1) times the mean: a cosine has no length
    return -F.cosine_similarity(predictions.to(others.dtype), others, dim=-1).mean()
