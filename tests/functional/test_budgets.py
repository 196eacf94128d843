import math

import pytest
import torch

from spice_pl.functional.budgets import cluster_budgets


def test_by_hand() -> None:
    # 2 for each, and the other 30 - 6 = 24 by shares: 16, 6.4 and 1.6.
    assert cluster_budgets(torch.tensor([10.0, 4.0, 1.0]), 30).tolist() == [18, 8, 4]
    # Without a floor: 7.5, 1.5 and 6; of the equal remainders the first gets one more label.
    assert cluster_budgets(torch.tensor([5.0, 1.0, 4.0]), 15, floor=0).tolist() == [8, 1, 6]


def test_sum_is_exact_and_no_cluster_falls_below_the_floor() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(200, 17, generator=generator) ** 9  # some are almost 0
    for total in (34, 35, 1000, 4999):
        budgets = cluster_budgets(shares, total)
        assert budgets.sum(dim=-1).tolist() == [total] * 200
        assert int(budgets.min()) >= 2
        assert torch.equal(budgets[3], cluster_budgets(shares[3], total))  # a head alone
        exact = 2 + (total - 34) * shares / shares.sum(dim=-1, keepdim=True)
        assert float((budgets - exact).abs().max()) < 1 + 1e-3


@pytest.mark.parametrize("num_clusters", [1, 3, 10, 7])
def test_equal_shares_give_equal_numbers(num_clusters: int) -> None:
    for each in (2, 3, 73, 500):
        shares = torch.full((num_clusters,), 1 / num_clusters)
        assert cluster_budgets(shares, num_clusters * each).tolist() == [each] * num_clusters


def test_shares_of_zero_and_one() -> None:
    assert cluster_budgets(torch.tensor([0.0, 1.0, 0.0]), 20).tolist() == [2, 16, 2]


@pytest.mark.parametrize("shares", [[1.0, -0.1], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_refuses_invalid_shares(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="must be at least 0, finite and not all 0"):
        cluster_budgets(torch.tensor(shares), 10)


def test_refuses_a_total_below_the_floor() -> None:
    with pytest.raises(ValueError, match="5 labels are fewer than 2 for each of 3 clusters; draw"):
        cluster_budgets(torch.ones(3), 5)
