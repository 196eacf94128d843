"""Odd images of a run, and the file that keeps them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spice_pl.data.images import FILE_FACTS, ImageSet
from spice_pl.reports.oddities import Oddity
from spice_pl.runs import oddities
from spice_pl.runs.folder import RunFolder
from spice_pl.runs.oddities import find_oddities


@pytest.fixture
def images() -> ImageSet:
    """Forty images of noise; 7 and 9 equal 3, 11 nearly equals 4, 5 is plain, 6 tiny."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32), dtype=np.uint8)
    pixels[[7, 9]] = pixels[3]
    pixels[11] = pixels[4]
    pixels[11, 0, 1, 1] ^= 1  # not one of the pixels that are compared first
    pixels[5] = 77
    files = np.zeros(40, FILE_FACTS)
    files["width"], files["height"] = 300, 200
    files["width"][6] = 12
    return ImageSet("noise", pixels, [f"{i}.png" for i in range(40)], "f", files=files)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run whose image 20 is far from all others."""
    features = 1 + 0.1 * np.random.default_rng(0).normal(size=(40, 256))
    features[20] = -features[20]
    np.save(tmp_path / "features.npy", features.astype(np.float32))
    return RunFolder(tmp_path)


METRICS: dict[str, Any] = {"seed": 0, "digests": {"features.npy": "d"}}


def test_each_kind_is_found(folder: RunFolder, images: ImageSet) -> None:
    found = {each.name: each for each in find_oddities(folder, images, METRICS)}
    assert {name: each.index.tolist() for name, each in found.items()} == {
        "exact copies": [3, 7, 9],
        "outliers": [20],
        "blurred": [],
        "tiny": [6],
        "one colour": [5],
    }
    assert found["exact copies"].count == 2
    kept = json.loads((folder.path / "oddities.json").read_text())["kinds"]
    assert kept["tiny"]["images"] == ["6.png"]
    assert "shorter side" in kept["tiny"]["rule"]


def test_images_are_looked_at_once(
    folder: RunFolder, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_oddities(folder, images, METRICS)
    looks: list[int] = []

    def look(*given: Any) -> list[Oddity]:
        looks.append(1)
        return list(first)

    monkeypatch.setattr(oddities, "look", look)
    again = find_oddities(folder, images, METRICS)
    assert [(a.name, a.count, a.index.tolist()) for a in again] == [
        (b.name, b.count, b.index.tolist()) for b in first
    ]
    assert looks == []
    file = folder.path / "oddities.json"
    whole = file.read_text()
    for content in ("", "[]", whole.replace('"count"', '"number"'), whole.replace("20", "4000")):
        file.write_text(content)
        find_oddities(folder, images, METRICS)
    find_oddities(folder, replace(images, fingerprint="other"), METRICS)
    find_oddities(folder, images, {"seed": 0, "digests": {"features.npy": "other"}})
    assert len(looks) == 6
