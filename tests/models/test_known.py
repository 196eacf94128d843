"""Known images are kept evenly and found by cosine."""

from __future__ import annotations

import math

import numpy as np
import torch

from spice_pl.models.known import Known, choose_known


def test_an_image_is_not_sure_if_too_few_of_the_nearest_are_in_its_cluster() -> None:
    angles = torch.arange(8) * 0.1
    known = Known(
        keys=[str(i) for i in range(8)],
        embeddings=torch.stack([angles.cos(), angles.sin()], dim=1).half(),
        clusters=torch.tensor([0, 0, 1, 0, 1, 1, 1, 1]),
    )
    # 8 known images in 2 clusters: the 2 nearest count.
    new = torch.tensor([[1.0, 0.0], [math.cos(0.21), math.sin(0.21)], [1.0, 0.0]])
    found = known.not_sure(new, torch.tensor([0, 1, 1]), num_clusters=2)
    assert found.tolist() == [False, False, True]  # 2 of 2, 1 of 2, 0 of 2


def test_a_new_image_of_a_small_cluster_can_be_sure() -> None:
    # 60 known images in 4 clusters, one of them of 3: the nearest 60 // (2 * 4) = 7 count.
    angles = torch.arange(60) * 0.01
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    clusters = torch.tensor([3] * 3 + [0] * 19 + [1] * 19 + [2] * 19)
    known = Known([str(i) for i in range(60)], rows.half(), clusters)
    new = rows[[0, 0, 59, 59]]  # the 7 nearest of the first are 3 of cluster 3 and 4 of cluster 0
    found = known.not_sure(new, torch.tensor([3, 1, 2, 3]), num_clusters=5)
    assert found.tolist() == [False, True, False, True]
    assert known.not_sure(new, torch.full((4,), 4), num_clusters=5).all()  # no known image


def test_shares_of_the_clusters_among_the_nearest_known_images() -> None:
    angles = torch.arange(8) * 0.1
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    known = Known([str(i) for i in range(8)], rows.half(), torch.tensor([0, 0, 1, 0, 1, 1, 1, 1]))
    # 8 known images in 2 clusters: the 2 nearest count.
    found = known.shares(rows[[0, 7]], num_clusters=3)
    assert found.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert known.shares(rows[2:3] + 0.01, num_clusters=2).tolist() == [[0.5, 0.5]]  # 2 and 3


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
