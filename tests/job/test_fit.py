"""A small data set lowers the sizes that it cannot fill, and says so."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from tests.conftest import TINY, compose, make_job

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.job.fit import fitted
from spice_pl.job.parts import build_stage
from spice_pl.job.plan import plan
from spice_pl.job.run import run_stages


def images(number: int) -> ImageSet:
    pixels = np.zeros((number, 3, 8, 8), np.uint8)
    return ImageSet("some", pixels, [str(i) for i in range(number)], "0")


def fit(stage: str, number: int, num_clusters: int, *given: str) -> tuple[Any, list[str]]:
    job = make_job("dataset=cifar10", f"dataset.num_clusters={num_clusters}", f"stage={stage}")
    (step,) = plan(job)
    return fitted(stage, step.own, images(number), num_clusters, given)


def test_queue_and_batch_hold_no_image_twice() -> None:
    own, changes = fit("moco", 100, 10)
    assert own["module"]["queue_size"] == 100
    assert own["streams"]["images"]["batch_size"] == 100
    assert "moco.module.queue_size 12800 -> 100" in changes


def test_a_step_of_the_heads_takes_the_slots_that_there_are() -> None:
    # 60 images in 7 clusters: 8 slots each, 56 in all.
    own, changes = fit("proto", 60, 7)
    assert own["module"]["head_batch_size"] == 56
    assert "proto.module.head_batch_size 128 -> 56" in changes


def test_a_large_data_set_changes_nothing() -> None:
    for stage in ("moco", "proto", "fixmatch"):
        own, changes = fit(stage, 60_000, 10)
        assert own == plan(make_job("dataset=cifar10", f"stage={stage}"))[0].own
        assert not changes


def test_a_batch_stays_a_multiple_of_its_groups() -> None:
    # 8 groups of BatchNorm: the largest multiple of 8 up to 90 is 88.
    (step,) = plan(make_job("dataset=cifar10", "stage=moco", "moco.module.bn_groups=8"))
    own, _ = fitted("moco", step.own, images(90), 10, ())
    assert own["streams"]["images"]["batch_size"] == 88


@pytest.mark.parametrize(
    ("number", "num_clusters", "neighbors"),
    [
        (60_000, 10, 20),
        (400, 20, 20),  # just enough: the mean cluster has 20 images
        (120, 10, 6),  # half of the mean size, 12
        (20, 10, 2),
    ],
)
def test_neighbours_of_scan_are_fewer_than_a_cluster_has(
    number: int, num_clusters: int, neighbors: int
) -> None:
    own, _ = fit("scan", number, num_clusters)
    assert own["module"]["num_neighbors"] == neighbors


def test_each_cluster_has_a_labelled_image() -> None:
    # A tenth of 5 images per cluster is none; a fifth is one.
    own, changes = fit("clusmatch", 20, 4)
    assert own["module"]["selector"]["fraction"] == 0.2
    assert "selectors.variance.fraction 0.1 -> 0.2" in changes
    own, changes = fit("clusmatch", 21, 3)  # 7 images: 1/7 rounded up gives one, and not two
    assert int(7 * own["module"]["selector"]["fraction"]) == 1


@pytest.mark.parametrize("number", [20, 120, 1_000_000])
@pytest.mark.parametrize("num_clusters", [2, 10])
@pytest.mark.parametrize(
    "stage",
    [
        *("moco", "simclr", "empssl", "vicreg", "fastsiam", "cc", "propos", "cdc", "dcboost"),
        *("proto", "scan", "selflabel", "fixmatch"),
    ],
)
def test_every_size_fits_from_20_images_to_a_million(
    stage: str, num_clusters: int, number: int
) -> None:
    job = make_job(
        "dataset=digits",
        f"dataset.num_clusters={num_clusters}",
        f"stage={stage}",
        "augment=photographs",
    )
    (step,) = plan(job)
    _, streams = build_stage(job, step, images(number))  # raises if a size does not fit
    for name, stream in streams.items():
        assert name == "labelled" or stream.batch_size <= number


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("reliable.agreement=1.2", "agreement=1.2 lets no image count as reliable"),
        ("reliable.confidence=1.0", "confidence=1.0 lets no image count as reliable"),
        ("fixmatch.selector=oracle", "has no true labels, which fixmatch.selector=oracle asks for"),
    ],
)
def test_stage_3_without_a_chance_is_refused_before_stage_1(
    tiny: Any, tmp_path: Any, setting: str, words: str
) -> None:
    more = ("dataset.labels=none", setting)
    with pytest.raises(UsageError, match=words):
        run_stages(make_job(*tiny, *more))
    assert not (tmp_path / "runs").exists()


def test_a_fraction_that_labels_no_image_is_refused_before_stage_1(
    tiny: Any, tmp_path: Any
) -> None:
    # 90 images in 3 clusters: a hundredth of 30 is none.
    chain = ("chain=[moco,proto,clusmatch]", "selectors.variance.fraction=0.01")
    with pytest.raises(UsageError, match=r"of 30 images per cluster labels 0 of them.*0\.034 to 1"):
        run_stages(make_job(*tiny, *chain))
    assert not (tmp_path / "runs").exists()


def test_what_the_command_line_names_stays() -> None:
    own, changes = fit("moco", 100, 10, "moco.module.queue_size=12800")
    assert own["module"]["queue_size"] == 12800
    assert changes == ["moco.streams.images.batch_size 128 -> 100"]


def test_a_run_of_few_images_with_the_settings_of_many(
    tiny: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = ("queue_size", "batch_size=30", "batch_size=25", "head_batch_size")
    rest = [text for text in tiny if not any(size in text for size in sizes)]
    with caplog.at_level(logging.INFO):
        run_stages(make_job(*rest, "stages=[moco,proto]", "dataset.num_clusters=2"))
    assert "fitted to 90 images: moco.streams.images.batch_size 128 -> 90" in caplog.text
    assert "moco.module.queue_size 12800 -> 90" in caplog.text
    assert compose("dataset=digits").moco.module.queue_size == 1024  # and no setting was changed
    assert "recipe=scratch" in TINY
