"""What is odd about an image: by hand, and on pictures that are made odd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from spice_pl.functional import oddities
from spice_pl.functional.oddities import blurred, deviations, outliers, sharpness, tiny


def edges(count: int = 1, side: int = 64) -> NDArray[np.uint8]:
    """Squares of 8 pixels at random levels: steps in both directions."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 3, side // 8, side // 8))
    return coarse.repeat(8, axis=2).repeat(8, axis=3).astype(np.uint8)


def gaussian(images: NDArray[np.uint8], sigma: float, *, down: bool = True) -> NDArray[np.uint8]:
    """Blur across and, with `down`, along columns too."""
    reach = int(4 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    made = torch.from_numpy(images).float()
    made = F.conv2d(F.pad(made, (reach, reach, 0, 0), "replicate"), kernel, groups=3)
    if down:
        turned = F.pad(made.transpose(2, 3), (reach, reach, 0, 0), "replicate")
        made = F.conv2d(turned, kernel, groups=3).transpose(2, 3)
    return made.round().clamp(0, 255).byte().numpy()


def test_sharpness_by_hand() -> None:
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint8) * 4, (1, 3, 16, 16))
    line = ramp + ramp.transpose(0, 1, 3, 2)  # steps of 4 in both directions, no bend
    assert sharpness(line) == pytest.approx([0.0])
    assert np.isinf(sharpness(np.full((1, 3, 16, 16), 7, np.uint8)))
    stripes = np.broadcast_to(np.array([0, 10] * 8, np.uint8), (16, 16))
    checked = np.broadcast_to(stripes ^ stripes.T, (1, 3, 16, 16))
    assert sharpness(checked) == pytest.approx([2.0])  # steps of 10, bends of 20


def test_noise_has_its_expected_sharpness_at_any_contrast() -> None:
    noise = np.random.default_rng(0).normal(size=(1, 3, 256, 256))
    for spread in (10, 30):
        levels = (128 + spread * noise).clip(0, 255).astype(np.uint8)
        assert sharpness(levels) == pytest.approx([3**0.5], rel=0.03)


def test_blur_is_found_in_one_direction_too_and_whatever_the_set_is_like() -> None:
    sharp = edges(20)
    mixed = np.concatenate([sharp, gaussian(sharp[:2], 3), gaussian(sharp[2:3], 3, down=False)])
    assert np.flatnonzero(blurred(sharpness(mixed))).tolist() == [20, 21, 22]
    assert not blurred(sharpness(gaussian(sharp, 3))).any()  # all alike: none is odd
    assert not blurred(np.full(5, np.inf, np.float32)).any()


def test_one_colour_by_hand() -> None:
    images = np.full((3, 3, 16, 16), 100, np.uint8)
    images[1, 2, :, :8] = 90  # half of one channel is 10 lower: deviation 5
    images[2, :, ::2] += 3
    assert deviations(images)[:2].tolist() == [0.0, 5.0]
    assert deviations(images)[2] < oddities.ONE_COLOUR


@pytest.mark.parametrize("side", [8, 28, 32, 64])
def test_small_images_are_looked_at_in_full(side: int) -> None:
    """A dot of four pixels on white is not one colour: the deviation is that of all pixels."""
    images = np.full((1, 3, side, side), 255, np.uint8)
    images[:, :, side // 2 + 1 : side // 2 + 3, 3:5] = 0
    thinned = images if side < 64 else images[:, :, ::2, ::2]
    assert deviations(images) == pytest.approx(thinned.std(axis=(2, 3)).max(), rel=1e-5)
    assert deviations(images)[0] > oddities.ONE_COLOUR


def test_tiny_is_small_for_the_network_and_for_the_set() -> None:
    assert tiny(np.array([500, 400, 300, 79, 80]), 160).tolist() == [False] * 3 + [True, False]
    assert not tiny(np.full(9, 32), 160).any()  # all are magnified alike
    assert not tiny(np.array([3000, 3000, 300]), 160).any()  # large enough for the network
    assert tiny(np.empty(0, np.int64), 160).tolist() == []


@pytest.mark.parametrize("references", [2_000, 100])  # exact; and from a sample
def test_outliers_are_far_from_all_and_small_groups_are_none(
    monkeypatch: pytest.MonkeyPatch, references: int
) -> None:
    monkeypatch.setattr(oddities, "REFERENCES", references)
    generator = np.random.default_rng(0)
    centres = 4 * np.eye(512)[np.repeat([0, 1, 2], [200, 200, 30])]  # a small group too
    rows = np.concatenate([centres + 0.3 * generator.normal(size=(430, 512)), np.eye(512)[6:8]])
    found, distances = outliers(rows.astype(np.float32), seed=0)
    assert np.flatnonzero(found).tolist()[-2:] == [430, 431]
    assert found.sum() <= 2 + 0.01 * 430
    assert distances[430:].min() > distances[:430].max()
    few, _ = outliers(rows[:4].astype(np.float32), seed=0)
    assert not few.any()
