"""Clusters for annotation tools."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote

from tests.conftest import NUM_IMAGES, Finished

from spice_pl.runs.labels import write_labels


def test_files_hold_the_table_with_names_and_real_paths(finished: Finished, tmp_path: Path) -> None:
    run = finished.folder("proto")
    table = run.read_clusters()
    first = int(table.clusters[0])
    (run.path / "names.json").write_text(json.dumps({str(first): "red, left"}))
    tasks, labels = (json.loads(file.read_text()) for file in write_labels(run, tmp_path))
    assert len(tasks) == len(labels["labels"]) == NUM_IMAGES
    path = unquote(tasks[0]["data"]["image"].partition("?d=")[2])
    assert Path("/", path).is_file()
    assert Path(path).name == table.keys[0]
    (found,) = tasks[0]["predictions"]
    assert found["result"][0]["value"] == {"choices": ["red, left"]}
    assert found["score"] == float(table.confidence[0])
    assert labels["classes"][first] == "red, left"
    assert labels["labels"][Path(table.keys[0]).stem] == first
