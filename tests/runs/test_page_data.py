"""What the page says about all images of a run, on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from spice_pl.runs.page_data import colour_share, least_alike


def test_the_least_alike_of_equal_and_of_orthogonal_images() -> None:
    assert least_alike(np.ones((30, 4), np.float32) * 3, 0) == pytest.approx(1)
    assert least_alike(np.eye(30, dtype=np.float32), 0) == 0
    assert least_alike(np.ones((1, 4), np.float32), 0) == 0  # no pair


def coloured(levels: np.ndarray) -> np.ndarray:
    return np.broadcast_to(levels[:, None, None, None], (len(levels), 3, 16, 16)).astype(np.uint8)


def test_clusters_by_brightness_explain_all_colours_and_random_ones_none() -> None:
    half = np.repeat([0, 1], 100)
    assert colour_share(coloured(np.where(half, 200, 50)), half, 0) == pytest.approx(1)
    generator = np.random.default_rng(0)
    levels = generator.integers(0, 256, 200)
    many = generator.integers(0, 60, 200)  # η² of 60 random clusters is about 60 / 200
    assert colour_share(coloured(levels), many, 0) < 0.15


def test_images_of_one_colour_and_single_images_explain_nothing() -> None:
    assert colour_share(coloured(np.full(10, 7)), np.arange(10) % 2, 0) == 0
    assert colour_share(coloured(np.arange(3)), np.arange(3), 0) == 0
