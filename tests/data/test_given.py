"""Images given from Python, with answers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from spice_pl.data.decode import decode
from spice_pl.data.given import (
    channels_last,
    eight_bits,
    given_images,
    number_range,
    write_images,
)
from spice_pl.models.pixels import pixels_of

GREY = np.array([[0, 85], [170, 255]], np.uint8)  # (2, 2)


def test_numbers_between_the_smallest_and_the_largest_become_levels() -> None:
    ramp = np.array([[[-1.0], [0.0]], [[0.5], [1.0]]])  # (2, 2, 1)
    assert number_range([ramp, GREY]) == (-1, 1)
    expected = [[0, 128], [191, 255]]
    assert eight_bits(ramp, (-1, 1))[..., 0].tolist() == expected
    assert eight_bits(ramp.astype(np.float16), (-1, 1))[..., 2].tolist() == expected
    wide = np.array([[[0], [65535]]], np.uint16)
    assert eight_bits(wide, number_range([wide]))[..., 0].tolist() == [[0, 255]]
    yes = np.array([[[False], [True]]])
    assert eight_bits(yes, number_range([yes]))[..., 1].tolist() == [[0, 255]]
    assert eight_bits(np.full((1, 1, 1), 7.0), (7, 7)).tolist() == [[[0, 0, 0]]]  # one number
    assert number_range([GREY]) is None
    assert eight_bits(GREY[..., None], None)[..., 1].tolist() == GREY.tolist()


def test_transparency_is_laid_on_white_as_in_files(tmp_path: Path) -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3], rgba[..., 3] = 100, GREY
    assert eight_bits(rgba, None)[..., 0].tolist() == [[255, 203], [152, 100]]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    found: Any = decode(tmp_path / "a.png", 2)
    np.testing.assert_allclose(eight_bits(rgba, None).transpose(2, 0, 1), found, atol=1)
    as_floats = eight_bits(rgba / 255.0, (0, 1))
    np.testing.assert_array_equal(as_floats, eight_bits(rgba, None))


@pytest.mark.parametrize(
    ("array", "between", "message"),
    [
        (np.zeros((2, 2, 1)), None, "hold float64, and those given to fit had levels of 8 bits"),
        (np.full((2, 2, 1), np.nan), (0, 1), "NaN or infinite"),
        (np.zeros((2, 2, 1), complex), (0, 1), "hold complex128; give uint8"),
        (np.zeros((2, 2, 1), object), (0, 1), "hold object; give uint8"),
    ],
)
def test_numbers_that_are_no_levels_are_named(array: Any, between: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eight_bits(array, between)


def test_infinite_numbers_are_refused_before_training() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            number_range([np.array([0.0, bad])])


def test_channels_are_found() -> None:
    for shape in ((5, 8, 9), (5, 8, 9, 1), (5, 1, 8, 9)):
        assert channels_last(np.zeros(shape), "X").shape == (5, 8, 9, 1)
    for c in (3, 4):
        for shape in ((5, c, 8, 9), (5, 8, 9, c)):
            assert channels_last(np.zeros(shape), "X").shape == (5, 8, 9, c)
    for wrong in ((5, 8, 9, 2), (8, 9), (5, 8, 9, 3, 1)):
        with pytest.raises(ValueError, match=r"X .* are not images; give"):
            channels_last(np.zeros(wrong), "X")


def test_tensors_become_arrays_whatever_they_are() -> None:
    image = torch.rand(3, 4, 4, requires_grad=True)
    (first, second) = given_images([image, torch.zeros(3, 5, 4, dtype=torch.bfloat16)])
    np.testing.assert_array_equal(first, image.detach().numpy())
    assert second.dtype == np.float32
    assert given_images([image, image]).shape == (2, 3, 4, 4)
    assert given_images(each for each in (GREY, GREY)).shape == (2, 2, 2)
    assert given_images([]) == []
    with pytest.raises(ValueError, match="image 1 of the list is a dict; give paths, PIL"):
        given_images(["a.png", {}])


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I", "F", "CMYK", "HSV"]
)
def test_images_of_pillow_are_read_as_predict_reads_them(mode: str, tmp_path: Path) -> None:
    """fit writes them into files, predict takes them as they are."""
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    if mode in ("I;16", "I"):
        image = Image.fromarray(levels.astype(np.uint16 if mode == "I;16" else np.int32) * 200)
    elif mode == "F":
        image = Image.fromarray(levels.astype(np.float32) / 255)
    else:
        colours = np.stack([levels, levels.T, 255 - levels, levels[::-1]], axis=2)
        image = Image.fromarray(colours).convert("RGBA" if mode in ("RGBA", "LA") else "RGB")
        image = image.convert(mode)
    assert image.mode == mode
    write_images([image], tmp_path / "written")
    (file,) = (tmp_path / "written").iterdir()
    written, direct = decode(file, 8), pixels_of(image, 8)
    assert not isinstance(written, str)
    assert not isinstance(direct, str)
    np.testing.assert_allclose(written, direct, atol=1)
    assert 60 < direct.mean() < 200  # neither clipped nor nearly black


def test_a_path_in_a_list_that_is_no_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(ValueError, match="is not a file; in a list, give paths of image files"):
            write_images([Image.new("L", (4, 4)), path], tmp_path / f"written{path.name}")
