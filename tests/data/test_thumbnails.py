"""Pictures of files in their own shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_pl.data import thumbnails
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.folder import folder
from spice_pl.data.thumbnails import own_shapes


@pytest.fixture
def photos(tmp_path: Path) -> ImageSet:
    """A landscape, a portrait turned by EXIF, a square, a strip, a deep and a transparent image."""
    root = tmp_path / "photos"
    root.mkdir()
    Image.new("RGB", (300, 200), (200, 0, 0)).save(root / "0 landscape.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (300, 200), (0, 200, 0)).save(root / "1 turned.jpg", exif=turned)
    Image.new("RGB", (200, 200), (0, 0, 200)).save(root / "2 square.png")
    Image.new("L", (2000, 100), 128).save(root / "3 strip.png")
    Image.fromarray(np.full((100, 200), 40_000, np.uint16)).save(root / "4 deep.png")
    Image.new("RGBA", (100, 150), (0, 0, 0, 0)).save(root / "5 clear.png")
    return folder(root=str(root), image_size=32, cache_dir=str(tmp_path / "cache"), name="photos")


def test_shapes_are_those_of_the_upright_images(photos: ImageSet) -> None:
    made = own_shapes(photos, range(6), 80)
    assert {i: picture.shape for i, picture in made.items()} == {
        0: (3, 80, 120),
        1: (3, 80, 50),  # two thirds, in eighths of the height
        3: (3, 80, 200),  # not wider than two and a half times the height
        5: (3, 80, 50),
    }
    assert made[0][:, 40, 60].tolist() == [200, 0, 0]
    assert abs(made[1][:, 40, 25].astype(int) - [0, 200, 0]).max() < 3  # JPEG
    assert made[5].min() == 255  # transparency is white, as in the stored pixels


def test_files_that_changed_or_went_keep_their_square(photos: ImageSet) -> None:
    assert photos.root is not None
    Image.new("RGB", (90, 30)).save(photos.root / "0 landscape.png")
    (photos.root / "3 strip.png").unlink()
    (photos.root / "5 clear.png").write_bytes(b"no image")
    assert list(own_shapes(photos, range(6), 80)) == [1]


def test_no_more_files_are_read_than_allowed(
    photos: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "FILE_PIXELS", 2 * 300 * 200)
    assert list(own_shapes(photos, [1, 0, 3], 80)) == [1, 0]
