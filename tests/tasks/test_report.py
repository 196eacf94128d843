"""stage=report: the page with later names, and the attention of the prototypes."""

from __future__ import annotations

import numpy as np
import pytest
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.runs.attention import read_attention


def test_the_page_is_written_again_and_the_numbers_stay(finished: Finished) -> None:
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
    run_stages(finished.job("stage=report"))
    page = (folder.path / "report.html").read_text()
    assert '<h3 id="cluster-0-title" data-name="0">owls</h3>' in page
    assert page.count("data-look=") == len(index)
    with np.load(folder.path / "attention.npz") as held:  # computed from model.spice: the same maps
        np.testing.assert_array_equal(held["index"], index)
        assert np.abs(held["maps"].astype(int) - maps).max() <= 1
    assert before == {name: (folder.path / name).read_bytes() for name in before}
