from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from spice_pl.data.augment import PlainView
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.base import Context
from spice_pl.tasks.linear_probe import LinearProbe

NUM, CLASSES = 120, 3
LABELS = np.arange(NUM, dtype=np.int64) % CLASSES


def folder(path: Path, features: NDArray[np.float64]) -> RunFolder:
    made = RunFolder(path / "seed0")
    made.path.mkdir(parents=True)
    np.save(made.path / "features.npy", features.astype(np.float32))
    return made


def context(
    upstream: list[RunFolder], labels: NDArray[np.int64] | None, *, split: bool = False
) -> Context:
    images = ImageSet(
        "made up",
        np.zeros((NUM, 3, 1, 1), dtype=np.uint8),
        keys=[str(i) for i in range(NUM)],
        fingerprint="0",
        labels=labels,
        is_test=np.arange(NUM) >= 90,
        protocol="split" if split else "whole",
    )
    plain = PlainView((0.5,) * 3, (0.5,) * 3)
    return Context(upstream[0], upstream, lambda: images, plain, CLASSES, seed=0)


def features(signal: float) -> NDArray[np.float64]:
    generator = np.random.default_rng(0)
    return np.eye(8)[LABELS] * signal + generator.normal(0, 1, (NUM, 8))


@pytest.mark.parametrize("split", [False, True])
def test_perfect_features_score_one_and_noise_scores_chance(tmp_path: Path, split: bool) -> None:
    fixmatch, moco = (folder(tmp_path / n, features(s)) for n, s in (("fixmatch", 50), ("moco", 0)))
    results = LinearProbe()(context([fixmatch, moco], LABELS, split=split))
    assert results["truth/fixmatch/linear_probe"] == 1
    assert results["truth/fixmatch/knn_20"] == 1
    assert results["truth/moco/linear_probe"] == pytest.approx(1 / CLASSES, abs=0.2)
    assert results["protocol"] == ("split" if split else "whole, 5 folds")


def test_split_never_trains_on_test_images(tmp_path: Path) -> None:
    # In the training images class c is at axis c, in the test images at axis c + 1: only a probe
    # trained on test images could be right.
    axis = np.where(np.arange(NUM) < 90, LABELS, (LABELS + 1) % CLASSES)
    moco = folder(tmp_path / "moco", np.eye(CLASSES)[axis] * 50)
    results = LinearProbe()(context([moco], LABELS, split=True))
    assert results["truth/moco/linear_probe"] == 0
    assert results["truth/moco/knn_20"] == 0


def test_images_of_unknown_class_take_no_part(tmp_path: Path) -> None:
    moco = folder(tmp_path / "moco", features(50))
    unknown = np.where(np.arange(NUM) % 7 == 0, -1, LABELS)
    assert LinearProbe()(context([moco], unknown))["truth/moco/linear_probe"] == 1


def test_a_stage_that_keeps_the_features_is_not_probed_again(tmp_path: Path) -> None:
    chain = [folder(tmp_path / name, features(1)) for name in ("proto", "moco")]
    results = LinearProbe()(context(chain, LABELS))
    assert "truth/moco/linear_probe" in results
    assert "truth/proto/linear_probe" not in results


def test_missing_labels_and_small_classes_are_named(tmp_path: Path) -> None:
    moco = folder(tmp_path / "moco", features(1))
    with pytest.raises(UsageError, match="made up has none"):
        LinearProbe()(context([moco], None))
    with pytest.raises(UsageError, match="smallest class of made up has 1 images"):
        LinearProbe()(context([moco], np.where(np.arange(NUM) == 5, 9, LABELS)))
