import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spice_pl.functional.losses import (
    double_softmax_cross_entropy,
    double_softmax_cross_entropy_per_head,
    double_softmax_floor,
    double_softmax_gradient_ratio,
    mean_prediction_entropy,
    mutual_information,
    tempered_cross_entropy_per_head,
)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_label(*shape: int, num_clusters: int) -> Tensor:
    return torch.randint(num_clusters, shape, generator=torch.Generator().manual_seed(1))


def gradient(loss: Tensor, logits: Tensor) -> Tensor:
    return torch.autograd.grad(loss, logits)[0]


def test_double_softmax_agrees_with_the_formula_written_out() -> None:
    probs, label = random_logits(6, 4).softmax(-1), random_label(6, num_clusters=4)
    total = 0.0
    for row, k in zip(probs.tolist(), label.tolist(), strict=True):
        total -= math.log(math.exp(row[k]) / sum(math.exp(p) for p in row))
    assert double_softmax_cross_entropy(probs, label).item() == pytest.approx(total / 6, abs=1e-12)


def test_heads_together_are_the_heads_one_by_one() -> None:
    probs, label = random_logits(3, 6, 4).softmax(-1), random_label(3, 6, num_clusters=4)
    losses = double_softmax_cross_entropy_per_head(probs, label)
    alone = [double_softmax_cross_entropy(p, y) for p, y in zip(probs, label, strict=True)]
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(double_softmax_cross_entropy(probs, label), losses.mean())


def test_heads_can_share_their_labels() -> None:
    probs, label = random_logits(3, 6, 4).softmax(-1), random_label(6, num_clusters=4)
    torch.testing.assert_close(
        double_softmax_cross_entropy_per_head(probs, label),
        double_softmax_cross_entropy_per_head(probs, label.expand(3, 6)),
    )


def test_renaming_clusters_does_not_change_the_loss() -> None:
    probs, label = random_logits(6, 4).softmax(-1), random_label(6, num_clusters=4)
    names = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        double_softmax_cross_entropy(probs[:, names], names.argsort()[label]),
        double_softmax_cross_entropy(probs, label),
    )


@pytest.mark.parametrize("num_clusters", [1, 2, 10, 20, 200])
def test_a_certain_and_right_head_reaches_the_floor(num_clusters: int) -> None:
    probs = torch.eye(num_clusters, dtype=torch.float64)
    loss = double_softmax_cross_entropy(probs, torch.arange(num_clusters))
    assert loss.item() == pytest.approx(double_softmax_floor(num_clusters), abs=1e-12)


@pytest.mark.parametrize("num_clusters", [2, 5, 200])
def test_appendix_a_gradients_and_their_ratio(num_clusters: int) -> None:
    eye = torch.eye(num_clusters, dtype=torch.float64)
    for row in range(20):
        z = random_logits(num_clusters, seed=row).requires_grad_()
        label = torch.tensor(row % num_clusters)
        p = z.softmax(-1)
        q = p.softmax(-1)
        single = gradient(F.cross_entropy(z, label), z)
        double = gradient(double_softmax_cross_entropy(z.softmax(-1)[None], label[None]), z)
        agree, own = (p * q).sum(), eye[label]
        torch.testing.assert_close(double, p * (q - own + p[label] - agree), rtol=0, atol=1e-15)
        ratio = double_softmax_gradient_ratio(p.detach(), label)
        torch.testing.assert_close(ratio, double / single, rtol=1e-7, atol=0)
        assert ratio[label] < 1


def test_gradient_ratio_is_small_where_the_head_is_not_sure() -> None:
    sure = torch.linspace(0.11, 0.99, 50, dtype=torch.float64)  # p_y; nine others share the rest
    probs = torch.cat([sure[:, None], ((1 - sure) / 9)[:, None].expand(-1, 9)], dim=1)
    ratio = double_softmax_gradient_ratio(probs, torch.zeros(50, dtype=torch.long))[:, 0]
    assert (ratio.diff() > 0).all()
    assert ratio[0] < 0.12
    one = double_softmax_gradient_ratio(probs[3], torch.tensor(0))
    assert torch.equal(one[0], ratio[3])


