from __future__ import annotations

import numpy as np
import pytest
import torch

from spice_pl.functional.covariance import redundancy, variance_hinge, vicreg_loss


def views(size: int = 7, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = 0.5 * torch.randn(2, size, width, generator=generator)
    return first, second


def test_loss_equals_a_loop_over_components_with_numpys_covariance() -> None:
    first, second = views()
    expected = 3.0 * float(np.mean((first.numpy() - second.numpy()) ** 2))
    for each in (first, second):
        covariance = np.cov(each.double().numpy(), rowvar=False)
        hinges = [max(0.0, 1 - np.sqrt(covariance[i, i] + 1e-4)) for i in range(5)]
        others = sum(covariance[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5
        expected += 5.0 * np.mean(hinges) / 2 + 7.0 * others
    assert float(vicreg_loss(first, second, 3.0, 5.0, 7.0)) == pytest.approx(expected, rel=1e-5)


def test_equal_views_that_are_spread_and_uncorrelated_cost_nothing() -> None:
    rows = 2.0 * torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(vicreg_loss(rows, rows)) == 0.0


def test_equal_embeddings_cost_a_hinge_of_almost_one() -> None:
    """√ε = .01 is the deviation that a constant counts as."""
    rows = torch.ones(4, 3)
    assert float(vicreg_loss(rows, rows)) == pytest.approx(25 * 0.99)
    assert variance_hinge(torch.zeros(2, 4, 3)).tolist() == pytest.approx([0.99, 0.99])


def test_a_shift_of_all_embeddings_changes_nothing_and_a_copied_component_costs() -> None:
    first, second = views()
    shift = torch.tensor([3.0, -1.0, 2.0, 0.0, 5.0])
    shifted = vicreg_loss(first + shift, second + shift)
    torch.testing.assert_close(shifted, vicreg_loss(first, second))
    column = torch.tensor([[1.0], [-1.0]])  # variance 2
    assert float(redundancy(column.expand(2, 3))) == pytest.approx(6 * 2**2 / 3)


def test_both_views_and_a_collapsed_batch_get_finite_gradients() -> None:
    first, second = (each.requires_grad_() for each in views())
    vicreg_loss(first, second).backward()  # type: ignore[no-untyped-call]
    for each in (first, second):
        assert each.grad is not None
        assert bool(each.grad.abs().sum() > 0)
    equal = torch.ones(4, 3, requires_grad=True)
    vicreg_loss(equal, equal).backward()  # type: ignore[no-untyped-call]
    assert equal.grad is not None
    assert bool(equal.grad.isfinite().all())


def test_the_covariance_is_not_rounded_under_autocast() -> None:
    first, second = views()
    expected = vicreg_loss(first, second)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(vicreg_loss(first, second), expected)


@pytest.mark.parametrize(("one", "other"), [((1, 3), (1, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_shapes_without_a_covariance_are_refused(
    one: tuple[int, ...], other: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"must both be \(B, P\) with B >= 2"):
        vicreg_loss(torch.zeros(one), torch.zeros(other))
