"""Edits applied without training: table, names, model and page agree."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Finished
from tests.runs.test_edits import of_run

from spice_pl import load
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs.compare import compare, finished_runs
from spice_pl.runs.folder import RunFolder


def applied(runs: Finished, reviewed: RunFolder, tmp_path: Path, **changes: object) -> RunFolder:
    """Apply edits as `spice edit RUN FILE` does."""
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(of_run(reviewed, **changes).as_json()))
    stage = reviewed.path.parent.name
    run_stages(runs.job("stage=edit", f"edit.upstream={stage}", f"edit.file={file}"))
    return RunFolder(runs.runs / "my photos" / "edits" / f"{stage}-{reviewed.path.name}")


@pytest.mark.slow
def test_edits_are_applied_without_training(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    proto = finished.folder("proto")
    before = proto.read_clusters().clusters
    sizes = np.bincount(before, minlength=3)
    largest = int(sizes.argmax())
    others = [c for c in range(3) if c != largest]
    moved = proto.read_clusters().keys[int(np.flatnonzero(before == others[0])[0])]
    made = applied(
        finished,
        proto,
        tmp_path,
        names={others[0]: "green, red", largest: "rest"},
        merge=[others],
        split={largest: 2},
        move={moved: largest},
    )
    said = "edits applied: 2 names, 1 merge, 1 split, 1 image moved by hand; "
    assert f"{said}{(sizes > 0).sum()} clusters with images become " in caplog.text
    table = made.read_clusters()
    kept = before[[key != moved for key in table.keys]]
    after = table.clusters[[key != moved for key in table.keys]]
    # Numbers stay: the merged cluster has the smaller one, the second part comes last.
    assert (after[np.isin(kept, others)] == min(others)).all()
    assert set(after[kept == largest]) == {largest, 3}
    assert made.names == {min(others): "green, red", largest: "rest", 3: "rest 2"}
    rows = list(csv.DictReader((made.path / "clusters.csv").read_text().splitlines()))
    assert {row["name"] for row in rows} == {"green, red", "rest", "rest 2"}
    assert made.metrics["cluster_sizes"][max(others)] == 0
    # It is compared without labels, as its run is.
    lines = compare(finished_runs([made.path]))
    assert [line.method for line in lines if line.compared] == [made.metrics["title"]]
    # The model shows known images under the new numbers.
    found = load(made.path)
    assert found.names[3] == "rest 2"
    assert found.known is not None
    assert dict(zip(found.known.keys, found.known.clusters.tolist(), strict=True)) == dict(
        zip(table.keys, table.clusters.tolist(), strict=True)
    )
    assert "green, red" in (made.path / "report.html").read_text(encoding="utf-8")
    assert (proto.read_clusters().clusters == before).all()
    made.check_upstream(proto)


def test_edits_of_another_clustering_leave_nothing(finished: Finished, tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    content = of_run(finished.folder("proto")).as_json() | {"digest": "0"}
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="belong to another clustering"):
        run_stages(finished.job("stage=edit", "edit.upstream=proto", f"edit.file={file}"))
    assert not (finished.runs / "my photos" / "edits").exists()


@pytest.mark.slow
def test_model_of_edits_answers_as_the_table(finished: Finished, tmp_path: Path) -> None:
    proto = finished.folder("proto")
    largest = int(np.bincount(proto.read_clusters().clusters).argmax())
    made = applied(finished, proto, tmp_path, split={largest: 3})
    root = next(Path(text.partition("=")[2]) for text in finished.overrides if "root" in text)
    predicted = load(made.path).predict(root)
    table = made.read_clusters()
    known = dict(zip(table.keys, table.clusters.tolist(), strict=True))
    same = [known[k] == c for k, c in zip(predicted.keys, predicted.clusters.tolist(), strict=True)]
    assert np.mean(same) > 0.97  # pixels pass the network in other batches
