"""Damaged files of every format: an image or a reason, never an exception, never another's name."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spice_pl.data.decode import Decoded, Decoding, quiet_warnings, read_image
from spice_pl.data.sources.archives import read_index
from spice_pl.data.sources.folder import folder
from spice_pl.errors import UsageError

S = 8
MUTANTS = 1000  # of every format
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


def seeds(kind: str) -> list[bytes]:
    """A few whole files of a format, in modes that it knows."""
    noise = np.random.default_rng(1).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    modes = {"JPEG": ["RGB", "L", "CMYK"], "PNG": ["RGB", "RGBA", "P", "I;16"], "GIF": ["P"]}
    options: dict[str, dict[str, Any]] = {
        "TIFF": {"compression": "tiff_lzw"},
        "WEBP": {"lossless": True},
    }
    files = []
    for mode in modes.get(kind, ["RGB", "L"]):
        image = Image.fromarray(noise)
        wide = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        buffer = io.BytesIO()
        (wide if mode == "I;16" else image.convert(mode)).save(
            buffer, kind, **options.get(kind, {})
        )
        files.append(buffer.getvalue())
    return files


def mutated(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip, cut, repeat or swap some bytes; headers are short, so half of the blows go there."""
    raw = np.frombuffer(data, np.uint8).copy()
    for _ in range(int(generator.integers(1, 8))):
        reach = min(len(raw), 64) if generator.random() < 0.5 else len(raw)
        place = int(generator.integers(reach)) if reach else 0
        blow = generator.integers(5)
        if blow == 0:
            raw = raw[: max(1, place)]
        elif blow == 1:
            raw = np.concatenate([raw[:place], raw[place // 2 : place], raw[place:]])
        elif blow == 2:
            raw[place : place + 4] = 255
        else:
            raw[place] = generator.integers(256)
    return bytes(raw.tobytes())


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_an_image_or_a_reason(kind: str) -> None:
    generator = np.random.default_rng(sum(kind.encode()))
    whole = seeds(kind)
    images, reasons = 0, 0
    with quiet_warnings():
        for data in whole:
            assert isinstance(read_image(data, Decoding(S)), Decoded)
        for i in range(MUTANTS):
            found = read_image(mutated(whole[i % len(whole)], generator), Decoding(S))
            if isinstance(found, Decoded):
                assert found.pixels.shape == (3, S, S)
                assert found.pixels.dtype == np.uint8
                images += 1
            else:
                assert isinstance(found, str)
                assert found
                reasons += 1
    assert images + reasons == MUTANTS
    assert reasons > MUTANTS // 10  # the blows do damage


def archive(kind: int) -> bytes:
    """A tar file of one of three formats, with long names, links and a label."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as opened:
        for i in range(4):
            member = tarfile.TarInfo(f"{'long ü/' * 5 if kind else ''}{i}.png")
            data = seeds("PNG")[0]
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        opened.addfile(link)
    return buffer.getvalue()


def test_a_damaged_archive_is_an_index_or_a_message(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    whole = [
        archive(kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]
    path, refused = tmp_path / "0.tar", 0
    for i in range(MUTANTS):
        raw = bytearray(mutated(whole[i % 3], generator))
        for place in range(0, len(raw) - 512, 512):  # else the checksum refuses most of them
            if raw[place + 257 : place + 262] == b"ustar":
                raw[place + 148 : place + 156] = b" " * 8
                raw[place + 148 : place + 156] = b"%06o\0 " % sum(raw[place : place + 512])
                if generator.random() < 0.3:
                    raw[place + int(generator.integers(124, 157))] = int(generator.integers(256))
        path.write_bytes(raw)
        try:
            index = read_index(path)
        except UsageError:
            refused += 1
            continue
        for image in index.images:
            assert 0 <= image.start <= image.start + image.size <= len(raw)
    assert MUTANTS // 10 < refused < MUTANTS


def colour(i: int) -> tuple[int, int, int]:
    return i % 256, i // 256, 77


def test_no_image_comes_under_the_name_of_another(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    root = tmp_path / "mixed"
    root.mkdir()
    suffixes = ["png", "bmp", "ppm", "webp", "tif"]
    damaged: set[str] = set()
    for i in range(400):
        name = f"{i:03}.{suffixes[i % len(suffixes)]}"
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        Image.new("RGB", (S, S), colour(i)).save(root / name, **options)
        if generator.random() < 0.5:
            damaged.add(name)
            (root / name).write_bytes(mutated((root / name).read_bytes(), generator))
    images = folder(str(root), S, str(tmp_path / "cache"))
    pixels: Sequence[NDArray[np.uint8]] = list(images.images)
    seen = dict(zip(images.keys, pixels, strict=True))
    whole = {path.name for path in root.iterdir()} - damaged
    assert len(whole) > 100
    for name in whole:
        assert tuple(seen[name][:, 3, 3]) == colour(int(name[:3])), name
    gone = {name for name, _ in images.skipped}
    assert gone <= damaged
    assert gone | seen.keys() == whole | damaged
    assert not gone & seen.keys()
    assert len(gone) > 30
