"""RunFolder: files that are complete or absent, and checks of what a run was made from."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from spice_pl.errors import UsageError
from spice_pl.nn.weights import load_strictly
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder, as_tensor
from spice_pl.system.files import atomic


def test_a_file_gets_its_name_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with atomic(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_with_metrics_is_finished(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert not folder.finished
    folder.create("features.npy", (2, 3))
    folder.write_weights("encoder.safetensors", nn.Linear(1, 1))
    assert not folder.finished
    folder.write_json("metrics.json", {"acc": np.float32(0.5)})
    assert folder.finished
    assert folder.metrics == {"acc": 0.5}


def test_arrays_have_no_name_until_they_are_published(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create("features.npy", (4, 2))
    folder.write_rows("features.npy", np.array([3, 1]), np.array([[7, 8], [5, 6]], np.float32))
    with pytest.raises(UsageError, match=r"features\.npy is missing; .* overwrite=true"):
        _ = folder.features
    folder.write_rows("features.npy", np.array([0, 2]), np.array([[1, 2], [3, 4]], np.float32))
    folder.publish("features.npy")
    assert folder.features.tolist() == [[1, 2], [5, 6], [3, 4], [7, 8]]
    assert isinstance(folder.features, np.memmap)
    assert as_tensor(folder.features).tolist() == folder.features.tolist()


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module.to(memory_format=torch.channels_last)
    module[1].running_mean = torch.arange(4.0)
    folder.write_weights("encoder.safetensors", module)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    folder.load_weights("encoder.safetensors", other)
    for key, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def test_weights_of_another_architecture_are_reported_key_by_key(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_weights("head.safetensors", nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4)))
    other = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UsageError) as error:
        folder.load_weights("head.safetensors", other)
    lines = [line.split() for line in str(error.value).splitlines()[1:]]
    assert [(line[0], line[1]) for line in lines] == [
        ("missing", "2.weight"),
        ("missing", "2.bias"),
        ("unexpected", "1.bias"),
        ("unexpected", "1.weight"),
        ("shape", "0.weight"),
        ("shape", "0.bias"),
    ]
    assert "0.weight is (3, 2), needed (5, 2)" in str(error.value)
    assert "head.safetensors holds weights of another architecture" in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_fitting_weights_are_loaded() -> None:
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    load_strictly(target, source.state_dict(), "memory")
    assert torch.equal(source.weight, target.weight)


def test_missing_weights_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"head\.safetensors is missing; .* overwrite=true"):
        RunFolder(tmp_path).load_weights("head.safetensors", nn.Linear(1, 1))


def test_artifacts_of_other_images_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.stamp("abc", 10, None)
    folder.check_dataset("abc", 10)
    with pytest.raises(UsageError, match=r"abc, 10 images; now xyz, 12 images.*overwrite=true"):
        folder.check_dataset("xyz", 12)


def test_artifacts_of_a_replaced_upstream_are_refused(tmp_path: Path) -> None:
    upstream, folder = RunFolder(tmp_path / "moco/seed0"), RunFolder(tmp_path / "proto/seed0")

    def make_upstream() -> None:
        upstream.write_weights("encoder.safetensors", nn.Linear(2, 2))
        upstream.write_json("metrics.json", {"digest": upstream.digest()})

    make_upstream()
    folder.stamp("abc", 10, upstream)
    folder.check_upstream(upstream)
    make_upstream()
    with pytest.raises(UsageError, match=r"proto/seed0 .*moco/seed0.*overwrite=true"):
        folder.check_upstream(upstream)


def test_clusters_have_one_line_per_image(tmp_path: Path) -> None:
    # A file name may have commas, quotes, line ends and bytes that are not UTF-8.
    names = ["a,b.png", 'say "x".png', "two\nlines.png", "ü 日.png", os.fsdecode(b"\xff.png")]
    table = ClusterTable(
        names,
        np.array([2, 0, 1, 0, 2]),
        np.array([0.99999, 0.5, 0.25, 1.0, 0.123456], np.float32),
        np.array([1.0, 0.0, 0.5, 0.25, 0.75], np.float32),
        np.array([True, False, False, True, False]),
    )
    RunFolder(tmp_path).write_clusters(table)
    file = tmp_path / "clusters.csv"
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == ["image", "cluster", "confidence", "agreement", "reliable"]
    assert [row["image"] for row in rows] == names
    assert [row["cluster"] for row in rows] == ["2", "0", "1", "0", "2"]
    assert [row["confidence"] for row in rows] == ["1.0000", "0.5000", "0.2500", "1.0000", "0.1235"]
    assert [row["agreement"] for row in rows] == ["1.0000", "0.0000", "0.5000", "0.2500", "0.7500"]
    assert [row["reliable"] for row in rows] == ["1", "0", "0", "1", "0"]


def test_columns_of_different_lengths_are_refused(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="argument"):
        RunFolder(tmp_path).write_clusters(
            ClusterTable(["a", "b"], np.array([0, 1]), one, one, np.array([True]))
        )
    assert list(tmp_path.iterdir()) == []
