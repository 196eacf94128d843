"""How many pseudo-labels each cluster gets, where clusters are unequal.

Shapes: K clusters.
"""

import torch
from torch import Tensor


def cluster_budgets(shares: Tensor, total: int, floor: int = 2) -> Tensor:
    """Part a number of pseudo-labels among clusters by their shares.

    Ours; SPICE has equal parts and names unequal ones as open. n_k = floor + (total - K floor) π_k,
    in whole numbers by largest remainders: the sum is exact, and equal shares give equal parts.
    That is the shares, mixed with the uniform ones at weight K floor / total.

    Args:
        shares: π, (..., K), finite, at least 0; scaled here to sum 1.
        total: labels of a head, at least K floor.
        floor: the least of a cluster, whatever its share.

    Returns:
        Numbers n (..., K) with sum `total`; of equal remainders the first clusters get one more.

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
    remainder = (exact - whole).round(decimals=6)  # equal ones are equal, whatever the arithmetic
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    return floor + whole.long() + (order.argsort(dim=-1) < missing)
