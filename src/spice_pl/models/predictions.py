"""Predictions of a model for a set of images.

Shapes: N images, k known images shown beside each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Predictions:
    """Clusters of N images, and the known images most similar to each.

    Attributes:
        keys: (N,) path or position of each image.
        clusters: (N,) cluster ids, int64.
        names: (N,) name of each image's cluster.
        confidence: (N,) largest probability.
        not_sure: (N,) whether fewer than half of its nearest known images are in its cluster.
        nearest: (N, k) keys of the most similar known images, nearest first.
        similarity: (N, k) cosines with these images.
        skipped: file and reason for each image that could not be decoded; not among the N.
    """

    keys: Sequence[str]
    clusters: NDArray[np.int64]
    names: Sequence[str]
    confidence: NDArray[np.float32]
    not_sure: NDArray[np.bool_]
    nearest: Sequence[Sequence[str]]
    similarity: NDArray[np.float32]
    skipped: Sequence[tuple[str, str]] = ()

    def __len__(self) -> int:
        return len(self.keys)


def join(parts: Sequence[Predictions], skipped: Sequence[tuple[str, str]]) -> Predictions:
    """Join the predictions of several batches in their order.

    Args:
        parts: predictions of at least one batch.
        skipped: file and reason for each image that could not be decoded, over all batches.
    """
    return Predictions(
        keys=[key for part in parts for key in part.keys],
        clusters=np.concatenate([part.clusters for part in parts]),
        names=[name for part in parts for name in part.names],
        confidence=np.concatenate([part.confidence for part in parts]),
        not_sure=np.concatenate([part.not_sure for part in parts]),
        nearest=[row for part in parts for row in part.nearest],
        similarity=np.concatenate([part.similarity for part in parts]),
        skipped=skipped,
    )
