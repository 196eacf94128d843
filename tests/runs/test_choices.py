"""Clusters compared without labels, and previews of other numbers of clusters."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet
from spice_pl.reports.map import Map
from spice_pl.runs import choices
from spice_pl.runs.answer import choose_answer
from spice_pl.runs.choices import (
    alike,
    beside,
    choose_k,
    compare_clusters,
    measure_edited,
    preview,
    read_estimate,
)
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder

GROUPS = np.repeat([0, 1, 2], [30, 19, 11])


KEYS = [str(i) for i in range(60)]
IMAGES = ImageSet("noise", np.zeros((60, 3, 8, 8), np.uint8), KEYS, "f")


def rows() -> NDArray[np.float32]:
    """Three groups that any clustering finds."""
    spread = 0.05 * np.random.default_rng(0).normal(size=(60, 8))
    made: NDArray[np.float32] = (np.eye(8)[GROUPS] + spread).astype(np.float32)
    return made


@pytest.fixture
def run(tmp_path: Path) -> tuple[RunFolder, RunFolder, dict[str, Any], ClusterTable]:
    """A run of K = 3 whose network puts every second image of group 0 into cluster 1."""
    folder = RunFolder(tmp_path / "proto" / "seed0", "smoothed")
    before = RunFolder(tmp_path / "embed" / "seed0")
    for each in (folder, before):
        each.path.mkdir(parents=True)
    np.save(folder.path / "features.npy", rows())
    network = np.where((GROUPS == 0) & (np.arange(60) % 2 == 1), 1, GROUPS)
    np.save(folder.path / "probs.npy", np.eye(3, dtype=np.float32)[network])
    before.write_json("metrics.json", {"stage": "embed", "digest": "d"})
    metrics = {
        **{"stage": "proto", "num_clusters": 3, "seed": 0, "settings": {}},
        "overrides": ["dataset=digits", "stage=all", "dataset.num_clusters=auto", "seed=0"],
        "answer": {"name": "k-means after 10 steps", "scores": {"network": 1.0, "walk": 2.0}},
    }
    ones = np.ones(60, np.float32)
    table = ClusterTable(KEYS, GROUPS, ones, ones, ones > 0)
    return folder, before, metrics, table


def test_clusterings_are_compared_with_the_one_on_the_page(run: Any) -> None:
    folder, _, metrics, table = run
    found = compare_clusters(folder, metrics, table, "stage 2")
    kept, network, plain, spectral = found.rows
    names = ["k-means after 10 steps", "stage 2", "k-means", "spectral clustering"]
    assert [row.name for row in found.rows] == names
    assert [row.kept for row in found.rows] == [True, False, False, False]
    assert (spectral.agreement, spectral.alike) == (1, 1)
    assert (kept.agreement, kept.alike, plain.agreement, plain.alike) == (1, 1, 1, 1)
    assert network.alike == pytest.approx(45 / 60)  # 15 images are elsewhere
    assert network.agreement < 0.9
    shares = np.array([30, 19, 11]) / 60
    entropy = -(shares * np.log(shares)).sum() / np.log(3)
    assert kept.evenness == pytest.approx(entropy)
    assert found.scores == {"network": 1.0, "walk": 2.0}


def test_the_score_on_the_page_is_that_of_the_choice_in_small_clusters_too(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "proto" / "seed0")
    folder.path.mkdir(parents=True)
    rows = np.random.default_rng(0).normal(size=(24, 8)).astype(np.float32)
    probs = torch.eye(6)[torch.arange(24) % 6]  # 4 images in each: 3 others, fewer than 10
    np.save(folder.path / "features.npy", rows)
    np.save(folder.path / "probs.npy", probs.numpy())
    scores = choose_answer(torch.from_numpy(rows), probs, 0).scores
    ones = np.ones(24, np.float32)
    table = ClusterTable(KEYS[:24], probs.argmax(dim=1).numpy(), ones, ones, ones > 0)
    metrics = {"num_clusters": 6, "seed": 0}
    (shown, *_) = compare_clusters(folder, metrics, table, "heads").rows
    assert shown.score == pytest.approx(scores["network"], abs=1e-5)


def test_without_a_choice_the_network_is_the_one_on_the_page(run: Any) -> None:
    folder, _, metrics, table = run
    found = compare_clusters(folder, metrics | {"answer": None}, table, "stage 2")
    assert [row.name for row in found.rows if row.kept] == ["stage 2"]
    assert (found.chosen, found.scores) == ("", {})


def test_many_clusters_are_compared_without_spectral_clustering(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, metrics, table = run
    monkeypatch.setattr(choices, "SPECTRAL", 60 * 3 - 1)  # images times clusters
    found = compare_clusters(folder, metrics, table, "stage 2")
    assert "spectral clustering" not in [row.name for row in found.rows]


def test_edited_clusters_are_measured_as_those_of_a_run(run: Any) -> None:
    folder, _, metrics, table = run
    (first, *_) = compare_clusters(folder, metrics, table, "heads").rows
    gaps = replace(table, clusters=table.clusters * 2 + 1)  # merging leaves numbers without images
    edited = measure_edited(folder, gaps, int(metrics["seed"]), first.name)
    assert edited == replace(first, kept=True, alike=1.0)


def test_numbers_of_clusters_do_not_matter_for_likeness() -> None:
    clusters = torch.tensor([0, 0, 1, 1, 2])
    assert alike(clusters, (clusters + 1) % 3, 3) == 1.0
    assert alike(torch.tensor([0, 0, 0, 0, 0]), clusters, 3) == pytest.approx(2 / 5)


def test_other_numbers_are_near_estimated_or_best() -> None:
    assert beside(4, 1000, None, []) == [2, 3, 5, 6, 7]
    assert beside(4, 1000, 9, [(9, 0.5), (15, 0.4), (3, 0.3), (8, 0.1)]) == [2, 3, 5, 6, 7, 9, 15]
    assert beside(2, 8, None, []) == [3, 4]  # at least two images each
    assert beside(200, 50_000, None, []) == [100, 150, 250, 300]


def test_a_preview_shows_groups_by_size_and_what_is_nearest_to_their_centre() -> None:
    drawn = np.arange(0, 60, 2)
    groups = preview(rows(), 3, 0, drawn, largest=2)
    assert [size for size, _ in groups] == [30, 19]
    assert all(
        (GROUPS[drawn[points]] == cluster).all() for cluster, (_, points) in enumerate(groups)
    )
    centre = rows()[GROUPS == 0].mean(axis=0)
    far = np.linalg.norm(rows()[drawn] - centre, axis=1)
    assert groups[0][1] == np.argsort(far)[:6].tolist()


def test_another_number_has_its_command(run: Any) -> None:
    folder, before, metrics, _ = run
    drawn = Map(np.arange(60), np.zeros((60, 2)), "a plane")
    estimate = {
        "num_clusters": 3,
        "clear": False,
        "candidates": [4, 2, 3],
        "scores": [0.1, 0.2, 0.9],
    }
    found = choose_k(folder, [before], IMAGES, metrics | {"k_estimate": estimate}, drawn)
    assert found is not None
    assert (found.estimated, found.clear) == (3, False)
    assert found.curve == [(2, 0.2), (3, 0.9), (4, 0.1)]
    assert [each.num_clusters for each in found.previews] == [2, 4, 5, 6]
    assert shlex.split(found.previews[0].command)[2:] == [
        *("dataset=digits", "seed=0", "stage=kmeans", "dataset.num_clusters=2", "overwrite=true")
    ]
    own = metrics | {
        "overrides": ["dataset=folder", "dataset.root='my photos'", "+seed=1"],
        "settings": {"dataset.root": "my photos"},
    }
    again = choose_k(folder, [before], IMAGES, own, drawn)
    assert again is not None
    assert shlex.split(again.previews[0].command)[2:4] == ["my photos", "+seed=1"]


def test_after_a_stage_with_clusters_no_number_is_offered(run: Any) -> None:
    folder, before, metrics, _ = run
    before.write_json("metrics.json", {"stage": "proto", "digest": "d", "cluster_sizes": [1]})
    assert choose_k(folder, [before], IMAGES, metrics, None) is None
    assert choose_k(folder, [], IMAGES, metrics, None) is None


@pytest.mark.parametrize(
    "held", [None, 4, {"num_clusters": 4}, {"num_clusters": "four", "clear": True}, []]
)
def test_an_estimate_of_another_form_is_none(held: Any) -> None:
    assert read_estimate(held) == (None, True, [])


def test_an_estimate_leaves_out_what_is_not_finite() -> None:
    held = {"num_clusters": 2, "clear": True, "candidates": [3, 2], "scores": [float("nan"), 1]}
    assert read_estimate(held) == (2, True, [(2, 1.0)])
