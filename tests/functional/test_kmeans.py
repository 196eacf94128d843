from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.kmeans import cosine_kmeans


def blobs(num_clusters: int = 4, each: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(num_clusters, 8, generator=generator))
    label = torch.arange(num_clusters).repeat_interleave(each)
    lengths = 0.5 + 5 * torch.rand(len(label), 1, generator=generator)  # must not matter
    noise = 0.1 * torch.randn(len(label), 8, generator=generator)
    return (centres[label] + noise) * lengths, label


def test_finds_directions_for_any_lengths() -> None:
    features, label = blobs()
    clusters, centres = cosine_kmeans(features, 4, generator=torch.Generator().manual_seed(1))
    assert clustering_scores(clusters, label)["acc"] == 1
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(4))
    cosines = torch.nn.functional.normalize(features) @ centres.T
    assert torch.equal(cosines.argmax(dim=1), clusters)


def test_fits_no_worse_than_scikit_learn_on_unit_rows() -> None:
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features)
    clusters, centres = cosine_kmeans(features, 7, generator=torch.Generator().manual_seed(0))
    theirs = torch.from_numpy(KMeans(7, n_init=10, random_state=0).fit_predict(unit.numpy())).long()
    means = torch.stack([unit[theirs == k].mean(dim=0) for k in range(7)])
    fit = float((unit * torch.nn.functional.normalize(means)[theirs]).sum())
    assert float((unit * centres[clusters]).sum()) >= fit * 0.99


def test_the_same_generator_gives_the_same_clusters() -> None:
    features, _ = blobs()
    runs = [
        cosine_kmeans(features, 5, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)
    ]
    assert torch.equal(*runs)


def test_given_clusters_are_the_start_and_keep_their_numbers() -> None:
    features, label = blobs()
    named = torch.tensor([2, 0, 3, 1])[label]
    noisy = named.clone()
    noisy[::10] = 0
    found, _ = cosine_kmeans(features, 4, start=noisy)
    assert torch.equal(found, named)
    found, _ = cosine_kmeans(features, 5, start=named)  # an empty cluster takes an image
    assert sorted(set(found.tolist())) == [0, 1, 2, 3, 4]


def test_as_many_clusters_as_samples_and_equal_samples() -> None:
    features = torch.eye(4)
    clusters, _ = cosine_kmeans(features, 4)
    assert sorted(clusters.tolist()) == [0, 1, 2, 3]
    clusters, centres = cosine_kmeans(torch.ones(6, 3), 3)  # all samples are equal
    assert clusters.shape == (6,)
    assert centres.isfinite().all()


def test_refuses_too_many_clusters_and_nan() -> None:
    with pytest.raises(ValueError, match="num_clusters 3 is not between 1 and the 2 samples"):
        cosine_kmeans(torch.eye(2), 3)
    with pytest.raises(ValueError, match="a feature is NaN"):
        cosine_kmeans(torch.tensor([[1.0, torch.nan]]), 1)
