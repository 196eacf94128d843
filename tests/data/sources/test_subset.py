from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.conftest import NUM_IMAGES, make_job

from spice_pl.data.images import ImageSet
from spice_pl.data.sources.subset import subset
from spice_pl.errors import UsageError
from spice_pl.functional.kmeans import kmeans_clusters
from spice_pl.job.parts import open_images

N, CLASSES = 60, ["a", "b", "c"]


def image_set(**more: Any) -> ImageSet:
    """60 images that hold their own number, of classes a, b, c in turn."""
    pixels = np.zeros((N, 3, 4, 4), dtype=np.uint8)
    pixels[:] = np.arange(N)[:, None, None, None]
    about: dict[str, Any] = {
        "labels": np.arange(N, dtype=np.int64) % 3,
        "class_names": CLASSES,
    } | more
    return ImageSet("numbers", pixels, [str(i) for i in range(N)], "f", **about)


def numbers(images: ImageSet) -> list[int]:
    kept = [int(image[0, 0, 0]) for image in images.images[np.arange(len(images))]]
    assert [int(key) for key in images.keys] == kept  # a name stays with its image
    if images.labels is not None and images.class_names is not None:
        names = [images.class_names[label] if label >= 0 else None for label in images.labels]
        assert names == [
            CLASSES[i % 3] if label >= 0 else None
            for i, label in zip(kept, images.labels, strict=True)
        ]
    return kept


def test_nothing_asked_for_is_nothing_done() -> None:
    images = image_set()
    assert subset(images) is images


def test_classes_are_kept_in_order_and_numbered_from_0() -> None:
    left = subset(image_set(), classes=["c", "a"])
    assert numbers(left) == [i for i in range(N) if i % 3 != 1]
    assert left.class_names == ["a", "c"]
    assert left.labels is not None
    assert left.labels.tolist() == [0, 1] * 20


def test_a_long_tail_is_exponential() -> None:
    left = subset(image_set(), imbalance=4)
    assert left.labels is not None
    assert np.bincount(left.labels).tolist() == [20, 10, 5]  # 20 · 4^(−c/2)
    kept = numbers(left)
    assert kept == sorted(kept)
    assert np.bincount(subset(image_set(), imbalance=1).labels).tolist() == [20] * 3  # type: ignore[arg-type]
    assert np.bincount(subset(image_set(), imbalance=1000).labels).tolist()[2] == 1  # type: ignore[arg-type]


def test_limits_hold_one_another() -> None:
    kept = [set(numbers(subset(image_set(), limit=limit))) for limit in (1, 7, 30, 60)]
    assert [len(each) for each in kept] == [1, 7, 30, 60]
    assert kept[0] < kept[1] < kept[2] < kept[3]


def test_the_same_images_are_drawn_every_time() -> None:
    first, second = (subset(image_set(), imbalance=4, limit=20) for _ in range(2))
    assert numbers(first) == numbers(second)
    assert first.fingerprint == second.fingerprint


def test_every_subset_has_a_fingerprint_of_its_own() -> None:
    choices: list[dict[str, Any]] = [
        *({}, {"limit": 30}, {"limit": 31}, {"imbalance": 4}, {"classes": ["a"]})
    ]
    prints = [subset(image_set(), **settings).fingerprint for settings in choices]
    assert len(set(prints)) == 5


def test_test_images_of_split_stay() -> None:
    is_test = np.arange(N) >= 45
    images = image_set(is_test=is_test, protocol="split")
    for left in (subset(images, limit=9), subset(images, imbalance=5)):
        assert [i for i in numbers(left) if i >= 45] == list(range(45, N))
        assert len(left.score_index) == 15
    assert len(subset(images, limit=9).train_index) == 9
    tail = subset(images, imbalance=5)
    assert tail.labels is not None
    assert np.bincount(tail.labels[tail.train_index]).tolist() == [15, 7, 3]
    assert np.bincount(tail.labels[tail.score_index]).tolist() == [5, 5, 5]


def test_extra_images_go_with_a_limit_alone() -> None:
    images = image_set(extra=np.full((5, 3, 4, 4), 200, dtype=np.uint8))
    assert subset(images, limit=9).extra is None
    tail = subset(images, imbalance=4)
    assert tail.drawn_index(extra=True).tolist() == [*range(35), *range(35, 40)]
    assert tail.pixels(np.array([36, 0]))[:, 0, 0, 0].tolist() == [200, numbers(tail)[0]]


def test_a_subset_is_read_when_asked_for() -> None:
    images = image_set()
    left = subset(images, classes=["b"])
    assert not isinstance(left.images, np.ndarray)
    assert left.images.shape == (20, 3, 4, 4)
    assert left.images[2, 0, 0, 0] == 7
    assert left.images[:2, 1, 2, 3].tolist() == [1, 4]
    assert np.asarray(left.images).shape == (20, 3, 4, 4)
    assert len(set(kmeans_clusters(left.images, 2, 0)[:10])) == 1  # as a stage uses it


def test_images_without_a_label_have_no_place_in_a_long_tail() -> None:
    labels = np.where(np.arange(N) < 30, np.arange(N) % 3, -1)
    left = subset(image_set(labels=labels), imbalance=2)
    assert max(numbers(left)) < 30
    assert numbers(subset(image_set(labels=labels), limit=N)) == list(range(N))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, r"dataset\.limit 0 is not between 1 and the 60 training images"),
        ({"limit": 61}, r"dataset\.limit 61 is not between"),
        ({"imbalance": 0.5}, r"dataset\.imbalance 0\.5 is below 1"),
        ({"classes": ["a", "z"]}, r"dataset\.classes z are none of a, b, c"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        subset(image_set(), **settings)


@pytest.mark.parametrize("settings", [{"classes": ["a"]}, {"imbalance": 2}])
def test_without_labels_there_is_nothing_to_choose_by(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="choose by true classes and numbers has none"):
        subset(image_set(labels=None, class_names=None), **settings)


def test_the_command_line_chooses_for_every_data_set(tiny: Sequence[str]) -> None:
    cfg = make_job(*tiny, "dataset.classes=['class 0','class 2']", "dataset.imbalance=3").cfg
    images = open_images(cfg)
    assert images.labels is not None
    assert np.bincount(images.labels).tolist() == [30, 10]
    assert len(open_images(make_job("dataset=digits", "dataset.limit=100").cfg)) == 100
    assert len(open_images(make_job(*tiny).cfg)) == NUM_IMAGES
