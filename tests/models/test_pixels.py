"""Images of every kind become the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from spice_pl.errors import UsageError
from spice_pl.models.pixels import named_images, pixel_batches, pixels_of

RED_BLUE = np.array([[[255, 0, 0], [0, 0, 255]], [[9, 9, 9], [1, 2, 3]]], np.uint8)  # (2, 2, 3)
PIXELS = [[[255, 0], [9, 1]], [[0, 0], [9, 2]], [[0, 255], [9, 3]]]  # (3, 2, 2), by hand


def test_every_kind_of_image_gives_the_same_pixels(tmp_path: Path) -> None:
    Image.fromarray(RED_BLUE).save(tmp_path / "a.png")
    kinds: list[Any] = [RED_BLUE, torch.from_numpy(RED_BLUE), RED_BLUE.transpose(2, 0, 1)]
    kinds += [Image.fromarray(RED_BLUE), tmp_path / "a.png"]
    for image in kinds:
        pixels = pixels_of(image, 2)
        assert isinstance(pixels, np.ndarray)
        assert pixels.tolist() == PIXELS


@pytest.mark.parametrize(
    ("images", "count"),
    [
        (np.zeros((8, 8), np.uint8), 1),
        (np.zeros((8, 9, 3), np.uint8), 1),
        (np.zeros((3, 8, 9), np.uint8), 1),
        (np.zeros((5, 8, 9), np.uint8), 5),  # grey images
        (np.zeros((4, 8, 9, 3), np.uint8), 4),
        (torch.zeros((4, 3, 8, 9), dtype=torch.uint8), 4),
    ],
)
def test_the_shape_of_an_array_says_how_many_images_it_holds(images: Any, count: int) -> None:
    assert [key for key, _ in named_images(images)] == [str(i) for i in range(count)]


def test_a_folder_is_searched_with_its_subfolders(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "sub/a.png"):
        Image.fromarray(RED_BLUE).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    assert sorted(named_images(tmp_path)) == [
        ("b.png", tmp_path / "b.png"),
        ("sub/a.png", tmp_path / "sub/a.png"),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_batches_keep_the_order_and_name_what_is_skipped(tmp_path: Path, batch_size: int) -> None:
    images: list[Any] = [np.full((4, 4), level, np.uint8) for level in range(5)]
    images.insert(2, tmp_path / "missing.png")
    skipped: list[tuple[str, str]] = []
    keys: list[str] = []
    levels: list[NDArray[np.uint8]] = []
    for names, pixels in pixel_batches(images, 4, batch_size, skipped):
        assert 1 <= len(names) == len(pixels) <= batch_size
        keys += names
        levels += [*pixels[:, 0, 0, 0]]
    assert keys == ["0", "1", "3", "4", "5"]
    assert levels == [0, 1, 2, 3, 4]
    assert skipped == [(str(tmp_path / "missing.png"), "there is no such file")]


@pytest.mark.parametrize(
    "array", [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros(8, np.uint8)]
)
def test_an_array_that_is_not_an_image_is_refused(array: Any) -> None:
    with pytest.raises(UsageError, match="give uint8 levels 0 to 255 as"):
        pixels_of(array, 8)


@pytest.mark.parametrize("images", [None, 3, 0.5])
def test_what_is_no_image_is_named(images: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"{type(images).__name__} is not an image; give a folder"
    ):
        list(named_images(images))
