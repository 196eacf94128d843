"""How much truth a linear layer reads out of frozen features: Table VI of the paper.

Shapes: N images, D features, C classes, k neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
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

Split = tuple[NDArray[np.int64], NDArray[np.int64]]


class LinearProbe:
    """Train a logistic regression with the true labels on what each encoder of a chain gives.

    Nothing reads the result: it is truth about features that were made without labels. Protocol
    split trains on the training images and scores the test images; protocol whole has no images
    apart, so every image is scored once by a probe that did not see it (stratified folds).

    Args:
        num_folds: of protocol whole.
        num_neighbors: k of the nearest-neighbour vote beside it, by cosine.
        inverse_penalty: C of the regression on standardised features.
        max_iter: steps of its solver at most.
    """

    def __init__(
        self,
        num_folds: int = 5,
        num_neighbors: int = 20,
        inverse_penalty: float = 1.0,
        max_iter: int = 200,
    ) -> None:
        self.num_folds, self.num_neighbors = num_folds, num_neighbors
        self.inverse_penalty, self.max_iter = inverse_penalty, max_iter

    def __call__(self, context: Context) -> Mapping[str, Any]:
        """Probe the features of the upstream stage and of the stages before it.

        Raises:
            UsageError: the data set has no labels, or too few of a class.
        """
        images = context.images()
        splits = list(self._splits(images, context.seed))
        results: dict[str, Any] = {}
        for folder in _different(context.upstream):
            stage, features = folder.path.parent.name, np.asarray(folder.features)
            scores = np.array([self._score(features, images, split) for split in splits])
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

    def _splits(self, images: ImageSet, seed: int) -> Iterator[Split]:
        """Pairs of (training, test) positions, images of known class only."""
        if images.labels is None:
            raise UsageError(
                f"stage=linear_probe measures against true labels and {images.name} has none; "
                "for a folder with class subfolders give dataset.labels=folders"
            )
        known = np.flatnonzero(images.labels >= 0)
        if images.protocol == "split":
            train, test = (
                np.intersect1d(index, known) for index in (images.train_index, images.score_index)
            )
            yield train, test
            return
        sizes = np.bincount(images.labels[known])
        if sizes[sizes > 0].min() < self.num_folds:
            raise UsageError(
                f"the smallest class of {images.name} has {sizes[sizes > 0].min()} images and "
                f"linear_probe.task.num_folds is {self.num_folds}; lower it to at least 2"
            )
        folds = StratifiedKFold(self.num_folds, shuffle=True, random_state=seed)
        for train, test in folds.split(known, images.labels[known]):
            yield known[train], known[test]

    def _score(
        self, features: NDArray[np.float32], images: ImageSet, split: Split
    ) -> tuple[float, float]:
        """Accuracy of the linear probe and of the neighbours' vote on the test images."""
        assert images.labels is not None  # noqa: S101 - _splits has refused it
        (train, test), labels = split, images.labels
        scale = StandardScaler().fit(features[train])
        probe = LogisticRegression(C=self.inverse_penalty, max_iter=self.max_iter)
        probe.fit(scale.transform(features[train]), labels[train])
        linear = float(probe.score(scale.transform(features[test]), labels[test]))
        rows = torch.from_numpy(features)
        k = min(self.num_neighbors, len(train))
        _, nearest = nearest_neighbors(rows[test], rows[train], k)  # (n, k)
        votes = torch.nn.functional.one_hot(torch.from_numpy(labels[train])[nearest]).sum(dim=1)
        vote = votes.argmax(dim=1).numpy()  # (n,), the lowest class of a tie
        return linear, float((vote == labels[test]).mean())


def _different(upstream: Any) -> Iterator[RunFolder]:
    """Stages whose features are not those of the stage before (stage 2 keeps stage 1's)."""
    kept: list[RunFolder] = []
    for folder in [each for each in reversed(upstream) if (each.path / "features.npy").is_file()]:
        if not kept or not np.array_equal(kept[-1].features, folder.features):
            kept.append(folder)
    yield from reversed(kept)
