from __future__ import annotations

import numpy as np
import pytest
import torch

from spice_pl.functional.averaged import averaged_target_loss


def pair(num_views: int = 4, size: int = 3, width: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, num_views, size, width, generator=generator)
    return first, second


def test_loss_equals_a_plain_loop_over_views_and_images() -> None:
    predictions, projections = pair()
    p, z = predictions.double().numpy(), projections.double().numpy()
    cosines = []
    for view in range(4):
        for image in range(3):
            target = np.mean([z[other, image] for other in range(4) if other != view], axis=0)
            norms = np.linalg.norm(p[view, image]) * np.linalg.norm(target)
            cosines.append(p[view, image] @ target / norms)
    found = averaged_target_loss(predictions, projections)
    assert float(found) == pytest.approx(-np.mean(cosines), abs=1e-6)


def test_equal_views_give_minus_one_whatever_their_length() -> None:
    view = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    views = view.expand(3, 2, 2)
    assert float(averaged_target_loss(5 * views, 0.1 * views)) == pytest.approx(-1)


def test_targets_get_no_gradient() -> None:
    predictions, projections = (each.requires_grad_() for each in pair())
    averaged_target_loss(predictions, projections).backward()  # type: ignore[no-untyped-call]
    assert projections.grad is None
    assert predictions.grad is not None
    assert bool((predictions.grad.abs().sum(dim=-1) > 0).all())


@pytest.mark.parametrize("shapes", [((1, 3, 2), (1, 3, 2)), ((2, 3, 2), (2, 3, 4)), ((2, 3),) * 2])
def test_shapes_without_a_target_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \(V, B, P\) with V >= 2"):
        averaged_target_loss(*(torch.zeros(shape) for shape in shapes))
