"""Names of folders as proposals for clusters."""

from __future__ import annotations

import numpy as np
import pytest

from spice_pl.reports.folders import MAX_NAME, folder_names


def test_more_than_half_and_more_than_overall() -> None:
    keys = ["a/1", "a/2", "a/3", "b/4", "b/5", "c/6", "b/7", "a/8"]
    clusters = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    # 0: three of four in a, of which there are four in eight. 1: a half is not more than half.
    assert folder_names(keys, clusters) == {0: ("a", 0.75), 2: ("b", 1.0), 3: ("a", 1.0)}


@pytest.mark.parametrize(
    "keys",
    [
        ["0", "1", "2", "3"],  # positions
        ["x/0", "x/1", "x/2", "x/3"],  # one folder
        ["0.png", "1.png", "x/2.png", "3.png"],  # most are in none
    ],
)
def test_where_folders_say_nothing_there_is_none(keys: list[str]) -> None:
    assert folder_names(keys, np.array([0, 0, 1, 1])) == {}


def test_the_nearest_folder_gives_the_name() -> None:
    keys = ["2019/cats/1.png", "2020/cats/2.png", "dogs/3.png", "trip\\dogs\\4.png"]
    found = folder_names(keys, np.array([0, 0, 1, 1]))
    assert found == {0: ("cats", 1.0), 1: ("dogs", 1.0)}
    long = folder_names([f"{'n' * 250}/1", "b/2"], np.array([0, 1]))
    assert long[0] == ("n" * MAX_NAME, 1.0)


def test_numbers_of_clusters_do_not_matter() -> None:
    generator = np.random.default_rng(0)
    clusters = generator.integers(0, 4, 200)
    keys = [f"{'abcd'[c] if generator.random() < 0.8 else 'e'}/{i}" for i, c in enumerate(clusters)]
    found = folder_names(keys, clusters)
    turned = folder_names(keys, (clusters + 1) % 4)
    assert {(k + 1) % 4: each for k, each in found.items()} == turned
    assert [found[k][0] for k in range(4)] == list("abcd")
