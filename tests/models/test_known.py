"""Known images are kept evenly and found by cosine."""

from __future__ import annotations

import math

import numpy as np
import torch

from spice_pl.models.known import Known, choose_known


def test_agreement_is_the_share_of_the_nearest_in_the_same_cluster() -> None:
    angles = torch.arange(8) * 0.1
    known = Known(
        keys=[str(i) for i in range(8)],
        embeddings=torch.stack([angles.cos(), angles.sin()], dim=1).half(),
        clusters=torch.tensor([0, 0, 1, 0, 1, 1, 1, 1]),
    )
    # 8 known images in 2 clusters: the 2 nearest count.
    new = torch.tensor([[1.0, 0.0], [math.cos(0.21), math.sin(0.21)]])
    found = known.agreement(new, torch.tensor([0, 1]), num_clusters=2)
    assert found.tolist() == [1.0, 0.5]


def test_the_nearest_known_images_come_first() -> None:
    ids = torch.zeros(3, dtype=torch.long)
    known = Known(["east", "north", "west"], torch.tensor([[1.0, 0], [0, 1], [-1, 0]]).half(), ids)
    keys, cosines = known.nearest(torch.tensor([[0.6, 0.8], [-1.0, 0.0]]), most=2)
    assert keys == [["north", "east"], ["west", "north"]]
    expected = np.array([[0.8, 0.6], [1, 0]], np.float32)
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    assert known.nearest(torch.tensor([[0.6, 0.8]]), most=9)[0] == [["north", "east", "west"]]


def test_known_images_are_evenly_spaced_and_at_most_as_many_as_asked() -> None:
    features = 5 * np.eye(10, dtype=np.float32)
    known = choose_known([str(i) for i in range(10)], features, np.arange(10), most=4)
    assert known is not None
    assert known.keys == ["0", "3", "6", "9"]
    assert known.clusters.tolist() == [0, 3, 6, 9]
    assert torch.equal(known.embeddings, torch.eye(10)[[0, 3, 6, 9]].half())
    assert choose_known(["0"], features[:1], np.arange(1), most=0) is None
