"""stage=sort: the images of a run in one folder per cluster, as clusters.csv says."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_files_are_where_the_table_says(finished: Finished) -> None:
    proto = finished.folder("proto")
    proto.write_json("names.json", {"0": "red/green"})
    job = finished.job("stage=sort", "sort.upstream=proto")
    run_stages(job)
    target = job.folder("sort").path / "sorted"
    placed = sorted(
        (path.relative_to(target).parts[0], "not sure" in path.parts, digest(path))
        for path in target.rglob("*")
        if path.is_file()
    )
    root = Path(proto.metrics["settings"]["dataset.root"])
    with (proto.path / "clusters.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = sorted(
        (
            "red_green" if row["cluster"] == "0" else f"cluster {row['cluster']}",
            bool(doubtful),
            digest(root / row["image"]),
        )
        for row, doubtful in zip(rows, proto.read_clusters().not_sure, strict=True)
    )
    assert placed == expected
    with pytest.raises(UsageError, match="holds sorted files already and nothing is replaced"):
        run_stages(finished.job("stage=sort", "sort.upstream=proto"))


def test_another_way_is_refused(straight: Finished) -> None:
    with pytest.raises(UsageError, match=r"sort\.how 'move' must be one of copy, hardlink"):
        run_stages(straight.job("stage=sort", "sort.upstream=proto", "sort.how=move"))
