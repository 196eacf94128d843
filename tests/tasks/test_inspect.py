"""stage=inspect: the page about a data set."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import NUM_IMAGES, make_job

from spice_pl.data.augment import PlainView
from spice_pl.data.images import ImageSet
from spice_pl.job.run import run_stages
from spice_pl.tasks.inspect import as_picture, measure, notes, used_views


@pytest.fixture
def page(tiny: Sequence[str], photo_folder: Path, tmp_path: Path) -> Path:
    """Inspect a folder with an exact copy, a damaged file and names that are HTML."""
    first = photo_folder / "class 0" / "000.png"
    (photo_folder / "class 1" / "copy.png").write_bytes(first.read_bytes())
    (photo_folder / "class 1" / "<b>bad&.png").write_bytes(b"no image")
    Image.new("RGB", (40, 4), (9, 99, 199)).save(photo_folder / "class 2" / "<script>.png")
    without_k = [text for text in tiny if not text.startswith("dataset.num_clusters")]
    job = make_job("stage=inspect", *without_k)
    run_stages(job)
    return job.folder("inspect").path / "inspect.html"


def test_everything_that_is_there_is_on_the_page(page: Path) -> None:
    html = page.read_text()
    counts = json.loads(page.with_name("inspect.json").read_text())
    assert (counts["num_images"], counts["num_copies"]) == (NUM_IMAGES + 2, 1)
    assert counts["skipped"] == [["class 1/<b>bad&.png", "cannot identify image file"]]
    for text in ("class 1/copy.png", "2 times the same", "cannot identify image file", "class 2"):
        assert text in html
    assert "More than twice as long as wide: 1 of 92 images." in html
    assert "Magnified" in html  # the strip is 4 pixels high, image_size is 8
    # All views of each of ten images.
    heads = re.findall(r'<th scope="col">(.*?)</th>', html)
    views = ["plain"] + [
        f"{name} {i}" for name in ("weak", "strong", "strong_joint", "moco") for i in (1, 2)
    ]
    assert heads[: len(views) + 1] == ["Image", *views]
    assert html.count(", plain") == 10 * 2  # alt and title
    assert html.count(", moco 2") == 10 * 2


def test_the_page_is_one_file_and_runs_nothing(page: Path) -> None:
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;.png" in html
    assert "<b>bad" not in html
    addresses = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(addresses) > 100
    assert all(address.startswith(("data:image/", "#")) for address in addresses)


def test_only_views_of_the_stages_that_would_run_are_shown(
    tiny: Sequence[str], photo_folder: Path
) -> None:
    job = make_job("stage=inspect", *tiny, "chain=[embed,proto]")
    run_stages(job)
    html = (job.folder("inspect").path / "inspect.html").read_text()
    heads = re.findall(r'<th scope="col">(.*?)</th>', html)[:6]
    assert heads[:-1] == ["Image", "plain", "weak 1", "weak 2", "strong 1"]
    assert "moco 1" not in html
    assert "views of embed, proto, the stages" in html


def test_all_views_are_shown_for_a_stage_whose_streams_are_not_known() -> None:
    views = {name: PlainView((level,) * 3, (1, 1, 1)) for name, level in (("plain", 0), ("a", 1))}
    assert used_views(views, ["mine"], {}) == views
    assert used_views(views, ["embed"], {"embed": {}}) == {"plain": views["plain"]}


def test_a_second_look_replaces_the_page_by_the_same(page: Path, tiny: Sequence[str]) -> None:
    before = page.read_text()
    run_stages(make_job("stage=inspect", *tiny))
    assert page.read_text() == before  # the seed of the run draws the views


def test_pictures_of_a_plain_view_are_the_images() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8)).astype(np.uint8)
    view = PlainView((0.2, 0.5, 0.7), (0.1, 0.2, 0.3))
    made = view(torch.from_numpy(pixels.copy()), torch.empty(3, 0))
    assert np.array_equal(as_picture(made, view), pixels)


def test_levels_are_measured() -> None:
    pixels = np.zeros((4, 3, 2, 2), dtype=np.uint8)
    pixels[:, 0] = 255
    pixels[::2, 1] = 255
    mean, std = measure(ImageSet("x", pixels, list("abcd"), "f"))
    assert mean.tolist() == [1, 0.5, 0]
    assert std.tolist() == [0, 0.5, 0]


def test_copies_of_training_images_among_the_test_images_are_counted() -> None:
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(3, 1)
    is_test = np.array([False, False, False, True, True])
    digests = np.array([1, 2, 3, 3, 4], dtype=np.uint64)
    images = ImageSet("x", pixels, list("abcde"), "f", is_test=is_test)
    assert notes(images, digests) == ["Exact copies of training images among the test images: 1."]


def test_a_pretrained_network_keeps_its_own_size_and_mean() -> None:
    side = 4
    pixels = np.zeros((2, 3, side, side), np.uint8)
    files = np.zeros(2, dtype=[("width", "i4"), ("height", "i4")])
    images = ImageSet("small", pixels, ["a", "b"], "f", files=files)
    digests = np.arange(2, dtype=np.uint64)
    assert "A smaller dataset.image_size costs less" in notes(images, digests)[0]
    assert "image_size" not in notes(images, digests, pretrained=True)[0]
