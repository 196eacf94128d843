from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from spice_pl.functional.cdc import (
    calibration_loss,
    confident_labels,
    labelled_loss,
    prototype_head,
    region_targets,
    regions_of,
)
from spice_pl.nn.heads import ClusterHead


def test_clusters_take_as_many_images_as_they_expect_to_be_right() -> None:
    """Six images, three clusters: M is the sum of the two largest probabilities of a column."""
    probs = torch.tensor(
        [
            [0.98, 0.01, 0.01],  # the two of cluster 0: ⌊.98 + .96⌋ = 1
            [0.96, 0.02, 0.02],
            [0.10, 0.50, 0.40],  # of cluster 1: ⌊.50 + .45⌋ = 0, and at least 1
            [0.15, 0.45, 0.40],
            [0.00, 0.00, 1.00],  # of cluster 2: ⌊1 + 1⌋ = 2
            [0.00, 0.00, 1.00],
        ]
    )
    assert confident_labels(probs).tolist() == [0, -1, 1, -1, 2, 2]
    shuffled = torch.tensor([3, 5, 0, 2, 4, 1])
    assert torch.equal(confident_labels(probs[shuffled]), confident_labels(probs)[shuffled])


def test_an_image_that_two_clusters_take_goes_to_the_larger_probability() -> None:
    probs = torch.tensor([[0.7, 0.3], [0.1, 0.2]])  # both take the first
    assert confident_labels(probs).tolist() == [0, -1]


def test_confident_right_predictions_label_every_image() -> None:
    probs = F.one_hot(torch.arange(12) % 4, 4).float()
    assert torch.equal(confident_labels(probs), torch.arange(12) % 4)


def test_regions_are_the_groups_that_are_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator))
    truth = torch.arange(40) % 4  # the first four images are one of each group
    rows = F.normalize(centres[truth] + 0.05 * torch.randn(40, 16, generator=generator))
    assert torch.equal(regions_of(rows, 4), truth)


def test_a_region_that_loses_its_images_keeps_its_centre() -> None:
    """Two equal first centres: all images are of the first, which moves away from the second."""
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert regions_of(rows, 2, iterations=0).tolist() == [0, 0, 0]
    assert regions_of(rows, 2).tolist() == [1, 1, 0]
    assert regions_of(rows, 3).tolist() == [0, 0, 2]


def test_targets_are_means_of_regions() -> None:
    probs = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.4, 0.6]])
    found = region_targets(probs, torch.tensor([1, 0, 1]), 3)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.6, 0.4]]))


def test_calibration_loss_by_hand() -> None:
    probs = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.7, 0.3]], dtype=torch.float64)
    cross = -(math.log(0.5) + 0.7 * math.log(0.9) + 0.3 * math.log(0.1)) / 2
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))  # of the mean prediction
    for weight in (0.0, 1.0, 2.5):
        loss = calibration_loss(probs.log(), targets, weight)
        assert float(loss) == pytest.approx(cross - weight * entropy)


def test_calibration_loss_is_least_at_the_targets() -> None:
    targets = torch.tensor([[0.7, 0.3], [0.3, 0.7]])
    logits = targets.log().requires_grad_()
    torch.autograd.backward(calibration_loss(logits, targets))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(2, 2))


def test_without_labels_there_is_no_loss_and_no_gradient() -> None:
    logits = torch.randn(3, 2).requires_grad_()
    loss = labelled_loss(logits, torch.full((3,), -1))
    torch.autograd.backward(loss)
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_head_starts_with_the_given_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(60) % 3
    features = 5 + 3 * F.normalize(torch.randn(3, 8, generator=generator))[truth]
    features += 0.3 * torch.randn(60, 8, generator=generator)
    head = ClusterHead(8, 20, 3)
    head.load_state_dict(prototype_head(features, truth, 3, 20, generator))
    probs = head(features)
    assert torch.equal(probs.argmax(dim=1), truth)
    first, second = probs.detach().topk(2).values.unbind(1)
    assert float((first / second).log().mean()) == pytest.approx(math.log(3), rel=1e-3)
    # A scale of the features changes nothing.
    other = ClusterHead(8, 20, 3)
    generator.manual_seed(0)
    other.load_state_dict(prototype_head(100 * features, truth, 3, 20, generator))
    generator.manual_seed(0)
    head.load_state_dict(prototype_head(features, truth, 3, 20, generator))
    torch.testing.assert_close(other(100 * features), head(features), rtol=1e-3, atol=1e-3)


def test_equal_features_give_a_head_without_nan() -> None:
    features, generator = torch.ones(6, 4), torch.Generator().manual_seed(0)
    state = prototype_head(features, torch.arange(6) % 2, 2, 3, generator)
    assert all(value.isfinite().all() for value in state.values())
