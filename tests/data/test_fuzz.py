"""Damaged files of every format: an image or a reason, never an exception, never another's name."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from spice_pl.data.decode import Decoded, Decoding, quiet_warnings, read_image
from spice_pl.data.sources.folder import folder

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
