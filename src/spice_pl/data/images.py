"""The data set as every stage sees it: pixels in a fixed order; nothing else is trained on.

Shapes: N images, S side in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spice_pl.errors import UsageError

PROTOCOLS = ("whole", "split")
# Facts about the file of each image; `source` is its position among all files of the source.
# `black` and `white` are the levels of the file that are 0 and 255 here.
FILE_FACTS = np.dtype(
    [
        *(("source", "i8"), ("format", "U8"), ("width", "u4"), ("height", "u4")),
        *(("black", "f4"), ("white", "f4")),
    ]
)


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order, with what is known about them.

    Attributes:
        name: name of the data set and of its folder of results.
        images: (N, 3, S, S) uint8, in memory or memory-mapped.
        keys: (N,) path or index of each image, for display.
        fingerprint: digest of pixels and order; sets with the same fingerprint are interchangeable.
        labels: (N,) int64 truth for `truth/*` metrics only, -1 where unknown; None without truth.
        class_names: one name per class.
        is_test: (N,) True for test images as published.
        protocol: "whole" trains and scores on all images, "split" trains on train and scores on
            test images.
        skipped: name and reason of files that were left out.
        unlisted: number of further files that were left out and are not in `skipped`.
        num_unused: number of images that `dataset.classes`, `imbalance` or `limit` leave out.
        root: folder that the keys are relative to; None if images are not files.
        extra: (M, 3, S, S) uint8, images beside the data set, such as the unlabelled ones of STL10.
            Streams that ask for them see them as images N to N + M - 1. They are never clustered,
            scored or used to choose anything.
        files: (N,) FILE_FACTS of the file of each image, for display.
    """

    name: str
    images: NDArray[np.uint8]
    keys: Sequence[str]
    fingerprint: str
    labels: NDArray[np.int64] | None = None
    class_names: Sequence[str] | None = None
    is_test: NDArray[np.bool_] | None = None
    protocol: str = "whole"
    skipped: Sequence[tuple[str, str]] = field(default_factory=tuple)
    unlisted: int = 0
    num_unused: int = 0
    root: Path | None = None
    extra: NDArray[np.uint8] | None = None
    files: NDArray[Any] | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise UsageError(f"dataset.protocol {self.protocol!r} is none of {PROTOCOLS}")
        if self.protocol == "split" and (self.is_test is None or not self.is_test.any()):
            raise UsageError(
                f"dataset.protocol=split needs test images and {self.name} has none; "
                "use dataset.protocol=whole"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_skipped(self) -> int:
        """Number of files that were left out."""
        return len(self.skipped) + self.unlisted

    @property
    def num_files(self) -> int:
        """Number of files that were found: each is used, left out with a reason, or unused."""
        return len(self) + self.num_skipped + self.num_unused

    @property
    def train_index(self) -> NDArray[np.int64]:
        """(n,) positions of the training images under the protocol."""
        return self._index(test=False)

    def drawn_index(self, *, extra: bool) -> NDArray[np.int64]:
        """Return (n,) positions to draw from: the training images, with `extra` those too."""
        if not extra or self.extra is None:
            return self.train_index
        return np.concatenate([self.train_index, len(self) + np.arange(len(self.extra))])

    def pixels(self, index: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Copy the images at positions (n,), which may include extra ones."""
        if self.extra is None:
            return self.images[index]
        proper = index < len(self)
        copied = np.empty((len(index), *self.images.shape[1:]), dtype=np.uint8)
        copied[proper] = self.images[index[proper]]
        copied[~proper] = self.extra[index[~proper] - len(self)]
        return copied

    @property
    def score_index(self) -> NDArray[np.int64]:
        """(n,) positions of the images that reported scores use under the protocol."""
        return self._index(test=True)

    def _index(self, *, test: bool) -> NDArray[np.int64]:
        if self.protocol == "whole" or self.is_test is None:
            return np.arange(len(self))
        return np.flatnonzero(self.is_test == test)


def fingerprint(images: NDArray[np.uint8], chunk: int = 4096) -> str:
    """Return a digest of shape, order and every pixel, 16 hexadecimal digits (BLAKE2b)."""
    digest = hashlib.blake2b(repr(images.shape).encode(), digest_size=8)
    for start in range(0, len(images), chunk):
        digest.update(np.ascontiguousarray(images[start : start + chunk]).data)
    return digest.hexdigest()


def joint_fingerprint(*parts: str) -> str:
    """Return the digest of several strings in this order, such as fingerprints."""
    return hashlib.blake2b("/".join(parts).encode(), digest_size=8).hexdigest()
