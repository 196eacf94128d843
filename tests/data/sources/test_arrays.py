from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spice_pl.data.images import ImageSet
from spice_pl.data.sources.arrays import array
from spice_pl.errors import UsageError

GENERATOR = np.random.default_rng(0)
COLOUR = GENERATOR.integers(0, 256, (6, 3, 8, 8)).astype(np.uint8)


def load(tmp_path: Path, pixels: Any, size: int = 8, **more: Any) -> ImageSet:
    np.save(tmp_path / "x.npy", pixels)
    return array(str(tmp_path / "x.npy"), size, str(tmp_path / "cache"), **more)


def test_an_array_that_fits_is_mapped_as_it_is(tmp_path: Path) -> None:
    images = load(tmp_path, COLOUR)
    assert isinstance(images.images, np.memmap)
    assert np.array_equal(images.images, COLOUR)
    assert list(images.keys) == [str(i) for i in range(6)]
    assert images.labels is None
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["channels last", "floats", "grey", "grey channel", "alpha"])
def test_every_layout_gives_the_same_images(tmp_path: Path, kind: str) -> None:
    grey = COLOUR[:, :1]
    alpha = np.concatenate([COLOUR, np.full_like(grey, 255)], axis=1)
    given, expected = {
        "channels last": (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        "floats": (COLOUR.transpose(0, 2, 3, 1).astype(np.float32) / 255, COLOUR),
        "grey": (grey[:, 0], grey.repeat(3, axis=1)),
        "grey channel": (grey, grey.repeat(3, axis=1)),
        "alpha": (alpha.transpose(0, 2, 3, 1), COLOUR),
    }[kind]
    assert np.array_equal(load(tmp_path, given).images, expected)


def test_images_are_scaled_and_cropped(tmp_path: Path) -> None:
    wide = np.zeros((2, 4, 12), dtype=np.uint8)
    wide[:, :, 4:8] = 90  # the middle square
    images = load(tmp_path, wide, size=4)
    assert images.images.shape == (2, 3, 4, 4)
    assert (images.images == 90).all()
    assert (
        load(tmp_path, np.full((2, 9, 7), 5, dtype=np.uint8), size=3).images.tolist()
        == [[[[5] * 3] * 3] * 3] * 2
    )


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    pixels = np.linspace(0, 1, 5)[:, None, None].repeat(4, 1).repeat(4, 2)
    pixels[1, 2, 2] = np.nan
    np.savez(tmp_path / "x.npz", images=pixels, y=np.array([3, 1, 2, 3, 10]))
    images = array(str(tmp_path / "x.npz"), 4, str(tmp_path / "cache"), labels="y")
    assert list(images.keys) == ["0", "2", "3", "4"]
    assert images.labels is not None
    assert images.labels.tolist() == [2, 1, 2, 3]
    assert images.class_names == ["1", "2", "3", "10"]
    assert list(images.skipped) == [("1", "holds NaN or infinity")]
    assert images.images[:, 0, 0, 0].tolist() == [0, 128, 191, 255]
    np.save(tmp_path / "y.npy", np.arange(6))
    given = load(tmp_path, COLOUR, labels=str(tmp_path / "y.npy")).labels
    assert given is not None
    assert given.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("pixels", "more", "message"),
    [
        (COLOUR.astype(complex), {}, r"is complex128 \(6, 3, 8, 8\); needed are integers"),
        (COLOUR[0].transpose(1, 2, 0), {}, r"has the shape \(8, 8, 3\) of one image"),
        (COLOUR[0, 0], {}, r"is uint8 \(8, 8\); needed are"),
        (COLOUR[:0], {}, r"is uint8 \(0, 3, 8, 8\); needed are"),
        (np.array([{}], dtype=object), {}, "is not a readable array"),
        (np.full((2, 3, 8, 8), np.nan), {}, "no level is a finite number"),
    ],
)
def test_what_is_no_array_of_images(
    tmp_path: Path, pixels: Any, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load(tmp_path, pixels, **more)


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("float32", 1.0), ("float64", 1 / 255), (">u2", 257), ("int64", 1), ("uint16", 16)],
)
def test_one_white_fits_all_images_of_an_array(tmp_path: Path, kind: str, factor: float) -> None:
    pixels = COLOUR.copy()
    pixels[0, 0, 0, :2] = 0, 255
    dark = pixels.copy()
    dark[1:] //= 16  # images that are nearly black stay so
    given = (dark.astype(float) * factor).astype(kind)
    found = load(tmp_path, given).images.astype(int)
    expected = dark.astype(int)
    assert np.abs(found - expected).max() <= 1


def test_true_is_white(tmp_path: Path) -> None:
    found = load(tmp_path, COLOUR > 100).images
    assert np.array_equal(found, 255 * (COLOUR > 100))


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.path=.*x\.npy does not exist"):
        array(str(tmp_path / "x.npy"), 8, str(tmp_path))
    np.savez(tmp_path / "x.npz", pictures=COLOUR)
    with pytest.raises(UsageError, match=r"has no entry 'images'; it has pictures"):
        array(str(tmp_path / "x.npz"), 8, str(tmp_path))
    np.save(tmp_path / "y.npy", np.arange(5))
    with pytest.raises(UsageError, match=r"has shape \(5,\), not \(6,\)"):
        load(tmp_path, COLOUR, labels=str(tmp_path / "y.npy"))
