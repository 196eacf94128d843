"""Rates of lossy coding: a spread of embeddings that needs no negatives, and EMP-SSL's loss on it.

Shapes: n patches per image, B images, P embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def coding_rate(embeddings: Tensor, distortion: float) -> Tensor:
    """Compute the rate R(Z) = ½ log det(I + P / (B ε²) ZᵀZ) that codes B embeddings.

    Yu et al. 2020 (MCR²), Section 2; the total coding rate of Tong et al. 2023 (EMP-SSL),
    Section 3. Embeddings are rows of Z here, columns there. The rate is the smallest if all are
    equal, and the largest if ZᵀZ is a multiple of the identity.

    Computed in float32 or float64, also under autocast, by a Cholesky factorisation of the smaller
    of I + aZᵀZ and I + aZZᵀ, which have the same determinant.

    Args:
        embeddings: Z, (..., B, P), l2-normalised; a rate for each leading index.
        distortion: ε², > 0, squared error that the code allows.

    Returns:
        (...), in nats; from ½ log(1 + P / ε²), all equal, to ½ P log(1 + 1 / ε²).

    Raises:
        ValueError: distortion is not positive, or there is no embedding.

    Examples:
        >>> coding_rate(torch.eye(2), distortion=1.0)  # ½ log det 2I = log 2
        tensor(0.6931)
    """
    if distortion <= 0:
        raise ValueError(f"distortion {distortion} is not positive; EMP-SSL uses 0.2")
    if embeddings.ndim < 2 or not embeddings.shape[-2]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} are not (..., B, P) with B >= 1; give one row "
            "per image"
        )
    size, width = embeddings.shape[-2:]
    with torch.autocast(embeddings.device.type, enabled=False):
        rows = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        gram = rows.mT @ rows if width <= size else rows @ rows.mT
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        # All eigenvalues are 1 or more. `cholesky` would make the processor wait for a check.
        factor, _ = torch.linalg.cholesky_ex(identity + width / (size * distortion) * gram)
        rate: Tensor = factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # ½ log det = log det L
    return rate


def multi_patch_loss(embeddings: Tensor, rate_weight: float, distortion: float) -> Tensor:
    """Pull the patches of each image to their mean, and spread the images.

    L = −mean cos(z_i, z̄) − w · mean R(Z_i), with z̄ the mean of an image's n embeddings and Z_i the
    i-th patches of all images. Tong et al. 2023 (EMP-SSL), Section 3: maximise
    mean R(Z_i) + λ D(Z_i, Z̄). Departure: divided by λ, so w = 1 / λ.

    Args:
        embeddings: (B, n, P), l2-normalised.
        rate_weight: w.
        distortion: ε² of `coding_rate`.

    Returns:
        Scalar; every patch receives a gradient, also by the mean.

    Raises:
        ValueError: distortion is not positive, or the shape is another.

    Examples:
        >>> patches = torch.eye(2)[:, None].expand(2, 3, 2)  # 2 images of 3 equal patches
        >>> multi_patch_loss(patches, rate_weight=0.5, distortion=1.0)  # −1 − ½ log 2
        tensor(-1.3466)
    """
    if embeddings.ndim != 3:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} are not (B, n, P); give n patches per image"
        )
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    mean = embeddings.mean(dim=1, keepdim=True)  # z̄, (B, 1, P)
    invariance = F.cosine_similarity(embeddings, mean, dim=-1).mean()
    rates = coding_rate(embeddings.transpose(0, 1), distortion)  # (n,)
    return -invariance - rate_weight * rates.mean()
