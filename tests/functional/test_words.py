"""Mean probability of words by cluster, with answers by hand."""

from __future__ import annotations

import math

import torch

from spice_pl.functional.words import word_shares

IMAGES = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
WORDS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_mean_of_softmaxes_by_hand() -> None:
    shares = word_shares(IMAGES, WORDS, torch.tensor([0, 0, 1]), 2, scale=5.0)
    # Of two words the softmax is a sigmoid of the difference of the scaled cosines.
    first = (sigmoid(5 * 1.0) + sigmoid(5 * -0.2)) / 2
    expected = torch.tensor([[first, 1 - first], [sigmoid(-5.0), sigmoid(5.0)]])
    torch.testing.assert_close(shares, expected)


def test_numbers_of_clusters_and_the_order_of_images_do_not_matter() -> None:
    clusters = torch.tensor([0, 0, 1])
    shares = word_shares(IMAGES, WORDS, clusters, 2, scale=5.0)
    order = torch.tensor([2, 0, 1])
    other = word_shares(IMAGES[order], WORDS, 1 - clusters[order], 3, scale=5.0)
    torch.testing.assert_close(other[:2], shares.flip(0))
    assert other[2].tolist() == [0, 0]
