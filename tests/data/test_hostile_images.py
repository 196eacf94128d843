"""Images that would take very long: refused at once, with a reason."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spice_pl.data.decode import MOST_SCANS, Decoded, Decoding, read_image

SECONDS = 5  # of processor time; without the checks it would be minutes to hours


def jpeg(*, progressive: bool = True) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


def refused(file: Path | bytes) -> str:
    begun = time.process_time()
    found = read_image(file, Decoding(8))
    assert time.process_time() - begun < SECONDS
    assert isinstance(found, str)
    return found


@pytest.mark.parametrize("whole", [3, 200, 10_000])
def test_a_jpeg_that_is_a_large_hole(tmp_path: Path, whole: int) -> None:
    """Only its beginning was copied; Pillow would look for the rest byte by byte."""
    (tmp_path / "a.jpg").write_bytes(jpeg()[:whole].ljust(3, b"\xff"))
    os.truncate(tmp_path / "a.jpg", 1 << 38)  # 256 GB, which take no place on the disk
    assert refused(tmp_path / "a.jpg") == "cut off: the file ends in zeros"


def test_zeros_after_a_whole_jpeg_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg() + bytes(1 << 20))
    assert isinstance(read_image(tmp_path / "a.jpg", Decoding(8)), Decoded)


@pytest.mark.parametrize("whole", [6, 60, 500])
def test_a_gif_that_is_a_large_hole(tmp_path: Path, whole: int) -> None:
    Image.effect_noise((40, 40), 99).save(tmp_path / "a.gif")
    os.truncate(tmp_path / "a.gif", whole)
    os.truncate(tmp_path / "a.gif", 1 << 28)  # less than max_decode_mb
    assert refused(tmp_path / "a.gif") == "cut off: the file ends in zeros"


@pytest.mark.parametrize("name", ["png", "bmp", "tif", "webp", "ppm", "jp2", "avif"])
def test_large_holes_of_other_formats(tmp_path: Path, name: str) -> None:
    file = tmp_path / f"a.{name}"
    try:
        Image.new("RGB", (40, 40)).save(file)
    except (OSError, KeyError):
        pytest.skip(f"Pillow cannot write {name} here")
    os.truncate(file, 60)
    os.truncate(file, 1 << 38)
    assert "a file of 274,878 MB; if this is not a decompression bomb, set" in refused(file)


def test_a_progressive_jpeg_of_many_scans_is_left_out() -> None:
    """Each scan goes through all pixels: a megabyte of empty ones takes minutes."""
    whole = jpeg()
    assert isinstance(read_image(whole, Decoding(8)), Decoded)
    last = whole.rindex(b"\xff\xda")
    made = whole[:-2] + whole[last:-2] * 2 * MOST_SCANS + whole[-2:]
    assert "scans in a progressive JPEG, which would take very long" in refused(made)


def test_a_pipe_in_the_place_of_a_file_does_not_wait(tmp_path: Path) -> None:
    """As if it were exchanged after the folder was listed and looked at."""
    os.mkfifo(tmp_path / "a.jpg")
    assert refused(tmp_path / "a.jpg") in ("empty file", "File or stream is not seekable.")
