"""Clusters for annotation tools."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.conftest import NUM_IMAGES, PIXELS, Finished

from spice_pl.errors import UsageError
from spice_pl.runs.labels import fiftyone_dataset, write_labels


def test_files_hold_the_table_with_names_and_real_paths(finished: Finished, tmp_path: Path) -> None:
    run = finished.folder("proto")
    table = run.read_clusters()
    first = int(table.clusters[0])
    (run.path / "names.json").write_text(json.dumps({str(first): "red, left"}))
    written = write_labels(run, tmp_path)
    assert [file.name for file in written] == ["label_studio.json", "fiftyone.json", "cvat.xml"]
    tasks, labels = (json.loads(file.read_text()) for file in written[:2])
    assert len(tasks) == len(labels["labels"]) == NUM_IMAGES
    path = unquote(tasks[0]["data"]["image"].partition("?d=")[2])
    assert Path("/", path).is_file()
    assert Path(path).name == table.keys[0]
    (found,) = tasks[0]["predictions"]
    assert found["result"][0]["value"] == {"choices": ["red, left"]}
    assert found["score"] == float(table.confidence[0])
    assert labels["classes"][first] == "red, left"
    assert labels["labels"][Path(table.keys[0]).stem] == first


def test_cvat_file_has_one_tag_per_image_among_its_labels(
    finished: Finished, tmp_path: Path
) -> None:
    run = finished.folder("proto")
    table = run.read_clusters()
    first = int(table.clusters[0])
    name = 'a & "b" <c>'
    run.write_json("names.json", {str(first): name})
    top = ElementTree.fromstring(write_labels(run, tmp_path)[2].read_bytes())  # noqa: S314 - ours
    assert (top.tag, top.findtext("version")) == ("annotations", "1.1")
    labels = [each.findtext("name") for each in top.findall("meta/task/labels/label")]
    assert len(labels) == len(set(labels)) == 3
    assert labels[first] == name
    assert {each.text for each in top.findall("meta/task/labels/label/type")} == {"tag"}
    images = top.findall("image")
    assert [image.get("name") for image in images] == list(table.keys)
    assert [image.get("id") for image in images] == [str(i) for i in range(NUM_IMAGES)]
    assert {(image.get("width"), image.get("height")) for image in images} == {(str(PIXELS),) * 2}
    for image, cluster in zip(images, table.clusters, strict=True):
        (tag,) = image
        assert (tag.tag, tag.get("label")) == ("tag", labels[cluster])


class Dataset:
    """What `fiftyone_dataset` uses of fiftyone.Dataset."""

    def __init__(self, name: str) -> None:
        self.name, self.samples = name, list[Any]()

    def add_samples(self, samples: Iterable[Any]) -> None:
        self.samples += samples


def test_fiftyone_data_set_has_clusters_agreement_and_embeddings(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake of fiftyone, which is 646 MB; the package itself was not tried."""
    fake = SimpleNamespace(Dataset=Dataset, Sample=SimpleNamespace, Classification=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "fiftyone", fake)
    run = finished.folder("proto")
    table = run.read_clusters()
    run.write_json("names.json", {str(table.clusters[4]): "reds"})
    made = fiftyone_dataset(run.path)
    assert made.name == "my photos-proto-seed0"
    assert len(made.samples) == NUM_IMAGES
    sample = made.samples[4]
    assert Path(sample.filepath).name == table.keys[4]
    assert Path(sample.filepath).is_file()
    assert sample.cluster.label == "reds"
    assert sample.cluster.confidence == pytest.approx(table.confidence[4])
    assert (sample.agreement, sample.reliable) == (table.agreement[4], table.reliable[4])
    feature = run.features[4]
    np.testing.assert_allclose(sample.embedding, feature / np.linalg.norm(feature), rtol=1e-5)


def test_without_fiftyone_the_extra_is_named(
    straight: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fiftyone", None)
    with pytest.raises(UsageError, match=r"pip install 'spice-pl\[fiftyone\]'"):
        fiftyone_dataset(straight.folder("proto").path)
