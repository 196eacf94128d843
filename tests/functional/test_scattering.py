from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.functional.contrastive import cluster_contrast, nt_xent
from spice_pl.functional.scattering import batch_prototypes, scattering_loss


def unit(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_prototypes_point_between_their_images() -> None:
    rows = unit(0, 60, 90, 200)
    found = batch_prototypes(rows, torch.tensor([0, 0, 2, -1]), 3)
    torch.testing.assert_close(found, torch.stack([*unit(30), torch.zeros(2).double(), *unit(90)]))


def test_scattering_of_three_clusters_by_hand() -> None:
    """Prototypes at 0, 90 and 180 degrees; those of the target 30 degrees further."""
    online, target = unit(0, 90, 180), unit(30, 120, 210)
    loss = scattering_loss(online, target, torch.arange(3), 3, 0.5)
    positive = math.exp(math.cos(math.pi / 6) / 0.5)
    rights, opposite = math.exp(0), math.exp(-1 / 0.5)
    ends = -math.log(positive / (positive + rights + opposite))
    middle = -math.log(positive / (positive + 2 * rights))
    assert float(loss) == pytest.approx((2 * ends + middle) / 3)


def test_absent_clusters_change_nothing() -> None:
    torch.manual_seed(0)
    online, target = (F.normalize(torch.randn(8, 5)) for _ in range(2))
    clusters = torch.arange(8) % 3
    loss = scattering_loss(online, target, clusters, 3, 0.5)
    # Clusters 1, 4 and 6 of 9, and an image without a cluster.
    renamed = torch.cat([torch.tensor([1, 4, 6])[clusters], torch.tensor([-1])])
    one, other = (torch.cat([each, F.normalize(torch.ones(1, 5))]) for each in (online, target))
    torch.testing.assert_close(scattering_loss(one, other, renamed, 9, 0.5), loss)


def test_one_cluster_or_none_has_no_loss_and_no_gradient() -> None:
    rows = F.normalize(torch.randn(4, 3)).requires_grad_()
    for clusters in (torch.zeros(4, dtype=torch.long), torch.full((4,), -1)):
        loss = scattering_loss(rows, rows.detach(), clusters, 3, 0.5)
        assert float(loss.detach()) == 0
        (gradient,) = torch.autograd.grad(loss, rows)
        assert (gradient == 0).all()


def test_gradient_pushes_prototypes_apart_and_reaches_the_online_network_alone() -> None:
    online = unit(80, 100).requires_grad_()
    target = unit(80, 100).requires_grad_()
    loss = scattering_loss(online, target, torch.arange(2), 2, 0.5)
    torch.autograd.backward(loss)
    assert target.grad is None
    assert online.grad is not None
    moved = online.detach() - 0.1 * online.grad
    angles = torch.atan2(moved[:, 1], moved[:, 0]).rad2deg()
    assert angles[0] < 80
    assert angles[1] > 100


def test_clusters_contrasted_by_hand() -> None:
    """Two images, two clusters: columns (a, b) and (1 - a, 1 - b), as vectors of length one."""
    first = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    second = torch.tensor([[0.7, 0.3], [0.4, 0.6]], dtype=torch.float64)
    columns = [first[:, 0], first[:, 1], second[:, 0], second[:, 1]]

    def cosine(i: int, j: int) -> float:
        one, other = columns[i].tolist(), columns[j].tolist()
        product = one[0] * other[0] + one[1] * other[1]
        return float(product / math.hypot(*one) / math.hypot(*other))

    losses = []
    for i in range(4):
        total = sum(math.exp(cosine(i, j) / 0.8) for j in range(4) if j != i)
        losses.append(math.log(total) - cosine(i, (i + 2) % 4) / 0.8)
    shares = ((0.55, 0.45), (0.55, 0.45))  # means of the columns
    entropy = -sum(p * math.log(p) for row in shares for p in row)
    found = cluster_contrast(first, second, 0.8)
    assert float(found) == pytest.approx(sum(losses) / 4 - entropy)


def test_even_sure_clusters_are_best() -> None:
    """Orthogonal columns, equal in both views: log((e + 2K - 2) / e) - 2 log K."""
    sure = torch.eye(4, dtype=torch.float64).repeat(3, 1)
    best = math.log((math.e + 6) / math.e) - 2 * math.log(4)
    assert float(cluster_contrast(sure, sure, 1.0)) == pytest.approx(best)
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        other = (scale * torch.randn(12, 4, dtype=torch.float64)).softmax(dim=1)
        assert float(cluster_contrast(other, other, 1.0)) > best


def test_one_cluster_for_all_has_no_entropy() -> None:
    alone = torch.zeros(6, 3, dtype=torch.float64)
    alone[:, 0] = 1
    columns = F.normalize(alone.T)
    torch.testing.assert_close(cluster_contrast(alone, alone, 1.0), nt_xent(columns, columns, 1.0))


def test_what_does_not_fit_is_refused() -> None:
    rows = unit(0, 90)
    with pytest.raises(ValueError, match=r"temperature 0\.0 is not positive; ProPos uses 0\.5"):
        scattering_loss(rows, rows, torch.arange(2), 2, 0.0)
    with pytest.raises(ValueError, match=r"clusters \(3,\) disagree; give \(B, P\)"):
        scattering_loss(rows, rows, torch.arange(3), 3, 0.5)
