"""A stage that reads a published checkpoint: its features, and its clusters if it has any."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from spice_pl.data.datamodule import Stream, Views
from spice_pl.data.images import ImageSet
from spice_pl.errors import UsageError
from spice_pl.models.interop import read_reference
from spice_pl.nn.resnet import Stem
from spice_pl.runs.folder import RunFolder
from spice_pl.stages.base import Prediction, Stage

logger = logging.getLogger(__name__)


class ImportModule(Stage):
    """Predict every image with the network of a checkpoint, without training.

    A checkpoint of stage 1 gives encoder and features, as `stage=moco` does. One of stage 2 or 3
    also gives head, probabilities, clusters and reliable images, as `stage=proto` and
    `stage=fixmatch` do.

    Args:
        path: file of the checkpoint.
        num_clusters: K of the data set, which must be that of the checkpoint.
        pixels: side of the images.
        stem: conv3, conv3_pool or conv7, where the file cannot tell.
        partial: whether the file may fit in part; then only that part is loaded.

    Raises:
        UsageError: the file cannot be read, does not fit, or has another number of clusters.
    """

    has_clusters = False  # unless the file has a head

    def __init__(
        self,
        path: str | None,
        num_clusters: int,
        *,
        pixels: int = 32,
        stem: Stem | None = None,
        partial: bool = False,
    ) -> None:
        super().__init__()
        if path is None:
            raise UsageError("stage=import reads a checkpoint and path is null; give path=FILE")
        model = read_reference(path, pixels, stem=stem, partial=partial)
        found = model.num_clusters
        if found is not None and found != num_clusters:
            raise UsageError(
                f"{path} has {found} clusters and dataset.num_clusters is {num_clusters}; "
                f"set dataset.num_clusters={found}"
            )
        self.has_clusters = found is not None
        self.encoder = model.encoder.requires_grad_(False)
        self.head = model.head.requires_grad_(False) if self.has_clusters and model.head else None
        self.path, self.summary = path, model.summary

    def forward(self, images: Tensor) -> Tensor:
        """Return probabilities (B, K), or raw features (B, D) where there is no cluster head."""
        features: Tensor = self.encoder(images)
        return features if self.head is None else self.head(features)

    def prepare(
        self, images: ImageSet, upstream: RunFolder | None, streams: Mapping[str, Stream]
    ) -> Mapping[str, Stream]:
        """Log what was read, and the settings with which later stages continue from it."""
        logger.info(self.summary)
        logger.info("to continue from it: backbone=checkpoint backbone.path=%s", self.path)
        return streams

    def weights(self) -> Mapping[str, nn.Module]:
        """Return the encoder, and the head if it gives clusters."""
        return {"encoder": self.encoder} | ({} if self.head is None else {"head": self.head})

    def predict(self, batch: Views) -> Prediction:
        """Return raw features and probabilities of the plain view."""
        features = self.encoder(batch.views["plain"]).float()
        return Prediction(batch.index, features, None if self.head is None else self.head(features))