def test_tempered_cross_entropy_is_that_of_divided_logits() -> None:
    logits, label = random_logits(3, 6, 4), random_label(3, 6, num_clusters=4)
    for temperature in (0.2, 1.0, 2.0):
        alone = [F.cross_entropy(z / temperature, y) for z, y in zip(logits, label, strict=True)]
        torch.testing.assert_close(
            tempered_cross_entropy_per_head(logits, label, temperature), torch.stack(alone)
        )


def test_tempered_cross_entropy_teaches_a_head_that_is_certain_and_wrong() -> None:
    logits = torch.tensor([[[500.0, -500.0]]], requires_grad=True)  # p is 1 and 0 in float32
    loss = tempered_cross_entropy_per_head(logits, torch.tensor([1]), 0.2)
    assert loss.tolist() == [5000]
    assert gradient(loss.sum(), logits).tolist() == [[[5, -5]]]


def test_entropy_of_the_mean_prediction() -> None:
    probs = random_logits(3, 6, 4).softmax(-1)
    entropy = mean_prediction_entropy(probs)
    for head, found in zip(probs, entropy, strict=True):
        mean = [sum(column) / 6 for column in zip(*head.tolist(), strict=True)]
        assert found.item() == pytest.approx(-sum(m * math.log(m) for m in mean), abs=1e-12)
    assert mean_prediction_entropy(torch.eye(5)).item() == pytest.approx(math.log(5))


def test_entropy_reaches_empty_clusters_with_a_finite_gradient() -> None:
    probs = torch.tensor([[1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    entropy = mean_prediction_entropy(probs)
    assert entropy.item() == pytest.approx(0)
    slope = gradient(entropy, probs)
    assert slope.isfinite().all()
    assert (slope[:, 1] > slope[:, 0]).all()


def test_mutual_information_is_high_for_even_and_sure_clusters() -> None:
    probs = random_logits(3, 6, 4).softmax(-1)
    unsure = [[-sum(p * math.log(p) for p in row) for row in head] for head in probs.tolist()]
    expected = mean_prediction_entropy(probs) - torch.tensor(unsure, dtype=probs.dtype).mean(dim=1)
    torch.testing.assert_close(mutual_information(probs), expected)
    assert mutual_information(torch.eye(5)).item() == pytest.approx(math.log(5))
    for nothing in (torch.full((6, 4), 0.25), torch.eye(4)[[2] * 6]):  # unsure; all in one cluster
        assert mutual_information(nothing).item() == pytest.approx(0, abs=1e-6)


def test_refuses_shapes_that_disagree() -> None:
    with pytest.raises(ValueError, match=r"label \(3,\) does not broadcast to \(2, 4\)"):
        double_softmax_cross_entropy(torch.rand(2, 4, 5), torch.zeros(3, dtype=torch.long))


def test_refuses_a_temperature_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="temperature 0 is not positive; SPICE's TCE"):
        tempered_cross_entropy_per_head(torch.rand(1, 2, 3), torch.zeros(2, dtype=torch.long), 0)


def test_balanced_loss_is_the_mean_of_the_clusters_that_have_samples() -> None:
    probs, label = torch.rand(7, 4).softmax(-1), torch.tensor([0, 0, 0, 0, 0, 2, 2])
    parts = [double_softmax_cross_entropy(probs[label == k], label[label == k]) for k in (0, 2)]
    found = double_softmax_cross_entropy(probs, label, balanced=True)
    torch.testing.assert_close(found, torch.stack(parts).mean())
    equal = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(
        double_softmax_cross_entropy(probs[:4], equal, balanced=True),
        double_softmax_cross_entropy(probs[:4], equal),
    )
