from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spice_pl.functional.temi import pair_weights, pointwise_information_loss, temi_loss


def log_probs(*rows: list[float]) -> Tensor:
    return torch.tensor([rows], dtype=torch.float64).log()  # (1, B, K)


def test_information_of_a_pair_by_hand() -> None:
    student, teacher = log_probs([0.9, 0.1]), log_probs([0.4, 0.6])
    shares = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    by_hand = -math.log(0.9 * 0.4 / 0.25 + 0.1 * 0.6 / 0.75)
    assert float(pointwise_information_loss(student, teacher, shares, 1.0)) == pytest.approx(
        by_hand
    )
    by_hand = -math.log(math.sqrt(0.36) / 0.25 + math.sqrt(0.06) / 0.75)
    assert float(pointwise_information_loss(student, teacher, shares, 0.5)) == pytest.approx(
        by_hand
    )


def test_independent_pairs_have_no_information_with_beta_1() -> None:
    """Where both predict the shares, p(c) p(c) / p(c) sums to 1."""
    shares = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    rows = shares.log()[None, None]
    loss = pointwise_information_loss(rows, rows, shares[None], 1.0)
    assert float(loss) == pytest.approx(0, abs=1e-12)


def test_losses_of_two_pairs_and_two_heads_by_hand() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    # Head 0 is sure that both pairs share a cluster, head 1 knows nothing.
    teacher = torch.stack([torch.stack([sure, half])] * 2).log()  # (2, H, B, K)
    student = teacher.clone()
    shares = torch.full((2, 2), 0.5, dtype=torch.float64)
    weight = (1 + 0.5) / 2  # mean over heads of the chance that the pair shares a cluster
    assert pair_weights(teacher[0], teacher[1]).tolist() == [weight, weight]
    found = temi_loss(student, teacher, shares, 1.0)
    assert found.tolist() == pytest.approx([-weight * math.log(2), 0.0])


def test_swapping_the_images_of_a_pair_changes_nothing() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 3, 5, 4).log_softmax(dim=-1)
    shares = torch.rand(3, 4).softmax(dim=1)
    one = temi_loss(student, teacher, shares)
    torch.testing.assert_close(one, temi_loss(student.flip(0), teacher.flip(0), shares))
    order = torch.tensor([2, 0, 3, 1])  # nor does the numbering of the clusters
    permuted = temi_loss(student[..., order], teacher[..., order], shares[:, order])
    torch.testing.assert_close(one, permuted)


def test_gradient_reaches_the_student_and_is_finite_for_sure_teachers() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    student = torch.stack([logits.log_softmax(-1)] * 2)
    teacher = torch.stack([(1000 * torch.eye(2))[None].log_softmax(-1)] * 2)
    torch.autograd.backward(temi_loss(student, teacher, torch.full((1, 2), 0.5)).sum())
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0, 0] < 0 < logits.grad[0, 0, 1]  # image 0 moves to the cluster 0


def test_what_does_not_fit_is_refused() -> None:
    rows = log_probs([0.5, 0.5])
    shares = torch.full((1, 2), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"beta 0.0 is not above 0 and at most 1"):
        pointwise_information_loss(rows, rows, shares, 0.0)
    with pytest.raises(ValueError, match=r"shares \(2,\) differ; give \(H, B, K\)"):
        pointwise_information_loss(rows, rows, shares[0])
