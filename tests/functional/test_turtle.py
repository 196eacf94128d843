from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import KFold, cross_val_score

from spice_pl.functional.turtle import generalization_scores, soft_cross_entropy, turtle_loss


def test_cross_entropy_with_soft_labels_by_hand() -> None:
    logits = torch.tensor([[0.8, 0.2], [0.5, 0.5]], dtype=torch.float64).log()
    labels = torch.tensor([[0.75, 0.25], [0.0, 1.0]], dtype=torch.float64)
    first = -(0.75 * math.log(0.8) + 0.25 * math.log(0.2))
    assert float(soft_cross_entropy(logits, labels)) == pytest.approx((first + math.log(2)) / 2)


def test_objective_sums_over_spaces_and_rewards_even_labels() -> None:
    labels = torch.tensor([[[0.9, 0.1], [0.3, 0.7]]], dtype=torch.float64)
    logits = torch.zeros(3, 1, 2, 2, dtype=torch.float64)  # three spaces that know nothing
    entropy = -(0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    found = turtle_loss(logits, labels, gamma=10.0)
    assert found.tolist() == pytest.approx([3 * math.log(2) - 10 * entropy])


def test_gradient_moves_labels_to_what_classifiers_predict() -> None:
    raw = torch.zeros(1, 2, 2, requires_grad=True)
    logits = torch.tensor([[[[2.0, 0.0], [0.0, 2.0]]]])
    torch.autograd.backward(turtle_loss(logits, raw.softmax(-1), gamma=0.0).sum())
    assert raw.grad is not None
    assert raw.grad[0, 0, 0] < 0
    assert raw.grad[0, 1, 1] < 0


def test_score_equals_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5))
    features -= features.mean(axis=0)
    labels = np.stack([features[:, 0] > 0, rng.random(60) > 0.5]).astype(np.int64)
    order = np.argsort(np.arange(60) % 10, kind="stable")  # KFold takes blocks
    penalty = float((features**2).mean())
    found = generalization_scores(torch.from_numpy(features), torch.from_numpy(labels), 2)
    for row, score in zip(labels, found.tolist(), strict=True):
        # The penalty of ours reaches the bias too, so it is one more feature here.
        inputs = np.concatenate([features, np.ones((60, 1))], axis=1)
        model = RidgeClassifier(alpha=penalty, fit_intercept=False)
        expected = cross_val_score(model, inputs[order], row[order], cv=KFold(10)).mean()
        assert score == pytest.approx(expected)
    assert found[0] > found[1] + 0.2


def test_score_of_few_samples_and_wrong_shapes() -> None:
    features = torch.tensor([[-1.0], [0.5]])
    labels = torch.tensor([[0, 0]])
    assert generalization_scores(features, labels, 2).tolist() == [1.0]  # one label for all
    with pytest.raises(ValueError, match=r"num_folds 1 leaves nothing to learn from"):
        generalization_scores(features, labels, 2, num_folds=1)
    with pytest.raises(ValueError, match=r"\(1, 3\) are not \(H, N\) with the N = 2"):
        generalization_scores(features, torch.tensor([[0, 0, 1]]), 2)
