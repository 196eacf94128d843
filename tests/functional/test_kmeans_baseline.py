from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from tests.conftest import NUM_CLASSES, NUM_IMAGES, photographs

from spice_pl.functional import kmeans
from spice_pl.functional.assignment import clustering_scores
from spice_pl.functional.kmeans import kmeans_clusters


def blobs(num: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return four far corners of a square with small noise, and the corner of each sample."""
    generator = np.random.default_rng(seed)
    corners = np.array([[0, 0], [0, 10], [10, 0], [10, 10]])
    labels = generator.integers(0, 4, num)
    data = corners[labels] + generator.normal(0, 0.5, (num, 2))
    return data.astype(np.float32), labels.astype(np.int64)


def accuracy(clusters: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    scores = clustering_scores(torch.from_numpy(clusters), torch.from_numpy(labels))
    return float(scores["acc"])


def test_distant_blobs_are_found() -> None:
    data, labels = blobs(200)
    clusters = kmeans_clusters(data, 4, seed=0)
    assert clusters.dtype == np.int64
    assert accuracy(clusters, labels) == 1


def test_images_are_flattened_and_scaled() -> None:
    images = photographs()
    clusters = kmeans_clusters(images, NUM_CLASSES, seed=0)
    assert accuracy(clusters, np.arange(NUM_IMAGES, dtype=np.int64) % NUM_CLASSES) == 1
    rows = (images / 255).reshape(NUM_IMAGES, -1).astype(np.float32)
    assert np.array_equal(kmeans_clusters(rows, NUM_CLASSES, seed=0), clusters)


def test_large_images_are_averaged_down() -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32)).astype(np.uint8)
    enlarged = images.repeat(3, axis=2).repeat(3, axis=3)  # 96 pixels
    clusters = kmeans_clusters(images, 4, seed=0)
    assert np.array_equal(kmeans_clusters(enlarged, 4, seed=0), clusters)


def test_the_seed_decides() -> None:
    data = np.random.default_rng(0).random((300, 2)).astype(np.float32)
    assert np.array_equal(kmeans_clusters(data, 8, seed=1), kmeans_clusters(data, 8, seed=1))
    assert not np.array_equal(kmeans_clusters(data, 8, seed=1), kmeans_clusters(data, 8, seed=2))


@pytest.mark.parametrize("num", [50, 51, 101])
def test_samples_beyond_those_of_the_fit_are_assigned_too(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "FIT_AT_MOST", 50)
    data, labels = blobs(num)
    clusters = kmeans_clusters(data, 4, seed=0)
    assert clusters.shape == (num,)
    assert accuracy(clusters, labels) == 1


@pytest.mark.parametrize(
    ("num_clusters", "restarts"), [(2, 10), (100, 10), (101, 9), (200, 5), (1000, 1), (2000, 1)]
)
def test_many_clusters_restart_less_often(
    num_clusters: int, restarts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Watched(KMeans):  # type: ignore[misc]
        def fit(self, rows: NDArray[np.float32]) -> Watched:
            asked.append(self.get_params()["n_init"])
            self.set_params(n_init=1)
            fitted: Watched = super().fit(rows)
            return fitted

    monkeypatch.setattr(kmeans, "KMeans", Watched)
    data = np.random.default_rng(0).random((num_clusters, 2)).astype(np.float32)
    kmeans_clusters(data, num_clusters, seed=0)
    assert asked == [restarts]
