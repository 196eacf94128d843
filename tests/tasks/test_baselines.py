"""stage=baselines: one table of classical methods, on pixels and on features."""

from __future__ import annotations

import numpy as np
import pytest
from tests.conftest import Finished

from spice_pl.data.augment import PlainView
from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.base import Context
from spice_pl.tasks.baselines import TITLES, Baselines


def test_one_command_gives_one_table(finished: Finished) -> None:
    run_stages(finished.job("stage=baselines"))
    folder = finished.folder("baselines")
    rows = folder.metrics["rows"]
    expected = [
        f"{title} on {where}" for where in ("pixels", "moco features") for title in TITLES.values()
    ]
    assert [row["name"] for row in rows] == expected
    table = (folder.path / "table.md").read_text()
    assert all(name in table for name in expected)


@pytest.mark.parametrize("method", TITLES)
def test_three_far_groups_are_found(method: str) -> None:
    generator = np.random.default_rng(0)
    truth = np.arange(60) % 3
    data = (8 * np.eye(3, 6)[truth] + 0.1 * generator.random((60, 6))).astype(np.float32)
    for limit, note in ((60, ""), (30, ", fitted on 30")):
        clusters, said = Baselines([method], max_samples=limit)._cluster(method, data, 3, 0)
        assert len(set(zip(clusters.tolist(), truth.tolist(), strict=True))) == 3
        assert said == (note if method in ("spectral", "agglomerative") else "")


def test_unknown_method_is_refused(tmp_path: object) -> None:
    context = Context(RunFolder("none"), [], lambda: None, PlainView((0.5,) * 3, (0.5,) * 3), 3, 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match=r"baselines\.task\.methods \['dbscan'\] are none of"):
        Baselines(["dbscan"])(context)
