import numpy as np
import pytest

from spice_pl.reports.map import feature_map


def groups() -> tuple[np.ndarray, np.ndarray]:
    """Three groups of unit vectors in five dimensions."""
    generator = np.random.default_rng(0)
    group = np.arange(90) % 3
    return np.eye(5)[group] + 0.05 * generator.normal(size=(90, 5)), group


def test_groups_stay_apart_in_the_unit_square() -> None:
    features, group = groups()
    drawn = feature_map(features)
    centres = np.stack([drawn.points[group == k].mean(axis=0) for k in range(3)])
    nearest = ((drawn.points[:, None] - centres) ** 2).sum(-1).argmin(axis=1)
    np.testing.assert_array_equal(nearest, group)
    assert drawn.points.min() >= 0
    assert drawn.points.max() <= 1


def test_plane_does_not_depend_on_the_scale_of_a_feature_vector() -> None:
    features, _ = groups()
    lengths = np.random.default_rng(1).uniform(0.1, 10, (90, 1))
    np.testing.assert_allclose(feature_map(features * lengths).points, feature_map(features).points)


def test_a_sample_is_drawn_of_many_images_and_it_is_the_same_each_time() -> None:
    features, _ = groups()
    drawn = feature_map(features, limit=20, seed=3)
    assert len(drawn.index) == len(set(drawn.index.tolist())) == 20
    np.testing.assert_array_equal(drawn.index, feature_map(features, limit=20, seed=3).index)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_few_images_have_points_too(num_images: int) -> None:
    drawn = feature_map(np.ones((num_images, 4)))
    assert drawn.points.shape == (num_images, 2)
    assert np.isfinite(drawn.points).all()


def test_unknown_method_is_named() -> None:
    with pytest.raises(ValueError, match="map 'umap' must be one of"):
        feature_map(np.ones((3, 2)), "umap")


@pytest.mark.slow
def test_neighbours_stay_together_under_tsne() -> None:
    pytest.importorskip("openTSNE", reason="needs the extra plots")
    features, group = groups()
    points = feature_map(features, "tsne").points
    distance = ((points[:, None] - points[None]) ** 2).sum(-1) + 9 * np.eye(90)
    assert (group[distance.argmin(axis=1)] == group).mean() > 0.95
