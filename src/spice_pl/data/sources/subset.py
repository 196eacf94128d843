"""Choose some images of any data set: some classes, a long tail, a limit.

Shapes: N images, n of them kept, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from spice_pl.data.images import ImageSet, joint_fingerprint
from spice_pl.data.keyed import keyed_seed
from spice_pl.errors import UsageError

logger = logging.getLogger(__name__)

DRAW = 0x5B5E7  # key of the draws below; not the seed of the run: all seeds use the same images


class Rows:
    """Some rows of an array, in order, read on access: a subset of a store takes no memory.

    It has what this package needs of an array of images: `shape`, `ndim`, `dtype`, `len`, rows by
    number, slice or index, and `np.asarray`.
    """

    def __init__(self, array: NDArray[np.uint8], index: NDArray[np.int64]) -> None:
        self._array, self._index = array, index
        self.shape, self.ndim, self.dtype = (len(index), *array.shape[1:]), array.ndim, array.dtype

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, rows: Any) -> NDArray[np.uint8]:
        """Copy rows."""
        if isinstance(rows, tuple):
            whole = isinstance(rows[0], slice) or np.ndim(rows[0]) > 0
            rest = (slice(None), *rows[1:]) if whole else rows[1:]
            part: NDArray[np.uint8] = self[rows[0]][rest]
            return part
        picked: NDArray[np.uint8] = self._array[self._index[rows]]
        return picked

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.uint8]:
        return np.asarray(self._array[self._index], dtype=dtype)


def subset(
    images: ImageSet,
    *,
    classes: Sequence[str] | None = None,
    imbalance: float | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Return the images that are left after `classes`, then `imbalance`, then `limit`.

    The draws are fixed: they depend only on the data set, not on the seed of the run. Under
    protocol split, `imbalance` and `limit` remove training images only.

    Args:
        images: any data set.
        classes: names of the classes to keep, of test images too.
        imbalance: ρ, size of the largest class divided by that of the smallest. Class c of C, in
            the order of the labels, keeps at most n·ρ^(−c/(C−1)) images, where n is the size of the
            largest class (Cui et al. 2019, "Class-balanced loss"). Images without a label are
            left out.
        limit: number of training images to keep; extra images are left out.

    Raises:
        UsageError: a setting is out of range, a class is unknown, or there are no labels to
            choose by.
    """
    if classes is None and imbalance is None and limit is None:
        return images
    labels, kept = images.labels, np.arange(len(images))
    # Here truth decides which images the data set has, before any stage begins, as it would for
    # the authors of a benchmark. No stage reads it: truth builds this set and trains nothing.
    if classes is not None or imbalance is not None:
        if labels is None or images.class_names is None:
            raise UsageError(
                f"dataset.classes and dataset.imbalance choose by true classes and {images.name} "
                "has none; give labels (dataset.labels=folders, for a folder)"
            )
        if classes is not None:
            kept = kept[np.isin(labels[kept], _numbers(classes, images.class_names))]
        if imbalance is not None:
            kept = _long_tail(kept, labels, _thinned(images, kept), imbalance)
    if limit is not None:
        candidates = kept[_thinned(images, kept)]
        if not 1 <= limit <= len(candidates):
            raise UsageError(
                f"dataset.limit {limit} is not between 1 and the {len(candidates)} training images"
            )
        gone = _draw(candidates, len(candidates) - limit)
        kept = np.setdiff1d(kept, gone)
    logger.info("%s: %d of %d images are kept", images.name, len(kept), len(images))
    class_names = images.class_names
    if labels is not None:
        labels = labels[kept]
        if class_names is not None:
            labels, class_names = _renumbered(labels, class_names)
    chosen = f"{kept.size}:{joint_fingerprint(kept.tobytes().hex())}"
    return replace(
        images,
        images=cast("NDArray[np.uint8]", Rows(images.images, kept)),
        keys=[images.keys[i] for i in kept.tolist()],
        fingerprint=joint_fingerprint(images.fingerprint, chosen, str(limit is None)),
        labels=labels,
        class_names=class_names,
        is_test=None if images.is_test is None else images.is_test[kept],
        num_unused=len(images) - len(kept),
        extra=images.extra if limit is None else None,
        files=None if images.files is None else np.asarray(images.files)[kept],
    )


def _thinned(images: ImageSet, kept: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which of the kept images may be removed: the training images."""
    return np.isin(kept, images.train_index)


def _numbers(classes: Sequence[str], class_names: Sequence[str]) -> list[int]:
    names = [str(each) for each in classes]
    if unknown := [name for name in names if name not in class_names]:
        raise UsageError(
            f"dataset.classes {', '.join(unknown)} are none of {', '.join(class_names)}"
        )
    return [list(class_names).index(name) for name in names]


def _long_tail(
    kept: NDArray[np.int64],
    labels: NDArray[np.int64],
    thinned: NDArray[np.bool_],
    imbalance: float,
) -> NDArray[np.int64]:
    if imbalance < 1:
        raise UsageError(f"dataset.imbalance {imbalance} is below 1, the ratio of a balanced set")
    present = np.unique(labels[kept][labels[kept] >= 0])
    members = [kept[thinned & (labels[kept] == label)] for label in present]
    largest = max(map(len, members), default=0)
    parts = [kept[~thinned]]
    for place, group in enumerate(members):
        share = imbalance ** (-place / max(len(members) - 1, 1))
        size = min(len(group), max(1, round(largest * share)))
        parts.append(np.setdiff1d(group, _draw(group, len(group) - size)))
    return np.sort(np.concatenate(parts))


def _draw(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Draw `size` images by a random rank per image that does not depend on the others."""
    if size == 0:
        return index[:0]
    generator = np.random.default_rng(keyed_seed(DRAW))
    rank = generator.random(int(index.max()) + 1)[index]
    return index[np.argsort(rank, kind="stable")[:size]]


def _renumbered(
    labels: NDArray[np.int64], class_names: Sequence[str]
) -> tuple[NDArray[np.int64], list[str]]:
    """Number the remaining classes from 0."""
    present = np.unique(labels[labels >= 0])
    number = np.full(len(class_names) + 1, -1, dtype=np.int64)  # the last entry is for label -1
    number[present] = np.arange(len(present))
    return number[labels], [class_names[i] for i in present]
