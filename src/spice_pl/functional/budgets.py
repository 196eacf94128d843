"""Numbers of pseudo-labels per cluster, for clusters of unequal size.

Shapes: K clusters.
"""

import torch
from torch import Tensor


def cluster_budgets(shares: Tensor, total: int, floor: int = 2) -> Tensor:
    """Divide a number of pseudo-labels among clusters by their shares.

    Not in the paper: SPICE gives each cluster the same number and leaves unequal clusters open.
    n_k = floor + (total - K·floor) π_k, rounded by largest remainders, so that the sum is exact and
    equal shares give equal numbers if K divides the total. The floor mixes the shares with uniform
    ones, which have the weight K·floor / total.

    Args:
        shares: π, (..., K), finite and at least 0; scaled here to sum 1.
        total: number of labels of one head, at least K·floor.
        floor: smallest number of labels of a cluster, whatever its share.

    Returns:
        Numbers n (..., K), int64, with sum `total`; among equal remainders the first clusters get
        one more.

    Raises:
        ValueError: shares are negative, not finite or all 0, or the total is below K floor.

    Examples:
        >>> cluster_budgets(torch.tensor([10.0, 4.0, 1.0]), total=36)
        tensor([22, 10,  4])
    """
    num_clusters = shares.shape[-1]
    sums = shares.double().sum(dim=-1, keepdim=True)
    if not bool((shares >= 0).all() and (sums > 0).all() and torch.isfinite(sums).all()):
        raise ValueError(f"shares {shares.tolist()} must be at least 0, finite and not all 0")
    rest = total - num_clusters * floor
    if rest < 0:
        raise ValueError(
            f"{total} labels are fewer than {floor} for each of {num_clusters} clusters; "
            f"draw at least {num_clusters * floor}"
        )
    exact = shares.double() / sums * rest  # (..., K)
    whole = exact.floor()
    missing = rest - whole.sum(dim=-1, keepdim=True)  # fewer than K
    remainder = (exact - whole).round(decimals=6)  # rounding errors must not order equal ones
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    return floor + whole.long() + (order.argsort(dim=-1) < missing)
