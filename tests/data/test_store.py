"""The image store after power cuts and with damaged files, and the memory that decoding takes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spice_pl.data import decode, store_files
from spice_pl.data.decode import Decoded, Decoding, read_image
from spice_pl.data.formats import Part, open_bytes
from spice_pl.data.images import ImageSet
from spice_pl.data.sources.folder import folder
from spice_pl.errors import UsageError

S = 4
PARTS = ("images.u8", "keys.bin", "keys.npy", "files.npy", "index.json")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.new("L", (S, S), 10 * i).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


@pytest.fixture
def load(root: Path, tmp_path: Path) -> Callable[..., ImageSet]:
    def load(**settings: Any) -> ImageSet:
        return folder(str(root), S, str(tmp_path / "cache"), **settings)

    return load


def place(tmp_path: Path) -> Path:
    """Return the folder of the only store."""
    (found,) = (path.parent for path in (tmp_path / "cache").glob("[!.]*/index.json"))
    return found


def levels(images: ImageSet) -> list[int]:
    return [int(image[0, 0, 0]) for image in images.images]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", ["nothing", "empty", "half", "longer"])
def test_a_damaged_store_is_made_again(
    tmp_path: Path,
    load: Callable[..., ImageSet],
    caplog: pytest.LogCaptureFixture,
    part: str,
    left: str,
) -> None:
    before = load()
    damaged = place(tmp_path)
    file = damaged / part
    whole = file.read_bytes()
    file.unlink()  # the images above are mapped from it
    if left != "nothing":
        size = {"empty": 0, "half": len(whole) // 2, "longer": len(whole) + 1}[left]
        file.write_bytes((whole + b"\0")[:size])
    after = load()
    assert levels(after) == levels(before) == [0, 10, 20, 30, 40]
    assert list(after.keys) == [f"{i}.png" for i in range(5)]
    assert after.fingerprint == before.fingerprint
    if (part, left) not in {("files.npy", "longer"), ("keys.npy", "longer")}:  # nothing reads it
        assert f"the image store {damaged} is damaged and is made again" in caplog.text
        assert file.read_bytes() == whole
    caplog.clear()
    load()
    assert "damaged" not in caplog.text


def test_a_flipped_bit_is_seen(
    tmp_path: Path,
    load: Callable[..., ImageSet],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load()
    file = place(tmp_path) / "images.u8"
    whole = file.read_bytes()

    def flip() -> None:
        file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])

    flip()
    assert levels(load()) == [0, 10, 20, 30, 40]
    assert "is damaged and is made again" in caplog.text
    assert file.read_bytes() == whole
    monkeypatch.setattr(store_files, "VERIFY_BYTES", 0)  # larger than what is read each time
    caplog.clear()
    flip()
    load()
    assert "damaged" not in caplog.text
    load(scan="files")
    assert "is damaged and is made again" in caplog.text


def test_an_error_that_passes_does_not_cost_the_store(
    tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    load()
    before = (place(tmp_path) / "images.u8").stat().st_ino

    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", failing)
        with pytest.raises(UsageError, match=r"cannot be read or written \(Too many open files\)"):
            load()
    load()
    assert (place(tmp_path) / "images.u8").stat().st_ino == before


def test_everything_is_on_the_disk_before_the_store_has_its_name(
    tmp_path: Path, load: Callable[..., ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(handle: int) -> None:
        real_sync(handle)
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))

    def rename(source: Any, target: Any, **more: Any) -> None:
        real_rename(source, target, **more)
        events.append(("rename", os.path.basename(target)))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    load()
    named = events.index(("rename", place(tmp_path).name))
    synced = {name for kind, name in events[:named] if kind == "sync"}
    assert {"images.u8", "keys.bin", "keys.npy", "files.npy"} <= synced
    assert any(name.startswith(".index.json") for name in synced)
    assert f".{place(tmp_path).name}.part" in synced  # the names of these files
    assert ("sync", "cache") in events[named:]  # the name of the store


def test_images_that_are_all_the_same_are_said(
    root: Path, load: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    for path in root.iterdir():
        Image.new("L", (S, S), 77).save(path)
    load()
    assert "all 5 images of dataset.root=" in caplog.text
    assert "are the same, pixel by pixel" in caplog.text


def test_names_cannot_write_to_the_terminal(
    root: Path, load: Callable[..., ImageSet], caplog: pytest.LogCaptureFixture
) -> None:
    name = "\x1b[31m\nerror: everything is lost.png"
    (root / name).write_bytes(b"")
    images = load()
    assert [key for key, _ in images.skipped] == [name]
    assert "\x1b" not in caplog.text
    assert "\nerror" not in caplog.text
    assert r"\x1b[31m\nerror: everything is lost.png: empty file" in caplog.text
    with pytest.raises(UsageError, match=r"bad image \\x1b\[31m\\nerror"):
        load(on_bad_image="raise")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "gif", "bmp", "ppm"])
def test_a_part_of_a_file_is_read_as_a_file(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / f"1.{suffix}")
    data = (tmp_path / f"1.{suffix}").read_bytes()
    (tmp_path / "archive").write_bytes(b"before" + data + b"\xff\xd8\xff behind")
    whole = read_image(tmp_path / f"1.{suffix}", Decoding(S))
    part = read_image(Part(tmp_path / "archive", 6, len(data)), Decoding(S))
    assert isinstance(whole, Decoded)
    assert isinstance(part, Decoded)
    assert (part.pixels == whole.pixels).all()
    with open_bytes(Part(tmp_path / "archive", 6, len(data))) as file:
        assert file.read() == data
        assert file.read(9) == b""
        assert file.seek(-9, os.SEEK_END) == len(data) - 9
        assert file.read(99) == data[-9:]
        assert (file.seek(3), file.read(4), file.tell()) == (3, data[3:7], 7)
        with pytest.raises(OSError, match="fileno"):
            file.fileno()
    short = read_image(Part(tmp_path / "archive", 6, 20), Decoding(S))
    assert isinstance(short, str)


# Memory


def test_an_image_that_takes_too_much_memory_is_left_out_until_it_may(
    root: Path, tmp_path: Path, load: Callable[..., ImageSet]
) -> None:
    Image.new("RGB", (600, 500), (90, 90, 90)).save(root / "large.png")  # 1.5 MB, 5 per pixel
    first = load(max_decode_mb=1)
    assert levels(first) == [0, 10, 20, 30, 40]
    ((name, reason),) = first.skipped
    assert name == "large.png"
    assert reason == (
        "600 x 500 pixels take 2 MB to decode; if this is not a decompression bomb, set "
        "dataset.max_decode_mb=2"
    )
    assert levels(load(max_decode_mb=2)) == [0, 10, 20, 30, 40, 90]
    assert load().num_skipped == 0
    with pytest.raises(UsageError, match=r"dataset\.max_decode_mb 0 is not positive"):
        load(max_decode_mb=0)
    assert len(list((tmp_path / "cache").glob("[!.]*/index.json"))) == 1


def test_a_photograph_of_108_megapixels_is_read_small(tmp_path: Path) -> None:
    Image.new("L", (12_000, 9_000), 99).save(tmp_path / "1.jpg")
    image = read_image(tmp_path / "1.jpg", Decoding(96, max_decode_mb=20))
    assert isinstance(image, Decoded), image
    assert (image.width, image.height) == (12_000, 9_000)
    assert (image.pixels == 99).all()


def test_threads_share_their_memory() -> None:
    memory = decode._Memory()
    most = [0]
    running = 0
    lock = threading.Lock()

    def work(need: int) -> None:
        nonlocal running
        with memory.take(need, 100):
            with lock:
                running += need
                most[0] = max(most[0], running)
            time.sleep(0.001)
            with lock:
                running -= need

    needs = [10, 40, 60, 90, 100, 250, 5] * 8
    threads = [threading.Thread(target=work, args=(need,)) for need in needs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert most[0] == 250  # the one that is larger than the limit runs alone


def test_memory_is_given_back_after_an_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "1.png")
    whole = (tmp_path / "1.png").read_bytes()
    for _ in range(3):
        assert isinstance(read_image(whole[:9000], Decoding(S, max_decode_mb=0.06)), str)
    assert isinstance(read_image(whole, Decoding(S, max_decode_mb=0.06)), Decoded)


def large(kind: str, path: Path) -> None:
    """Write an image of 4 megapixels."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 80, 4)).astype(np.uint8)
    image = Image.fromarray(noise).resize((2500, 1600))
    grey = np.asarray(image.convert("L"))
    if kind == "16 bits":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path, "PNG")
    elif kind == "float":
        Image.fromarray(grey.astype(np.float32)).save(path, "TIFF")
    elif kind == "alpha":
        image.save(path, "PNG")
    elif kind == "palette":
        image.convert("RGB").quantize(16).save(path, "PNG", transparency=3)
    elif kind == "CMYK":
        image.convert("CMYK").save(path, "TIFF", compression="tiff_lzw")
    else:
        image.convert("RGB").save(path, kind)


MEASURE = """
import sys
from pathlib import Path
from spice_pl.data import decode

def status(name):
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024

warm = decode.Decoding(16)
decode.read_image(Path(sys.argv[1]), warm)
estimates, real = [], decode._memory
decode._memory = lambda *given: estimates.append(real(*given)) or estimates[-1]
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
assert isinstance(decode.read_image(Path(sys.argv[2]), decode.Decoding(96)), decode.Decoded)
print(status("VmHWM") - before, estimates[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["PNG", "TIFF", "WEBP", "BMP", "GIF", "16 bits", "float", "alpha", "palette", "CMYK"],
)
def test_the_estimate_of_memory_is_not_too_low(tmp_path: Path, kind: str) -> None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs /proc/self/clear_refs")
    Image.new("L", (16, 16)).save(tmp_path / "small.png")
    large(kind, tmp_path / "large")
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", MEASURE, str(tmp_path / "small.png"), str(tmp_path / "large")],
        env=os.environ | {"PYTHONPATH": str(Path(decode.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    taken, estimated = map(int, done.stdout.split())
    assert taken < 1.1 * estimated + 4e6
