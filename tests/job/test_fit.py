"""A small data set lowers the sizes that it cannot fill, and says so."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from tests.conftest import TINY, compose, make_job

from spice_pl.data.images import ImageSet
from spice_pl.job.fit import fitted
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
