"""stage=trust: every measure on a case with a known answer, and the page of a real run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import Finished

from spice_pl.errors import UsageError
from spice_pl.job.run import run_stages
from spice_pl.reports.trust_page import Check, NullCheck, TrustData, record, render_trust, track
from spice_pl.runs.clusters import ClusterTable
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.trust import (
    Trust,
    chance,
    matched_agreement,
    null_check,
    seeds_agreement,
    separation,
)


def cloud(centres: float, num_images: int = 300, num_features: int = 6) -> np.ndarray:
    """Three groups of deviation one whose centres are at distance `centres` from zero."""
    generator = np.random.default_rng(0)
    middle = centres * np.eye(num_features)[np.arange(num_images) % 3]
    return (middle + generator.normal(size=(num_images, num_features))).astype(np.float32)


@pytest.mark.parametrize("shape", ["round", "long", "flat"])
def test_one_cloud_has_no_clusters(shape: str) -> None:
    points = np.random.default_rng(1).normal(size=(400, 6))
    scales = {"round": [1] * 6, "long": [9, 1, 1, 1, 1, 1], "flat": [5, 5, 1, 1, 1, 1]}
    points *= np.array(scales[shape])
    # Far from the origin, so that scaling to length one does not fold the cloud around it.
    found = null_check((points + 60).astype(np.float32), 3, 4, seed=0)
    assert not found.clear, found


def test_three_groups_are_clusters() -> None:
    assert null_check(cloud(12), 3, 4, seed=0).clear


def test_constant_features_have_no_clusters() -> None:
    assert not null_check(np.ones((50, 4), np.float32), 3, 2, seed=0).clear


def test_agreement_does_not_depend_on_the_numbers_of_clusters() -> None:
    one = torch.tensor([0, 0, 1, 1, 2, 2])
    assert matched_agreement([one, (one + 1) % 3]) == 1.0
    assert matched_agreement([one, torch.tensor([0, 0, 1, 1, 2, 0])]) == pytest.approx(5 / 6)


def test_separation_of_far_groups_is_near_one_and_of_random_ones_near_zero() -> None:
    features, groups = cloud(60), np.arange(300) % 3
    assert separation(features, groups) == pytest.approx(1, abs=0.05)
    shuffled = np.random.default_rng(0).permutation(groups)
    assert separation(features, shuffled) == pytest.approx(0, abs=0.05)
    assert separation(features, np.zeros(300, np.int64)) is None


def test_track_holds_the_rank_correlation() -> None:
    assert track([0.1, 0.2, 0.9], [0.3, 0.5, 0.6]).rho == pytest.approx(1)
    assert track([0.9, 0.2, 0.1], [0.3, 0.5, 0.6]).rho == pytest.approx(-1)
    assert track([0.5, 0.5], [0.3, 0.5]).rho is None
    assert track([], []).num_runs == 0


def test_record_holds_pairs() -> None:
    for values, accuracies in record().values():
        assert len(values) == len(accuracies)
        assert all(0 <= acc <= 1 for acc in accuracies)


def judged(name: str, value: float, chance: float = 0.0, own: float | None = None) -> str:
    null = NullCheck(0.4, (0.1, 0.2), own)
    data = TrustData("", "", 9, 9, 3, [Check(name, value)], null, {}, chance)
    found = data.judged(data.checks[0])
    assert found is not None
    assert (found.advice == "Nothing to do.") == (found.level == "good")
    assert found.level in data.summary
    return found.level


def test_agreement_is_judged_from_that_of_random_clusters() -> None:
    # Halfway from chance to 1 is poor, whatever the chance; 0.85 of the way is good.
    for low in (0.0, 0.1, 0.5):
        levels = [judged("heads", low + (1 - low) * way, low) for way in (0.5, 0.7, 0.9)]
        assert levels == ["poor", "middling", "good"]
    # Two equal clusters at random agree for half of the images: 0.75 is half of the way.
    assert judged("consistency", 0.75, 0.5) == "poor"
    assert judged("consistency", 0.75, 0.1) == "middling"


def test_shares_that_should_be_kept_may_fail_once_in_twenty_or_ten() -> None:
    for name in ("views", "sure"):
        assert [judged(name, value, 0.5) for value in (0.89, 0.92, 0.96)] == [
            *("poor", "middling", "good")
        ]


def test_separation_is_judged_beside_clouds_without_groups() -> None:
    # The best cloud has 0.2. The value itself is on another scale and does not count.
    found = [judged("separation", 0.9, own=own) for own in (0.21, 0.25, 0.31)]
    assert found == ["poor", "middling", "good"]
    data = TrustData("", "", 9, 9, 3, [], NullCheck(0.4, (0.1,)), {})
    assert data.judged(Check("separation", 0.5)) is None
    assert data.judged(Check("heads", None)) is None


def test_chance_is_that_of_two_random_images_in_one_cluster() -> None:
    assert chance(np.array([0, 1, 0, 1])) == pytest.approx(0.5)
    assert chance(np.array([0, 0, 0, 1])) == pytest.approx(10 / 16)


def page(null: NullCheck) -> str:
    checks = [Check("consistency", 0.75), Check("heads", None)]
    tracks = {"consistency": ([0.5, 0.75, 0.9], [0.3, 0.6, 0.9])}
    return render_trust(TrustData("<b>run</b>", "proto/seed0", 9, 9, 3, checks, null, tracks))


def test_page_gives_the_verdict_and_escapes() -> None:
    text = page(NullCheck(0.30, (0.29, 0.25)))
    assert "No real clusters here" in text
    assert "<script" not in text
    assert "&lt;b&gt;run&lt;/b&gt;" in text
    assert "ρ = 1.00, n = 3" in text
    assert "Needs the heads of stage 2" in text
    assert "No real clusters here" not in page(NullCheck(0.60, (0.29, 0.25)))


def test_a_run_is_judged_with_its_own_network(finished: Finished) -> None:
    # The settings of the job may name another network than that of the run.
    measured = []
    for widths in ("8", "16"):
        more = ("overwrite=true", "trust.task.num_nulls=2", f"backbone.widths=[{widths}]")
        run_stages(finished.job("stage=trust", *more))
        measured.append(finished.folder("trust").metrics["measures"]["views"])
    assert measured[0] is not None
    assert measured[0] == measured[1]


def test_seeds_are_compared_on_the_same_images_only(straight: Finished, tmp_path: Path) -> None:
    proto = straight.folder("proto")
    assert seeds_agreement([proto]) is None
    assert seeds_agreement([proto, proto]) == 1.0
    other = RunFolder(tmp_path)
    empty = np.zeros(1, np.float32)
    table = ClusterTable(["other"], np.zeros(1, np.int64), empty, empty, np.zeros(1, bool))
    other.write_clusters(table)
    with pytest.raises(UsageError, match="of other images"):
        seeds_agreement([proto, other])


def test_mistakes_of_trust_are_named() -> None:
    with pytest.raises(UsageError, match="num_nulls 1"):
        Trust(None, num_nulls=1)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"runs=runs/x is not a list; write trust\.runs=\[runs"):
        Trust(None, runs="runs/x")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="runs holds runs/x, which is not the folder of a run"):
        Trust(None, runs=["runs/x"])(None)  # type: ignore[arg-type]


def test_trust_of_a_run(finished: Finished) -> None:
    run_stages(finished.job("stage=trust", "trust.task.num_nulls=2"))
    folder = RunFolder(finished.runs / "my photos" / "trust" / "seed0")
    measures = folder.metrics["measures"]
    table = finished.folder("fixmatch").read_clusters()
    assert measures["consistency"] == pytest.approx(float(table.agreement.mean()))
    assert measures["seeds"] is None
    for name in ("heads", "views", "sure"):
        assert 0 <= measures[name] <= 1
    text = (folder.path / "trust.html").read_text(encoding="utf-8")
    assert folder.metrics["verdict"] in text
    assert "truth" not in folder.metrics
    assert set(folder.metrics["judged"].values()) <= {"good", "middling", "poor"}
    assert folder.metrics["summary"] in text
