from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_info, threadpool_limits

from spice_pl.reports.map import METHODS, Map, _components, feature_map


def groups() -> tuple[np.ndarray, np.ndarray]:
    """Three groups of unit vectors in five dimensions."""
    generator = np.random.default_rng(0)
    group = np.arange(90) % 3
    return np.eye(5)[group] + 0.05 * generator.normal(size=(90, 5)), group


@pytest.mark.parametrize("method", METHODS)
def test_groups_stay_apart_in_the_unit_square(method: str) -> None:
    features, group = groups()
    drawn = feature_map(features, method)
    centres = np.stack([drawn.points[group == k].mean(axis=0) for k in range(3)])
    nearest = ((drawn.points[:, None] - centres) ** 2).sum(-1).argmin(axis=1)
    np.testing.assert_array_equal(nearest, group)
    assert drawn.points.min() >= 0
    assert drawn.points.max() <= 1


def test_plane_does_not_depend_on_the_scale_of_a_feature_vector() -> None:
    features, _ = groups()
    lengths = np.random.default_rng(1).uniform(0.1, 10, (90, 1))
    scaled, plain = (feature_map(each, "pca") for each in (features * lengths, features))
    np.testing.assert_allclose(scaled.points, plain.points)


def test_a_sample_is_drawn_of_many_images_and_it_is_the_same_each_time() -> None:
    features, _ = groups()
    drawn = feature_map(features, limit=20, seed=3)
    assert len(drawn.index) == len(set(drawn.index.tolist())) == 20
    np.testing.assert_array_equal(drawn.index, feature_map(features, limit=20, seed=3).index)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_images", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("alike", [True, False])
def test_few_images_have_points_too(num_images: int, method: str, alike: bool) -> None:
    features = np.ones((num_images, 4)) if alike else np.eye(9)[:num_images, :4] + 0.1
    drawn = feature_map(features, method)
    assert drawn.points.shape == (num_images, 2)
    assert np.isfinite(drawn.points).all()


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="map 'umap' must be one of"):
        feature_map(np.ones((3, 2)), "umap")


def openmp() -> list[Any]:
    return [each for each in threadpool_info() if each["user_api"] == "openmp"]


def trust(drawn: Map) -> float:
    return float(drawn.how.partition("Trustworthiness ")[2].partition(":")[0])


def test_neighbours_stay_together_under_tsne() -> None:
    features, group = groups()
    points = feature_map(features, "tsne").points
    distance = ((points[:, None] - points[None]) ** 2).sum(-1) + 9 * np.eye(90)
    assert (group[distance.argmin(axis=1)] == group).mean() > 0.95


def test_images_that_were_not_fitted_are_placed_in_their_group() -> None:
    features, group = groups()
    points = feature_map(features, "tsne", fitted=30).points
    centres = np.stack([np.median(points[group == k], axis=0) for k in range(3)])
    nearest = ((points[:, None] - centres) ** 2).sum(-1).argmin(axis=1)
    assert (nearest == group).mean() > 0.95
    assert len(np.unique(points.round(9), axis=0)) > 85  # no heap of dots


def test_a_seed_gives_one_map_whatever_the_number_of_threads() -> None:
    features, _ = groups()
    maps = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="openmp"):
            maps.append(feature_map(features, seed=3))
            assert {each["num_threads"] for each in openmp()} == {threads}  # given back
    np.testing.assert_array_equal(maps[0].points, maps[1].points)
    assert maps[0].how == maps[1].how


def test_trustworthiness_is_one_for_a_plane_and_lower_where_a_map_must_tear() -> None:
    generator = np.random.default_rng(0)
    angles = generator.uniform(0, 0.5, (60, 2))  # a patch of a sphere, nearly flat
    patch = np.column_stack([np.sin(angles), np.cos(angles).prod(axis=1)])
    assert trust(feature_map(patch, "pca")) >= 0.99
    noise = generator.normal(size=(200, 60))
    assert 0.4 < trust(feature_map(noise, "pca")) < 0.7


def test_few_rows_of_many_numbers_have_the_plane_of_the_covariance() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 90))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    expected = PCA(2, svd_solver="full").fit_transform(rows)
    found = _components(rows)[:, :2]
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-9)
