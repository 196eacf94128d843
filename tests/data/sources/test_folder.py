from __future__ import annotations

import errno
import logging
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, features

from spice_pl.data import formats, left_out, listing, retry, store, store_files, store_writer
from spice_pl.data.decode import Decoded, Decoding, Loaded, decode, read_image
from spice_pl.data.images import ImageSet
from spice_pl.data.sources import folder as module
from spice_pl.data.sources.folder import folder
from spice_pl.data.sources.survey import survey
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
    assert list(images.skipped) == [("notes.txt", "not an image")]


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
    # level / 65535 * 255, rounded: 0.996 and 127.502
    assert decoded(tmp_path / name, 2)[..., 2].tolist() == [[0, 1], [128, 255]]


def test_camera_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[10, 20], [30, 40]], dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert decoded(tmp_path / "x.png", 2)[..., 0].tolist() == [[30, 10], [40, 20]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_image_is_as_one_that_was_saved_upright(tmp_path: Path, orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (11, 17, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).resize((170, 110)).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        ImageOps.exif_transpose(image).save(tmp_path / "y.png")
    assert (decoded(tmp_path / "x.png", 24) == decoded(tmp_path / "y.png", 24)).all()


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
    def read_image(path: Path, decoding: Decoding) -> str:
        raise AssertionError(f"decoded {path}")

    monkeypatch.setattr(module, "read_image", read_image)


def stores(tmp_path: Path) -> list[str]:
    """What is in the cache, without the empty files that runs lock."""
    return [path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


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
    with pytest.raises(UsageError, match=r"bad image 2\.png of .*: empty file"):
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


def test_interrupted_decoding_is_gone_on_with(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(9):
        solid(root / f"{i}.png", 10 * i)
    (root / "1.png").write_bytes(b"")
    read: list[str] = []

    def interrupted(path: Path, decoding: Decoding) -> Loaded:
        read.append(path.name)
        if path.name == "7.png" and "0.png" in read:  # the first time
            raise KeyboardInterrupt
        return read_image(path, decoding)

    monkeypatch.setattr(module, "read_image", interrupted)
    monkeypatch.setattr(store_writer, "STEP_IMAGES", (3, 3))
    with pytest.raises(KeyboardInterrupt):
        load()
    (part,) = stores(tmp_path)
    assert part.endswith(".part")
    # What a killed process leaves behind: rows and a line of the journal without an end.
    for name in ("images.u8", "files.part", "journal.jsonl"):
        with (tmp_path / "cache" / part / name).open("ab") as file:
            file.write(b'{"done": 9, "num_rows')
    read.clear()
    images = load()
    assert sorted(read) == ["6.png", "7.png", "8.png"]
    assert levels(images) == [0, *range(20, 90, 10)]
    assert list(images.keys) == ["0.png", *(f"{i}.png" for i in range(2, 9))]
    assert list(images.skipped) == [("1.png", "empty file")]
    assert not [name for name in stores(tmp_path) if name.endswith(".part")]
    monkeypatch.undo()
    assert images.fingerprint == folder(str(root), S, str(tmp_path / "another")).fingerprint


KILLS = """
import os, signal, sys
from pathlib import Path
from spice_pl.data import store_files, store_writer
from spice_pl.data.sources.folder import folder

root, caches = sys.argv[1], Path(sys.argv[2])
store_writer.STEP_IMAGES = (3, 3)
left, cache, append = None, "", store_files._append


def strike():
    global left
    if left is not None:
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def heard(event, args):
    if event in ("open", "os.rename", "os.remove", "os.truncate"):
        if str(args[0]).startswith(cache):
            strike()


def torn(path, arrays):
    with path.open("ab") as file:  # half of the bytes, then the blow
        file.write(b"".join(array.tobytes() for array in arrays)[:1000])
        file.flush()
        size = file.tell()
        strike()
    os.truncate(path, size - min(1000, sum(array.nbytes for array in arrays)))
    append(path, arrays)


def make(cache_dir):
    images = folder(root, 4, str(cache_dir))
    return images.fingerprint, list(images.keys), list(images.skipped), images.images.tobytes()


straight, ends, deaths, parts = make(caches / "straight"), 0, 0, 0
sys.addaudithook(heard)
store_files._append = torn
while not ends:  # die at the first blow, at the second, ... until one run gets through
    cache_dir = caches / f"killed-{deaths}"
    for attempt in range(3):  # twice at this blow, then straight on
        pid = os.fork()
        if not pid:
            cache, left = str(cache_dir), deaths if attempt < 2 else None
            os._exit(0 if make(cache_dir) == straight else 1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in ((0, -signal.SIGKILL) if attempt < 2 else (0,)), (deaths, attempt, code)
        parts += code != 0 and not list(cache_dir.glob("[!.]*/index.json"))
        ends += attempt == 0 and code == 0
    deaths += 1
print(deaths - 1, parts)
"""


@pytest.mark.slow
def test_a_store_is_whole_wherever_its_writer_is_killed(root: Path, tmp_path: Path) -> None:
    for i in range(8):
        solid(root / f"{i}.png", 10 * i)
    (root / "1.png").write_bytes(b"")
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", KILLS, str(root), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[3])},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    deaths, parts = map(int, done.stdout.split()[-2:])
    assert deaths >= 30  # places where the process was killed
    assert parts >= 30


def test_one_process_writes_and_the_others_wait(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        solid(root / f"{i}.png", 10 * i)
    read: list[str] = []

    def slow(path: Path, decoding: Decoding) -> Loaded:
        read.append(path.name)
        time.sleep(0.02)
        return read_image(path, decoding)

    monkeypatch.setattr(module, "read_image", slow)
    with ThreadPoolExecutor(4) as pool:  # a lock is of the open file, so threads show it too
        opened = [pool.submit(load) for _ in range(4)]
    assert [levels(each.result()) for each in opened] == [[0, 10, 20, 30, 40]] * 4
    assert len(read) == 5


def test_a_full_disk_is_said(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 10)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_files, "_append", full)
        with pytest.raises(UsageError, match="is full; make room and start again"):
            load()
    assert levels(load()) == [10]


def test_exact_copies_are_counted(
    root: Path, load: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    for name, level in (("a", 1), ("b", 2), ("c", 1), ("d", 1)):
        solid(root / f"{name}.png", level)
    with caplog.at_level(logging.INFO):
        load()
    assert "2 of 4 images are exact copies of others" in caplog.text


# What a skip is worth


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAUSES_S", (0.0, 0.0))


class Disk:
    """A disk that fails, for some files and some attempts."""

    def __init__(self, error: BaseException, names: Sequence[str], times: int) -> None:
        self.error, self.left = error, dict.fromkeys(names, times)
        self.real = formats._File

    def __call__(self, path: Path) -> Any:
        if self.left.get(path.name, 0):
            self.left[path.name] -= 1
            raise self.error
        return self.real(path)


PASSING = [OSError(code, os.strerror(code)) for code in (errno.EIO, errno.EMFILE, errno.ESTALE)]


@pytest.mark.parametrize("error", [*PASSING, MemoryError()], ids=repr)
@pytest.mark.usefixtures("no_pauses")
def test_an_image_that_can_be_read_at_the_third_attempt_is_read(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for i in range(5):
        solid(root / f"{i}.png", 10 * i)
    monkeypatch.setattr(formats, "_File", Disk(error, ["1.png", "3.png"], 2))
    images = load(on_bad_image="raise")
    assert levels(images) == [0, 10, 20, 30, 40]
    assert not images.skipped


@pytest.mark.parametrize("error", [*PASSING, MemoryError()], ids=repr)
@pytest.mark.usefixtures("no_pauses")
def test_an_image_that_cannot_be_read_now_is_there_in_the_next_run(
    root: Path,
    tmp_path: Path,
    load: Callable[..., ImageSet],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    for i in range(5):
        solid(root / f"{i}.png", 10 * i)
    (root / "0.png").write_bytes(b"")
    disk = Disk(error, ["1.png", "4.png"], 3)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_File", disk)
        first = load()
    assert levels(first) == [20, 30]
    assert [key for key, _ in first.skipped] == ["0.png", "1.png", "4.png"]
    assert first.skipped[1][1].startswith("cannot be read now: ")
    disk.left = {"1.png": 1}
    with monkeypatch.context() as patch:  # one of the two can be read
        patch.setattr(formats, "_File", disk)
        assert list(load().keys) == ["2.png", "3.png", "4.png"]
    last = load()
    assert levels(last) == [10, 20, 30, 40]
    assert list(last.keys) == ["1.png", "2.png", "3.png", "4.png"]
    assert list(last.skipped) == [("0.png", "empty file")]
    assert last.fingerprint == folder(str(root), S, str(tmp_path / "another")).fingerprint
    assert levels(first) == [20, 30]  # a run that had it open keeps its images
    assert len(stores(tmp_path)) == 1
    forbid_decoding(monkeypatch)
    assert levels(load()) == [10, 20, 30, 40]


@pytest.mark.usefixtures("no_pauses")
def test_ranks_do_not_make_a_store_again(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 10)
    solid(root / "2.png", 20)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_File", Disk(PASSING[0], ["1.png"], 3))
        load()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert levels(load()) == [20]
    monkeypatch.delenv("LOCAL_RANK")
    assert levels(load()) == [10, 20]


@pytest.mark.usefixtures("no_pauses")
def test_a_disk_that_fails_for_many_images_is_an_error(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i:02}.png" for i in range(30)]
    for i, name in enumerate(names):
        solid(root / name, i)
    monkeypatch.setattr(store_writer, "STEP_IMAGES", (10, 10))
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_File", Disk(PASSING[0], names[12:], 9))
        with pytest.raises(
            UsageError, match=r"11 images of .* cannot be read, the last is 22\.png"
        ):
            load()
    assert levels(load()) == list(range(30))


def test_other_decoders_try_what_was_skipped_again(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        solid(root / f"{i}.png", 10 * i)
    (root / "1.png").write_bytes(b"")
    image = Image.new("RGB", (S, S), (20, 20, 20))
    image.save(root / "2.png", "WEBP", lossless=True)
    others = tuple(name for name in formats._formats() if name != "WEBP")
    with monkeypatch.context() as patch:  # a Pillow without WebP
        patch.setattr(formats, "_formats", lambda: others)
        patch.setattr(store, "decoders", lambda: ("Pillow 1",))
        first = load()
        assert levels(first) == [0, 30]
        forbid_decoding(patch)
        load()  # the same decoders decide the same
    again = load()
    assert list(zip(again.keys, levels(again), strict=True)) == [
        *(("0.png", 0), ("2.png", 20), ("3.png", 30))
    ]
    forbid_decoding(monkeypatch)
    assert levels(load()) == [0, 20, 30]


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
    assert f"skipped 5 images of dataset.root={root}" in caplog.text


@pytest.mark.parametrize("name", ["empty.png", "half.jpg", "link.png", "text.jpg", "truncated.png"])
def test_a_bad_image_stops_when_asked(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], name: str
) -> None:
    for other in write_bad(root):
        if other != name:
            (root / other).unlink()
    with pytest.raises(UsageError, match=rf"bad image {name} of .*: .*on_bad_image=skip"):
        load(on_bad_image="raise")
    assert stores(tmp_path) == []


def test_only_bad_images_are_no_data_set(root: Path, load: Callable[..., ImageSet]) -> None:
    write_bad(root)
    (root / "good.png").unlink()
    with pytest.raises(UsageError, match=r"none of the 5 images of .*first: empty\.png: empty"):
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
        UsageError, match=r"no image below .*, 0 other files; looked for JPEG, .*PNG"
    ):
        load()


def test_folder_without_images(root: Path, load: Callable[..., ImageSet]) -> None:
    (root / "deep").mkdir()
    for name in ("a.txt", "b.csv", "deep/c"):
        (root / name).write_text("x")
    with pytest.raises(UsageError, match=r"no image below .*, 3 other files \(3 not an image\)"):
        load()


def test_disk_too_small(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 0)
    need = 3 * S * S
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    with pytest.raises(
        UsageError, match=r"the images need 48 bytes in .* and 47 bytes are free; make room"
    ):
        load()
    assert [name for name in stores(tmp_path) if not name.endswith(".part")] == []


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"labels": "csv"}, r"dataset\.labels=csv reads .* of dataset\.table; give it"),
        ({"scan": "never"}, r"dataset\.scan 'never' is none of"),
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


# A folder that is not at rest


def test_a_file_that_changes_while_the_folder_is_read_is_left_out(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        solid(root / f"{i}.png", 10 * i)

    def meanwhile(path: Path, decoding: Decoding) -> Loaded:
        if path.name == "1.png":
            path.unlink()
        if path.name == "2.png":
            solid(path, 200)
            os.utime(path, ns=(0, 0))
        return read_image(path, decoding)

    with monkeypatch.context() as patch:
        patch.setattr(module, "read_image", meanwhile)
        images = load()
    assert list(zip(images.keys, levels(images), strict=True)) == [("0.png", 0), ("3.png", 30)]
    assert list(images.skipped) == [
        ("1.png", "vanished after the folder was listed"),
        ("2.png", "changed after the folder was listed; run again when it is complete"),
    ]
    assert levels(load()) == [0, 200, 30]  # the next run sees the folder as it is then


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_file_that_must_not_be_read_is_left_out_until_it_may(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    solid(root / "1.png", 10)
    solid(root / "2.png", 20)
    real_file, real_access = formats._File, os.access

    def refused(file: Path) -> Any:
        if file.name == "1.png":
            raise PermissionError(13, "Permission denied", str(file))
        return real_file(file)

    def access(file: Any, mode: int) -> bool:
        return not str(file).endswith("1.png") and real_access(file, mode)

    with monkeypatch.context() as patch:  # a test that runs as root may read everything
        patch.setattr(formats, "_File", refused)
        if when == "before":
            patch.setattr(os, "access", access)
        images = load()
    assert levels(images) == [20]
    assert list(images.skipped) == [("1.png", "permission denied")]
    again = load()
    assert list(again.keys) == ["1.png", "2.png"]
    assert levels(again) == [10, 20]
    assert not again.skipped


def test_a_pipe_is_no_image(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "1.png", 10)
    os.mkfifo(root / "2.png")
    images = load()
    assert levels(images) == [10]
    assert list(images.skipped) == [("2.png", "not a file")]


def test_links_to_folders_are_followed_once(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "real/1.png", 10)
    solid(root.parent / "elsewhere/2.png", 20)
    (root / "a link").symlink_to(root / "real")
    (root / "real/loop").symlink_to(root)
    (root / "outside").symlink_to(root.parent / "elsewhere")
    images = load()
    assert list(images.keys) == ["outside/2.png", "real/1.png"]
    assert list(images.skipped) == [
        ("a link", "a link to a folder that is searched already"),
        ("real/loop", "a link to a folder that is searched already"),
    ]


def test_names_that_are_no_text_survive(root: Path, load: Callable[..., ImageSet]) -> None:
    name = os.fsdecode(b"caf\xe9\n.png")
    solid(root / name, 10)
    solid(root / "z.png", 20)
    images = load()
    assert list(images.keys) == [name, "z.png"]
    assert images.keys[-1] == "z.png"
    assert images.keys[:1] == [name]
    with pytest.raises(IndexError):
        images.keys[2]


@pytest.mark.parametrize("name", ["link", "link.png"])
@pytest.mark.parametrize("target", ["link", "x" * 300, "nowhere"], ids=["loop", "long", "broken"])
def test_a_link_that_leads_nowhere_costs_no_other_file(
    root: Path, load: Callable[..., ImageSet], target: str, name: str
) -> None:
    for i in range(9):
        solid(root / f"deep/{i}.png", 10 * i)
    (root / "deep" / name).symlink_to(name if target == "link" else target)
    images = load()
    assert levels(images) == [10 * i for i in range(9)]
    ((key, reason),) = images.skipped
    assert key == f"deep/{name}"
    assert reason.startswith("broken link")


# Which files are images, and which are left out


def in_folder(path: Path) -> Path:
    """Make the folder of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def everything(root: Path) -> set[str]:
    """Return the paths of all files below a folder, links among them."""
    return {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_symlink() or not path.is_dir()
    }


def test_content_decides_what_is_an_image(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "plain.png", 10)
    photograph = root / "0.jfif"
    Image.new("RGB", (S, S), (20, 20, 20)).save(photograph, "JPEG")
    for name in ("1.jpe", "2", "3.txt", "4.JPG_large"):
        shutil.copy(photograph, root / name)
    kinds = ["PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
    for kind in kinds:
        Image.new("RGB", (S, S), (20, 20, 20)).save(root / f"no suffix {kind}", kind)
    texts = {"a.txt": "a text", "BMW": "BMW is a maker of cars", "P1": "P1 is a name", "empty": ""}
    for name, text in texts.items():
        (root / name).write_text(text)
    images = load()
    expected = ["0.jfif", "1.jpe", "2", "3.txt", "4.JPG_large"]
    expected += [*sorted(f"no suffix {kind}" for kind in kinds), "plain.png"]
    assert list(images.keys) == expected
    assert np.abs(np.array(levels(images)) - [*[20] * 11, 10]).max() <= 1
    assert list(images.skipped) == [(name, "not an image") for name in sorted(texts)]


def test_avif_is_an_image(root: Path, load: Callable[..., ImageSet]) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    Image.new("RGB", (16, 16), (50, 50, 50)).save(root / "1.avif")
    shutil.copy(root / "1.avif", root / "2")
    assert list(load().keys) == ["1.avif", "2"]


def test_every_file_is_used_or_left_out_with_a_reason(
    root: Path,
    load: Callable[..., ImageSet],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(root.parent)
    left_out = {
        ".hidden.png": "hidden",
        ".ipynb_checkpoints/1-checkpoint.png": "in .ipynb_checkpoints, a hidden folder",
        ".Trash-1000/files/deep/1.png": "in .Trash-1000, a hidden folder",
        "album/@eaDir/1.png/SYNOPHOTO_THUMB_M.png": "in @eaDir, thumbnails of a Synology disk",
        "__MACOSX/._1.png": "in __MACOSX, a folder of macOS",
        "runs/photos/moco/seed0/1.png": "among the results of a run",
        "cache/1.png": "in the cache_dir",
        "drafts/deep/1.png": "excluded by dataset.exclude",
        "album/1.gif": "excluded by dataset.exclude",
        "album/b/1.png": "excluded by dataset.exclude",
        "raw.NEF": "a raw file of a camera; export it as JPEG, PNG or TIFF",
    }
    for name in ("1.png", "album/1.png", "album/runs/1.png", "b/1.png", *left_out):
        shutil.move(solid(root.parent / "x.png", 10), in_folder(root / name))
    (root / "notes.txt").write_text("text")
    (root / "empty.png").touch()
    os.mkfifo(root / "pipe")
    (root / "runs/photos/moco/seed0/.hydra").mkdir()
    left_out |= {"notes.txt": "not an image", "empty.png": "empty file", "pipe": "not a file"}
    before = everything(root)
    with caplog.at_level(logging.INFO):
        images = folder(
            *("images", S, "images/cache"),
            exclude=["drafts", "*.gif", "album/b"],
        )
    assert list(images.keys) == ["1.png", "album/1.png", "album/runs/1.png", "b/1.png"]
    found = dict(images.skipped)
    assert found.items() >= left_out.items()
    assert before == {*images.keys, *found}
    assert len(images) + images.num_skipped == len(before)
    said = "of 18 files 4 are used, 1 cannot be decoded and 13 are left out ("
    assert said in caplog.text
    assert "3 excluded by dataset.exclude" in caplog.text


def test_files_behind_links_that_are_left_out_are_not_counted(
    root: Path, load: Callable[..., ImageSet]
) -> None:
    solid(root / "1.png", 10)
    solid(root.parent / "cache/1.png", 10)
    solid(root.parent / "elsewhere/1.png", 10)
    (root / ".hidden").symlink_to(root.parent / "elsewhere")
    (root / "to the cache").symlink_to(root.parent / "cache")
    images = load()
    assert list(images.keys) == ["1.png"]
    expected = [
        (".hidden", "in .hidden, a hidden folder"),
        ("to the cache", "in the cache_dir"),
    ]
    assert list(images.skipped) == expected


def test_only_some_of_many_files_are_listed_by_name(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_out, "LISTED", 3)
    solid(root / "1.png", 10)
    for i in range(9):
        (root / f"{i}.txt").write_text("text")
    images = load()
    assert len(images.skipped) == 3
    assert images.num_skipped == 9


def test_exclude_is_a_list(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "1.png", 0)
    with pytest.raises(UsageError, match=r"dataset\.exclude=\*\.gif is not a list; write"):
        load(exclude="*.gif")


# Notes of earlier scans


def age(root: Path) -> None:
    for path in (root, *root.rglob("*")):
        os.utime(path, (1e9, 1e9))


def test_a_trusted_scan_knows_what_was_left_out(
    root: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    solid(root / "1.png", 10)
    for name in ("a.txt", ".b.png"):
        (root / name).write_text("text")
    age(root)
    first = load(scan="folders")
    monkeypatch.setattr(listing, "scan_files", None)
    again = load(scan="folders")
    assert list(again.skipped) == list(first.skipped)
    assert list(first.skipped) == [(".b.png", "hidden"), ("a.txt", "not an image")]


def test_a_damaged_note_is_not_trusted(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    solid(root / "1.png", 10)
    age(root)
    load(scan="folders")
    (note,) = (tmp_path / "cache").glob("*.scan.json")
    for text in ("", "{", "[]", "{}", '{"num_images": 1, "folders": {}, "sample": [1]}'):
        note.write_text(text)
        assert levels(load(scan="folders")) == [10]


@pytest.mark.parametrize("change", ["nothing", "added", "removed", "renamed", "sampled"])
def test_a_folder_that_has_not_changed_is_trusted(
    root: Path,
    load: Callable[..., ImageSet],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    for i in range(4):
        solid(root / f"deep/{i}.png", 10 * i)
    age(root)
    assert levels(load(scan="folders")) == [0, 10, 20, 30]
    expected = [0, 10, 20, 30]
    if change == "added":
        solid(root / "deep/4.png", 40)
        expected = [0, 10, 20, 30, 40]
    elif change == "removed":
        (root / "deep/1.png").unlink()
        expected = [0, 20, 30]
    elif change == "renamed":
        (root / "deep/1.png").rename(root / "deep/5.png")
        expected = [0, 20, 30, 10]
    elif change == "sampled":
        (root / "deep/1.png").write_bytes(solid(root.parent / "x.png", 99).read_bytes())
        expected = [0, 99, 20, 30]
    scans: list[Path] = []
    real = listing.scan_files

    def counted(search: listing.Search) -> listing.Found:
        scans.append(search.root)
        return real(search)

    monkeypatch.setattr(listing, "scan_files", counted)
    assert levels(load(scan="folders")) == expected
    assert len(scans) == (change != "nothing")


def test_a_folder_that_changes_just_now_leaves_no_note(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    solid(root / "1.png", 10)
    load(scan="folders")
    assert not list((tmp_path / "cache").glob("*.scan.json"))


def test_few_files_are_looked_at_every_time(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    solid(root / "1.png", 10)
    age(root)
    load()
    assert not list((tmp_path / "cache").glob("*.scan.json"))


# Tables


def test_a_table_says_which_images_in_which_order(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    for i in range(4):
        solid(root / f"{i}.png", 10 * i)
    (root / "1.png").write_bytes(b"")
    outside = solid(tmp_path / "outside.png", 70)
    lines = ["label,path", "10,3.png", "9,1.png", ",2.png", f"9,{outside}", "10,gone.png"]
    (tmp_path / "t.csv").write_text("\ufeff" + "\n".join(lines))
    images = load(table=str(tmp_path / "t.csv"), labels="csv")
    assert list(images.keys) == ["3.png", "2.png", str(outside)]
    assert levels(images) == [30, 20, 70]
    assert images.labels is not None
    assert images.labels.tolist() == [1, -1, 0]  # numbers sort as numbers
    assert images.class_names == ["9", "10"]
    assert list(images.skipped) == [("1.png", "empty file"), ("gone.png", "there is no such file")]
    assert load(table=str(tmp_path / "t.csv")).labels is None


def test_a_parquet_table_is_one_too(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    solid(root / "1.png", 10)
    solid(root / "2.png", 20)
    columns = {"path": ["2.png", "1.png"], "label": ["b", None]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    images = load(table=str(tmp_path / "t.parquet"), labels="csv")
    assert levels(images) == [20, 10]
    assert images.labels is not None
    assert images.labels.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("file,label\n1.png,a", r"has no column path; it has file, label"),
        ("path\n1.png", r"has no column label; it has path"),
        ("path,label", r"has no rows"),
        ("path,label\n1.png,a\n1.png,b", r"row 2 of .* names 1\.png twice"),
        ("path,label\n,a", r"row 1 of .* names no file"),
        ("path,label\na\0b.png,a", r"row 1 of .* names a\\x00b.png, which no file can be called"),
        ("path,label\n1.png,a\n./1.png,b", r"row 2 of .* names \./1\.png, which row 1 names as 1"),
        ("path,label\n1.png,a\nx/../1.png,b", r"row 2 of .* which row 1 names as 1\.png"),
        ("label,path\na,b,1.png", r"line 2 of .* has 3 fields and the header 2; put a path with"),
        ("path,label\n" + "x" * 200_000, r"cannot be read: field larger than"),
        ('path,label\n"a.png,b\n', r"cannot be read: unexpected end .* is each quote closed"),
        ("path,label\na\0.png,b\n", r"row 1 .* names a\\x00\.png, which no file can be called"),
    ],
)
def test_a_table_that_does_not_fit(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], lines: str, message: str
) -> None:
    solid(root / "1.png", 10)
    (tmp_path / "t.csv").write_text(lines)
    with pytest.raises(UsageError, match=message):
        load(table=str(tmp_path / "t.csv"), labels="csv")


def test_each_row_says_what_is_wrong_with_its_file(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    solid(root / "sub/1.png", 10)
    solid(root / "a,b.png", 20)
    (root / "link.png").symlink_to("nowhere")
    (root / "folder.png").mkdir()
    rows = ["sub/1.png", "sub\\1.png", "gone.png", "link.png", "folder.png", '"a,b.png"']
    (tmp_path / "t.csv").write_text("\n".join(["path", *rows]))
    images = load(table=str(tmp_path / "t.csv"))
    assert list(images.keys) == ["sub/1.png", "a,b.png"]
    assert list(images.skipped) == [
        ("sub\\1.png", "there is no such file, but there is one with / instead of \\"),
        ("gone.png", "there is no such file"),
        ("link.png", "broken link"),
        ("folder.png", "not a file"),
    ]


def test_nan_is_no_class(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    labels = ["cat", "nan", "NaN", "<NA>", "", "dog", "none"]
    for i in range(len(labels)):
        solid(root / f"{i}.png", 10 * i)
    rows = [f"{i}.png,{label}" for i, label in enumerate(labels)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
    with caplog.at_level(logging.INFO):
        images = load(table=str(tmp_path / "t.csv"), labels="csv")
    assert images.class_names == ["cat", "dog", "none"]
    assert images.labels is not None
    assert images.labels.tolist() == [0, -1, -1, -1, -1, 1, 2]
    assert "3 labels are nan and count as no label" in caplog.text
    assert "3 of 7 images have a label, of 3 classes" in caplog.text


def test_a_damaged_parquet_table(root: Path, tmp_path: Path, load: Callable[..., ImageSet]) -> None:
    pytest.importorskip("pyarrow")
    solid(root / "1.png", 10)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UsageError, match=r"dataset\.table=.* cannot be read"):
        load(table=str(tmp_path / "t.parquet"))


# Hostile files


def test_bombs_are_left_out(root: Path, load: Callable[..., ImageSet]) -> None:
    solid(root / "good.png", 10)
    for name, side in (("bomb.png", 50_000), ("large.png", 15_000)):
        # A header that promises side × side pixels in a few bytes.
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
        (root / name).write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(data))
                + kind
                + data
                + struct.pack(">I", zlib.crc32(kind + data))
                for kind, data in chunks
            )
        )
    images = load()
    assert levels(images) == [10]
    assert [name for name, _ in images.skipped] == ["bomb.png", "large.png"]
    assert all("decompression bomb" in reason for _, reason in images.skipped)
    assert "set dataset.max_decode_mb=1125" in images.skipped[1][1]  # 5 bytes per pixel


def test_a_long_thin_image_is_an_image(tmp_path: Path) -> None:
    Image.new("L", (50_000, 2), 9).save(tmp_path / "x.png")
    assert (decoded(tmp_path / "x.png", 4) == 9).all()


def test_an_extension_does_not_choose_the_decoder(tmp_path: Path) -> None:
    Image.new("RGB", (S, S), (7, 7, 7)).save(tmp_path / "x", "PNG")
    (tmp_path / "x").rename(tmp_path / "x.jpg")
    assert (decoded(tmp_path / "x.jpg", S) == 7).all()
    # PostScript is a program; Pillow would run it.
    (tmp_path / "y.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    reason = decode(tmp_path / "y.png", S)
    assert isinstance(reason, str)
    assert "cannot identify image file" in reason


def test_damaged_notes_beside_a_picture_do_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (S, S), (7, 7, 7)).save(tmp_path / "x.png", exif=b"Exif\0\0MM\0*\xff\xff\xff")
    assert (decoded(tmp_path / "x.png", S) == 7).all()


def test_floating_levels(tmp_path: Path) -> None:
    for name, levels_ in (("unit", [0.0, 0.5, 1.0]), ("byte", [0.0, 127.5, 255.0])):
        row = np.array([levels_] * 3, dtype=np.float32)
        Image.fromarray(row).save(tmp_path / f"{name}.tif")
        assert decoded(tmp_path / f"{name}.tif", 3)[0, :, 0].tolist() == [0, 128, 255]


def test_a_large_photograph_is_read_small(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    Image.fromarray(np.tile(ramp, (512, 1))).save(tmp_path / "x.jpg", quality=95)
    image = read_image(tmp_path / "x.jpg", Decoding(16))
    assert isinstance(image, Decoded)
    assert (image.format, image.width, image.height) == ("JPEG", 512, 512)
    expected = ramp.reshape(16, 32).mean(axis=1)
    assert np.abs(image.pixels[0, 8] - expected).max() < 4


def test_heic_is_read_where_its_package_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    read_image(b"", Decoding(S))  # registers what is there
    Image.new("RGB", (16, 16), (50, 100, 150)).save(tmp_path / "x.heic")
    assert np.abs(decoded(tmp_path / "x.heic", S).astype(int) - (50, 100, 150)).max() < 8


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", " "])
def test_a_root_that_no_folder_can_have_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not exist, looked for in .*; give dataset"):
        folder(name, 4, str(tmp_path))
    assert survey({"root": name, "cache_dir": str(tmp_path)}) is None


def test_an_archive_among_photos_is_left_out_with_what_to_do(
    root: Path, load: Callable[..., ImageSet]
) -> None:
    solid(root / "1.png", 10)
    for name in ("a.zip", "b.tar.gz", "c.7z"):
        (root / name).write_bytes(b"PK\3\4 and more")
    images = load()
    assert list(images.skipped) == [
        (name, "an archive; unpack it") for name in ("a.zip", "b.tar.gz", "c.7z")
    ]
