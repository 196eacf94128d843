"""The guard against values that are not finite reads one number for all weights."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_largest_weight_of_a_parameter_is_not_finite_if_any_weight_is_not(bad: float) -> None:
    for position in (0, 500, 999):
        weight = torch.randn(1000)
        weight[position] = bad
        norms = torch.stack(torch._foreach_norm([torch.ones(3), weight], torch.inf))
        assert norms.isfinite().tolist() == [True, False]


def test_a_weight_whose_square_overflows_is_finite() -> None:
    (norm,) = torch._foreach_norm([torch.tensor([1e30, -3e38])], torch.inf)
    assert bool(norm.isfinite())
