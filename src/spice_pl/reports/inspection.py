"""Render the page of stage=inspect about a data set: one HTML file that opens offline.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spice_pl.reports.html import template_environment, write_page
from spice_pl.reports.wall import sprite

MAX_SKIPPED = 500  # skipped files listed on the page; the rest is counted
MAX_COPIES = 8  # pictures shown of a group of copies
MAGNIFIED = 48  # pixels a side; pictures up to this size are magnified pixel by pixel


@dataclass(frozen=True)
class Inspection:
    """Everything that the page shows.

    Attributes:
        name: name of the data set.
        facts: numbers of the headline, as (name, value).
        notes: sentences shown near the top.
        tables: tables by title, as rows of (name, value).
        skipped: files that were left out, as (file, reason).
        keys: (N,), path or position of each image.
        images: (N, 3, S, S) uint8.
        copies: groups of equal images to show.
        num_copies: number of images that equal an earlier one.
        near: (n, 2) pairs of nearly equal images to show.
        num_near: number of such pairs found.
        num_compared: number of images that the pairs were searched in.
        wall: images of the sample.
        viewed: (v,) images whose views are shown.
        views: pictures (v, 3, S, S) uint8 of each view, by its name.
        stages: names of the stages that use these views.
    """

    name: str
    facts: Sequence[tuple[str, str]]
    notes: Sequence[str]
    tables: Mapping[str, Sequence[tuple[str, str]]]
    skipped: Sequence[tuple[str, str]]
    keys: Sequence[str]
    images: NDArray[np.uint8]
    copies: Sequence[NDArray[np.int64]]
    num_copies: int
    near: NDArray[np.int64]
    num_near: int
    num_compared: int
    wall: NDArray[np.int64]
    viewed: NDArray[np.int64]
    views: Mapping[str, NDArray[np.uint8]]
    stages: Sequence[str] = ()


@dataclass(frozen=True)
class Strip:
    """Pictures side by side, with a title."""

    title: str
    pictures: Sequence[tuple[str, str]]  # (name, data URI)


def render_inspection(data: Inspection) -> str:
    """Return the page as HTML: no script, nothing loaded from outside."""
    side = data.images.shape[-1]
    views = [
        Strip(
            str(data.keys[int(i)]),
            [(name, sprite(made[row : row + 1])) for name, made in data.views.items()],
        )
        for row, i in enumerate(data.viewed)
    ]
    return (
        template_environment()
        .get_template("inspect.html.j2")
        .render(
            data=data,
            side=side,
            tile_pixels=96 // side * side if side <= MAGNIFIED else 96,
            pixel_art=side <= MAGNIFIED,
            views=views,
            wall=_strip(data, "", data.wall).pictures,
            copies=[
                _strip(data, f"{len(group)} times the same", group[:MAX_COPIES])
                for group in data.copies
            ],
            near=[_strip(data, "", pair) for pair in data.near],
            skipped=data.skipped[:MAX_SKIPPED],
        )
    )


def write_inspection(data: Inspection, path: Path) -> Path:
    """Write the page to path; the old page stays until the new one is complete on disk."""
    return write_page(render_inspection(data), path)


def _strip(data: Inspection, title: str, index: NDArray[np.int64]) -> Strip:
    pictures = data.images[index]
    return Strip(
        title,
        [
            (str(data.keys[int(i)]), sprite(picture[None]))
            for i, picture in zip(index, pictures, strict=True)
        ],
    )
