from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.dcboost import agreeing_images, compactness_loss, separation_loss


def unit(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_agreeing_images_by_hand() -> None:
    """Nearest first: 0: 1 2 3 4, 1: 0 2 3 4, 2: 1 0 3 4, 3: 4 2 1 0, 4: 3 2 1 0.

    Neighbours before the first of another cluster: 2, 2, 2, 1, 1. So n_1 = 5, n_2 = 3, and
    k n_k is 5 and 6.
    """
    rows, clusters = unit(0, 10, 21, 90, 100), torch.tensor([0, 0, 0, 1, 1])
    chosen, number = agreeing_images(rows, clusters)
    assert int(number) == 2
    assert chosen.tolist() == [True, True, True, False, False]
    chosen, number = agreeing_images(rows, clusters, max_neighbors=1)
    assert int(number) == 1
    assert chosen.all()


def test_noise_is_left_out() -> None:
    """Two groups of 20, and one image of each with the label of the other."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(40) % 2
    rows = F.normalize(3 * F.one_hot(truth, 8) + 0.3 * torch.randn(40, 8, generator=generator))
    clusters = truth.clone()
    clusters[:2] = 1 - truth[:2]
    chosen, _ = agreeing_images(rows, clusters)
    assert not chosen[:2].any()
    assert chosen[2:].any()


def test_nobody_agrees_where_neighbours_alternate() -> None:
    chosen, number = agreeing_images(unit(0, 10, 100, 110), torch.tensor([0, 1, 0, 1]))
    assert int(number) == 1
    assert not chosen.any()


def test_compactness_by_hand() -> None:
    """Cluster 0 holds 0 and 60 degrees, cluster 2 holds 200; the target is 30 degrees further."""
    online, clusters = unit(0, 60, 200, 77), torch.tensor([0, 0, 2, -1])
    target = unit(30, 90, 230, 0)
    cosine = {angle: math.cos(math.radians(angle)) for angle in (30, 60, 90)}
    # Pairs of cluster 0: 0-30, 0-90, 60-30, 60-90.
    distances = [2 - 2 * cosine[angle] for angle in (30, 90, 30, 30)]
    first = sum(distances) / (1 + 1 + 2 * cosine[60])  # ‖z_1 + z_2‖² = 3
    second = 2 - 2 * cosine[30]
    loss = compactness_loss(online, target, clusters, 4)
    assert float(loss) == pytest.approx((first + second) / 2)


def test_equal_images_of_a_cluster_are_compact_however_many() -> None:
    rows = unit(*[40] * 5, 90)
    loss = compactness_loss(rows, rows, torch.tensor([1] * 5 + [0]), 2)
    assert float(loss) == pytest.approx(0, abs=1e-12)


def test_the_weight_receives_a_gradient() -> None:
    """As by differences: the weight is not a constant."""
    online, target, clusters = unit(0, 60, 90), unit(10, 50, 100), torch.tensor([0, 0, 1])

    def loss(rows: Tensor) -> Tensor:
        return compactness_loss(rows, target, clusters, 2)

    assert torch.autograd.gradcheck(loss, online.requires_grad_())


def test_separation_by_hand() -> None:
    """Prototypes at 30, 90 and 180 degrees; those of the target 10 degrees further."""
    online, target = unit(0, 60, 90, 180, 5), unit(10, 70, 100, 190, 5)
    clusters = torch.tensor([0, 0, 1, 3, -1])
    angles = (70, 160, 50, 100, 140, 80)  # 30-100, 30-190, 90-40, 90-190, 180-40, 180-100
    expected = -sum(2 - 2 * math.cos(math.radians(angle)) for angle in angles) / 6
    assert float(separation_loss(online, target, clusters, 4)) == pytest.approx(expected)


def test_fewer_than_two_clusters_have_nothing_to_part() -> None:
    rows = unit(0, 50).requires_grad_()
    for clusters in (torch.zeros(2, dtype=torch.long), torch.full((2,), -1)):
        loss = separation_loss(rows, rows.detach(), clusters, 3)
        assert float(loss.detach()) == 0
        (gradient,) = torch.autograd.grad(loss, rows)
        assert not gradient.any()
    assert float(compactness_loss(rows, rows, torch.full((2,), -1), 3).detach()) == 0


def test_gradients_pull_images_together_and_prototypes_apart() -> None:
    rows = unit(80, 100)
    for one, label, closer in ((compactness_loss, [0, 0], True), (separation_loss, [0, 1], False)):
        online = rows.clone().requires_grad_()
        torch.autograd.backward(one(online, rows, torch.tensor(label), 2))
        assert online.grad is not None
        moved = F.normalize(online.detach() - 0.05 * online.grad)
        before, after = (float(each[0] @ each[1]) for each in (rows, moved))
        assert (after > before) is closer
