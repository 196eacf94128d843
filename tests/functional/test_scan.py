from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from spice_pl.functional.scan import scan_loss, self_label_loss


@pytest.mark.parametrize("num_clusters", [2, 5, 10])
def test_one_hot_and_balanced_gives_minus_5_log_k(num_clusters: int) -> None:
    logits = 200 * torch.eye(num_clusters).repeat(3, 1)
    loss, consistency, entropy = scan_loss(logits, logits)
    assert float(loss) == pytest.approx(-5 * math.log(num_clusters), abs=1e-4)
    assert float(consistency) == pytest.approx(0, abs=1e-5)
    assert float(entropy) == pytest.approx(math.log(num_clusters), abs=1e-5)


def test_loss_equals_its_plain_form() -> None:
    anchors, neighbors = torch.randn(8, 4), torch.randn(8, 4)
    p, q = anchors.softmax(dim=1).double(), neighbors.softmax(dim=1).double()
    mean = p.mean(dim=0)
    plain = -(p * q).sum(dim=1).log().mean() - 2 * -(mean * mean.log()).sum()
    assert float(scan_loss(anchors, neighbors, 2.0)[0]) == pytest.approx(float(plain), abs=1e-5)


def test_contradicting_confident_neighbours_give_a_finite_loss() -> None:
    anchors = torch.tensor([[300.0, 0.0], [300.0, 0.0]], requires_grad=True)
    loss, _, _ = scan_loss(anchors, anchors.detach().flip(1))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert anchors.grad is not None
    assert anchors.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"both are \(B, K\)"):
        scan_loss(torch.zeros(2, 3), torch.zeros(3, 3))


def test_self_label_gives_clusters_the_same_weight() -> None:
    logits = torch.randn(5, 3)
    probs = torch.eye(3)[[0, 0, 0, 1, 2]]
    probs[4] = 1 / 3  # not confident
    loss, mask = self_label_loss(logits, probs)
    assert mask.tolist() == [True] * 4 + [False]
    each = F.cross_entropy(logits, probs.argmax(dim=1), reduction="none")
    assert float(loss) == pytest.approx(float(each[:3].mean() + each[3]) / 2, abs=1e-6)


def test_no_confident_sample_gives_no_loss_and_no_gradient() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss, mask = self_label_loss(logits, torch.full((4, 3), 1 / 3))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert not mask.any()
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(4, 3))
