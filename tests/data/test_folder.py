from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spice_pl.data import folder as module
from spice_pl.data.folder import decode, folder
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError

S = 4


def solid(path: Path, level: int) -> Path:
    """Write a grey image of one level, so that an image can be told by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (S, S), (level, level, level)).save(path)
    return path


def levels(images: ImageSet) -> list[int]:
    assert images.images.shape == (len(images), 3, S, S)
    return [int(image[0, 0, 0]) for image in images.images]


def decoded(path: Path, size: int) -> NDArray[np.uint8]:
    """(S, S, 3) pixels of a file that can be decoded."""
    pixels = decode(path, size)
    assert not isinstance(pixels, str), pixels
    assert pixels.dtype == np.uint8
    return pixels.transpose(1, 2, 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def load(root: Path, tmp_path: Path) -> Callable[..., ImageSet]:
    def load(**settings: Any) -> ImageSet:
        return folder(str(root), S, str(tmp_path / "cache"), **settings)

    return load


# What is found, and in which order


def test_nested_images_come_in_the_order_of_their_paths(
    root: Path, load: Callable[..., ImageSet]
) -> None:
    names = ["b/2.PNG", "a b/ü ñ 日本.png", "a b/1.bmp", "z.jpeg", "b/deep/er/1.png", "b/10.tif"]
    for i, name in enumerate(names):
        solid(root / name, 40 * i)
    (root / "notes.txt").write_text("not an image")
    images = load()
    assert list(images.keys) == sorted(names)
    assert levels(images) == [40 * names.index(name) for name in sorted(names)]
    assert images.labels is None
    assert list(images.skipped) == [("1 files", "not an image by name")]


def test_folders_are_labels_when_asked_for(root: Path, load: Callable[..., ImageSet]) -> None:
    for name in ("dog/1.png", "cat/x/2.png", "cat/1.png", "loose.png"):
        solid(root / name, 0)
    images = load(labels="folders")
    assert list(images.keys) == ["cat/1.png", "cat/x/2.png", "dog/1.png", "loose.png"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1, -1]
    assert images.class_names == ["cat", "dog"]
    assert load().labels is None


def test_without_class_folders_there_is_no_truth(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "1.png", 0)
    images = load(labels="folders")
    assert images.labels is None
    assert images.class_names is None


def test_labels_do_not_enter_the_fingerprint(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "a/1.png", 0)
    assert load(labels="folders").fingerprint == load().fingerprint


# Pixels


def test_grey(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "x.png")
    assert (decoded(tmp_path / "x.png", 2) == 77).all()


def test_black_and_white(tmp_path: Path) -> None:
    image = Image.new("1", (2, 2))
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png")
    assert decoded(tmp_path / "x.png", 2)[..., 0].tolist() == [[0, 255], [0, 0]]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 2), (200, 0, 0, 255))
    image.putpixel((0, 0), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 100, 51))  # one fifth
    image.save(tmp_path / "x.png")
    pixels = decoded(tmp_path / "x.png", 2).astype(int)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 1] - [244, 204, 224]).max() <= 1  # 0.2 * colour + 0.8 * 255
    assert pixels[1, 1].tolist() == [200, 0, 0]


def test_grey_with_transparency_is_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 2), (100, 255))
    image.putpixel((0, 0), (100, 0))
    image.save(tmp_path / "x.png")
    assert decoded(tmp_path / "x.png", 2)[..., 1].tolist() == [[255, 100], [100, 100]]


def test_transparent_palette_colour_becomes_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "x.png", transparency=0)
    pixels = decoded(tmp_path / "x.png", 2)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [40, 50, 60]


def test_transparent_colour_of_rgb_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    image.save(tmp_path / "x.png", transparency=(9, 9, 9))
    pixels = decoded(tmp_path / "x.png", 2)
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [1, 2, 3]


def test_printing_colours(tmp_path: Path) -> None:
    image = Image.new("CMYK", (2, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    image.save(tmp_path / "x.tif")
    pixels = decoded(tmp_path / "x.tif", 2)
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[1, 1].tolist() == [0, 255, 255]


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path, name: str) -> None:
    wide = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / name)
    # level / 65535 * 255, cut to a whole number
    assert decoded(tmp_path / name, 2)[..., 2].tolist() == [[0, 0], [127, 255]]


def test_camera_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[10, 20], [30, 40]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert decoded(tmp_path / "x.png", 2)[..., 0].tolist() == [[30, 10], [40, 20]]


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert decoded(tmp_path / "x.gif", 2)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("upright", [False, True])
def test_middle_square_is_kept(tmp_path: Path, upright: bool) -> None:
    wide = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], dtype=np.uint8)
    Image.fromarray(wide.T if upright else wide).save(tmp_path / "x.png")
    middle = np.array([[2, 3], [6, 7]])
    expected = middle.T if upright else middle
    assert decoded(tmp_path / "x.png", 2)[..., 0].tolist() == expected.tolist()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_thin_images_are_images(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (7, 8, 9)).save(tmp_path / "x.png")
    assert (decoded(tmp_path / "x.png", 8) == (7, 8, 9)).all()


# The store


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(path: Path, image_size: int) -> str:
        raise AssertionError(f"decoded {path}")

    monkeypatch.setattr(module, "decode", decode)


def test_second_opening_reads_the_store(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 10)
    (root / "2.png").write_bytes(b"")
    first = load()
    forbid_decoding(monkeypatch)
    second = load()
    assert isinstance(second.images, np.memmap)
    assert levels(second) == levels(first) == [10]
    assert second.fingerprint == first.fingerprint
    assert list(second.skipped) == list(first.skipped)
    with pytest.raises(UsageError, match=r"bad image .*2\.png: empty file"):
        load(on_bad_image="raise")


@pytest.mark.parametrize("change", ["pixels", "name", "another", "size"])
def test_changed_files_make_a_new_store(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], change: str
) -> None:
    solid(root / "1.png", 10)
    solid(root / "2.png", 20)
    before = load()
    if change == "pixels":
        solid(root / "1.png", 30)
        stat = (root / "1.png").stat()  # a clock may be too coarse for two writes
        os.utime(root / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    elif change == "name":
        (root / "1.png").rename(root / "3.png")
    elif change == "another":
        solid(root / "0.png", 30)
    size = 2 * S if change == "size" else S
    after = folder(str(root), size, str(tmp_path / "cache"))
    expected = {"pixels": [30, 20], "name": [20, 10], "another": [30, 10, 20], "size": [10, 20]}
    assert [int(image[0, 0, 0]) for image in after.images] == expected[change]
    assert after.images.shape[-1] == size
    assert after.fingerprint != before.fingerprint


def test_interrupted_decoding_leaves_nothing_that_is_taken_for_whole(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        solid(root / f"{i}.png", 10 * i)

    def interrupted(path: Path, image_size: int) -> NDArray[np.uint8] | str:
        if path.name == "3.png":
            raise KeyboardInterrupt
        return decode(path, image_size)

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert list((tmp_path / "cache").iterdir()) == []
    # A process that was killed cannot tidy up; what it leaves is no store either.
    (tmp_path / "cache/.decoding-killed").mkdir()
    (tmp_path / "cache/.decoding-killed/index.json").write_text("{}")
    assert levels(load()) == [0, 10, 20, 30, 40]


def test_store_of_another_run_that_was_first_is_used(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 10)
    rename = os.rename

    def late(source: str, target: Path) -> None:
        monkeypatch.undo()
        load()  # the other run
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert levels(load()) == [10]


# Bad input


def write_bad(root: Path) -> dict[str, str]:
    """Write one file of every bad kind; return a part of the reason to be given for each."""
    whole = solid(root / "good.png", 50).read_bytes()
    (root / "empty.png").write_bytes(b"")
    (root / "truncated.png").write_bytes(whole[: len(whole) // 2])
    photograph = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(photograph).save(root / "half.jpg")
    (root / "half.jpg").write_bytes((root / "half.jpg").read_bytes()[:3000])
    (root / "text.jpg").write_text("this is a text")
    (root / "link.png").symlink_to(root / "nowhere.png")
    return {
        "empty.png": "empty file",
        "half.jpg": "truncated",
        "link.png": "broken link",
        "text.jpg": "cannot identify image file",
        "truncated.png": "",
    }


def test_bad_images_are_skipped_counted_and_named(
    root: Path, load: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    reasons = write_bad(root)
    with caplog.at_level(logging.WARNING):
        images = load()
    assert list(images.keys) == ["good.png"]
    assert levels(images) == [50]
    assert [name for name, _ in images.skipped] == sorted(reasons)
    for name, reason in images.skipped:
        assert reasons[name] in reason
        assert str(root) not in reason  # the name stands before it
        assert f"{name}: {reason}" in caplog.text
    assert f"skipped 5 images below {root}" in caplog.text


@pytest.mark.parametrize("name", ["empty.png", "half.jpg", "link.png", "text.jpg", "truncated.png"])
def test_a_bad_image_stops_when_asked(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], name: str
) -> None:
    for other in write_bad(root):
        if other != name:
            (root / other).unlink()
    with pytest.raises(UsageError, match=rf"bad image .*{name}: .*on_bad_image=skip"):
        load(on_bad_image="raise")
    assert list((tmp_path / "cache").iterdir()) == []


def test_only_bad_images_are_no_data_set(root: Path, load: Callable[..., ImageSet]) -> None:
    write_bad(root)
    (root / "good.png").unlink()
    with pytest.raises(UsageError, match=r"none of the 5 image files .*first: empty\.png: empty"):
        load()


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.root=.*/nowhere does not exist"):
        folder(str(tmp_path / "nowhere"), S, str(tmp_path))


def test_file_as_root(tmp_path: Path) -> None:
    file = solid(tmp_path / "1.png", 0)
    with pytest.raises(UsageError, match=r"1\.png is a file, not a folder"):
        folder(str(file), S, str(tmp_path))


def test_empty_folder(load: Callable[..., ImageSet]) -> None:
    with pytest.raises(
        UsageError, match=r"no image below .* \(0 other files\); looked for .*\.png"
    ):
        load()


def test_folder_without_images(root: Path, load: Callable[..., ImageSet]) -> None:
    (root / "deep").mkdir()
    for name in ("a.txt", "b.csv", "deep/c"):
        (root / name).write_text("x")
    with pytest.raises(UsageError, match=r"no image below .* \(3 other files\)"):
        load()


def test_disk_too_small(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 0)
    need = 3 * S * S
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(UsageError, match=r"the images need .* GB in .* are free; make room"):
        load()
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"labels": "names"}, r"dataset\.labels 'names' is none of"),
        ({"on_bad_image": "ignore"}, "on_bad_image 'ignore' is none of"),
        ({"protocol": "split"}, "protocol=split needs test images"),
    ],
)
def test_settings_that_are_none(
    root: Path, load: Callable[..., ImageSet], setting: dict[str, str], message: str
) -> None:
    solid(root / "1.png", 0)
    with pytest.raises(UsageError, match=message):
        load(**setting)
