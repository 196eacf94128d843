"""Which images a semi-supervised stage labels: what selectors read, and the labels they give.

Shapes: N images, n of them for training, D features, K clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spice_pl.data.images import ImageSet
from spice_pl.data.keyed import keyed_generator
from spice_pl.errors import UsageError
from spice_pl.functional.selectors import OracleLabels, SelectedLabels
from spice_pl.runs.evidence import check_features, check_probs, read_array
from spice_pl.runs.folder import RunFolder, as_tensor

logger = logging.getLogger(__name__)

# (embeddings (n, D) or None, probs (n, K) or None, num_clusters, generator) -> SelectedLabels
Selector = Callable[..., SelectedLabels]


@dataclass(frozen=True)
class LabelSource:
    """Where the labels of a semi-supervised stage come from.

    Attributes:
        selector: one of `functional/selectors.py`.
        num_clusters: K.
        features_file: features (N, D) that replace those of the upstream, or None.
        probs_file: probabilities (N, K) that replace those of the upstream, or None.
        seed: seed of the selector's draws.
    """

    selector: Selector | OracleLabels
    num_clusters: int
    features_file: str | None
    probs_file: str | None
    seed: int

    @property
    def oracle(self) -> bool:
        """Whether the labels are true labels."""
        return isinstance(self.selector, OracleLabels)

    def labels(self, images: ImageSet, upstream: RunFolder | None, stage: str) -> Tensor:
        """Return the labels (n,) of the training images, -1 for those that stay unlabelled.

        An image that was moved in the review of the upstream keeps the cluster it was moved to,
        whatever the selector says. `stage` is the name of the stage, for messages.

        Raises:
            UsageError: what the selector reads is missing or wrong, or no image is labelled.
        """
        generator = keyed_generator(self.seed)
        evidence: tuple[object, ...]
        if self.oracle:
            evidence = (self._true_labels(images, stage), generator)
        else:
            features, probs = self._evidence(images, upstream, stage)
            embeddings = None if features is None else F.normalize(features)
            if embeddings is not None and upstream is not None and self.features_file is None:
                train_index = torch.from_numpy(images.train_index)
                embeddings = upstream.embeddings(images.train_index)[train_index]
            evidence = (embeddings, probs, self.num_clusters, generator)
        try:
            selection: SelectedLabels = self.selector(*evidence)
        except ValueError as error:
            raise UsageError(f"{stage}.selector: {error}") from error
        self._report(selection, stage)
        label = selection.label
        if upstream is not None:
            train_index = torch.from_numpy(images.train_index)
            moved = torch.from_numpy(upstream.moved(len(images)))[train_index]  # (n,)
            if moved.any():
                label[moved] = as_tensor(upstream.probs)[train_index[moved]].argmax(dim=1)
        return label

    def _report(self, selection: SelectedLabels, stage: str) -> None:
        """Log how many images are labelled, and how many pass each rule of the selector."""
        label = selection.label
        counts = torch.bincount(label[label >= 0], minlength=self.num_clusters)  # (K,)
        passed = ", ".join(f"{rule}: {count}" for rule, count in selection.passed.items())
        found = (
            f"{int(counts.sum())} of {len(label)} images are labelled "
            f"({passed}{'; ' if passed else ''}per cluster {counts.tolist()})"
        )
        if not counts.any():
            raise UsageError(
                f"{found}; there is nothing to learn from: loosen {stage}.selector (lower "
                "reliable.agreement or reliable.confidence, or change the settings of another "
                "selector under selectors), or train the upstream longer, such as proto.epochs"
            )
        logger.info(found)
        if without := (counts == 0).nonzero()[:, 0].tolist():
            logger.warning("clusters %s have no labelled image and start without one", without)

    def _true_labels(self, images: ImageSet, stage: str) -> Tensor:
        """Return the true labels (n,) of the training images."""
        if images.labels is None:
            raise UsageError(
                f"{images.name} has no true labels, which {stage}.selector asks for; take "
                "a selector that needs none (reliable, centroid, variance, confident)"
            )
        logger.warning("ORACLE: %s trains on true labels; no unsupervised result", stage)
        truth = torch.from_numpy(images.labels)[torch.from_numpy(images.train_index)]
        if int(truth.max()) >= self.num_clusters:
            raise UsageError(
                f"true labels reach {int(truth.max())} and dataset.num_clusters is "
                f"{self.num_clusters}; give as many clusters as classes"
            )
        return truth

    def _evidence(
        self, images: ImageSet, upstream: RunFolder | None, stage: str
    ) -> tuple[Tensor | None, Tensor | None]:
        """Read features (n, D) and probs (n, K) of the training images, None where there are none.

        A file of features alone leaves out the probabilities of the upstream: the two would be of
        different clusterings.
        """
        features = probs = None
        if self.features_file is not None:
            source = self.features_file
            features = read_array(source, images.keys, images.fingerprint)
        elif upstream is not None and (upstream.path / "features.npy").is_file():
            source = f"{upstream.path}/features.npy"
            features = upstream.features
        if features is not None:
            check_features(features, len(images), source)
        if self.probs_file is not None:
            source = self.probs_file
            probs = read_array(source, images.keys, images.fingerprint, self.num_clusters)
        elif (
            upstream is not None
            and self.features_file is None
            and (upstream.path / "probs.npy").is_file()
        ):
            source = f"the clusters of {upstream.path}"
            probs = upstream.answer
        if probs is not None:
            check_probs(probs, len(images), self.num_clusters, source)
        if features is None and probs is None:
            raise UsageError(
                f"stage={stage} has nothing to select labelled images on; set "
                f"{stage}.upstream=proto, or {stage}.module.probs_file or "
                f"{stage}.module.features_file to a file"
            )
        index = torch.from_numpy(images.train_index)
        return (
            None if features is None else as_tensor(features)[index],
            None if probs is None else as_tensor(probs)[index],
        )
