from __future__ import annotations

import math

import pytest
import torch

from spice_pl.functional.consistency import (
    negative_cross_entropy,
    self_adaptive_fairness,
    weighted_cross_entropy,
)
from spice_pl.nn.thresholds import FixedThreshold


def test_weights_of_zero_and_one_are_fixmatch_by_hand() -> None:
    """SPICE, Eqs. 8-9: sure weak views teach the strong one, a mean over all images."""
    weak = torch.tensor([[0.95, 0.05], [0.04, 0.96], [0.94, 0.06]], dtype=torch.float64)
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [9.0, -9.0]], dtype=torch.float64)
    weight = FixedThreshold(0.95)(weak)
    assert weight.tolist() == [1, 1, 0]  # the threshold itself is sure enough
    loss = weighted_cross_entropy(logits, weak.argmax(dim=1), weight)
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 3)


def test_weights_of_zero_give_no_loss_and_no_gradient() -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.full((5,), -1), torch.zeros(5))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert torch.equal(logits.grad, torch.zeros(5, 3))


def test_negative_loss_equals_its_plain_form() -> None:
    logits = torch.randn(50, 6, dtype=torch.float32, requires_grad=True)
    ruled_out = torch.rand(50, 6) < 0.4
    ruled_out[torch.arange(50), torch.randint(6, (50,))] = False  # one cluster is always kept
    ruled_out[:5] = False
    q = logits.detach().double().softmax(dim=1)
    plain = -(1 - (q * ruled_out).sum(dim=1)).log()  # 0 where nothing is ruled out
    loss = negative_cross_entropy(logits, ruled_out)
    assert float(loss.detach()) == pytest.approx(float(plain.mean()), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert torch.equal(logits.grad[:5], torch.zeros(5, 6))
    assert (logits.grad[5:][ruled_out[5:]] > 0).all()  # what is ruled out loses probability


def test_negative_loss_is_finite_where_the_plain_form_is_not() -> None:
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)  # 1 - q is 0 in float32
    loss = negative_cross_entropy(logits, torch.tensor([[True, False]]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 200
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_fairness_by_hand() -> None:
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.5, 0.5]])
    mask = torch.tensor([True, True, True, False])
    mean_probs, histogram = torch.tensor([0.6, 0.4]), torch.tensor([0.75, 0.25])
    wanted = [0.6 / 0.75, 0.4 / 0.25]  # p̃ / h̃
    found = [(1.7 / 3) / (2 / 3), (1.3 / 3) / (1 / 3)]  # p̄ / h̄
    wanted, found = ([x / sum(each) for x in each] for each in (wanted, found))
    expected = sum(a * math.log(b) for a, b in zip(wanted, found, strict=True))
    loss = self_adaptive_fairness(probs, mask, mean_probs, histogram)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("mask", [torch.zeros(4).bool(), torch.tensor([True, False, False, False])])
def test_fairness_is_finite_with_an_empty_mask_or_cluster(mask: torch.Tensor) -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    histogram = torch.tensor([1.0, 0.0, 0.0])
    loss = self_adaptive_fairness(logits.softmax(dim=1), mask, torch.ones(3) / 3, histogram)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in length; they are of one batch"):
        weighted_cross_entropy(torch.zeros(2, 3), torch.zeros(3).long(), torch.ones(2))
    with pytest.raises(ValueError, match="differ; both are"):
        negative_cross_entropy(torch.zeros(2, 3), torch.zeros(2, 2).bool())
