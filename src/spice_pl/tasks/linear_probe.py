"""Train a linear classifier with true labels on frozen features: Table VI of the paper.

Shapes: N images, D features, C classes, k neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.functional.neighbors import nearest_neighbors
from spice_pl.runs.folder import RunFolder
from spice_pl.tasks.base import Context

logger = logging.getLogger(__name__)

Split = tuple[NDArray[np.int64], NDArray[np.int64]]  # positions of training and test images
SOLVER_STEPS = 200  # of the logistic regression, at most


class LinearProbe:
    """Train a logistic regression with the true labels on the features of each stage of a chain.

    It says how much the features know about the classes; no stage reads the result. Protocol
    split trains on the training images and scores the test images. Protocol whole has no test
    images, so every image is scored once by a probe that was not trained on it (stratified folds).

    Args:
        num_folds: folds of protocol whole.
        num_neighbors: k of the nearest-neighbour vote by cosine, reported beside the probe.
        inverse_penalty: C of the regression on standardised features.
    """

    def __init__(
        self, num_folds: int = 5, num_neighbors: int = 20, inverse_penalty: float = 1.0
    ) -> None:
        self.num_folds, self.num_neighbors = num_folds, num_neighbors
        self.inverse_penalty = inverse_penalty

    def __call__(self, context: Context) -> Mapping[str, Any]:
        """Probe the features of the upstream stage and of the stages before it.

        Raises:
            UsageError: the data set has no labels, or too few images of a class.
        """
        images = context.images()
        if images.labels is None:
            raise UsageError(
                f"stage=linear_probe measures against true labels and {images.name} has none; "
                "for a folder with class subfolders give dataset.labels=folders"
            )
        splits = list(self._splits(images, images.labels, context.seed))
        results: dict[str, Any] = {}
        for folder in _different(context.upstream):
            stage, features = folder.path.parent.name, np.asarray(folder.features)
            scores = np.array([self._score(features, images.labels, split) for split in splits])
            weight = np.array([len(test) for _, test in splits])
            linear, neighbors = np.average(scores, axis=0, weights=weight)
            results |= {
                f"truth/{stage}/linear_probe": linear,
                f"truth/{stage}/knn_{self.num_neighbors}": neighbors,
            }
            logger.info(
                "%s: linear probe %.3f, %d-NN %.3f (%s)",
                *(stage, linear, self.num_neighbors, neighbors, self._protocol(images)),
            )
        return {"dataset": images.name, "protocol": self._protocol(images)} | results

    def _protocol(self, images: ImageSet) -> str:
        return "split" if images.protocol == "split" else f"whole, {self.num_folds} folds"

    def _splits(self, images: ImageSet, labels: NDArray[np.int64], seed: int) -> Iterator[Split]:
        """Yield the splits; images of unknown class are in none."""
        known = np.flatnonzero(labels >= 0)
        if images.protocol == "split":
            train, test = (
                np.intersect1d(index, known) for index in (images.train_index, images.score_index)
            )
            yield train, test
            return
        sizes = np.bincount(labels[known])
        if sizes[sizes > 0].min() < self.num_folds:
            raise UsageError(
                f"the smallest class of {images.name} has {sizes[sizes > 0].min()} images and "
                f"linear_probe.task.num_folds is {self.num_folds}; lower it to at least 2"
            )
        folds = StratifiedKFold(self.num_folds, shuffle=True, random_state=seed)
        for train, test in folds.split(known, labels[known]):
            yield known[train], known[test]

    def _score(
        self, features: NDArray[np.float32], labels: NDArray[np.int64], split: Split
    ) -> tuple[float, float]:
        """Return the accuracy of the linear probe and of the vote on the test images."""
        train, test = split
        scale = StandardScaler().fit(features[train])
        probe = LogisticRegression(C=self.inverse_penalty, max_iter=SOLVER_STEPS)
        probe.fit(scale.transform(features[train]), labels[train])
        linear = float(probe.score(scale.transform(features[test]), labels[test]))
        rows = torch.from_numpy(features)
        k = min(self.num_neighbors, len(train))
        _, nearest = nearest_neighbors(rows[test], rows[train], k)  # (n, k)
        votes = torch.nn.functional.one_hot(torch.from_numpy(labels[train])[nearest]).sum(dim=1)
        vote = votes.argmax(dim=1).numpy()  # (n,), a tie goes to the lowest class
        return linear, float((vote == labels[test]).mean())


def _different(upstream: Sequence[RunFolder]) -> Iterator[RunFolder]:
    """Yield the stages whose features differ from the stage before (stage 2 keeps stage 1's)."""
    kept: list[RunFolder] = []
    for folder in [each for each in reversed(upstream) if (each.path / "features.npy").is_file()]:
        if not kept or not np.array_equal(kept[-1].features, folder.features):
            kept.append(folder)
    yield from reversed(kept)
