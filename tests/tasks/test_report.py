"""stage=report: the page with later names, and the attention of the prototypes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.parts import open_images
from spice_pl.job.run import run_stages
from spice_pl.reports.choices import Comparison
from spice_pl.reports.map import Map, feature_map
from spice_pl.runs import choices, page_data
from spice_pl.runs.attention import read_attention
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.page_data import report_data
from spice_pl.tasks import report


def test_the_page_is_written_again_and_the_numbers_stay(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished.folder("fixmatch")
    with np.load(folder.path / "attention.npz") as held:
        index, maps = held["index"], held["maps"]
    assert 0 < len(index) == len(maps)
    assert maps.dtype == np.uint8
    assert (maps.max(axis=(1, 2)) == 255).all()
    before = {name: (folder.path / name).read_bytes() for name in ("metrics.json", "clusters.csv")}
    folder.write_json("names.json", {"0": "owls"})
    whole = (folder.path / "attention.npz").read_bytes()
    for content in (b"no archive", b"", whole[:-9], whole[:80] + b"12" + whole[82:]):
        (folder.path / "attention.npz").write_bytes(content)
        with pytest.raises(UsageError, match=r"attention\.npz is damaged .* stage=report writes"):
            read_attention(folder)
    opened: list[Path] = []
    monkeypatch.setattr(report, "open_page", lambda page, wanted: opened.append(page))
    for name in (".report.html.x", ".attention.npz.x", ".names.json.x"):  # the last is not its own
        (folder.path / name).touch()
    run_stages(finished.job("stage=report"))
    left = [each.name for each in folder.path.glob(".*.x")]
    assert left == [".names.json.x"]
    assert opened == [folder.path / "report.html"]
    page = (folder.path / "report.html").read_text()
    assert '<h3 id="cluster-0-title" data-name="0">owls</h3>' in page
    assert page.count("data-look=") == len(index)
    with np.load(folder.path / "attention.npz") as held:  # computed from model.spice: the same maps
        np.testing.assert_array_equal(held["index"], index)
        assert np.abs(held["maps"].astype(int) - maps).max() <= 1
    assert before == {name: (folder.path / name).read_bytes() for name in before}


def test_a_page_is_computed_once_and_again_after_a_change(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    compare = choices.compare_clusters

    def counted(folder: RunFolder, *given: Any) -> Comparison:
        looks.append(folder.path.name)
        return compare(folder, *given)

    monkeypatch.setattr(page_data, "compare_clusters", counted)
    monkeypatch.setattr(page_data, "_last", {})
    folder = finished.folder("fixmatch")
    metrics, table = folder.metrics, folder.read_clusters()
    images = open_images(finished.job().cfg)
    for names in ({"0": "owls"}, {"0": "cats"}):
        folder.write_json("names.json", names)
        data = report_data(folder, [], images, metrics, table)
        assert data.names == {0: names["0"]}
    assert looks == ["seed0"]
    digests = {**metrics["digests"], "clusters.csv": "other"}
    report_data(folder, [], images, metrics | {"digests": digests}, table)
    assert looks == ["seed0"] * 2


def test_a_map_is_made_once_for_the_same_features(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(features: Any, method: str, seed: int) -> Map:
        made.append(method)
        return feature_map(features, method, seed)

    monkeypatch.setattr(page_data, "feature_map", counted)
    monkeypatch.setattr(page_data, "_last", {})
    monkeypatch.setattr(page_data, "_last_map", {})
    folder = finished.folder("fixmatch")
    metrics, table = folder.metrics, folder.read_clusters()
    images = open_images(finished.job().cfg)
    edited = {**metrics["digests"], "clusters.csv": "other"}
    trained = {**edited, "features.npy": "other"}
    for digests in (metrics["digests"], edited, trained):
        report_data(folder, [], images, metrics | {"digests": digests}, table)
    assert made == ["tsne"] * 2
    assert report_data(folder, [], images, metrics, table, "pca").map is not None
    assert made == ["tsne", "tsne", "pca"]
