"""Images of more than 8 bits: each is visible, and one pixel does not decide how bright it is."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spice_pl.data.decode import Decoded, Decoding, read_image, square
from spice_pl.data.levels import black_and_white
from spice_pl.data.sources.folder import folder
from spice_pl.errors import UsageError

S = 32
RAMP = np.linspace(0, 1, S * S).reshape(S, S)


def tiff(
    levels: NDArray[Any], *, planes: bool = False, big: bool = False, packed: bool = False
) -> bytes:
    """Write levels (H, W) or (H, W, C) as a TIFF file of one strip, or of one strip per plane."""
    order = ">" if big else "<"
    height, width = levels.shape[:2]
    channels = levels.shape[2] if levels.ndim == 3 else 1
    ordered = levels.astype(levels.dtype.newbyteorder(">" if big else "<"))
    strips = [ordered[..., i].tobytes() for i in range(channels)] if planes else [ordered.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    directory, more, names = b"", b"", {"H": 3, "I": 4}
    place = starts.pop() + sum(map(len, strips)) % 2
    tags: list[tuple[int, str, Sequence[int]]] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [levels.dtype.itemsize * 8] * channels),
        (259, "H", [8 if packed else 1]),
        (262, "H", [2 if channels > 1 else 1]),
        (273, "I", starts),
        (277, "H", [channels]),
        (278, "I", [height]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planes else 1]),
        (339, "H", [{"u": 1, "i": 2, "f": 3}[levels.dtype.kind]] * channels),
    ]
    for tag, kind, values in tags:
        raw = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(raw) > 4:
            where = place + 2 + 12 * len(tags) + 4 + len(more)
            more, raw = more + raw, struct.pack(f"{order}I", where)
        directory += struct.pack(f"{order}HHI", tag, names[kind], len(values)) + raw.ljust(4, b"\0")
    body = b"".join(strips)
    head = (b"MM\0*" if big else b"II*\0") + struct.pack(f"{order}I", place)
    count = struct.pack(f"{order}H", len(tags))
    return head + body + b"\0" * (len(body) % 2) + count + directory + bytes(4) + more


def png(levels: NDArray[np.uint16]) -> bytes:
    """Write 16-bit levels (H, W, 3 or 4) as a PNG file."""
    height, width, channels = levels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def read(data: bytes, **settings: Any) -> Decoded:
    image = read_image(data, Decoding(S, **settings))
    assert isinstance(image, Decoded), image
    return image


def grey(data: bytes, **settings: Any) -> NDArray[np.int64]:
    pixels = read(data, **settings).pixels
    assert (pixels == pixels[0]).all()
    return np.asarray(pixels[0], np.int64)


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([0, 0.2, 0.5, 1], (0, 1)),
        ([0, 0.2, 0.5, 1, 1, 1.03, 1.03], (0, 1)),  # what sharpening adds
        ([0, 0.2, 0.5, 1, 1.0001], (0, 1)),
        ([0, 0.2, 0.5, 1, np.inf, np.nan, -np.inf], (0, 1)),
        ([0, 0.2, 0.5, 1, 3.4e38, -3.4e38], (0, 1)),
        ([0, 1, 100, 255, 256], (0, 255)),
        ([0, 1, 0, 1], (0, 1)),  # a mask
        ([0, 3, 0, 3], (0, 3)),  # 3 of 255 would be black
        ([0, 100, 200, 250], (0, 255)),
        ([0, 5, 1000, 1000], (0, 1023)),
        ([0, 5, 3000, 3000], (0, 4095)),
        ([0, 5, 3000, 65535], (0, 4095)),  # a hot pixel
        ([0, 5, 12000, 12000], (0, 16383)),
        ([0, 5, 40000, 40000], (0, 65535)),
        ([0, 5, 70000, 70000], (0, 70000)),
        ([0, 1e-4, 2e-4, 2e-4], (0, 2e-4)),
        ([-3000, -1000, -1000, 500, 2000, 2000, 9000], (-1000, 2000)),  # of a scanner
        ([-0.01, 0, 0, 1, 1, 1], (0, 1)),
        ([0, 0, 0, 0], (0, 1)),
        ([0, 0, 0, 900], (0, 1023)),  # a star
        ([7], (0, 7)),
    ],
)
def test_black_and_white(levels: Sequence[float], expected: tuple[float, float]) -> None:
    assert black_and_white(np.array(levels, np.float32)) == pytest.approx(expected)


def test_nothing_but_missing_data_has_no_black_and_white() -> None:
    found = read_image(tiff(np.full((S, S), np.nan, np.float32)), Decoding(S))
    assert found == "no level is a finite number"


@pytest.mark.parametrize(
    ("kind", "big"),
    [
        *((kind, big) for kind in ("u2", "i2", "i4", "f4") for big in (False, True)),
        ("u4", False),  # Pillow does not read the other order
    ],
)
@pytest.mark.parametrize("white", [255, 1023, 4095, 16383])
def test_every_kind_of_number_is_scaled_by_its_bits(kind: str, white: int, big: bool) -> None:
    levels = (RAMP * white).round().astype(kind)
    expected = (levels.astype(float) / white * 255).round()
    assert np.abs(grey(tiff(levels, big=big)) - expected).max() == 0
    buffer = io.BytesIO()
    if kind == "u2":
        Image.fromarray(levels).save(buffer, "PNG")
        assert np.abs(grey(buffer.getvalue()) - expected).max() == 0
    image = Image.fromarray(levels.astype(np.float32) if kind == "u4" else levels)
    if image.mode != "L":
        assert np.abs(square(image, S)[0] - expected).max() == 0


def test_large_unsigned_numbers_are_not_negative() -> None:
    levels = (RAMP * (2**32 - 1)).astype(np.uint32)
    found = grey(tiff(levels))
    assert found[0, 0] == 0
    assert found[-1, -1] == 255
    assert (np.diff(found.ravel()) >= 0).all()


def test_a_scan_with_negative_numbers_is_seen() -> None:
    levels = (-1000 + 3000 * RAMP).astype(np.int16)
    levels[0, 0], levels[-1, -1] = -30000, 30000
    image = read(tiff(levels))
    assert image.black == pytest.approx(-1000, abs=10)
    assert image.white == pytest.approx(2000, abs=10)
    assert image.pixels.mean() == pytest.approx(127.5, abs=2)


@pytest.mark.parametrize("odd", [1.0001, 256.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38])
def test_one_odd_pixel_changes_no_other(odd: float) -> None:
    levels = RAMP.astype(np.float32)
    whole = grey(tiff(levels))
    levels[5, 7] = odd
    found = grey(tiff(levels))
    found[5, 7] = whole[5, 7]
    assert np.abs(found - whole).max() == 0
    assert whole.mean() > 120


def colours(white: int) -> NDArray[np.uint16]:
    """Return (S, S, 3) colours that all differ."""
    columns = [RAMP, RAMP[::-1], RAMP.T]
    return np.stack([(each * white).round() for each in columns], axis=-1).astype(np.uint16)


WRITERS = {
    "TIFF": lambda levels: tiff(levels),
    "TIFF, big": lambda levels: tiff(levels, big=True),
    "TIFF, packed": lambda levels: tiff(levels, packed=True),
    "TIFF, packed, big": lambda levels: tiff(levels, packed=True, big=True),
    "TIFF, planes": lambda levels: tiff(levels, planes=True),
    "TIFF, planes, big": lambda levels: tiff(levels, planes=True, big=True),
    "PNG": png,
}


@pytest.mark.parametrize("writer", [*WRITERS, "TIFF, planes, packed"])
def test_sixteen_bit_colours_are_right(writer: str) -> None:
    write = WRITERS.get(writer, lambda levels: tiff(levels, planes=True, packed=True))
    levels = colours(65535)
    pixels = read(write(levels)).pixels.transpose(1, 2, 0)
    assert np.abs(pixels - levels / 257).max() <= 1


@pytest.mark.parametrize("writer", WRITERS)
def test_twelve_bit_colours_in_sixteen_are_seen(writer: str) -> None:
    levels = colours(4095)
    image = read(WRITERS[writer](levels))
    assert (image.black, image.white) == (0, 4095)
    expected = (levels / 4095 * 255).round()
    assert np.abs(image.pixels.transpose(1, 2, 0) - expected).max() == 0


def test_twelve_bit_colours_whose_lower_bytes_are_not_to_be_had_are_seen() -> None:
    levels = colours(4095)
    image = read(tiff(levels, planes=True, packed=True))
    expected = levels / 4095 * 255
    assert np.abs(image.pixels.transpose(1, 2, 0) - expected).max() <= 18  # one of 16 steps


def test_twelve_bits_keep_their_transparency() -> None:
    levels = np.dstack([colours(4095), np.full((S, S), 65535, np.uint16)])
    levels[:, :10, 3] = 0
    pixels = read(png(levels)).pixels.transpose(1, 2, 0)
    assert (pixels[:, :10] == 255).all()
    expected = (levels[:, 10:, :3] / 4095 * 255).round()
    assert np.abs(pixels[:, 10:] - expected).max() <= 1


def test_given_levels_hold_for_every_image() -> None:
    levels = (RAMP * 4095).round().astype(np.uint16)
    for data in (tiff(levels), tiff(levels.astype(np.float32)), tiff(colours(4095))):
        image = read(data, levels=[1000, 3000])
        assert (image.black, image.white) == (1000, 3000)
    expected = ((levels.clip(1000, 3000) - 1000.0) / 2000 * 255).round()
    assert np.abs(grey(tiff(levels), levels=[1000, 3000]) - expected).max() == 0
    eight = (RAMP * 255).astype(np.uint8)
    assert (grey(tiff(eight), levels=[1000, 3000]) == eight).all()


@pytest.mark.parametrize("levels", [[1], [3, 3], [4095, 0], [0, float("nan")], 3, "ab"])
def test_levels_that_are_none(levels: Any) -> None:
    with pytest.raises(UsageError, match=r"dataset\.levels=.* are not black and white; give"):
        Decoding(S, levels)


def test_scales_are_said_and_part_of_the_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "scans"
    root.mkdir()
    for i, white in enumerate((4095, 4095, 255, 60000)):
        (root / f"{i}.tif").write_bytes(tiff((RAMP * white).astype(np.uint16)))
    Image.new("L", (S, S), 50).save(root / "9.png")
    with caplog.at_level(logging.INFO):
        first = folder(str(root), S, str(tmp_path / "cache"))
    assert (
        "levels are not 0 to 255: 0 to 4095 in 2; 0 to 65535 in 1; dataset.levels=" in caplog.text
    )
    assert [int(image.max()) for image in first.images] == [255, 255, 255, 233, 50]
    second = folder(str(root), S, str(tmp_path / "cache"), levels=[0, 65535])
    assert [int(image.max()) for image in second.images] == [16, 16, 1, 233, 50]
    assert first.fingerprint != second.fingerprint
